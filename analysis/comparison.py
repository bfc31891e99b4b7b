"""A ranking with its curves: what is drawn of them, what they are laid along, and their values at chosen points."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.curves import Curve, Floats
from analysis.ranking import Ranking, Row
from trainer import names
from trainer.errors import UserError

AXES: dict[str, tuple[str | None, float, str]] = {
    "steps": (None, 1, "optimizer steps"),
    "samples": (names.SAMPLES_SEEN, 1, "samples seen"),
    "tokens": (names.TOKENS_SEEN, 1e-3, "thousand tokens seen"),
    "epochs": (names.EPOCH, 1, "epochs"),
    "hours": (names.TRAIN_SECONDS, 1 / 3600, "hours of training"),
}
"""What can be drawn along x: metric that counts it, scale, label."""

CURVE_FIGURES = {
    "eval_loss": (names.EVAL_LOSS, "eval loss, nats per supervised token"),
    "train_loss": (names.TRAIN_LOSS, "train loss, nats per supervised token"),
    "gap": (names.GAP, "gap, nats per supervised token"),
    "learning_rate": (names.LEARNING_RATE + "vision", "learning rate of the vision part"),
}
"""File -> metric, label."""

CURVES_NEEDED = (
    *(metric for metric, _ in CURVE_FIGURES.values()),
    *(metric for metric, _, _ in AXES.values() if metric),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What figures and reports are made of."""

    ranking: Ranking
    curves: Mapping[str, Mapping[str, Curve]]
    """Run id -> metric -> curve, of `CURVES_NEEDED` and the ranked metric; empty where a run has not logged it."""

    @property
    def loss(self) -> str:
        """The ranked metric where it is an eval loss with a curve, else the eval loss that has one."""
        known = [self.ranking.by, names.EVAL_LOSS, names.EVAL_LOSS_SMOOTHED]
        losses = [name for name in known if name in (names.EVAL_LOSS, names.EVAL_LOSS_SMOOTHED)]
        with_curve = [n for n in losses if any(len(of_run.get(n, ())) > 1 for of_run in self.curves.values())]
        return with_curve[0] if with_curve else losses[0]

    def of(self, row: Row) -> list[Mapping[str, Curve]]:
        """The curves of an arm's runs."""
        return [self.curves[reading.run.id] for reading in row.readings]


def default_axis(ranking: Ranking) -> str:
    """Samples where arms take different numbers of them in a step, so that equal steps are not equal work."""
    ratios = {
        round(estimate.mean / steps.mean, 1)
        for row in ranking.rows
        if (estimate := row.estimates[names.SAMPLES_SEEN]).n and (steps := row.estimates["step"]).mean
    }
    return "samples" if len(ratios) > 1 and max(ratios) > 1.1 * min(ratios) else "steps"


def along(curve: Curve, curves: Mapping[str, Curve], axis: str) -> Floats:
    """Where a curve's points lie on an axis: (n,), nan where the counter was not logged."""
    counter, scale, _ = AXES[axis]
    if counter is None:
        return curve.steps.astype(np.float64)
    counted = curves[counter]
    if not len(counted):
        return np.full(len(curve), np.nan)
    return np.asarray(np.interp(curve.steps, counted.steps, counted.values, left=np.nan, right=np.nan) * scale)


def mean_at(comparison: Comparison, row: Row, metric: str, axis: str, point: float) -> float:
    """An arm's mean over seeds at a place on an axis, straight between rows of a curve.

    Args:
        comparison: with the curves.
        row: the arm.
        metric: of the curve.
        axis: a key of `AXES`.
        point: in the axis's unit.

    Returns:
        nan unless every seed was evaluated before and after.
    """
    values = []
    for curves in comparison.of(row):
        x, y = along(curves[metric], curves, axis), curves[metric].values
        keep = np.isfinite(x) & np.isfinite(y)
        values.append(np.interp(point, x[keep], y[keep], left=np.nan, right=np.nan) if keep.any() else np.nan)
    return float(np.mean(values))


def round_points(comparison: Comparison, metric: str, axis: str, about: int = 5) -> list[float]:
    """About so many round numbers up to where the longest run ends: 2,000, 4,000, ... 10,000 for 10,420."""
    reached = [along(curves[metric], curves, axis) for row in comparison.ranking.rows for curves in comparison.of(row)]
    end = max((float(np.nanmax(x)) for x in reached if np.isfinite(x).any()), default=0.0)
    if end <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(end / about))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(end / step - about))
    return [step * i for i in range(1, int(end / step + 1e-9) + 1)]


def parse_points(text: str) -> list[float]:
    """`500,1000,2000` as numbers, rising.

    Raises:
        UserError: anything else.
    """
    try:
        points = sorted(float(part) for part in text.split(","))
    except ValueError:
        points = []
    if not points or not all(0 <= point < math.inf for point in points):
        raise UserError(
            "--points",
            text,
            "numbers in the unit of the axis, with commas",
            "give numbers such as --points 500,1000,2000",
        )
    return points
