"""Stages: which steps they are, what is refused, and the learning rate of what begins late."""

import pytest

from tests.conftest import shapes_of, tiny_model
from trainer.build import plan_from
from trainer.config.load import load
from trainer.errors import UserError
from trainer.model import parameter_shapes
from trainer.optim import Schedule
from trainer.stages import Stage, stage_at, stages_from, start_of
from trainer.strategy import Shapes

SCHEDULE = Schedule({"vision": 1e-3, "llm": 1e-4}, floor=1e-6, warmup_steps=20, total_steps=100)
STAGES = (Stage(0, (2, 3), 2), Stage(4, (1, 2, 3), 6), Stage(7, (0, 1, 2, 3), 9))


def stages(config: str = "progressive_lora", schedule: str = "", total: int = 100, shapes: Shapes | None = None):  # type: ignore[no-untyped-def]
    """Of a file of `experiments/`, perhaps with another schedule."""
    resolved = load(config, overrides={"strategy.vision.schedule": schedule})
    shapes = shapes or shapes_of(tiny_model())
    plan, _ = plan_from(resolved, shapes)
    rates = Schedule({"vision": 1e-3}, 1e-6, round(0.2 * total), total)
    return stages_from(resolved, plan, shapes, rates, max(2, rates.warmup_steps))


def refused(schedule: str, total: int = 100) -> str:
    """The message."""
    with pytest.raises(UserError) as told:
        stages(schedule=schedule, total=total)
    assert "-P strategy.vision.schedule" in told.value.where and told.value.do
    return str(told.value)


def test_shares_become_steps_and_blocks_those_of_the_model() -> None:
    """`from` is a share of all optimizer steps, rounded up; the gate looks at the end of each stage's own warm-up."""
    blocks = [tuple(range(first, 24)) for first in (22, 20, 18)]
    assert stages(total=100) == (Stage(0, blocks[0], 20), Stage(33, blocks[1], 33 + 14), Stage(66, blocks[2], 66 + 7))
    assert [stage.start for stage in stages(total=146)] == [0, 49, 97]
    assert [(s.start, s.gate_look) for s in stages(total=6)] == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("size", ["8b", "32b"])
def test_on_a_deeper_tower_they_are_its_last_blocks(size: str) -> None:
    """25-26, then 23-26, then 21-26 on 8B and 32B."""
    assert [s.blocks[0] for s in stages(shapes=parameter_shapes(f"random:{size}"))] == [25, 23, 21]


def test_without_a_schedule_there_is_one_stage() -> None:
    """With the gate's look where it always was."""
    assert stages("last6_lora") == (Stage(0, tuple(range(18, 24)), 20),)
    assert stages("frozen_vision") == (Stage(0, (), 20),)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("last-2", "which adds no block"),
        ("last-1", "without 22"),
        ("3-4", "without 22-23"),
        ("last-30", "24 vision blocks"),
    ],
)
def test_a_stage_has_the_blocks_of_the_one_before_and_more(second: str, said: str) -> None:
    """Held against the real depth, in whichever form blocks are written."""
    assert said in refused(f"[{{from: 0.0, blocks: last-2}}, {{from: 0.5, blocks: {second}}}]")
    assert len(stages(schedule="[{from: 0.0, blocks: last-2}, {from: 0.5, blocks: '5,22,23'}]")) == 2


def test_a_stage_has_two_steps_at_least() -> None:
    """In the second the gate sees the gradient of LoRA's A."""
    three = "[{from: 0.0, blocks: last-2}, {from: 0.33, blocks: last-4}, {from: 0.66, blocks: last-6}]"
    assert "stages of 2, 2, 1 optimizer steps, of 5 in all" in refused(three, total=5)


def test_a_tensor_starts_with_the_first_stage_that_has_its_block() -> None:
    """What lies in no vision block trains from the beginning."""
    starts = [start_of(f"model.visual.blocks.{block}.attn.qkv.weight", STAGES) for block in (3, 2, 1, 0)]
    assert starts == [0, 0, 4, 7]
    assert start_of("model.visual.merger.norm.weight", STAGES) == start_of("lm_head.weight", STAGES) == 0


def test_a_step_is_taken_in_the_stage_that_began_before_it() -> None:
    """Step 4 is the last of the first stage, which begins after 0 and ends after 4 steps."""
    assert [stage_at(step, STAGES) for step in range(10)] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_what_begins_late_warms_up_to_the_common_cosine() -> None:
    """From the first step of its own, over the same share of the steps that it has; then one rate for the part."""
    for start, own in ((33, 14), (66, 7)):
        assert SCHEDULE.warmup_of(start) == own
        for k in range(1, 101 - start):
            expected = SCHEDULE.rate("vision", start + k) * min(1, k / own)
            assert SCHEDULE.rate("vision", start + k, start) == pytest.approx(expected, rel=1e-15)
            assert SCHEDULE.rate("vision", start + k, start) > 0
    assert SCHEDULE.warmup_of(0) == 20 and SCHEDULE.rate("vision", 5, 0) == SCHEDULE.rate("vision", 5)


def test_a_start_within_the_common_warm_up_and_no_warm_up_at_all() -> None:
    """Both factors hold at once; without warm-up there is none for anybody."""
    assert SCHEDULE.rate("llm", 11, 10) == pytest.approx(1e-4 * (11 / 20) * (1 / 18))
    without = Schedule({"llm": 1e-4}, 1e-6, 0, 10)
    assert without.rate("llm", 6, 5) == without.rate("llm", 6)
