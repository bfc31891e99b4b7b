"""Whether arms are behind a leader by more than a margin, or within it, from few paired seeds and several looks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.statistics import Estimate, holm


@dataclass(frozen=True, slots=True)
class Margin:
    """How far an arm is behind the leader, beside a margin that counts as no difference."""

    arm: str
    estimate: Estimate
    """Arm minus leader, with the interval that holds for all arms together (Bonferroni)."""
    p_behind: float
    """Of the one-sided t test whose null hypothesis is that it is behind by the margin at most."""
    p_equivalent: float
    """Of the two one-sided tests whose null hypothesis is that it is away by the margin at least (Schuirmann 1987)."""
    p: float
    """Twice the smaller of the two, since either may end the matter, after Holm's correction over arms."""


def margins(values: Mapping[str, Mapping[int, float]], leader: str, margin: float, error: float) -> list[Margin]:
    """Ask of every arm whether it is behind the leader by more than a margin, and whether it is within the margin.

    The mean difference d over n paired seeds has the standard error max(s sqrt(2/n), s_d / sqrt(n)): s pooled over all
    arms (see `pooled_spread`), s_d that of this pair's own differences. Pooling gives a few seeds enough degrees of
    freedom; the pair's own spread, where it is the larger, guards against an arm that scatters more than the rest. The
    t statistics (d - margin)/se, (margin - d)/se and (margin + d)/se are referred to the pooled degrees of freedom.

    Args:
        values: arm -> seed -> value, lower is better; the same two seeds or more in every arm, all finite.
        leader: one of the arms.
        margin: in the unit of the values, more than 0.
        error: chance that any of the intervals misses, in (0, 1).

    Returns:
        One for every arm but the leader, in the mapping's order.

    Raises:
        ValueError: fewer than two seeds, or not the same in every arm.
    """
    spread, freedom = pooled_spread(values)
    others = [arm for arm in values if arm != leader]
    pairs = np.array([[values[arm][seed] - values[leader][seed] for seed in values[leader]] for arm in others])
    if not others:
        return []
    n = pairs.shape[1]
    d, own = pairs.mean(axis=1), pairs.std(axis=1, ddof=1)
    se = np.maximum(spread * math.sqrt(2), own) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        behind, inside, above = (
            np.where(se > 0, stats.t.sf(gap / se, freedom), np.where(gap > 0, 0.0, 1.0))
            for gap in (d - margin, margin - d, margin + d)
        )
    equivalent = np.maximum(inside, above)
    half = float(stats.t.isf(error / (2 * len(others)), freedom)) * se
    adjusted = holm([min(1.0, 2 * float(p)) for p in np.minimum(behind, equivalent)])
    return [
        Margin(arm, Estimate(float(d[i]), float(d[i] - half[i]), float(d[i] + half[i]), n), float(behind[i]),
               float(equivalent[i]), adjusted[i])
        for i, arm in enumerate(others)
    ]  # fmt: skip


def pooled_spread(values: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """What seeds do to one arm and not to all: standard deviation of the residuals of arms x seeds, and its freedom.

    s^2 = sum (y_as - mean_a - mean_s + mean)^2 / ((A-1)(S-1)); a seed that is hard for every arm is no noise between
    them.

    Raises:
        ValueError: fewer than two seeds or arms, or not the same seeds in every arm.
    """
    seeds = {tuple(sorted(of_arm)) for of_arm in values.values()}
    if len(seeds) != 1 or len(values) < 2 or len(*seeds) < 2:
        raise ValueError(f"two arms or more, with the same two seeds or more, are needed, not {sorted(seeds)}")
    y = np.array([[of_arm[seed] for seed in sorted(of_arm)] for of_arm in values.values()])
    residuals = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    freedom = (y.shape[0] - 1) * (y.shape[1] - 1)
    return math.sqrt(float((residuals**2).sum()) / freedom), freedom


def shares(error: float, looks: int) -> list[float]:
    """Split an accepted error over looks at growing data: half of what is left at each, the rest at the last.

    The chance of an error at any look is at most the sum, whatever the looks have in common (Bonferroni), which is the
    accepted error; no look need know how many there were before.

    Args:
        error: accepted over all looks together.
        looks: how many, at least 1.
    """
    return [error / 2 ** min(look + 1, looks - 1) for look in range(looks)]
