"""The rule that stops arms: what it needs to stop one, what it never does, and how a loss at a rung is made."""

import math

import pytest

from trainer.halving import Rule, decide, rung_loss

RULE = Rule()
SEEDS = (17, 18, 19)
LEADER = {17: 0.600, 18: 0.604, 19: 0.598}


def shifted(by: float, *jitter: float) -> dict[int, float]:
    """The leader's losses, so much higher, and a little to and fro."""
    return {seed: LEADER[seed] + by + more for seed, more in zip(SEEDS, jitter or (0.001, -0.001, 0.0), strict=True)}


def verdicts(losses: dict[str, dict[int, float]], rung: int = 0, rule: Rule = RULE) -> dict[str, str]:
    """Arm -> verdict."""
    return {decision.arm: decision.verdict for decision in decide(losses, rung=rung, rule=rule)}


def test_far_behind_stops_within_the_margin_stops_and_what_is_open_goes_on() -> None:
    """The margin is 0.006: one arm is 0.05 behind, one 0.0005, one 0.006."""
    losses = {"far": shifted(0.05), "lead": LEADER, "near": shifted(0.0005), "open": shifted(0.006)}
    found = decide(losses, rung=0, rule=RULE)
    assert [(d.arm, d.verdict, d.stops) for d in found] == [
        ("far", "behind", True), ("lead", "leader", False), ("near", "equivalent", True), ("open", "goes on", False)
    ]  # fmt: skip


def test_a_decision_holds_its_numbers() -> None:
    """All that a report needs to say why."""
    far, lead = decide({"far": shifted(0.05), "lead": LEADER}, rung=1, rule=RULE)
    mean = sum(LEADER.values()) / 3
    assert (far.difference, far.loss, lead.loss) == pytest.approx((0.05, mean + 0.05, mean))
    assert (far.margin, far.error, far.seeds) == (pytest.approx(0.01 * mean), 0.0125, 3)
    assert far.interval[0] > far.margin and far.interval[0] < far.difference < far.interval[1]
    assert far.p <= far.error and math.isnan(lead.p)


def test_noise_that_is_as_large_as_the_difference_stops_nobody() -> None:
    """0.02 behind on average, and better on one of three seeds."""
    assert verdicts({"lead": LEADER, "noisy": shifted(0.02, 0.05, -0.04, 0.0)}) == {
        "lead": "leader",
        "noisy": "goes on",
    }


def test_one_seed_or_one_arm_decides_nothing() -> None:
    """However far behind: no leader either."""
    assert set(verdicts({"a": {17: 0.1}, "b": {17: 9.0}}).values()) == {"goes on"}
    assert verdicts({"a": LEADER}) == {"a": "goes on"}
    assert decide({}, rung=0, rule=RULE) == ()


@pytest.mark.parametrize("hole", [{}, {17: 0.9, 18: 0.9}, {17: 0.9, 18: 0.9, 19: math.nan}])
def test_an_arm_that_misses_a_seed_goes_on_and_the_others_are_judged(hole: dict[int, float]) -> None:
    """A failed run is no reason to stop its arm, nor to wait with the rest."""
    found = verdicts({"hole": hole, "lead": LEADER, "far": shifted(0.05)})
    assert found == {"hole": "goes on", "lead": "leader", "far": "behind"}


def test_an_arm_with_a_hole_does_not_lead() -> None:
    """Two good seeds are not three."""
    found = verdicts({"hole": {17: 0.1, 18: 0.1}, "lead": LEADER, "far": shifted(0.05)})
    assert found == {"hole": "goes on", "lead": "leader", "far": "behind"}


def test_identical_arms_come_out_equivalent() -> None:
    """A/A: the same seed gives the same losses, to the bit."""
    assert verdicts({"a": LEADER, "b": dict(LEADER)}) == {"a": "leader", "b": "equivalent"}


def test_a_later_rung_asks_for_more_than_an_earlier_one() -> None:
    """The first has half of the error, the second a quarter: p between the two stops there and not here."""
    losses = {"lead": LEADER, "b": shifted(0.028, 0.0056, -0.0045, 0.0)}
    (_, b) = decide(losses, rung=0, rule=RULE)
    assert 0.0125 < b.p <= 0.025
    assert (verdicts(losses, 0)["b"], verdicts(losses, 1)["b"]) == ("behind", "goes on")
    assert RULE.spent(0) + RULE.spent(1) + RULE.spent(2) == pytest.approx(RULE.error)


def test_thresholds_are_the_users() -> None:
    """A wide margin makes equivalent what a narrow one keeps apart."""
    losses = {"lead": LEADER, "b": shifted(0.03)}
    assert verdicts(losses)["b"] == "behind"
    assert verdicts(losses, rule=Rule(margin=0.2))["b"] == "equivalent"


@pytest.mark.parametrize(
    ("thresholds", "word"),
    [
        ({"margin": 0.0}, "margin"), ({"margin": 1.0}, "margin"), ({"margin": math.nan}, "margin"),
        ({"error": 0.0}, "error"), ({"error": 0.5}, "error"),
        ({"rungs": ()}, "rungs"), ({"rungs": (0.5, 0.25)}, "rungs"), ({"rungs": (0.5, 1.0)}, "rungs"),
        ({"rungs": (0.0, 0.5)}, "rungs"), ({"rungs": (0.5, 0.5)}, "rungs"),
    ],
)  # fmt: skip
def test_thresholds_that_make_no_sense_are_refused(thresholds: dict[str, object], word: str) -> None:
    """Each by its name."""
    with pytest.raises(ValueError, match=word):
        Rule(**thresholds)  # type: ignore[arg-type]


# --- the loss at a rung ---------------------------------------------------------------------------------------------

EVALUATIONS = [(0, 9.0), (101, 0.8), (204, 0.7), (303, 0.6), (400, 0.5)]


@pytest.mark.parametrize(
    ("samples", "loss"),
    [(200, 0.75), (204, 0.75), (205, 0.65), (400, 0.55), (401, None), (101, None), (50, None)],
)
def test_the_loss_at_a_rung_is_the_mean_of_its_last_two_evaluations(samples: int, loss: float | None) -> None:
    """The first that has reached it and the one before; the base model's own is none."""
    found = rung_loss(EVALUATIONS, samples)
    assert found == (loss if loss is None else pytest.approx(loss))


def test_a_loss_that_is_not_finite_is_none() -> None:
    """Such a run stops itself; it must not pull an arm's mean."""
    assert rung_loss([(0, 1.0), (10, math.nan), (20, 1.0)], 20) is None
