"""Prints memory and time of a run as `trainer plan` tells them: what a rank holds, what a step computes, how long."""

from collections.abc import Iterator, Mapping

from trainer.cost.memory import Memory
from trainer.cost.operations import Operations, Where, total
from trainer.estimate import Estimate, Time

_MEANING = {
    "base": "base weights",
    "trained": "what trains",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "exchange": "exchange of ranks",
    "inputs": "inputs",
    "activations": "activations",
    "working": "for a moment",
}
_TERA = 1e12


def cost_lines(of: Estimate, *, total_steps: int) -> Iterator[str]:
    """The block of `plan`, line by line."""
    if of.memory is None:
        yield "memory           not known: transformers' own forward pass is not modelled"
    else:
        yield from _memory_lines(of, of.memory)
        yield ""
        yield from _operation_lines(of.operations)
    yield ""
    yield f"time             {_duration(of.time, total_steps)}"
    if of.elsewhere is not None:
        card, ranks, memory, time = of.elsewhere
        gpus = f"one {card.name}" if ranks == 1 else f"{ranks} {card.name}"
        verdict = "" if memory.total < card.memory else f", more than its {_size(card.memory)}"
        yield f"on {gpus:<14}{_size(memory.total)} a GPU{verdict}; {_duration(time, total_steps)}"


def _memory_lines(of: Estimate, memory: Memory) -> Iterator[str]:
    batch = of.largest
    yield f"{'memory of a rank':<20}{'':>10}"
    for name, size in sorted(memory.parts.items(), key=lambda pair: -pair[1]):
        if size:
            yield f"  {_MEANING[name]:<18}{_size(size):>10}{100 * size / memory.total:>6.0f} %"
    yield f"  {'in all':<18}{_size(memory.total):>10}         computed, at the most: {memory.at}"
    yield (
        f"  {'':<18}in the largest micro-batch: {batch.tokens:,} tokens, {batch.patches:,} patches, "
        f"{batch.supervised:,} supervised; without Python and libraries"
    )


def _operation_lines(parts: Mapping[Where, Operations]) -> Iterator[str]:
    every = total(dict(parts))
    unit, name = (_TERA, "TFLOP") if every.done >= _TERA else (1e9, "GFLOP")
    columns = ("forward", "to inputs", "to weights", "again")
    yield f"{f'a step, {name}':<38}" + "".join(f"{column:>12}" for column in columns) + f"{'share':>9}"
    for where, ops in parts.items():
        cells = (ops.forward, ops.inputs, ops.weights, ops.again)
        numbers = "".join(f"{cell / unit:>12,.1f}" for cell in cells)
        yield f"  {where:<36}{numbers}{100 * ops.done / every.done:>7.0f} %"


def _duration(time: Time, steps: int) -> str:
    if time.step_seconds is None:
        return f"not known: {time.rests_on}"
    whole = time.step_seconds * steps
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in time.parts.items() if seconds >= 0.005)
    told = f" ({parts})" if parts else ""
    return f"{time.step_seconds:.2f} s a step{told} x {steps:,} = {_span(whole)} of training; {time.rests_on}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
