"""What a run would hold and take: the cost model at a configuration's own samples, on this machine and on H200s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.build import Prepared, checkpointed_parts, computes_in_bf16
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.cost.anatomy import Anatomy, anatomy_of
from trainer.cost.duration import CARDS, Card, Layered, card_of, step_seconds
from trainer.cost.layer_memory import Format
from trainer.cost.memory import Layout, Memory, peak_memory
from trainer.cost.microbatch import MicroBatch
from trainer.cost.operations import Operations, Where, operations_of
from trainer.earlier import earlier_pace
from trainer.model import read_config

_FEWEST_WORDS = 8  # that are worth being shared, see `trainer.fused.prompt`
_LOOKED_AT = 64  # samples of which images and answers are measured for the mean


@dataclass(frozen=True, slots=True)
class Time:
    """Of training, without start-up, evaluations and captions."""

    step_seconds: float | None
    """None: not known."""
    rests_on: str
    """What it is known from, or why it is not."""
    parts: Mapping[str, float]
    """Seconds of a step by what is done; empty where it was measured as a whole."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one run."""

    largest: MicroBatch
    """The micro-batch of the first epoch with most tokens."""
    memory: Memory | None
    """Of a rank, at that one; None for transformers' own pass, which is not modelled."""
    operations: Mapping[Where, Operations]
    """Of a mean optimizer step, all ranks together; empty likewise."""
    time: Time
    elsewhere: tuple[Card, int, Memory, Time] | None
    """The same run on so many GPUs of the kind that was measured; None where it computes in float32, or runs on some."""


def estimate(resolved: Resolved, prepared: Prepared) -> Estimate:
    """Estimate memory and time of a run from everything that needs no weights."""
    config, plan = resolved.config, prepared.budget.plan
    largest, mean, scale = _batches(prepared)
    if not prepared.forward_pass.fused:
        time = _measured(resolved, prepared) or Time(None, "no earlier run of this work here", {})
        return Estimate(largest, None, {}, time, None)
    of = anatomy_of(read_config(config.model.model), prepared.plan)
    layout = layout_from(config, prepared)
    memory = peak_memory(of, largest, layout)
    per_step = scale * plan.accumulation * plan.ranks
    operations = {where: _times(ops, per_step) for where, ops in operations_of(of, mean, memory.remade).items()}
    gpu = layout.format.gpu
    card = card_of(torch.cuda.get_device_name()) if gpu else None
    time = _measured(resolved, prepared)
    if time is None and card is not None:
        time = _computed(of, mean, memory, layout, card, scale)
    if time is None:
        of_what = f"{torch.cuda.get_device_name()}, of which nothing is known here" if gpu else "a CPU"
        time = Time(None, f"no earlier run of this work in {config.training.output_dir}, and this is {of_what}", {})
    elsewhere = None
    if computes_in_bf16(config) and not gpu:
        there = replace(layout, format=Format(2, gpu=True), card=CARDS[0].memory)
        held = peak_memory(of, largest, there)
        elsewhere = (CARDS[0], plan.ranks, held, _computed(of, mean, held, there, CARDS[0], scale))
    return Estimate(largest, memory, operations, time, elsewhere)


def layout_from(config: Config, prepared: Prepared) -> Layout:
    """How the run is laid out on this machine."""
    plan, gpu = prepared.budget.plan, torch.cuda.is_available()
    zero: dict[str, Any] = (prepared.zero or {}).get("zero_optimization", {})
    return Layout(
        weight=getattr(torch, config.model.torch_dtype).itemsize,
        format=Format(2 if computes_in_bf16(config) else 4, gpu=gpu),
        card=torch.cuda.get_device_properties(0).total_memory if gpu else None,
        ranks=plan.ranks,
        zero=int(zero.get("stage", 0)),
        accumulation=plan.accumulation,
        checkpointed=frozenset(checkpointed_parts(config)),
    )


def _batches(prepared: Prepared) -> tuple[MicroBatch, MicroBatch, float]:
    """The largest micro-batch of the first epoch, one of samples spread over the epoch, and how many of these a mean
    micro-batch is.
    """
    plan = prepared.budget.plan
    lengths = plan.samples.lengths(0)
    steps = plan.steps()
    every = [of_rank for _ in range(plan.steps_in_epoch(0)) for some in next(steps) for of_rank in some if of_rank]
    largest = max(every, key=lambda indices: sum(lengths[i] for i in indices))
    n = min(_LOOKED_AT, max(1, round(len(lengths) / len(every))))
    spread = [len(lengths) * i // n for i in range(n)]
    tokens_of_mean = sum(lengths) / len(every)
    mean = _micro_batch(prepared, spread)
    return _micro_batch(prepared, largest), mean, tokens_of_mean / mean.tokens


def _micro_batch(prepared: Prepared, places: Sequence[int]) -> MicroBatch:
    """Samples of the first epoch end to end, without looking at their pixels."""
    encoder = prepared.encoder
    records = [prepared.samples.record((0, place)) for place in places]
    counts = [encoder.token_counts(record) for record in records]
    lengths = [min(count.whole, encoder.max_length) for count in counts]
    factor = int(encoder.image_processor.patch_size)
    images = [w * h // factor**2 for record in records for w, h in encoder.shown_sizes(record)]
    supervised = sum(length - count.prompt - count.image for length, count in zip(lengths, counts, strict=True))
    words = encoder.opening(records)
    return MicroBatch(tuple(lengths), tuple(images), supervised, words if words >= _FEWEST_WORDS else 0)


def _measured(resolved: Resolved, prepared: Prepared) -> Time | None:
    """From the pace of an earlier run, where there is one."""
    pace = earlier_pace(resolved)
    if pace is None:
        return None
    plan = prepared.budget.plan
    tokens = sum(plan.samples.lengths(0)) / plan.steps_in_epoch(0)
    told = f"{pace.tokens_per_second:,.0f} tokens/s measured over {pace.tokens:,} tokens in {pace.run}"
    return Time(tokens / pace.tokens_per_second, told, {})


def _computed(of: Anatomy, mean: MicroBatch, memory: Memory, layout: Layout, card: Card, scale: float) -> Time:
    """From operations, at what was measured on a card."""
    step = Layered(layout.accumulation, layout.ranks, layout.zero)
    parts = dict(step_seconds(of, mean, memory.remade, layout.format, card.rates, step))
    parts = {name: seconds * (1 if name == "exchange" else scale) for name, seconds in parts.items()}
    how = "as measured on one H200" if card.is_measured else "measured on an H200, scaled by published peaks"
    told = f"operations at rates {how} (docs/scaling.md)"
    if layout.ranks > 1:
        told += "; the exchange between GPUs was not measured"
    return Time(sum(parts.values()), told, parts)


def _times(of: Operations, factor: float) -> Operations:
    return Operations(
        of.forward * factor, of.inputs * factor, of.weights * factor, of.again * factor, of.attention * factor
    )
