"""Metric rows worked out by hand from a few events."""

import math

import pytest

from trainer import names
from trainer.events import CheckpointSaved, EvalDone, RecordLosses, Seen, StepDone, StoppedEarly
from trainer.metrics import SPIKE_MIN_ROWS, Meter, Smoothing, Spikes, vision_gain


def meter(**changes: object) -> Meter:
    """A meter that logs every second step of ten."""
    return Meter(**{"logging_steps": 2, "log_first": False, "total_steps": 10, "smoothing": 0.6} | changes)  # type: ignore[arg-type]


def step(number: int, loss: float, tokens: int = 10) -> StepDone:
    """A step of 4 samples and one second."""
    seen = Seen(number, number / 5, 4 * number, 100 * number, tokens * number, float(number))
    return StepDone(seen, loss, tokens, {"vision": 1e-4}, {"total": 5.0, "vision": 3.0})


def losses(*pairs: tuple[float, int], domains: tuple[str | None, ...] | None = None) -> RecordLosses:
    """Records r0, r1 ... with these sums and token counts."""
    ids = tuple(f"r{i}" for i in range(len(pairs)))
    return RecordLosses(ids, domains or (None,) * len(pairs), *zip(*pairs, strict=True))  # type: ignore[arg-type]


def evaluation(number: int, loss: float, **others: RecordLosses) -> EvalDone:
    """An evaluation whose eval loss is `loss`."""
    return EvalDone(Seen(step=number, samples=4 * number), {"eval": losses((loss * 10, 10))} | others, 0.1)


def test_smoothing_matches_tensorboards_reference_values() -> None:
    """The values of TensorBoard's own test: 1, .5, 0 at weight .6."""
    smoothing = Smoothing(0.6)
    assert [smoothing.add(x) for x in (1.0, 0.5, 0.0)] == pytest.approx([1.0, 0.6875, 0.3367346938])


def test_smoothing_keeps_a_constant_and_passes_non_finite_values_through() -> None:
    """A constant stays itself from the first point on; a NaN is shown and not remembered."""
    smoothing = Smoothing(0.6)
    assert [smoothing.add(0.3) for _ in range(5)] == pytest.approx([0.3] * 5)
    assert math.isnan(smoothing.add(math.nan))
    assert smoothing.add(0.3) == pytest.approx(0.3)


def test_the_train_loss_of_a_row_is_weighted_by_tokens_over_the_steps_since_the_last_row() -> None:
    """Loss 1 on 30 tokens and 2 on 10 tokens is 1.25, not 1.5."""
    m = meter()
    assert m.rows(step(1, 1.0, tokens=30)) == {}
    row = m.rows(StepDone(Seen(2, 0.4, 8, 200, 40, 2.0), 2.0, 10, {"vision": 1e-4}, {"total": 5.0}))
    assert row[names.TRAIN_LOSS] == 1.25
    assert row[names.SAMPLES_PER_SECOND] == 4.0
    assert row[names.LEARNING_RATE + "vision"] == 1e-4
    assert row[names.GRAD_NORM + "total"] == 5.0


def test_a_row_is_due_every_logging_steps_at_the_first_when_asked_and_at_the_last() -> None:
    """Ten steps, a row every four."""
    m = meter(logging_steps=4, log_first=True)
    assert [n for n in range(1, 11) if m.rows(step(n, 1.0))] == [1, 4, 8, 10]


def test_the_gap_is_smoothed_eval_loss_minus_the_latest_smoothed_train_loss() -> None:
    """The report's definition; before any train row there is no gap."""
    m = meter(logging_steps=1)
    assert names.GAP not in m.rows(evaluation(0, 2.0))
    m.rows(step(1, 1.0))
    m.rows(step(2, 0.5))
    row = m.rows(evaluation(2, 1.0))
    smoothed_eval = (0.6 * 0.4 * 2.0 + 0.4 * 1.0) / (1 - 0.36)
    assert row[names.GAP] == pytest.approx(smoothed_eval - 0.6875)


def test_the_clean_gap_compares_two_evaluations() -> None:
    """Eval loss minus probe loss, neither smoothed nor augmented."""
    row = meter().rows(evaluation(0, 2.0, probe=losses((5.0, 10))))
    assert row[names.GAP_CLEAN] == pytest.approx(1.5)
    assert row[names.PROBE_LOSS] == 0.5


