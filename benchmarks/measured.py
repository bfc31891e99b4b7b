"""What one measured process is asked for and what it tells: rates, memory, losses, and who else was busy."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import psutil
from machine import cores

SAMPLES_A_STEP, MICRO_BATCH = 4, 2
LEFT_OUT = 5
"""First optimizer steps that are not counted: memory is taken for the first time, and threads start."""
EVAL_BATCH = 4
RATE, CLIP = 1e-4, 1.0
"""Learning rate of every step and part, and the norm to which gradients are clipped; weights do not decay."""
SEED = 42
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Switches:
    """What ours does differently from its plain path; each can be on alone."""

    fused: bool = False
    """Forward and backward of `trainer.fused`."""
    packed: bool = False
    """The samples of a micro-batch end to end in one row, without padding."""
    one_batch: bool = False
    """All of a rank's samples of a step in one micro-batch."""
    onednn: bool = False
    """The fused path's products by oneDNN where that is faster than MKL."""
    ranks: int = 1
    """Processes that share the cores and the samples of a step."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures."""

    workload: str
    arm: str
    work: Literal["train", "eval", "count"] = "train"
    """`count` counts floating-point operations instead of seconds."""
    checkpointing: bool = False
    steps: int = 45
    """Optimizer steps, the first ones that are left out with them; an evaluation runs the samples of so many."""
    dropout: float = 0.1
    switches: Switches = field(default_factory=Switches)

    @classmethod
    def read(cls, text: str) -> "Job":
        """What `ask` has written on a command line."""
        values = json.loads(text)
        return cls(**values | {"switches": Switches(**values["switches"])})


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process found; rates are of the counted steps."""

    samples_per_second: float
    supervised_per_second: float
    step_seconds: float
    """Median."""
    peak_bytes: int
    """Peak resident sets of all processes of the training, added up: pages that they share count for each."""
    proportional_bytes: int
    """The same at the end, shared pages divided among those who share them."""
    others: float
    """Cores that processes beside it kept busy."""
    start_seconds: float
    """From the start of the process to the end of the first step."""
    losses: list[float]
    """Of every step, the first ones too; nats per supervised token."""


class Watch:
    """A stopwatch for the steps of this process and those that train with it."""

    def __init__(self, left_out: int = LEFT_OUT) -> None:
        """Nothing has happened yet; the first `left_out` steps, at least one, will not be counted."""
        self._left_out = left_out
        self._ends: list[float] = []
        self._samples: list[int] = []
        self._supervised: list[int] = []
        self._busy = 0.0
        self._start_seconds = 0.0
        self.losses: list[float] = []

    def step(self, samples: int, supervised: int) -> None:
        """A step has ended."""
        if not self._ends:
            self._start_seconds = time.time() - min(p.create_time() for p in family())
        self._samples.append(samples)
        self._supervised.append(supervised)
        if len(self._samples) == self._left_out:
            self._busy = _seconds_of_others()
        self._ends.append(time.perf_counter())

    def result(self) -> Measured:
        """What it comes to."""
        others = _seconds_of_others() - self._busy
        ends = self._ends[self._left_out - 1 :]
        whole = ends[-1] - ends[0]
        return Measured(
            samples_per_second=sum(self._samples[self._left_out :]) / whole,
            supervised_per_second=sum(self._supervised[self._left_out :]) / whole,
            step_seconds=statistics.median(later - earlier for earlier, later in pairwise(ends)),
            peak_bytes=sum(map(_peak_bytes, family())),
            proportional_bytes=sum(p.memory_full_info().pss for p in family()),
            others=max(0.0, others) / whole,
            start_seconds=self._start_seconds,
            losses=self.losses,
        )


def family() -> list[psutil.Process]:
    """This process; of a rank, the launcher too and all that it has started."""
    first = psutil.Process(os.getppid() if "LOCAL_RANK" in os.environ else os.getpid())
    return [first, *first.children(recursive=True)]


def ask(job: Job, script: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Have a script of this folder measure a job in a process of its own, on all cores.

    Args:
        job: what to measure.
        script: file name, and what stands before the job on its command line.
        prefix: a command to run it under, as `taskset -c 0,1`.

    Returns:
        What it told (see `tell`).

    Raises:
        RuntimeError: it failed.
    """
    ranks = job.switches.ranks
    command = [*prefix, sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    file, *arguments = script.split()
    done = subprocess.run(
        [*command, str(HERE / file), *arguments, json.dumps(asdict(job))],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{script} {job}:\n{done.stderr[-4000:]}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def tell(found: dict[str, Any]) -> None:
    """What `ask` returns."""
    print(json.dumps(found), flush=True)


def indices(step: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Which samples a rank trains on in optimizer step `step`, from 0."""
    share = SAMPLES_A_STEP // ranks
    first = step * SAMPLES_A_STEP + rank * share
    return list(range(first, first + share))


def _seconds_of_others() -> float:
    """CPU seconds that were spent on this machine, by others than this family, since it was switched on."""
    machine: Any = psutil.cpu_times()
    own = [process.cpu_times() for process in family()]
    return float(sum(machine[:8]) - machine.idle - machine.iowait) - sum(t.user + t.system for t in own)


def _peak_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
