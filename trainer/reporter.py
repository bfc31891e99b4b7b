"""Passes every event on: to metric rows, from there to MLflow and the display; keeps what the end of a run needs."""

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer import names
from trainer.display import Display
from trainer.events import CheckpointSaved, EvalDone, Event, Seen, StepDone, StoppedEarly, eval_done_of
from trainer.metrics import Meter
from trainer.tracker import Tracker


class Reporter:
    """The `emit` of one run."""

    def __init__(self, tracker: Tracker, meter: Meter, display: Display, home: Path) -> None:
        """Report to a tracker and a display; `home` is the folder of the run's checkpoints."""
        self._tracker, self._meter, self._display, self._home = tracker, meter, display, home
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the clock and returns 0
        self.latest: dict[str, float] = {}
        """Last value of every metric."""
        self.evaluations: dict[str, EvalDone] = {}
        """The evaluation behind the `best` checkpoint, and the `last` one."""
        self.checkpoints: dict[str, CheckpointSaved] = {}
        """Kind -> the newest checkpoint of that kind."""

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        row = self._meter.rows(event)
        if row and isinstance(event, StepDone | StoppedEarly):
            row |= self._measured()
        if row:
            self.log(row, event.seen.step)
        match event:
            case EvalDone():
                self.evaluations["last"] = event
            case CheckpointSaved():
                self.checkpoints[event.kind] = event
                if event.kind == "best":  # saved right after the evaluation that was best
                    self.evaluations["best"] = self.evaluations["last"]
            case StoppedEarly():
                self._tracker.tags({names.TAG_STOPPED_EARLY: f"step {event.seen.step}"})
        self._display.event(event, row)
        for notice in self._tracker.notices():
            self.say(notice)

    def state(self) -> dict[str, Any]:
        """All that is reported later, for a resume point; JSON-able."""
        return {
            "meter": self._meter.state(),
            "latest": self.latest,
            "evaluations": {kind: asdict(event) for kind, event in self.evaluations.items()},
            "checkpoints": {kind: [asdict(saved.seen), saved.size_bytes] for kind, saved in self.checkpoints.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            KeyError, TypeError, ValueError: it is not a state.
        """
        self._meter.restore(state["meter"])
        self.latest = {str(name): float(value) for name, value in state["latest"].items()}
        self.evaluations = {kind: eval_done_of(event) for kind, event in state["evaluations"].items()}
        self.checkpoints = {
            kind: CheckpointSaved(Seen(**seen), kind, str(self._home / Path(kind).name), int(size))
            for kind, (seen, size) in state["checkpoints"].items()
        }

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Log a row that no event brings, such as the scores of generated captions."""
        self.latest.update(row)
        self._tracker.metrics(row, step)

    def say(self, text: str) -> None:
        """Show a line to whoever watches."""
        self._display.say(text)

    def _measured(self) -> dict[str, float]:
        return {
            names.PEAK_MEMORY: float(peak_memory()),
            names.CPU_PERCENT: self._process.cpu_percent(),
            names.MEMORY_BYTES: float(self._process.memory_info().rss),
        }


def peak_memory() -> int:
    """Most memory in use at once so far, bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
