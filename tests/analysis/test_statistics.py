"""Intervals, tests and their correction, each against scipy, a closed form or numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import (
    all_differences,
    contrast,
    difference,
    estimate,
    holm,
    interaction,
    paired_bootstrap,
    seeds_to_settle,
)

LOSSES = st.floats(0.1, 10.0)


@given(st.lists(LOSSES, min_size=2, max_size=12))
def test_the_interval_is_students(values: list[float]) -> None:
    """What scipy gives: its own t interval around the mean."""
    found = estimate(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error) if error else (values[0],) * 2
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-12)
    assert found.low <= found.mean <= found.high or error < 1e-12
    assert (found.n, found.excluded) == (len(values), 0)


def test_three_seeds_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, t(2) at 97.5 % is 4.302653, so 2 +- 4.302653 / sqrt 3; not the 1.96 of many."""
    found = estimate([1, 2, 3])
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate([1, 2, 3], confidence=0.5).half_width == pytest.approx(0.816497 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    """Nothing is invented; none at all has no mean either."""
    one, none = estimate([0.5]), estimate([])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(none.mean) and none.n == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    """The mean is that of the others."""
    found = estimate([1.0, bad, 2.0, 3.0])
    assert found == estimate([1.0, 2.0, 3.0]).__class__(found.mean, found.low, found.high, 3, 1)
    assert found.mean == 2


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=10))
def test_runs_of_the_same_seeds_are_compared_in_pairs(pairs: list[tuple[float, float]]) -> None:
    """What scipy gives: `ttest_rel`; the interval is that of the differences."""
    a, b = ({str(seed): pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found = difference("a", "b", {"a": a, "b": b})
    shifts = np.array(list(b.values())) - np.array(list(a.values()))
    rounding = 16 * np.finfo(float).eps * max(abs(value) for pair in pairs for value in pair)
    assert found.method == (
        "paired" if np.std(shifts, ddof=1) > rounding or abs(shifts.mean()) <= rounding else "untested"
    )
    assert found.estimate == estimate(shifts)
    if np.std(shifts) > 1e-9:
        assert found.p == pytest.approx(stats.ttest_rel(list(b.values()), list(a.values())).pvalue, rel=1e-9)


def test_a_seed_that_only_one_has_is_left_out_of_the_pairs() -> None:
    """Pairs are 17 and 18; 99 would have changed the mean."""
    found = difference("a", "b", {"a": {"17": 1.0, "18": 2.0, "99": 50.0}, "b": {"18": 2.5, "17": 1.3}})
    assert (found.estimate.mean, found.estimate.n) == (pytest.approx(0.4), 2)


@given(st.lists(LOSSES, min_size=2, max_size=8), st.lists(LOSSES, min_size=2, max_size=8))
def test_other_seeds_are_compared_by_welch(a: list[float], b: list[float]) -> None:
    """What scipy gives: `ttest_ind` without equal variances, test and interval."""
    found = difference(
        "a", "b", {"a": {f"a{i}": x for i, x in enumerate(a)}, "b": {f"b{i}": x for i, x in enumerate(b)}}
    )
    rounding = 16 * np.finfo(float).eps * max(map(abs, a + b))
    error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    same = abs(np.mean(b) - np.mean(a)) <= rounding
    assert found.method == ("welch" if error > rounding or same else "untested")
    if np.std(a) + np.std(b) > 1e-6:
        theirs = stats.ttest_ind(b, a, equal_var=False)
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
        interval = theirs.confidence_interval()
        assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


@pytest.mark.parametrize("b", [{"17": 0.6}, {"18": 0.6}, {}, {"17": math.nan, "18": 0.6}])
def test_a_single_pair_is_not_tested(b: dict[str, float]) -> None:
    """The shift is told where there is one; no p, no interval, not distinguishable."""
    found = difference("a", "b", {"a": {"17": 0.5}, "b": b})
    assert found.method == "untested" and math.isnan(found.p) and math.isnan(found.estimate.low)
    assert not found.distinguishable
    assert math.isnan(found.estimate.mean) if not b else found.estimate.mean == pytest.approx(0.1)


def test_without_any_spread_there_is_no_test() -> None:
    """Two seeds with one and the same count of spikes are no proof; equal runs do not differ."""
    same = difference("a", "b", {"a": {"1": 1.0, "2": 2.0}, "b": {"1": 1.0, "2": 2.0}})
    shifted = difference("a", "b", {"a": {"1": 1.0, "2": 2.0}, "b": {"1": 1.5, "2": 2.5}})
    assert same.p == 1.0 and shifted.method == "untested" and math.isnan(shifted.p) and not shifted.distinguishable


@pytest.mark.parametrize(("a", "b"), [([1 / 3, 1 / 3, 1 / 3], [1.0, 1.0, 1.0]), ([0.3, 0.4], [0.4, 0.5])])
@pytest.mark.parametrize("paired", [True, False])
def test_a_spread_that_is_only_rounding_is_none(a: list[float], b: list[float], paired: bool) -> None:
    """F1 of 1/3 on each of three seeds is one value, whatever the last bit of its mean; of Welch's, where both are."""
    names = ("", "") if paired else ("a", "b")
    x, y = ({f"{name}{i}": value for i, value in enumerate(of)} for name, of in zip(names, (a, b), strict=True))
    found = difference("a", "b", {"a": x, "b": y})
    alike = paired or len(set(a)) == len(set(b)) == 1
    assert (found.method == "untested", math.isnan(found.p)) == (alike, alike)
    if paired:
        assert math.isnan(contrast({"a": -1, "b": 1}, {"a": x, "b": y}).p)


def test_holm_by_hand() -> None:
    """Sorted .01 x 3, .02 x 2, .04 x 1: .03, .04, .04. A p that is missing counts for nothing."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.02, math.nan, 0.01])[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(holm([0.02, math.nan])[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    """Its step-down values never fall, and never exceed p times the number of tests."""
    adjusted = holm(p_values)
    by_raw = [adjusted[i] for i in sorted(range(len(p_values)), key=p_values.__getitem__)]
    assert by_raw == sorted(by_raw)
    assert all(p <= a <= min(1, p * len(p_values)) + 1e-15 for p, a in zip(p_values, adjusted, strict=True))


def test_all_pairs_are_compared_and_corrected_together() -> None:
    """Three strategies, three pairs: the far one is told apart from both, the near ones are not."""
    values = {
        "near": {"17": 0.500, "18": 0.510, "19": 0.490, "20": 0.505},
        "far": {"17": 0.600, "18": 0.611, "19": 0.589, "20": 0.606},
        "nearer": {"17": 0.501, "18": 0.508, "19": 0.491, "20": 0.505},
    }
    found = {(d.first, d.second): d for d in all_differences(values)}
    assert list(found) == [("near", "far"), ("near", "nearer"), ("far", "nearer")]
    assert [d.distinguishable for d in found.values()] == [True, False, True]
    assert [d.p_adjusted for d in found.values()] == pytest.approx(holm([d.p for d in found.values()]))


def test_two_strategies_that_are_one_are_seldom_told_apart() -> None:
    """Four equal strategies, all pairs: a wrong "distinguishable" in at most 5 % of 400 verdicts, and 3 sigma."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        values = {name: {str(seed): float(generator.normal()) for seed in range(4)} for name in "abcd"}
        wrong += any(pair.distinguishable for pair in all_differences(values))
    assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_the_bootstrap_weights_records_by_their_tokens() -> None:
    """(3 + 1) / (10 + 30) more nats a token; one generator state gives one interval."""
    arguments = ([5.0, 9.0], [8.0, 10.0], [10, 30])
    found = paired_bootstrap(*arguments, np.random.default_rng(3))
    assert found.mean == pytest.approx(0.1)
    # of two records, both draws the first: 6/20; both the second: 2/60; and those are the ends of the interval
    assert (found.low, found.high) == pytest.approx((2 / 60, 6 / 20))
    assert paired_bootstrap(*arguments, np.random.default_rng(3)) == found
    assert found.n == 2


def test_the_bootstrap_is_scipys() -> None:
    """The percentile interval of the same statistic, to the noise of 10,000 resamples: 2 % of its width."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 90, size=80)
    first = tokens * generator.gamma(4, 0.15, size=80)
    second = first + tokens * generator.normal(0.02, 0.1, size=80)
    found = paired_bootstrap(first, second, tokens, np.random.default_rng(0))

    def shift(a: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int) -> np.ndarray:
        return (b - a).sum(axis=axis) / n.sum(axis=axis)

    theirs = stats.bootstrap(
        (first, second, tokens), shift, paired=True, vectorized=True, n_resamples=10_000, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(found.low - theirs.low) < 0.02 * width and abs(found.high - theirs.high) < 0.02 * width


def test_records_that_do_not_match_are_refused() -> None:
    """A wrong shape is an error and not a wrong number."""
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap([1.0, 2.0], [1.0], [3, 4], np.random.default_rng(0))
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap([], [], [], np.random.default_rng(0))


def test_seeds_to_settle_are_as_many_as_give_the_power() -> None:
    """Differences of mean 1 and deviation 1: ten pairs have a power of 0.803, nine 0.749 (one-sample t, two-sided)."""
    shifts = np.array([-1.0, 0.0, 1.0]) + 1.0
    found = difference("a", "b", {"a": {str(i): 0.0 for i in range(3)}, "b": dict(zip("012", shifts, strict=True))})
    assert found.estimate.mean == 1 and np.std(shifts, ddof=1) == 1
    assert seeds_to_settle(found) == 10
    clear = difference("a", "b", {"a": {"1": 0.5, "2": 0.5}, "b": {"1": 0.6, "2": 0.602}})
    assert seeds_to_settle(clear, alpha=0.005) in (3, 4)  # far out, where scipy's noncentral t is nan
    untested = difference("a", "b", {"a": {"1": 1.0}, "b": {"1": 2.0}})
    assert seeds_to_settle(untested) is None


# --- effects ------------------------------------------------------------------------------------------------------


def test_a_contrast_of_two_is_their_paired_difference() -> None:
    """Weights 1 and -1: the same estimate and p, over the blocks that both have."""
    values = {"a": {"1": 0.5, "2": 0.6, "3": 0.7}, "b": {"1": 0.4, "2": 0.7, "4": 9.0}}
    found, wanted = contrast({"b": 1, "a": -1}, values), difference("a", "b", values)
    assert (found.estimate, found.p) == (wanted.estimate, wanted.p)


def test_effects_of_a_2x2_by_hand() -> None:
    """Cells 1, 2, 3, 8 and 2, 3, 4, 11: main effects (3+8-1-2)/2 = 4 and 5, interaction 8-3-2+1 = 4 and 6."""
    values = {
        "a": {"1": 1.0, "2": 2.0},
        "b": {"1": 2.0, "2": 3.0},
        "c": {"1": 3.0, "2": 4.0},
        "d": {"1": 8.0, "2": 11.0},
    }
    main = contrast({"a": -0.5, "b": -0.5, "c": 0.5, "d": 0.5}, values)
    assert main.estimate == estimate([4, 5])
    found = contrast({"a": 1, "b": -1, "c": -1, "d": 1}, values)
    assert found.estimate == estimate([4, 6])
    assert found.p == pytest.approx(stats.ttest_1samp([4, 6], 0).pvalue)


def test_a_contrast_without_two_shared_seeds_has_no_interval() -> None:
    """Means are subtracted; how sure that is, is not invented."""
    found = contrast({"a": -1, "b": 1}, {"a": {"1": 1.0, "2": 2.0}, "b": {"3": 4.0}})
    assert (found.estimate.mean, found.estimate.n) == (2.5, 1)
    assert math.isnan(found.estimate.low) and math.isnan(found.p) and not found.distinguishable


def test_the_interaction_is_that_of_a_linear_model() -> None:
    """F from residual sums of squares of two models with all margins of seeds, with and without arm x domain."""
    generator = np.random.default_rng(3)
    seeds, a, b = 4, 3, 2
    y = generator.normal(size=(seeds, a, b)) + generator.normal(size=(seeds, 1, 1))
    y[:, 0, 0] += 1.0
    found = interaction(y)

    def residual(*terms: str) -> float:
        codes = dict(zip("sab", np.indices((seeds, a, b)).reshape(3, -1), strict=True))
        columns = [np.ones(y.size)]
        for term in terms:
            key = sum(codes[letter] * 10**i for i, letter in enumerate(term))
            columns += [(key == value).astype(float) for value in np.unique(key)]
        design = np.stack(columns, axis=1)
        fitted = design @ np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
        return float(((y.ravel() - fitted) ** 2).sum())

    without, full = residual("sa", "sb"), residual("sa", "sb", "ab")
    degrees = ((a - 1) * (b - 1), (a - 1) * (b - 1) * (seeds - 1))
    f = (without - full) / degrees[0] / (full / degrees[1])
    assert found.freedom == degrees
    assert found.f == pytest.approx(f, rel=1e-9)
    assert found.p == pytest.approx(float(stats.f.sf(f, *degrees)), rel=1e-9)


def test_arms_that_differ_alike_in_every_domain_do_not_interact() -> None:
    """Parallel rows: size 0; one seed has no test."""
    parallel = np.array([[[0.5, 0.7], [0.6, 0.8]]])
    found = interaction(parallel)
    assert found.size == pytest.approx(0, abs=1e-12) and math.isnan(found.p)
    crossed = interaction(np.array([[[0.0, 1.0], [1.0, 0.0]]]))
    assert crossed.size == pytest.approx(0.5)


def test_of_many_strategies_only_pairs_with_the_first_are_compared() -> None:
    """41 arms, 820 pairs: 40 are looked at, and p counts all 820 (Bonferroni), which Holm over all never exceeds."""
    generator = np.random.default_rng(5)
    values = {f"arm{i:02}": {str(seed): float(generator.normal()) + (i > 0) for seed in range(5)} for i in range(41)}
    found = all_differences(values)
    assert [(pair.first, pair.second) for pair in found] == [("arm00", f"arm{i:02}") for i in range(1, 41)]
    assert all(pair.p_adjusted == min(1.0, 820 * pair.p) for pair in found)
