"""The verdict and what hangs on it: order and test can disagree, seeds diverge, values be 0 or nan."""

import math

import pytest

from analysis.advice import next_steps, recommendation
from analysis.champion import promote
from analysis.checks import careful_reading
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.subject import subject_of
from analysis.verdict import listed, standing, verdict
from tests.analysis.test_ranking import LOSS, readings, run
from trainer.errors import UserError


def ranking(arms: dict[str, dict[int, float]], by: str = LOSS) -> Ranking:
    """Arm -> seed -> value."""
    found = [read(run(arm, seed, metrics={by: v}), by, At(), {}) for arm, of in arms.items() for seed, v in of.items()]
    return rank([one for one in found if isinstance(one, Reading)], by, At())


REVERSED = {
    "a": {17: 0.60, 18: 0.61, 19: 0.62},
    "b": {17: 0.595, 18: 0.6045, 19: 0.6152, 20: 0.70, 21: 0.71},
}


def test_a_winner_that_is_behind_on_shared_seeds_is_no_winner() -> None:
    """Its mean is lower because the other has two bad seeds more; in pairs the other is better, by more than noise."""
    found = ranking(REVERSED)
    assert found.rows[0].label == "a" and found.differences[0].distinguishable
    assert standing(found, found.rows[1]) == "reversed"
    assert any("behind on the seeds that both have" in line for line in verdict(found))
    advice = recommendation(found, [])
    assert advice.confidence == "low" and "give both arms the same seeds" in " ".join(advice.why)
    with pytest.raises(UserError, match="not distinguishable"):
        promote(None, found, "m", "a", anyway=False)  # type: ignore[arg-type]  # refused before the store is asked


def test_diverged_seeds_are_said_and_lower_the_confidence() -> None:
    """Two of five ended in nan: the mean is that of the three that went well."""
    found = ranking(
        {"a": {1: 0.50, 2: 0.501, 3: 0.499, 4: math.nan, 5: math.nan}, "b": {i: 0.6 + i / 1000 for i in range(1, 6)}}
    )
    findings = careful_reading(subject_of(found))
    assert [f.check for f in findings] == ["diverged"] and "2 of 5 runs of a" in findings[0].text
    assert recommendation(found, findings).confidence == "moderate"


def test_an_arm_without_any_finite_value_is_named_as_such() -> None:
    """Not as one with too few seeds."""
    found = ranking({"a": {1: 0.5, 2: 0.51}, "b": {1: math.nan, 2: math.nan}})
    assert "Without a finite value: b." in verdict(found)
    assert verdict(ranking({"a": {1: math.nan}, "b": {1: math.nan}})) == ["No arm has a finite eval/loss."]


@pytest.mark.parametrize("by", ["loss_spikes", "eval/f1"])
def test_a_winner_of_zero_breaks_nothing(by: str) -> None:
    """No percentage of 0, and no traceback."""
    found = ranking(
        {"a": {1: 0.0, 2: 0.0}, "b": {1: 1.0, 2: 2.0}} if by == "loss_spikes" else {"a": {1: 0.0}, "b": {1: 0.0}}, by
    )
    assert "nan" not in " ".join(verdict(found))
    assert isinstance(careful_reading(subject_of(found)), list)
    recommendation(found, [])


def test_nothing_to_promote_is_told() -> None:
    """An empty ranking."""
    with pytest.raises(UserError, match="no run that can be ranked"):
        promote("store", rank([], LOSS, At()), "m", "a", anyway=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "alias", "option"),
    [("a/b", "champion", "--name"), (" ", "champion", "--name"), ("m", "a b", "--alias"), ("m", "v2", "--alias"),
     ("m", "Latest", "--alias"), ("m", "", "--alias")],
)  # fmt: skip
def test_a_name_that_mlflow_does_not_take_is_told_as_that(name: str, alias: str, option: str) -> None:
    """And not as a fault of the store."""
    with pytest.raises(UserError, match=option):
        promote("store", ranking(REVERSED), name, alias, anyway=True)  # type: ignore[arg-type]


def test_a_row_a_run_has_no_verdict_on_seeds() -> None:
    """And keeps every run, also those of one name."""
    twins = [read(run(seed=17, id=f"aaaaaa{i}"), LOSS, At(), {}) for i in range(3)]
    found = rank([one for one in twins if isinstance(one, Reading)], LOSS, At(), each=True)
    assert len(found.rows) == 3 and "only runs pooled by arm can tell" in verdict(found)[0]


def test_arms_of_one_name_are_all_kept() -> None:
    """`run #2` is a strategy of its own, and settings beyond the third are not in a name."""
    runs = [run("run #2"), run("run", params={f"training.x{i}": "1" for i in range(5)}), run("run", 18)]
    found = rank([r for r in (read(one, LOSS, At(), {}) for one in runs) if isinstance(r, Reading)], LOSS, At())
    assert len(found.rows) == 3


def test_both_arms_are_given_the_seeds_that_settle_a_difference() -> None:
    """Pairs are what is compared: a seed that one arm lacks comes first."""
    found = rank(readings({"a": [0.500, 0.520, 0.480], "b": [0.510, 0.500, 0.505, 0.504]}), LOSS, At())
    steps = [step for step in next_steps(found, []) if "Both arms need them" in step.why or "same seeds" in step.why]
    assert len(steps) == 2


def test_long_lists_are_cut() -> None:
    """A sentence stays one."""
    assert listed([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