def test_the_mean_over_records_is_weighted_by_tokens_and_split_by_domain() -> None:
    """Sums divided by sums; records without a domain count in the whole only."""
    many = losses((1.0, 10), (8.0, 10), (3.0, 30), domains=("a", "b", None))
    assert many.mean() == pytest.approx(12 / 50)
    assert many.mean_by_domain() == {"a": 0.1, "b": 0.8}
    row = meter().rows(EvalDone(Seen(), {"eval": many}, 0.1))
    assert row[names.EVAL_LOSS_BY_DOMAIN + "b"] == 0.8


def test_vision_gain_compares_the_same_records() -> None:
    """Only records with a partner are exchanged, and only they are compared."""
    right = losses((1.0, 10), (2.0, 10), (9.0, 10))
    exchanged = RecordLosses(("r1", "r0"), (None, None), (5.0, 4.0), (10, 10))
    assert vision_gain({"eval": right, "exchanged_images": exchanged}) == pytest.approx((9.0 - 3.0) / 20)


def test_best_loss_step_and_samples_to_best() -> None:
    """Samples until within 1 % of the best so far; a later better one moves it."""
    m = meter()
    assert m.rows(evaluation(0, 2.0))[names.BEST_STEP] == 0
    m.rows(evaluation(1, 1.005))
    row = m.rows(evaluation(2, 1.0))
    assert (row[names.BEST_LOSS], row[names.BEST_STEP], row[names.SAMPLES_TO_BEST]) == (1.0, 2, 4)
    row = m.rows(evaluation(3, 1.5))
    assert (row[names.BEST_LOSS], row[names.BEST_STEP]) == (1.0, 2)
    assert m.rows(evaluation(4, 0.5))[names.SAMPLES_TO_BEST] == 16


def test_spikes_are_rows_above_the_median_by_five_mads() -> None:
    """Nothing is judged before ten rows; then a jump counts once, a value on the line does not."""
    for loss, count in ((1.5 + 5 * 0.5, 0), (1.5 + 5 * 0.5 + 0.01, 1)):
        spikes = Spikes()
        assert [spikes.add(x) for x in [1.0, 2.0] * (SPIKE_MIN_ROWS // 2)][-1] == 0
        assert spikes.add(loss) == count
    early = Spikes()
    assert [early.add(x) for x in [1.0] * (SPIKE_MIN_ROWS - 1)][-1] == 0
    assert early.add(100.0) == 0


def test_a_checkpoint_brings_its_size() -> None:
    """In bytes."""
    assert meter().rows(CheckpointSaved(Seen(), "best", "there", 123)) == {names.CHECKPOINT_BYTES: 123.0}


def test_every_metric_of_a_row_is_in_the_table_of_names() -> None:
    """A name that is logged has a unit; a typing error would be a second curve."""
    m = meter(logging_steps=1)
    rows = [m.rows(step(1, 1.0)), m.rows(evaluation(1, 1.0, probe=losses((5.0, 10)), ood=losses((5.0, 10))))]
    for name in (key for row in rows for key in row):
        assert names.metric(name).unit


def test_an_early_end_brings_the_row_that_was_not_due_yet() -> None:
    """A row every second step: stopped after the third, its loss is not lost; after the second nothing is."""
    m = meter()
    m.rows(step(1, 3.0))
    assert m.rows(step(2, 2.0))[names.TRAIN_LOSS] == 2.5
    assert m.rows(StoppedEarly(Seen(step=2), 1)) == {}
    assert m.rows(step(3, 1.0)) == {}
    row = m.rows(StoppedEarly(Seen(step=3), 1))
    assert (row[names.TRAIN_LOSS], row[names.SAMPLES_SEEN]) == (1.0, 12)


def test_seconds_of_evaluations_add_up() -> None:
    """0.1 s each; what measuring costs stands beside what training takes."""
    m = meter()
    m.rows(evaluation(0, 1.0))
    assert m.rows(evaluation(2, 1.0))[names.EVALUATION_SECONDS] == pytest.approx(0.2)


def test_a_mean_does_not_depend_on_the_order_of_records() -> None:
    """Ranks and packs bring them in other orders: 0.1 ten times, beside 1e16 and its opposite, is exactly 1."""
    sums = [0.1] * 10 + [1e16, -1e16]
    forward, backward = (losses(*[(x, 1) for x in order]) for order in (sums, sums[::-1]))
    assert forward.mean() == backward.mean() == pytest.approx(1.0 / 12, rel=1e-15)
