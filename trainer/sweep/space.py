"""What a sweep varies: axes with their choices or bounds, and the settings that a point of them stands for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

SEED = "training.seed"
STRATEGY = "strategy"
"""The axis that exchanges the configuration itself; all others change keys of it."""

Value = str | int | float
"""Of one axis at one point: the label of a choice, or a number."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to go along an axis."""

    label: str
    settings: Mapping[str, str]
    """Dotted key -> value as text: what it sets, several keys where they belong together."""


@dataclass(frozen=True, slots=True)
class Choices:
    """An axis of a few values that have no order."""

    key: str
    choices: tuple[Choice, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What the choices are called, in their order."""
        return tuple(choice.label for choice in self.choices)

    def settings(self, value: Value) -> Mapping[str, str]:
        """What a choice sets.

        Args:
            value: its label.
        """
        return next(choice.settings for choice in self.choices if choice.label == value)

    def ends(self) -> tuple[Value, ...]:
        """Values that must be right for all of them to be."""
        return self.labels


@dataclass(frozen=True, slots=True)
class Range:
    """An axis of numbers between two bounds, both included."""

    key: str
    low: float
    high: float
    log: bool
    """Whether each factor is as likely as the next."""
    whole: bool
    """Whether only whole numbers count."""

    def settings(self, value: Value) -> Mapping[str, str]:
        """What a number sets.

        Args:
            value: the number.
        """
        return {self.key: str(value)}

    def ends(self) -> tuple[Value, ...]:
        """Values that must be right for all of them to be."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


Axis = Choices | Range
Point = Mapping[str, Value]
"""Key of an axis -> value: one of the things to be tried."""


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, Value]]:
    """Every point of axes of choices; the first axis changes fastest, so that the last one, the seeds, comes in rounds.

    Args:
        axes: none of them a range.
    """
    for values in product(*(axis.ends() for axis in reversed(axes))):
        yield {axis.key: value for axis, value in zip(axes, reversed(values), strict=True)}


def size(axes: Sequence[Axis]) -> int:
    """How many points a grid has."""
    return math.prod(len(axis.ends()) for axis in axes)


def settings(axes: Sequence[Axis], point: Point) -> dict[str, str]:
    """Dotted key -> value as text: what a point changes of the configuration, which itself may be under `strategy`.

    Args:
        axes: of the sweep.
        point: a value for each.
    """
    return {key: text for axis in axes for key, text in axis.settings(point[axis.key]).items()}


def without_seed(point: Point) -> dict[str, Value]:
    """A point as it is ranked: its seeds are repetitions of it."""
    return {key: value for key, value in point.items() if key != SEED}


def name_of(point: Point) -> str:
    """`vit_lr=0.00012, blocks=last-6`: a point in a few words."""
    return ", ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in point.items())


def short(value: Value) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
