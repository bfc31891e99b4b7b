"""One training run in a process of its own: how it is started and ended, and what its folder says of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from trainer import launch, names
from trainer.runs import SPOOL, Busy, disk, held, runs_below
from trainer.signals import STARTED_BY
from trainer.spool import AGAIN, entries, position_of

_OF_A_RANK = frozenset(
    ("MLFLOW_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
     "MASTER_PORT", "JOB_COMPLETION_INDEX", launch.ROUND, launch.STATUSES)
)  # fmt: skip
"""Variables that a scheduler has set for this process, which is one of several, and that say nothing of its runs."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is wanted."""

    name: str
    """Of the run, in MLflow and in messages."""
    arguments: tuple[str, ...]
    """What follows `python -m trainer run`, but for the name and the folder."""
    folder: Path
    """Of this job alone: the run's folder and the log lie in it, so that the same job finds its run again."""
    parent: str = ""
    """MLflow run to nest the run below; empty: none. It is no part of what makes the run."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the MLflow run, from its beginning on."""

    @property
    def command(self) -> list[str]:
        """The command without the interpreter: `-m trainer run ...`; the same one goes on with an interrupted run."""
        here = ("--output_dir", str(self.folder), "--training.run_name", self.name)
        return ["-m", "trainer", "run", *self.arguments, *here]

    @property
    def log(self) -> Path:
        """What the run writes to the terminal, of all attempts one after the other."""
        return self.folder / "log.txt"


class Child:
    """The process of a job, the leader of a process group: a Ctrl-C of the terminal reaches it through us alone."""

    def __init__(self, job: Job, *, threads: int, gpus: str | None = None) -> None:
        """Start it.

        Args:
            job: the run.
            threads: of each of its ranks.
            gpus: as `launch.gpus` has it; None: what the job says.

        Raises:
            ConfigError: the folder or the log cannot be written.
        """
        self.job = job
        with disk(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
            log = job.log.open("ab")
        of_gpus = ["--launch.gpus", gpus] if gpus is not None else []
        with log:
            self._process = subprocess.Popen(
                [sys.executable, *job.command, *of_gpus],
                env=environment(job, threads), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, as a shell has it; None while it runs."""
        status = self._process.poll()
        return status if status is None or status >= 0 else 128 - status

    def ask_to_end(self) -> None:
        """Ask it to finish its step, write a resume point and close its run; ranks hear it from the process itself."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, with what it has started; its run can be gone on with all the same."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None where it has not ended so soon."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()


def environment(job: Job, threads: int) -> dict[str, str]:
    """Ours, but for what would make the run adopt our MLflow run, or be a rank; it is told of its parent, and of us.

    Args:
        job: the run.
        threads: of each of its ranks.
    """
    kept = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK and not key.startswith("SLURM_")}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        STARTED_BY: str(os.getpid()),
        names.PARENT_VARIABLE: job.parent,
        names.TAGS_VARIABLE: json.dumps(dict(job.tags)),
    }


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation of a run."""

    step: int
    """Optimizer steps."""
    samples: int
    """Training samples seen."""
    loss: float
    """Eval loss, nats per supervised token."""


@dataclass(frozen=True)
class Standing:
    """How a job's run stands, by its folder: no tracker is asked."""

    path: Path | None = None
    """Of the newest run; None: none has begun."""
    state: str = ""
    """running, interrupted, paused, stopped or over; empty: none has begun."""
    total_steps: int = 0
    """Optimizer steps of the whole training; 0 where that is not known."""
    params: Mapping[str, str] = field(default_factory=dict)
    """The run's configuration, and what it rests on."""

    @property
    def run_id(self) -> str:
        """The MLflow run; empty where it has not been made yet."""
        return position_of(self.path / SPOOL).run_id if self.path else ""

    @cached_property
    def rows(self) -> tuple[tuple[int, Mapping[str, float]], ...]:
        """(optimizer step, metric -> value) of every row so far."""
        return tuple(self._rows())

    def _rows(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        for entry in entries(self.path / SPOOL) if self.path else ():
            if entry.kind == "metrics":
                yield entry.body["step"], entry.body["values"]

    @property
    def step(self) -> int:
        """The step of the last row."""
        return max((step for step, _ in self.rows), default=0)

    @property
    def evaluations(self) -> tuple[Evaluated, ...]:
        """All evaluations so far, in order; of a step that was evaluated again after a change, the last one."""
        found = {
            step: Evaluated(step, int(values.get(names.SAMPLES_SEEN, 0)), values[names.EVAL_LOSS])
            for step, values in self.rows
            if names.EVAL_LOSS in values
        }
        return tuple(found[step] for step in sorted(found))

    @property
    def seconds(self) -> float:
        """From the first entry of the run to its last; of a run that was interrupted, with the time in between."""
        times = [entry.time_ms for entry in entries(self.path / SPOOL)] if self.path else []
        return (times[-1] - times[0]) / 1000 if times else 0.0

    @property
    def in_one_go(self) -> bool:
        """Whether the run was never interrupted."""
        return self.path is not None and all(entry.kind != AGAIN for entry in entries(self.path / SPOOL))


def standing(folder: Path) -> Standing:
    """How the newest run in a job's folder stands."""
    for path, facts in runs_below(folder):
        return Standing(path, facts["state"], int(facts.get("total_steps", 0)), facts["params"])
    return Standing()


def last_words(log: Path) -> list[str]:
    """What a run has said of its end: its message, at most four lines; else the very last line; empty: it said nothing.

    Args:
        log: of a job; all attempts one after the other.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    message = [n for n, line in enumerate(lines) if line.startswith(("error: ", "stopped: ", "interrupted"))]
    return lines[message[-1] :][:4] if message else lines[-1:]


def is_held(folder: Path) -> bool:
    """Whether a living process has the newest run of a folder: perhaps one that was told to end, and is at it."""
    path = standing(folder).path
    try:
        if path is not None:
            held(path).release()
    except Busy:
        return True
    return False
