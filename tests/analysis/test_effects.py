"""Depth x method and domains, on losses worked out by hand."""

import math

import pytest

from analysis.effects import QUESTIONS, Effects, arm_by_domain, by_domain, two_by_twos
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.statistics import estimate, holm
from tests.analysis.test_ranking import run

LOSS = "eval/loss"


def ranked(cells: dict[str, tuple[str, str, list[float]]], **params: dict[str, str]) -> Ranking:
    """Arm -> (blocks, method, loss of seeds 0, 1, ...); `params` of an arm by its name."""
    found = []
    for arm, (blocks, method, losses) in cells.items():
        n = {"last-2": "[22, 23]", "last-6": "[18, 19, 20, 21, 22, 23]", "all": str([*range(24)])}[blocks]
        own = {"strategy.vision.blocks": blocks, "strategy.vision.method": method, "vision.blocks_resolved": n}
        for seed, loss in enumerate(losses):
            one = read(run(arm, seed, loss, params=own | params.get(arm, {})), LOSS, At(), {})
            assert isinstance(one, Reading)
            found.append(one)
    return rank(found, LOSS, At())


def depth_by_method(ranking: Ranking) -> Effects | None:
    """The only 2x2 of depth and method that a ranking can hold."""
    found = two_by_twos(ranking, QUESTIONS["depth_by_method"])
    assert len(found) <= 1
    return found[0] if found else None


FOUR = {
    "few_lora": ("last-6", "lora", [0.50, 0.52]),
    "few_full": ("last-6", "full", [0.54, 0.58]),
    "many_lora": ("all", "lora", [0.60, 0.60]),
    "many_full": ("all", "full", [0.68, 0.70]),
}


def test_effects_by_hand() -> None:
    """Depth by seed: (.60+.68-.50-.54)/2 = .12 and .10; method .06 and .08; interaction .08-.04 and .10-.06."""
    effects = depth_by_method(ranked(FOUR))
    assert effects is not None and effects.levels == (("last-6", "all"), ("lora", "full"))
    for effect, by_seed in ((effects.first, [0.12, 0.10]), (effects.second, [0.06, 0.08]),
                            (effects.interaction, [0.04, 0.04]), (effects.first_at["full"], [0.14, 0.12]),
                            (effects.second_at["all"], [0.08, 0.10])):  # fmt: skip
        found, wanted = effect.estimate, estimate(by_seed)
        assert (found.mean, found.low, found.high, found.n) == pytest.approx(
            (wanted.mean, wanted.low, wanted.high, 2), abs=1e-12
        )
    assert effects.confounded == {}


def test_what_differs_beside_depth_and_method_is_told() -> None:
    """A learning rate and accumulation of an arm's own: the effects are those of whole configurations."""
    own = {"many_full": {"training.vit_lr": "3e-05"}, "few_lora": {"training.vit_lr": "1e-4"}}
    effects = depth_by_method(ranked(FOUR, **own))
    assert effects is not None
    assert effects.confounded == {"training.vit_lr": ("1e-4", "-", "-", "3e-05")}


def test_without_four_cells_there_are_no_effects() -> None:
    """A missing cell, or one depth only."""
    assert depth_by_method(ranked({k: v for k, v in FOUR.items() if k != "many_full"})) is None
    assert depth_by_method(ranked({k: v for k, v in FOUR.items() if k.startswith("few")})) is None


def test_of_three_depths_the_extremes_are_compared() -> None:
    """By the number of blocks."""
    effects = depth_by_method(
        ranked({**FOUR, "two_lora": ("last-2", "lora", [0.4]), "two_full": ("last-2", "full", [0.4])})
    )
    assert effects is not None and effects.levels[0] == ("last-2", "all")
    assert math.isnan(effects.first.estimate.low)  # one seed of some cells


def test_an_arm_that_opens_the_tower_step_by_step_has_no_depth() -> None:
    """Six blocks in the end, but not the cell of those that train six throughout."""
    staged = {"strategy.vision.blocks": "none", "strategy.vision.schedule": '[{"from": 0.0, "blocks": "last-2"}]'}
    arms = {**FOUR, "steps_lora": ("last-2", "lora", [0.1, 0.1])}
    effects = depth_by_method(ranked(arms, steps_lora=staged))
    assert effects is not None and effects.levels[0] == ("last-6", "all")
    assert effects.first.estimate.mean == pytest.approx(0.11)


# --- domains ------------------------------------------------------------------------------------------------------


def by_domains(losses: dict[str, dict[str, list[float]]]) -> Ranking:
    """Arm -> domain -> loss of seeds 0, 1, ..."""
    found = []
    for arm, of_domain in losses.items():
        for seed in range(len(next(iter(of_domain.values())))):
            metrics = {f"eval/loss_by_domain/{domain}": values[seed] for domain, values in of_domain.items()}
            one = read(run(arm, seed, metrics=metrics | {LOSS: sum(metrics.values())}), LOSS, At(), {})
            assert isinstance(one, Reading)
            found.append(one)
    return rank(found, LOSS, At())


CROSSED = {
    "a": {"street": [0.30, 0.31, 0.32], "field": [0.60, 0.62, 0.61]},
    "b": {"street": [0.40, 0.42, 0.41], "field": [0.50, 0.51, 0.53]},
}


def test_each_domain_has_its_winner_with_interval_and_correction() -> None:
    """Arm a on the street, by .10, .11, .09; b in the field; p of both are corrected together."""
    field, street = by_domain(by_domains(CROSSED))
    assert (street.domain, [*street.losses]) == ("street", ["a", "b"])
    assert [*field.losses] == ["b", "a"]
    wanted = estimate([0.10, 0.11, 0.09])
    assert (street.ahead.estimate.mean, street.ahead.estimate.low) == pytest.approx((wanted.mean, wanted.low))
    assert [field.ahead.p_adjusted, street.ahead.p_adjusted] == holm([field.ahead.p, street.ahead.p])


def test_winners_that_change_with_the_domain_interact() -> None:
    """Shown to depend; one seed cannot show it."""
    found = arm_by_domain(by_domains(CROSSED))
    assert found is not None and found.p < 0.01 and found.freedom == (1, 2)
    assert arm_by_domain(by_domains({"a": {"x": [0.3], "y": [0.4]}, "b": {"x": [0.4], "y": [0.3]}})) is None
