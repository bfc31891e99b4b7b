"""When things are due: by samples as well as by steps, whatever number of samples each step holds."""

from itertools import accumulate

import pytest

from trainer.budget import budget_from, cadence_from
from trainer.cadence import Cadence
from trainer.config.load import load
from trainer.data.packing import Fixed


def evaluated(samples_of_steps: list[int], cadence: Cadence) -> list[int]:
    """Steps at which a training evaluates whose steps hold so many samples each."""
    steps, evaluated_at = [], -1
    for step, samples in enumerate(accumulate(samples_of_steps, initial=0)):
        if cadence.evaluates(step, samples, evaluated_at):
            steps.append(step)
            evaluated_at = samples
    return steps


@pytest.mark.parametrize(
    ("samples_of_steps", "steps"),
    [
        ([5, 5, 5, 5], [0, 2, 4]),  # a step that ends on a multiple has reached it
        ([7, 6, 7, 5], [0, 2, 3]),  # 7, 13, 20, 25: past the first by three, on the second
        ([4, 4, 4, 4, 4, 4], [0, 3, 5]),
        ([35, 4, 1], [0, 1, 3]),  # a step that leaps over three multiples is evaluated once
    ],
)
def test_by_samples_the_first_step_that_has_reached_the_next_multiple_is_evaluated(
    samples_of_steps: list[int], steps: list[int]
) -> None:
    """Of ten samples; step 0 too, so that every curve starts at the base model."""
    assert evaluated(samples_of_steps, Cadence(9, n_samples=1, eval_steps=frozenset({1}), eval_samples=10)) == steps


def test_arms_of_different_batches_are_evaluated_after_the_same_samples() -> None:
    """One takes twice as many samples a step, and is at most one step late."""
    cadence = Cadence(99, n_samples=1, eval_steps=frozenset(), eval_samples=48)
    small, large = evaluated([8] * 36, cadence), evaluated([16] * 18, cadence)
    assert [8 * step for step in small] == [16 * step for step in large] == list(range(0, 289, 48))


def test_without_samples_the_steps_decide() -> None:
    """However many samples they hold."""
    cadence = Cadence(9, n_samples=1, eval_steps=frozenset({0, 2}))
    assert evaluated([1, 100, 1], cadence) == [0, 2]


@pytest.mark.parametrize(
    ("overrides", "evaluations", "points"),
    [
        ({"training.eval_steps": "4"}, [0, 4, 8], [4, 8]),
        ({"training.eval_samples": "5"}, [0, 3, 5, 8, 10], [3, 5, 8, 10]),
        ({"training.eval_samples": "5", "training.resume_steps": "6"}, [0, 3, 5, 8, 10], [6]),
    ],
)
def test_a_resume_point_comes_with_every_evaluation_unless_steps_are_given(
    overrides: dict[str, str], evaluations: list[int], points: list[int]
) -> None:
    """Ten steps of two samples, without packing; none at step 0, where nothing is lost."""
    more = {"training.packing": "false", "training.max_steps": "10", "launch.nproc": "1"}
    config = load("last6_lora", overrides=more | overrides).config
    cadence = cadence_from(config, budget_from(config, Fixed((10,) * 20)))
    assert evaluated([2] * 10, cadence) == evaluations
    assert [step for step in range(10) if cadence.keeps(step, evaluated=step in evaluations)] == [
        point for point in points if point < 10
    ]
