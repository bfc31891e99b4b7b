"""Arms against a margin: against scipy and numbers worked out by hand, and the errors that were asked for."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.margins import margins, pooled_spread, shares
from analysis.statistics import holm

LOSSES = {
    "a": {1: 1.00, 2: 1.10, 3: 1.20},
    "b": {1: 1.31, 2: 1.40, 3: 1.49},
    "c": {1: 1.02, 2: 1.12, 3: 1.22},
}


def test_the_pooled_spread_is_that_of_a_two_way_layout_without_interaction() -> None:
    """By hand: seeds are 0.1 apart in a and c and 0.09 in b, so that the residuals are thirds of a hundredth."""
    spread, freedom = pooled_spread(LOSSES)
    a, b = 0.01 / 3, -0.02 / 3  # of each arm: at the first seed minus, at the third plus
    assert freedom == 4
    assert spread == pytest.approx(math.sqrt((2 * 2 * a**2 + 2 * b**2) / 4), rel=1e-9)


def test_a_seed_that_is_hard_for_all_is_no_spread() -> None:
    """Only what it does to one arm and not to the others counts."""
    shifted = {arm: {seed: value + 7 * seed for seed, value in of.items()} for arm, of in LOSSES.items()}
    assert pooled_spread(shifted) == pytest.approx(pooled_spread(LOSSES))


def test_two_arms_are_the_paired_t_test_against_the_margin() -> None:
    """Pooled and own spread are one then: scipy's one-sample test of the differences, shifted by the margin."""
    values = {"a": {1: 1.0, 2: 1.3, 3: 1.1, 4: 0.9}, "b": {1: 1.2, 2: 1.33, 3: 1.4, 4: 1.0}}
    (found,) = margins(values, "a", 0.05, error=0.1)
    differences = [0.2, 0.03, 0.3, 0.1]
    behind = stats.ttest_1samp(differences, 0.05, alternative="greater").pvalue
    inside = stats.ttest_1samp(differences, 0.05, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -0.05, alternative="greater").pvalue
    assert found.p_behind == pytest.approx(behind)
    assert found.p_equivalent == pytest.approx(max(inside, above))
    assert found.p == pytest.approx(2 * min(behind, inside))
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high))


def test_an_arm_that_scatters_more_than_the_rest_has_its_own_spread() -> None:
    """And one that scatters less has the pooled one, which the wild one has made wider: careful both times."""
    values = LOSSES | {"wild": {1: 1.0, 2: 2.0, 3: 1.5}}
    found = {margin.arm: margin for margin in margins(values, "a", 0.01, error=0.05)}
    spread, freedom = pooled_spread(values)
    half = stats.t.isf(0.05 / 6, freedom)  # three arms, two sides
    own = np.std([0.0, 0.9, 0.3], ddof=1) / math.sqrt(3)
    assert own > spread * math.sqrt(2 / 3)
    assert found["wild"].estimate.half_width == pytest.approx(half * own)
    assert found["b"].estimate.half_width == pytest.approx(half * spread * math.sqrt(2 / 3))


def test_p_is_corrected_over_both_questions_and_over_arms() -> None:
    """Holm over what is twice the smaller of an arm's two."""
    found = margins(LOSSES, "a", 0.05, error=0.05)
    raw = [min(1.0, 2 * min(one.p_behind, one.p_equivalent)) for one in found]
    assert [one.p for one in found] == pytest.approx(holm(raw))


def test_identical_arms_are_within_any_margin_and_leave_no_spread() -> None:
    """The same training twice comes out bit-identical: no division by nothing."""
    twin, far = {1: 1.0, 2: 1.5}, {1: 1.1, 2: 1.6}
    (same,) = margins({"a": twin, "b": dict(twin)}, "a", 0.01, error=0.05)
    assert (same.p_equivalent, same.p_behind, same.p) == (0.0, 1.0, 0.0)
    (behind,) = margins({"a": {1: 1.0, 2: 2.0}, "b": {1: 1.5, 2: 2.5}}, "a", 0.01, error=0.05)
    assert (behind.p_equivalent, behind.p_behind, behind.p) == (1.0, 0.0, 0.0)
    assert len(margins({"a": twin, "b": dict(twin), "c": far}, "a", 0.01, error=0.05)) == 2


@pytest.mark.parametrize(
    "values",
    [{"a": {1: 1.0}, "b": {1: 2.0}}, {"a": {1: 1.0, 2: 1.0}}, {"a": {1: 1.0, 2: 1.0}, "b": {1: 1.0, 3: 1.0}}, {}],
)
def test_what_cannot_be_compared_is_refused(values: dict[str, dict[int, float]]) -> None:
    """One seed, one arm, other seeds, nothing."""
    with pytest.raises(ValueError, match="are needed"):
        margins(values, "a", 0.01, error=0.05)


@pytest.mark.parametrize(("looks", "split"), [(1, [1]), (2, [0.5, 0.5]), (3, [0.5, 0.25, 0.25])])
def test_an_error_is_split_in_halves_and_used_up_at_the_last_look(looks: int, split: list[float]) -> None:
    """In sum the whole."""
    assert shares(0.05, looks) == pytest.approx([0.05 * part for part in split])
    assert sum(shares(0.05, looks)) == pytest.approx(0.05)


@pytest.mark.parametrize("truth", [0.0, 0.02])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    """Two arms, four seeds, a tenth of error: 400 draws, of which 40 miss on average; six deviations of room."""
    generator = np.random.default_rng(5)
    missed = 0
    for _ in range(400):
        seeds, noise = generator.normal(size=4), generator.normal(scale=0.01, size=(2, 4))
        values = {
            name: {i: float(1 + shift + seeds[i] + noise[row, i]) for i in range(4)}
            for row, (name, shift) in enumerate({"a": 0.0, "b": truth}.items())
        }
        (found,) = margins(values, "a", 0.01, error=0.1)
        missed += not found.estimate.low <= truth <= found.estimate.high
    assert abs(missed - 40) <= 36
