"""Trains the five arms on several seeds, writes the report that README and docs show, and records the runs.

    python benchmarks/five_arms.py --seeds 17,18,19 --jobs 2      # skips what is already in the store

Each run is its own process with as many threads as fit beside the others. Arms of one seed see the same batches in the
same order (until accumulation differs). Only runs of the code that is checked out count.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import recorded
from mlflow import MlflowClient
from rich.progress import Progress

from analysis.ranking import why_excluded
from analysis.runs import Run
from analysis.store import Store
from trainer import names
from trainer.config.load import load
from trainer.provenance import code_version

ROOT = Path(__file__).parents[1]
ARMS = ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")


def finished(code: str, seeds: list[int]) -> dict[tuple[str, int], Run]:
    """(arm, seed) -> its run in the store, trained by this code under the pocket profile with nothing else changed."""
    store = Store(create=True)
    if MlflowClient(store.uri).get_experiment_by_name(names.EXPERIMENT) is None:
        return {}
    found = store.runs(names.EXPERIMENT, f"tags.{names.TAG_CODE_VERSION} = '{code}'")
    good = [run for run in found if why_excluded(run) is None and as_shipped(run)]
    return {(run.strategy, int(run.seed)): run for run in good if int(run.seed) in seeds}


def as_shipped(run: Run) -> bool:
    """Whether a run is one of the arms as it is shipped, but for the seed."""
    if run.strategy not in ARMS:
        return False
    shipped = load(run.strategy, overrides={"seed": run.seed}).params()
    return all(run.params.get(key) == value for key, value in shipped.items())


def train(arm: str, seed: int, threads: int) -> None:
    """One run in a process of its own; what it prints goes to a file beside its output."""
    logs = Path("output") / "five_arms"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer", "run", arm, "--seed", str(seed)]
    with (logs / f"{arm}-{seed}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def main() -> None:
    """Train what is missing, then write the report and the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="17,18,19", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "five_arms", help="folder for the report")
    parser.add_argument("--code", default=code_version(), help="commit whose runs count; by default the one here")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    have = finished(arguments.code, seeds)
    missing = [(arm, seed) for seed in seeds for arm in ARMS if (arm, seed) not in have]
    if missing and arguments.code != code_version():
        sys.exit(f"of that commit {len(missing)} runs are missing, and the code here is {code_version()}")
    with Progress() as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(missing))
        trained = [pool.submit(train, arm, seed, threads) for arm, seed in missing]
        for done in as_completed(trained):
            done.result()
            progress.advance(task)
    recorded.save(Store(), finished(arguments.code, seeds).values())
    command = [sys.executable, "-m", "analysis", "report", "--experiment", names.EXPERIMENT, "--by", names.EVAL_LOSS]
    command += ["--where", f"tags.{names.TAG_CODE_VERSION} = '{arguments.code}'", "--out", str(arguments.out)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
