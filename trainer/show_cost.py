"""Prints memory and time of a run: what a rank holds, what a step computes, how long it takes and how that is known."""

from collections.abc import Iterator, Mapping

from trainer.cost.operations import Operations, Where, total
from trainer.estimate import Elsewhere, Estimate, Time

_MEANING = {
    "base": ("base weights", "the originals of full copies too"),
    "trained": ("what trains", "adapters and full copies, float32"),
    "gradients": ("gradients", "float32"),
    "moments": ("AdamW's moments", "two float32 a trained parameter"),
    "exchange": ("exchange", "buffers between ranks, and ZeRO's own masters"),
    "inputs": ("inputs", "patches, ids, keys of shared words"),
    "activations": ("activations", "kept from forward to backward"),
    "working": ("for a moment", "{at}"),
}


def cost_lines(of: Estimate, *, total_steps: int) -> Iterator[str]:
    """The block of `plan`, line by line."""
    yield from _memory_lines(of)
    yield ""
    if of.operations:
        yield from _operation_lines(of.operations)
        yield ""
    yield f"time             {_duration(of.time, total_steps)}"
    if of.elsewhere is not None:
        yield from _elsewhere_lines(of.elsewhere, total_steps)


def _memory_lines(of: Estimate) -> Iterator[str]:
    """Parts, the largest first; what is no thousandth of all is left out."""
    memory, batch = of.memory, of.largest
    ranks = "" if of.ranks == 1 else f" of each of {of.ranks} ranks"
    yield f"memory{ranks}, computed, without Python and libraries"
    for name, size in sorted(memory.parts.items(), key=lambda pair: -pair[1]):
        if size >= memory.total / 1000:
            word, meaning = _MEANING[name]
            share = f"{100 * size / memory.total:.0f} %"
            yield f"  {word:<17}{_size(size):>10}{share:>7}   {meaning.format(at=memory.at)}"
    told = "and activations, which are modelled for the fused pass alone"
    if of.whole:
        told = (
            f"in the largest micro-batch: {batch.tokens:,} tokens, {batch.patches:,} patches, "
            f"{batch.supervised:,} supervised"
        )
    yield f"  {'in all':<17}{_size(memory.total):>10}          {told}"


def _operation_lines(parts: Mapping[Where, Operations]) -> Iterator[str]:
    """One row for each part of the model; columns are the ways through it."""
    every = total(parts)
    size, unit = (1e12, "TFLOP") if every.done >= 1e12 else (1e9, "GFLOP")
    columns = ("forward", "to inputs", "to weights", "again")
    yield f"{f'a step, {unit}':<38}" + "".join(f"{column:>12}" for column in columns) + f"{'share':>8}"
    for where, ops in parts.items():
        if ops.done:
            cells = (ops.forward, ops.inputs, ops.weights, ops.again)
            numbers = "".join(f"{cell / size:>12,.1f}" for cell in cells)
            share = f"{100 * ops.done / every.done:.0f} %"
            yield f"  {where:<36}{numbers}{share:>8}"


def _elsewhere_lines(there: Elsewhere, steps: int) -> Iterator[str]:
    """The same run on GPUs of the kind that was measured."""
    name, room = there.card.name, there.card.memory
    gpus = f"on one {name}" if there.ranks == 1 else f"on {there.ranks} {name}"
    verdict = "" if there.memory.total < room else f": more than the {_size(room)} that it has"
    yield f"{gpus:<17}{_size(there.memory.total)} a GPU{verdict}; {_duration(there.time, steps)}"


def _duration(time: Time, steps: int) -> str:
    if time.step_seconds is None:
        return f"not known: {time.rests_on}"
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in time.parts.items() if seconds >= 0.005)
    told = f" ({parts})" if parts else ""
    whole = _span(time.step_seconds * steps)
    return (
        f"{time.step_seconds:.2f} s a step{told} x {steps:,} = {whole}, evaluations not counted; from {time.rests_on}"
    )


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
