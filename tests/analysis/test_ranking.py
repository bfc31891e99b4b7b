"""Ranking: what is ranked and what not, how seeds are pooled, where a run is read, what the verdict says."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from analysis.curves import Curve, last_write_wins
from analysis.ranking import At, Reading, arms, parse_at, rank, read, why_excluded
from analysis.runs import Run
from analysis.verdict import verdict
from benchmarks import recorded
from trainer.errors import UserError

LOSS = "eval/loss"


def run(strategy: str = "arm", seed: int = 17, loss: float = 0.5, **more: Any) -> Run:
    """A run that finished and passed its gate; `params`, `tags`, `status`, `started` as given."""
    tags = {"strategy": strategy, "seed": str(seed), "training_gate": "passed", "data.train_digest": "d"}
    return Run(
        id=more.get("id", f"{strategy}-{seed}"),
        name=f"{strategy}-seed{seed}",
        experiment_id="1",
        status=more.get("status", "FINISHED"),
        started=more.get("started", 0),
        params={"training.seed": str(seed), "tuner.lora_rank": "16"} | more.get("params", {}),
        tags=tags | more.get("tags", {}),
        metrics=more.get("metrics", {LOSS: loss}),
        last_step=more.get("last_step", 100),
    )


def readings(losses: Mapping[str, list[float]]) -> list[Reading]:
    """Runs of seeds 0, 1, 2 ... read at the end."""
    found = [read(run(arm, seed, loss), LOSS, At(), {}) for arm, of in losses.items() for seed, loss in enumerate(of)]
    return [reading for reading in found if isinstance(reading, Reading)]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"status": "RUNNING"}, "is RUNNING"),
        ({"status": "FAILED"}, "is FAILED"),
        ({"status": "KILLED", "tags": {"halving": "behind at 518 samples"}}, "was ended early: behind at 518 samples"),
        ({"tags": {"training_gate": "failed"}}, "its training gate is failed"),
        ({"tags": {"training_gate": "open"}}, "its training gate is open"),
        ({"tags": {"training_gate": ""}}, "has no training gate"),
        ({"tags": {"training_gate": "", "source": "published"}}, None),
        ({"tags": {"continued_in": "abc"}}, "was continued in abc"),
        ({"tags": {"comparison.role": "trial"}}, "has only tried out a learning rate"),
        ({"tags": {"comparison.role": "trial", "sweep.study": "rank"}}, None),
    ],
)
def test_only_runs_that_finished_and_passed_their_gate_are_ranked(more: dict[str, Any], reason: str | None) -> None:
    """Others are listed with the reason; what others have trained has no gate of ours."""
    assert why_excluded(run(**more)) == reason


def test_seeds_are_pooled_and_margins_are_those_of_the_winner() -> None:
    """Means 0.50 and 0.55: 10 % worse. The best comes first."""
    found = rank(readings({"worse": [0.54, 0.56], "better": [0.49, 0.51]}), LOSS, At())
    assert [(row.label, row.estimates[LOSS].n) for row in found.rows] == [("better", 2), ("worse", 2)]
    assert [row.estimates[LOSS].mean for row in found.rows] == pytest.approx([0.50, 0.55])
    assert [row.margin for row in found.rows] == pytest.approx([0, 10])


def test_where_higher_is_better_the_highest_wins() -> None:
    """F1 0.4 is 20 % below 0.5."""
    runs = [run("low", metrics={"eval/f1": 0.4}), run("high", metrics={"eval/f1": 0.5})]
    found = rank([r for r in (read(r, "eval/f1", At(), {}) for r in runs) if isinstance(r, Reading)], "eval/f1", At())
    assert [row.label for row in found.rows] == ["high", "low"]
    assert [row.margin for row in found.rows] == pytest.approx([0, 20])
    assert math.copysign(1, found.rows[0].margin) == 1  # and it is not printed as -0.0 %


def test_each_run_can_have_its_row() -> None:
    """Four runs, four rows."""
    assert len(rank(readings({"a": [0.5, 0.6], "b": [0.7, 0.8]}), LOSS, At(), each=True).rows) == 4


def test_a_seed_that_was_run_twice_counts_once() -> None:
    """It is the same numbers again and no replication: the newer run is taken, the older is told."""
    runs = [run(seed=17, id="old", started=1), run(seed=17, id="new", started=2), run(seed=18, id="other", started=1)]
    found = rank([r for r in (read(r, LOSS, At(), {}) for r in runs) if isinstance(r, Reading)], LOSS, At())
    assert found.rows[0].estimates[LOSS].n == 2
    assert [(r.id, reason) for r, reason in found.excluded] == [("old", "was repeated with the same seed in new")]


def test_runs_of_one_arm_may_lie_on_different_numbers_of_ranks() -> None:
    """As `launch.nproc: auto` lays them on different machines, with the packs of a step unchanged."""
    keys = ("launch.nproc", "training.gradient_accumulation_steps", "effective_batch.packs")
    laid = [dict(zip(keys, values, strict=True)) for values in (("1", "2", "2"), ("2", "1", "2"), ("2", "2", "4"))]
    found = [read(run(seed=seed, params=params), LOSS, At(), {}) for seed, params in enumerate(laid)]
    assert sorted(map(len, arms([reading for reading in found if isinstance(reading, Reading)]).values())) == [1, 2]


def test_runs_of_one_strategy_with_other_settings_are_other_arms() -> None:
    """A sweep over rank is not noise between seeds; seed, folders and tracking make no arm."""
    runs = [
        run(seed=17, params={"tuner.lora_rank": "8", "training.output_dir": "a"}),
        run(seed=18, params={"tuner.lora_rank": "8", "training.output_dir": "b", "tracking.probe_records": "4"}),
        run(seed=17, params={"tuner.lora_rank": "32"}),
    ]
    groups = arms([r for r in (read(r, LOSS, At(), {}) for r in runs) if isinstance(r, Reading)])
    assert {label: len(members) for label, members in groups.items()} == {
        "arm (lora_rank 8)": 2,
        "arm (lora_rank 32)": 1,
    }


def test_what_is_not_finite_is_no_part_of_a_mean() -> None:
    """A run that ended in nan is counted as left out; an arm of nothing else comes last."""
    found = rank(readings({"nan": [math.nan], "mixed": [0.5, math.inf], "good": [0.6]}), LOSS, At())
    assert [row.label for row in found.rows] == ["mixed", "good", "nan"]
    assert (found.rows[0].estimates[LOSS].n, found.rows[0].estimates[LOSS].excluded) == (1, 1)


# --- where a run is read -----------------------------------------------------------------------------------------


def curve(points: dict[int, float]) -> Curve:
    """Step -> value."""
    return last_write_wins([(step, step, value) for step, value in points.items()])


CURVES = {
    LOSS: curve({0: 0.9, 10: 0.5, 20: 0.4, 30: 0.6}),
    "train/loss": curve({1: 0.9, 15: 0.5, 30: 0.3}),
    "samples_seen": curve({0: 0, 10: 160, 20: 320, 30: 480}),
}


@pytest.mark.parametrize(
    ("at", "step", "loss", "train"),
    [
        ("best", 20, 0.4, 0.5),
        ("samples=320", 20, 0.4, 0.5),
        ("samples=319", 10, 0.5, 0.9),
        ("samples=480", 30, 0.6, 0.3),
    ],
)
def test_a_run_is_read_at_its_best_or_when_it_had_seen_so_much(at: str, step: int, loss: float, train: float) -> None:
    """All columns are of that one evaluation: the latest train row up to it."""
    found = read(run(), LOSS, parse_at(at), CURVES)
    assert isinstance(found, Reading)
    assert (found.values["step"], found.values[LOSS], found.values["train/loss"]) == (step, loss, train)


def test_a_run_that_never_came_so_far_is_not_compared_there() -> None:
    """A shorter run is not put in a row with longer ones at a point after its end."""
    assert read(run(), LOSS, parse_at("samples=481"), CURVES) == "ended before samples=481, at 480"
    assert read(run(metrics={}), LOSS, At(), {}) == "has no eval/loss"
    late = {**CURVES, "eval/f1": last_write_wins([(30, 30, 0.4)])}
    f1 = run(metrics={LOSS: 0.5, "eval/f1": 0.4})
    assert read(f1, "eval/f1", parse_at("samples=320"), late) == "has no eval/f1 at samples=320 or before"


@pytest.mark.parametrize("text", ["worst", "samples", "samples=", "samples=many", "samples=-3", "steps=5", "best=2"])
def test_a_place_that_is_none_is_told(text: str) -> None:
    """With what is allowed."""
    with pytest.raises(UserError, match="samples=N"):
        parse_at(text)


@pytest.mark.parametrize(
    ("by", "hint"), [("eval/los", "eval/loss"), ("epoch", "neither"), ("nonsense", "see the metrics")]
)
def test_a_metric_that_cannot_rank_is_told(by: str, hint: str) -> None:
    """A misspelt one with the nearest name; one without a better direction."""
    with pytest.raises(UserError, match=hint):
        rank([], by, At())


# --- the verdict -------------------------------------------------------------------------------------------------


def test_the_verdict_tells_apart_what_the_seeds_allow() -> None:
    """Far on every seed: distinguishable. Now above, now below: not."""
    losses = {
        "winner": [0.500, 0.510, 0.490, 0.505],
        "near": [0.502, 0.509, 0.492, 0.504],
        "far": [0.600, 0.611, 0.589, 0.606],
    }
    lines = verdict(rank(readings(losses), LOSS, At()))
    assert lines[0] == "winner has the lowest eval/loss, 0.5012."
    assert lines[1] == "It is distinguishable from:" and lines[2].startswith("- far: 20.0 % worse; difference +0.100")
    assert lines[3] == "It is not distinguishable from:" and lines[4].startswith("- near: 0.1 % worse")
    assert "paired, n = 4" in lines[2]


def test_with_one_seed_the_verdict_says_that_nothing_can_be_told() -> None:
    """No p value is made up."""
    lines = verdict(rank(readings({"a": [0.5], "b": [0.6]}), LOSS, At()))
    assert "too few seeds" in lines[1] and "b (20.0 %)" in lines[1] and "p =" not in " ".join(lines)
    assert verdict(rank(readings({"a": [0.5]}), LOSS, At())) == ["One arm only: there is nothing to compare it with."]
    assert verdict(rank([], LOSS, At())) == ["No run can be ranked."]


def test_two_equal_arms_with_other_seeds_are_not_distinguishable() -> None:
    """A/A: draws of one distribution."""
    lines = verdict(rank(readings({"a": [0.51, 0.50, 0.52], "a again": [0.50, 0.52, 0.51]}), LOSS, At()))
    assert "It is not distinguishable from:" in lines and "It is distinguishable from:" not in lines


# --- A/A on real runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", sorted({run.strategy for run in recorded.runs()}))
def test_two_halves_of_one_arm_are_not_distinguishable(strategy: str) -> None:
    """The recorded seeds of an arm as two arms of their own, 17 and 18 against 19 to 21: nothing is found."""
    runs = [one for one in recorded.runs() if one.strategy == strategy]
    half = [replace(one, tags={**one.tags, "strategy": "early" if int(one.seed) < 19 else "late"}) for one in runs]
    found = rank([r for r in (read(one, LOSS, At(), {}) for one in half) if isinstance(r, Reading)], LOSS, At())
    (pair,) = found.differences
    assert pair.method == "welch" and not pair.distinguishable
    assert any("It is not distinguishable from" in line for line in verdict(found))
