"""A stopwatch for training steps: rates, memory, losses, and whether others were busy. Needs psutil alone."""

import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

LEFT_OUT = 5
"""First optimizer steps that are not counted: memory is taken for the first time, and threads start."""


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


def _seconds_of_others() -> float:
    """CPU seconds that were spent on this machine, by others than this family, since it was switched on."""
    machine: Any = psutil.cpu_times()
    own = [process.cpu_times() for process in family()]
    return float(sum(machine[:8]) - machine.idle - machine.iowait) - sum(t.user + t.system for t in own)


def _peak_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
