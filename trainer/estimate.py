"""What a run would hold and take: the cost model at a configuration's own samples, on this machine and on H200s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from trainer.build import Prepared
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.cost.anatomy import Anatomy, anatomy_of
from trainer.cost.duration import CARDS, Card, busy_seconds, card_of, exchanged
from trainer.cost.layer_memory import Format
from trainer.cost.memory import Layout, Memory, peak_memory, states
from trainer.cost.microbatch import MicroBatch
from trainer.cost.operations import Operations, Where, operations_of
from trainer.earlier import earlier_pace
from trainer.engines import checkpointed_parts, computes_in_bf16
from trainer.model import read_config

_FEWEST_WORDS = 8
"""That are worth being shared (`trainer.fused.prompt`)."""
_LOOKED_AT = 64
"""Samples of which images and answers are measured for the mean step, at most."""


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
class Elsewhere:
    """The same run on GPUs of the kind that was measured."""

    card: Card
    ranks: int
    memory: Memory
    time: Time


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one run."""

    ranks: int
    largest: MicroBatch
    """The micro-batch of the first epoch with most tokens."""
    memory: Memory
    """Of a rank, at that one."""
    whole: bool
    """Whether activations are in it: they are not for transformers' own pass, which is not modelled."""
    operations: Mapping[Where, Operations]
    """Of a mean optimizer step, all ranks together; empty for transformers' own pass."""
    time: Time
    elsewhere: Elsewhere | None
    """None where it computes in float32, or this machine has GPUs."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Of the first epoch."""

    largest: MicroBatch
    spread: MicroBatch
    """Samples from all over it, as many as a mean micro-batch has."""
    micro_batches: int
    """Of each rank in its longest step."""
    tokens: float
    """Of a mean step, all ranks together."""

    @property
    def steps(self) -> float:
        """A mean step, in micro-batches like `spread`."""
        return self.tokens / self.spread.tokens


def estimate(resolved: Resolved, prepared: Prepared) -> Estimate:
    """Estimate memory and time of a run from what needs no weights."""
    config, ranks = resolved.config, prepared.budget.plan.ranks
    of = anatomy_of(read_config(config.model.model), prepared.plan)
    layout, work = layout_from(config, prepared), _work(prepared)
    measured = _measured(resolved, work)
    if not prepared.forward_pass.fused:
        held = states(of, work.largest, layout)
        return Estimate(ranks, work.largest, held, False, {}, measured or _unknown(config), None)
    memory = peak_memory(of, work.largest, layout)
    operations = {where: ops.times(work.steps) for where, ops in operations_of(of, work.spread, memory.remade).items()}
    card = card_of(torch.cuda.get_device_name()) if layout.format.gpu else None
    computed = _computed(of, work, memory, layout, card) if card is not None else None
    elsewhere = None
    if layout.format.row == 2 and not layout.format.gpu:
        there = replace(layout, format=Format(2, gpu=True), card=CARDS[0].memory)
        held = peak_memory(of, work.largest, there)
        elsewhere = Elsewhere(CARDS[0], ranks, held, _computed(of, work, held, there, CARDS[0]))
    time = measured or computed or _unknown(config)
    return Estimate(ranks, work.largest, memory, True, operations, time, elsewhere)


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


def _work(prepared: Prepared) -> _Work:
    plan = prepared.budget.plan
    lengths, n_steps = plan.samples.lengths(0), plan.steps_in_epoch(0)
    steps = list(islice(plan.steps(), n_steps))
    every = [of_rank for step in steps for some in step for of_rank in some if of_rank]
    largest = max(every, key=lambda places: sum(lengths[place] for place in places))
    n = min(_LOOKED_AT, max(1, round(len(lengths) / len(every))))
    spread = [len(lengths) * index // n for index in range(n)]
    return _Work(
        _micro_batch(prepared, largest),
        _micro_batch(prepared, spread),
        micro_batches=max(map(len, steps)),
        tokens=sum(lengths) / n_steps,
    )


def _micro_batch(prepared: Prepared, places: Sequence[int]) -> MicroBatch:
    """Samples of the first epoch end to end, without looking at their pixels."""
    encoder = prepared.encoder
    records = [prepared.samples.record((0, place)) for place in places]
    counts = [encoder.token_counts(record) for record in records]
    lengths = tuple(min(count.whole, encoder.max_length) for count in counts)
    patch = int(encoder.image_processor.patch_size)
    images = tuple(w * h // patch**2 for record in records for w, h in encoder.shown_sizes(record))
    words = encoder.opening(records)
    return MicroBatch(
        lengths,
        images,
        supervised=sum(lengths) - sum(count.prompt + count.image for count in counts),
        shared=words if words >= _FEWEST_WORDS else 0,
    )


def _measured(resolved: Resolved, work: _Work) -> Time | None:
    """From the pace of an earlier run, where there is one."""
    pace = earlier_pace(resolved)
    if pace is None:
        return None
    told = f"{pace.tokens_per_second:,.0f} tokens/s, measured here over {pace.tokens:,} tokens by {pace.run}"
    return Time(work.tokens / pace.tokens_per_second, told, {})


def _computed(of: Anatomy, work: _Work, memory: Memory, layout: Layout, card: Card) -> Time:
    """From operations, at what was measured on a card."""
    busy = busy_seconds(of, work.spread, memory.remade, layout.format, card.rates)
    parts = {name: seconds * work.steps / layout.ranks for name, seconds in busy.items()}
    sent = exchanged(of, ranks=layout.ranks, zero=layout.zero, micro_batches=work.micro_batches)
    parts["exchange"] = sent / card.rates.exchange
    how = "measured on one H200" if card.is_measured else "measured on one H200 and scaled by published peaks"
    told = f"operations, at rates {how} (docs/scaling.md)"
    if layout.ranks > 1:
        told += "; several GPUs were not measured"
    return Time(sum(parts.values()), told, parts)


def _unknown(config: Config) -> Time:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return Time(None, f"this is {where}, and no run in {config.training.output_dir} has done the same work here", {})
