"""Means with intervals, comparisons of strategies and their correction, all pure: numbers in, numbers out.

A seed is the unit of replication. What varies from seed to seed (data order, dropout, new weights) is what an interval
here is about; the uncertainty of the validation set is another question, with `paired_bootstrap` as its answer.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
FAMILY_ERROR = 0.05
"""Accepted probability that a verdict calls any two equal strategies different."""
ALL_PAIRS = 40
"""Up to so many strategies every pair is compared: 780 pairs take a second."""

NAN = math.nan
_ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""Of the largest value: values whose spread is not above it are all the same but for rounding."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its interval; without an interval (nan) where fewer than two values were finite."""

    mean: float
    low: float
    high: float
    n: int
    """Finite values behind it."""
    excluded: int = 0
    """Values that were not finite, and were left out."""

    @property
    def half_width(self) -> float:
        """Half the interval's width, in the unit of the values."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Difference:
    """How much two strategies differ: mean of the second minus mean of the first, over seeds."""

    first: str
    second: str
    estimate: Estimate
    p: float
    """Of the two-sided t test; nan where there are too few seeds to test."""
    method: Literal["paired", "welch", "untested"]
    """`paired`: by seeds that both have; `welch`: independent seeds, unequal variances (Welch 1947)."""
    p_adjusted: float = NAN
    """After Holm's correction over all pairs compared."""

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is more than the seeds explain, at `FAMILY_ERROR` over all pairs."""
        return self.p_adjusted <= FAMILY_ERROR


def estimate(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of values, one a seed, with Student's t interval: mean +- t(n - 1) s / sqrt(n).

    Args:
        values: (n,), in any unit; what is not finite is left out and counted.
        confidence: of the interval, in (0, 1).
    """
    everything = np.asarray(values, dtype=np.float64).ravel()
    kept = everything[np.isfinite(everything)]
    n, excluded = len(kept), len(everything) - len(kept)
    if n == 0:
        return Estimate(NAN, NAN, NAN, 0, excluded)
    mean = float(kept.mean())
    if n == 1:
        return Estimate(mean, NAN, NAN, 1, excluded)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * float(kept.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, excluded)


def difference(
    first: str, second: str, values: Mapping[str, Mapping[str, float]], confidence: float = CONFIDENCE
) -> Difference:
    """Compare two strategies.

    Args:
        first: name of the strategy that is subtracted.
        second: name of the other.
        values: strategy -> block -> value. A block is what makes two runs a pair: the same seed on the same data, so
            that both saw the same batches. With two blocks in common or more the test is paired by them, and the
            blocks that only one has are left out; else it is Welch's.
        confidence: of the interval.
    """
    a, b = _finite(values[first]), _finite(values[second])
    common = sorted(a.keys() & b.keys())
    if len(common) >= 2:
        differences = [b[block] - a[block] for block in common]
        p = _one_sample_p(differences, max(abs(of[block]) for of in (a, b) for block in common))
        method: Literal["paired", "untested"] = "untested" if math.isnan(p) else "paired"
        return Difference(first, second, estimate(differences, confidence), p, method)
    x, y = np.array(list(a.values())), np.array(list(b.values()))
    if min(len(x), len(y)) < 2:
        shift = float(y.mean() - x.mean()) if len(x) and len(y) else NAN
        return Difference(first, second, Estimate(shift, NAN, NAN, min(len(x), len(y))), NAN, "untested")
    return _welch(first, second, x, y, confidence)


