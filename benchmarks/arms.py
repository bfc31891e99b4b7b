"""Trains arms on seeds, each run in a process of its own, and finds those that the store has already."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from rich.progress import Progress

from analysis.ranking import why_excluded
from analysis.runs import Run
from analysis.store import Store
from trainer import names
from trainer.config.load import load
from trainer.provenance import code_version

OUTPUT = Path("output")
ONE_RANK = {"launch.nproc": "1"}
"""Several runs at once share the cores as it is, and dropout, drawn by rank, is that of the runs that are recorded."""


@dataclass(frozen=True)
class Arm:
    """A strategy as it is shipped, but for these settings."""

    strategy: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> value."""

    @property
    def name(self) -> str:
        """For files and messages."""
        return "-".join([self.strategy, *self.settings.values()])

    def trained(self, run: Run) -> bool:
        """Whether a run is one of this arm, with nothing else changed but the seed."""
        if run.strategy != self.strategy:
            return False
        params = load(self.strategy, overrides={**ONE_RANK, **self.settings, "seed": run.seed}).params()
        # a key that the run does not know is one that its code did not have
        return all(run.params.get(key, value) == value for key, value in params.items())


def finished(code: str, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[tuple[str, int], Run]:
    """(name of the arm, seed) -> its run in the store, by this code under the default profile."""
    store = Store(create=True)
    if MlflowClient(store.uri).get_experiment_by_name(names.EXPERIMENT) is None:
        return {}
    found = store.runs(names.EXPERIMENT, f"tags.{names.TAG_CODE_VERSION} = '{code}'")
    good = [run for run in found if why_excluded(run) is None and int(run.seed) in seeds]
    return {(arm.name, int(run.seed)): run for run in good for arm in arms if arm.trained(run)}


def train_missing(code: str, arms: Sequence[Arm], seeds: Sequence[int], jobs: int) -> list[Run]:
    """Every arm on every seed, `jobs` runs at once with as many threads as fit; what is there is not run again."""
    have = finished(code, arms, seeds)
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm.name, seed) not in have]
    if missing and code != code_version():
        sys.exit(f"of that commit {len(missing)} runs are missing, and the code here is {code_version()}")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("runs", total=len(missing))
        trained = [pool.submit(_train, arm, seed, threads) for arm, seed in missing]
        for done in as_completed(trained):
            done.result()
            progress.advance(task)
    return [*finished(code, arms, seeds).values()]


def write_report(code: str, out: Path) -> None:
    """The report on all runs by this code."""
    command = [sys.executable, "-m", "analysis", "report", "--experiment", names.EXPERIMENT, "--by", names.EVAL_LOSS]
    command += ["--where", f"tags.{names.TAG_CODE_VERSION} = '{code}'", "--out", str(out)]
    subprocess.run(command, check=True)


def _train(arm: Arm, seed: int, threads: int) -> None:
    """One run; what it prints goes to a file beside its output."""
    logs = OUTPUT / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer", "run", arm.strategy, "--seed", str(seed)]
    command += [part for key, value in {**ONE_RANK, **arm.settings}.items() for part in (f"--{key}", value)]
    with (logs / f"{arm.name}-{seed}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
