"""Parameter groups and the learning-rate schedule."""

import math

import pytest
import torch

from tests.conftest import ARMS, MakeParts
from trainer.optim import Schedule, set_rates

SCHEDULE = Schedule({"vision": 1.2e-4, "aligner": 1e-4, "llm": 1e-4}, floor=1e-6, warmup_steps=20, total_steps=100)


def test_warm_up_is_linear_from_one_step_and_never_zero() -> None:
    """Step 1 has peak / warm-up, the last step of warm-up has the peak."""
    assert SCHEDULE.rate("vision", 1) == pytest.approx(1.2e-4 / 20, rel=1e-15)
    assert SCHEDULE.rate("vision", 10) == 1.2e-4 / 2
    assert SCHEDULE.rate("vision", 20) == 1.2e-4


def test_the_cosine_ends_at_one_absolute_floor_in_every_part() -> None:
    """The floor is not scaled with a part's own peak."""
    assert SCHEDULE.rate("vision", 100) == pytest.approx(1e-6, rel=1e-12)
    assert SCHEDULE.rate("llm", 100) == pytest.approx(1e-6, rel=1e-12)
    assert SCHEDULE.rate("llm", 60) == pytest.approx((1e-4 + 1e-6) / 2, rel=1e-12)


def test_the_schedule_matches_its_closed_form_and_falls_after_warm_up() -> None:
    """Against the formula written out, and without a single rise."""
    for step in range(21, 101):
        angle = math.pi * (step - 20) / 80
        assert SCHEDULE.rate("aligner", step) == pytest.approx(1e-6 + 0.5 * (1e-4 - 1e-6) * (1 + math.cos(angle)))
        assert SCHEDULE.rate("aligner", step) < SCHEDULE.rate("aligner", step - 1)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (0, 5), (5, 5)])
def test_edges_of_warm_up(warmup: int, total: int) -> None:
    """No warm-up, nothing but warm-up, a single step: rates stay within floor and peak, and above zero."""
    schedule = Schedule({"llm": 1e-4}, 1e-6, warmup, total)
    rates = [schedule.rate("llm", step) for step in range(1, total + 1)]
    assert all(0 < rate <= 1e-4 for rate in rates)
    assert max(rates) == 1e-4 and (total == 1 or total == warmup or rates[-1] == 1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_every_trained_tensor_is_in_exactly_one_group_and_no_group_is_empty(make_parts: MakeParts, arm: str) -> None:
    """Frozen tensors are in none; tensors of one dimension are not decayed."""
    parts = make_parts(arm)
    grouped = [p for group in parts.engine.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(t.parameter) for t in parts.engine.trained)
    for group in parts.engine.optimizer.param_groups:
        assert group["params"]
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    has_vision = arm != "frozen_vision"
    assert {g["part"] for g in parts.engine.optimizer.param_groups} == {"aligner", "llm"} | (
        {"vision"} if has_vision else set()
    )


def test_the_rates_that_are_reported_are_those_the_optimizer_holds(make_parts: MakeParts) -> None:
    """Read back from the optimizer, part by part."""
    optimizer = make_parts().engine.optimizer
    rates = set_rates(optimizer, SCHEDULE, 20)
    assert rates == {"vision": 1.2e-4, "aligner": 1e-4, "llm": 1e-4}
    assert {g["part"]: g["lr"] for g in optimizer.param_groups} == rates


def test_the_optimizer_is_adamw_by_its_published_formula(make_parts: MakeParts) -> None:
    """One step of decoupled decay and bias-corrected moments, written out by hand."""
    optimizer = make_parts().engine.optimizer
    set_rates(optimizer, SCHEDULE, 20)
    group = next(g for g in optimizer.param_groups if g["part"] == "aligner" and g["weight_decay"])
    parameter = group["params"][0]
    before, gradient = parameter.detach().clone(), torch.randn(parameter.shape)
    parameter.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 1e-4 * 0.1) - 1e-4 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)  # float32 moments