def all_differences(values: Mapping[str, Mapping[str, float]]) -> list[Difference]:
    """Every pair of strategies, in the mapping's order, with p values adjusted by Holm over all that could be tested.

    All pairs, and not only those with the winner: who wins is read from the same numbers, so that testing the winner
    against the rest alone would call chance a difference more often than `FAMILY_ERROR`. Of more than `ALL_PAIRS`
    strategies only the pairs with the first are looked at, and p is multiplied by the number of all pairs (Bonferroni),
    which can only be more careful.

    Args:
        values: strategy -> block -> value, the best first.
    """
    if len(values) > ALL_PAIRS:
        first, *others = values
        among_all = math.comb(len(values), 2)
        few = [difference(first, other, values) for other in others]
        return [replace(pair, p_adjusted=float(np.minimum(1.0, among_all * pair.p))) for pair in few]  # nan stays nan
    pairs = [difference(a, b, values) for a, b in itertools.combinations(values, 2)]
    adjusted = holm([pair.p for pair in pairs])
    return [replace(pair, p_adjusted=p) for pair, p in zip(pairs, adjusted, strict=True)]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A weighted sum of strategies, and whether it is more than noise."""

    estimate: Estimate
    p: float
    """Of the two-sided t test that it is 0; nan where there are too few seeds to test."""
    p_adjusted: float = NAN
    """After Holm's correction over all contrasts that answer the same kind of question."""

    @property
    def distinguishable(self) -> bool:
        """Whether it is more than the seeds explain, at `FAMILY_ERROR` over all that were corrected together."""
        return self.p_adjusted <= FAMILY_ERROR


def contrast(
    weights: Mapping[str, float], values: Mapping[str, Mapping[str, float]], confidence: float = CONFIDENCE
) -> Contrast:
    """A weighted sum of strategies, such as an effect in a factorial design, over the blocks that all of them have.

    Args:
        weights: strategy -> weight; for an effect they sum to 0.
        values: strategy -> block -> value, as for `difference`.
        confidence: of the interval.

    Returns:
        In the unit of the values, p not yet adjusted. Where fewer than two blocks are shared, the sum of the means
        without an interval or a test.
    """
    known = {name: _finite(values[name]) for name in weights}
    shared = sorted(set.intersection(*({*of} for of in known.values())))
    if len(shared) >= 2:
        sums = [sum(w * known[name][block] for name, w in weights.items()) for block in shared]
        scale = sum(abs(w) * max(abs(known[name][block]) for block in shared) for name, w in weights.items())
        return Contrast(estimate(sums, confidence), _one_sample_p(sums, scale))
    means = [w * float(np.mean([*known[name].values()])) if known[name] else NAN for name, w in weights.items()]
    return Contrast(Estimate(sum(means), NAN, NAN, min(len(of) for of in known.values())), NAN)


@dataclass(frozen=True, slots=True)
class Interaction:
    """Whether the differences between strategies are the same in every domain."""

    f: float
    p: float
    """nan where there are too few seeds to test."""
    freedom: tuple[int, int]
    """Degrees of freedom of the F test: interaction, error."""
    size: float
    """Root mean square of what strategy and domain together add, in the unit of the values."""


