"""Stages of a run: from which optimizer step on which vision blocks train, as `strategy.vision.schedule` says it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.problems import place
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError, StrategyError
from trainer.optim import Schedule
from trainer.strategy import BLOCK, ParameterPlan, Shapes, depth, resolve_blocks

SCHEDULE = "strategy.vision.schedule"
_BLOCK = re.compile(BLOCK + r"\.")
_SHORTEST = 2
"""Optimizer steps that a stage has at least: in the second one the gate sees the gradient of LoRA's A."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training in which the set of trained tensors does not change."""

    start: int
    """Optimizer steps that are done when it begins."""
    blocks: tuple[int, ...]
    """Vision blocks that train in it."""
    gate_look: int
    """Optimizer step after which the gate looks at the weights: the end of the warm-up of what is new in it, not before
    its second step, and not after its last one.
    """


def stages_from(
    resolved: Resolved, plan: ParameterPlan, shapes: Shapes, schedule: Schedule, gate_look: int
) -> tuple[Stage, ...]:
    """The stages of a run; one, in which everything trains, where the configuration has no schedule.

    Args:
        resolved: the configuration.
        plan: what trains in the last stage.
        shapes: full parameter name -> shape of the base model.
        schedule: of learning rates, whose warm-ups end in each stage.
        gate_look: of the first stage.

    Raises:
        StrategyError: blocks that the model does not have.
        ConfigError: a stage lacks blocks of the one before, or is too short.
    """
    of_config = resolved.config.strategy
    if of_config is None or of_config.vision.schedule is None:
        return (Stage(0, plan.vision_blocks, gate_look),)
    where = place(resolved.origins[SCHEDULE], SCHEDULE)
    shares, specs = zip(*of_config.vision.stages, strict=True)
    available = depth(shapes, BLOCK)
    blocks = [resolve_blocks(spec, available, where=where, noun="vision blocks") for spec in specs]
    _check_growth(where, specs, blocks)
    starts = [_steps(share, schedule.total_steps) for share in shares]
    _check_lengths(where, starts, schedule.total_steps)
    ends = [*starts[1:], schedule.total_steps]
    looks = [gate_look, *(start + max(2, schedule.warmup_of(start)) for start in starts[1:])]
    return tuple(
        Stage(start, of, min(look, end)) for start, of, look, end in zip(starts, blocks, looks, ends, strict=True)
    )


def start_of(base_name: str, stages: Sequence[Stage]) -> int:
    """Optimizer steps that are done when a tensor of the base model begins to train."""
    block = _BLOCK.match(base_name)
    return next((s.start for s in stages if block is None or int(block[1]) in s.blocks), 0)


def stage_at(step: int, stages: Sequence[Stage]) -> int:
    """Index of the stage in which optimizer step `step`, counted from 1, is taken; that of step 0 is the first."""
    return max((index for index, stage in enumerate(stages) if stage.start < step), default=0)


def spans(indices: Sequence[int]) -> str:
    """`18-23`, or `5,11,17`; `none` where there are none."""
    if not indices:
        return "none"
    contiguous = tuple(indices) == tuple(range(indices[0], indices[-1] + 1))
    return f"{indices[0]}-{indices[-1]}" if contiguous else ",".join(map(str, indices))


def _steps(share: float, total: int) -> int:
    """Rounded up, but not for the last bit of a float product, as warm-up is."""
    return math.ceil(round(share * total, 9))


def _check_growth(where: str, specs: Sequence[str], blocks: Sequence[tuple[int, ...]]) -> None:
    for index in range(1, len(blocks)):
        before, now = set(blocks[index - 1]), set(blocks[index])
        if not before < now:
            lost = f"without {spans(sorted(before - now))}" if before - now else "which adds no block"
            told = [f"{specs[i]} ({spans(blocks[i])})" for i in (index, index - 1)]
            raise StrategyError(
                where,
                f"{told[0]} after {told[1]}, {lost}",
                "in every stage the blocks of the one before, and more: what trains goes on training",
                "add blocks from stage to stage, such as last-2, last-4, last-6",
            )


def _check_lengths(where: str, starts: Sequence[int], total: int) -> None:
    lengths = [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]
    if min(lengths) < _SHORTEST:
        raise ConfigError(
            where,
            f"stages of {', '.join(map(str, lengths))} optimizer steps, of {total} in all",
            f"at least {_SHORTEST} steps a stage: the training gate sees LoRA's A move in the second",
            "train longer (num_train_epochs, max_steps), or move `from` of the stages apart",
        )
