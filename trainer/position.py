"""Where training stands, as a resume point keeps it, and what those outside may ask of it meanwhile."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.events import Seen


@dataclass(slots=True)
class Progress:
    """What evaluations have said so far."""

    patience: int | None = None
    evaluations: int = 0
    evaluated_at: int = -1
    """Training samples seen at the newest of them; -1: there was none."""
    lowest: float = math.inf
    without_better: int = 0
    """Evaluations since the lowest."""
    best_saved: float = math.inf

    def take(self, loss: float, samples: int) -> None:
        """Count an evaluation, after so many training samples."""
        self.evaluations += 1
        self.evaluated_at = samples
        self.without_better = 0 if loss < self.lowest else self.without_better + 1
        self.lowest = min(self.lowest, loss)

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.without_better >= self.patience


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands: at the head of pass `seen.step` of the loop, or behind what it evaluates and saves."""

    seen: Seen = field(default_factory=Seen)
    progress: Progress = field(default_factory=Progress)
    passed: bool = False
    """Whether the model was evaluated and saved after this many updates already, where that was due."""
    ended: bool = False
    """Whether that was the last pass."""


class Wishes(Protocol):
    """What somebody outside has asked of the training."""

    stop: bool
    """End after this optimizer step."""
    save: bool
    """Write a resume point and go on."""


def position_of(tree: Mapping[str, Any]) -> Position:
    """The position that `dataclasses.asdict` has made a tree of.

    Raises:
        KeyError, TypeError, ValueError: it is another tree.
    """
    seen, progress = Seen(**tree["seen"]), Progress(**tree["progress"])
    counts = (
        seen.step,
        seen.samples,
        seen.tokens,
        seen.supervised_tokens,
        progress.evaluations,
        progress.without_better,
    )
    if not all(type(count) is int and count >= 0 for count in counts) or type(progress.evaluated_at) is not int:
        raise ValueError(f"not all of {counts} are counts")
    for number in (seen.epoch, seen.train_seconds, progress.lowest, progress.best_saved):
        float(number)
    return Position(seen, progress, passed=tree["passed"] is True, ended=tree["ended"] is True)


@dataclass(slots=True)
class NoWishes:
    """Nobody asks for anything."""

    stop: bool = False
    save: bool = False
