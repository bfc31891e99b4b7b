"""The paired bootstrap over validation records: which records, which evaluation, whose mean."""

import pandas as pd
import pytest

from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.records import over_records
from tests.analysis.test_ranking import run

LOSS = "eval/loss"


def losses(sums: list[float], at: str = "last", ids: str = "abcdef") -> pd.DataFrame:
    """Per-record losses of one run: four tokens a record, and a record of another set that must not count."""
    rows = [{"at": at, "step": 9, "set": "eval", "record_id": i, "domain": "d", "loss_sum": s, "tokens": 4}
            for i, s in zip(ids, sums, strict=False)]  # fmt: skip
    return pd.DataFrame([*rows, {**rows[0], "set": "ood", "loss_sum": 1e9}])


def ranking(*runs: tuple[str, int, float], at: str = "final") -> Ranking:
    """(arm, seed, loss)."""
    found = [read(run(arm, seed, loss), LOSS, At(), {}) for arm, seed, loss in runs]
    return rank([one for one in found if isinstance(one, Reading)], LOSS, At(at))


def test_seeds_are_averaged_and_records_resampled() -> None:
    """a: records 1, 2, 3 and 3, 4, 5, mean 2, 3, 4; b one more on each: .25 nats a token, whatever is drawn."""
    kept = {"a-0": losses([1, 2, 3]), "a-1": losses([3, 4, 5]), "b-0": losses([3, 4, 5])}
    (found,) = over_records(ranking(("a", 0, 0.5), ("a", 1, 0.5), ("b", 0, 0.6)), kept.get)
    assert found.arm == "b" and found.difference.n == 3
    assert (found.difference.mean, found.difference.low, found.difference.high) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_holds_what_records_leave_open() -> None:
    """Three records better and three worse: nothing can be said of other records."""
    kept = {"a-0": losses([1, 1, 1, 1, 1, 1]), "b-0": losses([2, 0, 3, 0.5, 0, 0])}
    (found,) = over_records(ranking(("a", 0, 0.5), ("b", 0, 0.6)), kept.get)
    assert found.difference.low < 0 < found.difference.high
    assert over_records(ranking(("a", 0, 0.5), ("b", 0, 0.6)), kept.get) == [found]  # one generator, one answer


@pytest.mark.parametrize("missing", ["no artifact", "other records", "another evaluation"])
def test_an_arm_without_the_same_records_is_left_out(missing: str) -> None:
    """Nothing is compared across sets."""
    other = {
        "no artifact": None,
        "other records": losses([1, 2, 3], ids="xyz"),
        "another evaluation": losses([1], "best"),
    }
    kept = {"a-0": losses([1, 2, 3]), "b-0": other[missing]}
    assert over_records(ranking(("a", 0, 0.5), ("b", 0, 0.6)), kept.get) == []


def test_the_best_evaluation_is_read_where_the_ranking_was_read_there() -> None:
    """And elsewhere no records were kept."""
    kept = {"a-0": losses([1, 2, 3], "best"), "b-0": losses([2, 3, 4], "best")}
    pair = ("a", 0, 0.5), ("b", 0, 0.6)
    assert len(over_records(ranking(*pair, at="best"), kept.get)) == 1
    assert over_records(ranking(*pair), kept.get) == []
    assert over_records(ranking(*pair, at="samples"), kept.get) == []
