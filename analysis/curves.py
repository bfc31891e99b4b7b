"""Curves of a run as arrays: one value a step, smoothed as TensorBoard does, read at any step, sample or second."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.metrics import Smoothing

SMOOTHING = 0.6
"""TensorBoard's default, with which the published figures were most likely read."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of one run over its steps."""

    steps: NDArray[np.int64]
    """(n,) optimizer steps, rising."""
    values: Floats
    """(n,) in the metric's unit; may hold nan and infinities."""
    times: NDArray[np.int64]
    """(n,) when each was written, milliseconds since 1970."""

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    @property
    def n_not_finite(self) -> int:
        """Points that are nan or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.values)))

    def smoothed(self, weight: float = SMOOTHING) -> "Curve":
        """The curve as TensorBoard smooths it."""
        return Curve(self.steps, debiased_ema(self.values, weight), self.times)

    def lowest(self) -> int | None:
        """Index of the lowest finite value, the first of several; None where none is finite."""
        finite = np.isfinite(self.values)
        return int(np.argmin(np.where(finite, self.values, np.inf))) if finite.any() else None

    def at_or_before(self, step: float) -> float:
        """The last value written at a step up to this one; nan where there is none, and after the curve's end."""
        if not len(self) or step > self.steps[-1]:
            return np.nan
        index = int(np.searchsorted(self.steps, step, side="right")) - 1
        return float(self.values[index]) if index >= 0 else np.nan


def last_write_wins(points: Iterable[tuple[int, int, float]]) -> Curve:
    """A curve from metric rows in any order.

    A run that was stopped and resumed writes some steps twice; what was written last is what counts. Of rows with equal
    time, the later one in `points`.

    Args:
        points: (step, time in milliseconds, value).
    """
    kept: dict[int, tuple[int, float]] = {}
    for step, time, value in points:
        if step not in kept or time >= kept[step][0]:
            kept[step] = (time, value)
    steps = sorted(kept)
    return Curve(
        np.array(steps, dtype=np.int64),
        np.array([kept[step][1] for step in steps], dtype=np.float64),
        np.array([kept[step][0] for step in steps], dtype=np.int64),
    )


def debiased_ema(values: ArrayLike, weight: float = SMOOTHING) -> Floats:
    """TensorBoard's smoothing: s_n = w s_(n-1) + (1 - w) x_n from s_0 = 0, shown as s_n / (1 - w^n).

    Values that are not finite pass through and are not remembered. 1, .5, 0 at weight .6 give 1, .6875, .33673.

    Args:
        values: (n,).
        weight: w, in [0, 1).

    Raises:
        ValueError: the weight is outside.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"a smoothing weight is in [0, 1), not {weight}")
    one_by_one = Smoothing(weight)
    return np.array([one_by_one.add(float(value)) for value in np.asarray(values)], dtype=np.float64)