def interaction(values: ArrayLike) -> Interaction:
    """Interaction of two factors, each seed having been measured in all their cells (repeated measures).

    The error term is the interaction's own variation over seeds: F = MS(ab) / MS(abs), with (a-1)(b-1) and
    (a-1)(b-1)(s-1) degrees of freedom (Winer 1971, chapter 4). It takes the cells' differences to vary alike over seeds
    (sphericity), which so few seeds cannot prove.

    Args:
        values: (seeds, strategies, domains), all finite, at least two strategies and two domains.
    """
    y = np.asarray(values, dtype=np.float64)
    seeds, a, b = y.shape
    cells = y.mean(axis=0)
    both = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean()
    deviations = y - cells  # of each seed from the cells; what is left without its own two margins is the error
    error = (
        deviations
        - deviations.mean(axis=1, keepdims=True)
        - deviations.mean(axis=2, keepdims=True)
        + deviations.mean(axis=(1, 2), keepdims=True)
    )
    freedom = (a - 1) * (b - 1), (a - 1) * (b - 1) * (seeds - 1)
    size = float(np.sqrt((both**2).mean()))
    noise = float((error**2).sum())
    if seeds < 2 or noise <= y.size * (_ROUNDING * float(np.abs(y).max())) ** 2:
        return Interaction(NAN, NAN, freedom, size)
    f = seeds * float((both**2).sum()) / freedom[0] / (noise / freedom[1])
    return Interaction(f, float(stats.f.sf(f, *freedom)), freedom, size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm 1979): p_(i), sorted, becomes max over j <= i of min(1, (m-j+1) p_(j)).

    Args:
        p_values: any order; nan means that no test was possible, stays nan and does not count into m.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, running = [NAN] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    tokens: ArrayLike,
    generator: np.random.Generator,
    *,
    resamples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Difference of two eval losses, with the percentile interval over resampled validation records (Efron 1979).

    Says how much the *choice of validation records* leaves open, for these two sets of weights; nothing about seeds.

    Args:
        first: (records,) summed loss of each record in nats, of the strategy that is subtracted.
        second: (records,) of the other, the same records in the same order.
        tokens: (records,) supervised tokens of each.
        generator: of all random draws.
        resamples: how many sets of as many records are drawn.
        confidence: of the interval.

    Returns:
        Nats per supervised token; `n` is the number of records.

    Raises:
        ValueError: shapes differ, or there is no record.
    """
    a, b, weights = (np.asarray(values, dtype=np.float64) for values in (first, second, tokens))
    if not a.shape == b.shape == weights.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"records of the two runs and tokens have shapes {a.shape}, {b.shape}, {weights.shape}")
    delta = b - a
    shifts = np.empty(resamples)
    at_once = max(1, 1_000_000 // len(a))  # an index of at most 8 MB
    for start in range(0, resamples, at_once):
        drawn = generator.integers(len(a), size=(min(at_once, resamples - start), len(a)))
        shifts[start : start + len(drawn)] = delta[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(shifts, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(delta.sum() / weights.sum()), float(low), float(high), len(a))


def seeds_to_settle(differences: Difference, *, power: float = 0.8, alpha: float = FAMILY_ERROR) -> int | None:
    """Seeds a strategy that a paired difference of this size and spread would need to be found with `power`.

    The noncentral t gives the power of n pairs. The spread is that of the pairs seen, itself uncertain with few pairs.

    Returns:
        The smallest n up to 1,000, or None: more, or not compared in pairs, or no spread to reckon with.
    """
    seen = differences.estimate
    if seen.n < 2 or differences.method != "paired" or differences.p == 1:
        return None
    spread = seen.half_width * math.sqrt(seen.n) / float(stats.t.ppf((1 + CONFIDENCE) / 2, seen.n - 1))

    def found(n: int) -> bool:
        critical = stats.t.ppf(1 - alpha / 2, n - 1)
        shift = abs(seen.mean) / spread * math.sqrt(n)
        reached = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        return bool(reached >= power) if np.isfinite(reached) else shift > 2 * critical  # nan far out

    enough = bisect.bisect_left(range(2, 1002), True, key=found) + 2  # more pairs find more
    return enough if enough <= 1000 else None


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {block: value for block, value in values.items() if math.isfinite(value)}


def _one_sample_p(values: Sequence[float], scale: float) -> float:
    """Two-sided p that the mean of these is 0; nan where they are all the same and not 0: no spread to reckon with.

    Args:
        values: differences of two each, or longer sums.
        scale: the largest value that they were made of, by whose rounding they may differ.
    """
    spread = float(np.std(values, ddof=1))
    if spread <= _ROUNDING * scale:
        return 1.0 if abs(np.mean(values)) <= _ROUNDING * scale else NAN
    t = float(np.mean(values) / (spread / math.sqrt(len(values))))
    return float(2 * stats.t.sf(abs(t), len(values) - 1))


def _welch(first: str, second: str, x: NDArray[np.float64], y: NDArray[np.float64], confidence: float) -> Difference:
    """Welch's t test and interval, with the degrees of freedom of Welch and Satterthwaite."""
    vx, vy = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    shift, n = float(y.mean() - x.mean()), min(len(x), len(y))
    nothing = _ROUNDING * float(max(np.abs(x).max(), np.abs(y).max()))
    if math.sqrt(vx + vy) <= nothing:
        if abs(shift) <= nothing:
            return Difference(first, second, Estimate(shift, shift, shift, n), 1.0, "welch")
        return Difference(first, second, Estimate(shift, NAN, NAN, n), NAN, "untested")
    freedom = (vx + vy) ** 2 / (vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1))
    error = math.sqrt(vx + vy)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(shift) / error, freedom))
    return Difference(first, second, Estimate(shift, shift - half, shift + half, n), p, "welch")
