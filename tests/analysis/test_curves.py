"""Curves: what was written last counts, smoothing is TensorBoard's, reading stops where the curve does."""

import math

import pytest

from analysis.curves import debiased_ema, last_write_wins


def test_smoothing_gives_tensorboards_reference_values() -> None:
    """1, .5, 0 at weight .6: 1, .6875, .33673 in TensorBoard."""
    assert debiased_ema([1, 0.5, 0]) == pytest.approx([1, 0.6875, 0.33673], abs=5e-6)
    assert list(debiased_ema([1, 0.5, 0], 0)) == [1, 0.5, 0]
    assert len(debiased_ema([])) == 0


def test_what_is_not_finite_passes_through_and_is_not_remembered() -> None:
    """The reference values come out around a nan and an infinity."""
    smoothed = debiased_ema([1, math.nan, 0.5, math.inf, 0])
    assert smoothed[[0, 2, 4]] == pytest.approx([1, 0.6875, 0.33673], abs=5e-6)
    assert math.isnan(smoothed[1]) and smoothed[3] == math.inf


@pytest.mark.parametrize("weight", [-0.1, 1.0, 1.5])
def test_a_weight_outside_is_refused(weight: float) -> None:
    """At 1 nothing would ever be forgotten."""
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        debiased_ema([1.0], weight)


def test_after_a_resume_the_last_write_wins() -> None:
    """Steps 20 and 30 were done twice; the second time is what training went on from."""
    rows = [(10, 100, 1.0), (20, 200, 0.9), (30, 300, 0.8), (20, 400, 0.95), (30, 500, 0.85), (40, 600, 0.7)]
    curve = last_write_wins(rows)
    assert curve.steps.tolist() == [10, 20, 30, 40]
    assert curve.values.tolist() == [1.0, 0.95, 0.85, 0.7]
    assert curve.times.tolist() == [100, 400, 500, 600]
    assert last_write_wins(reversed(rows)).values.tolist() == curve.values.tolist()


def test_points_that_are_not_finite_stay_and_are_counted() -> None:
    """They are drawn as gaps, kept out of the smoothing, and told."""
    curve = last_write_wins([(1, 1, 1.0), (2, 2, math.nan), (3, 3, math.inf), (4, 4, 0.5)])
    assert curve.n_not_finite == 2
    assert curve.smoothed().values[[0, 3]] == pytest.approx([1, 0.6875])


def test_a_curve_is_not_read_beyond_its_end() -> None:
    """Before the first point and after the last there is nothing; between, the last value holds."""
    curve = last_write_wins([(10, 1, 1.0), (20, 2, 0.9)])
    assert [curve.at_or_before(step) for step in (10, 15, 20)] == [1.0, 1.0, 0.9]
    assert math.isnan(curve.at_or_before(9)) and math.isnan(curve.at_or_before(21))
    assert math.isnan(last_write_wins([]).at_or_before(0))
