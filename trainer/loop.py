"""The training loop, read as the algorithm: evaluate, save, step. Tensors in, events out.

It knows no MLflow, no configuration and no strategy. Loss is a sum over supervised tokens divided by the number of
supervised tokens of the *whole* optimizer step, all its micro-batches on all ranks:

    L = sum_m sum_{t in m} nll_t / N,   N = sum_m |supervised tokens of micro-batch m|

so that every supervised token counts the same, however the samples are laid out in packs, micro-batches and ranks.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.cadence import Cadence
from trainer.data.loader import Batch
from trainer.engine import Engine
from trainer.errors import Interrupted, Paused, TrainingStopped
from trainer.events import (
    EVAL,
    CheckpointSaved,
    EvalDone,
    Event,
    GatePassed,
    RecordLosses,
    SaveFailed,
    Seen,
    StageBegun,
    StepDone,
    StoppedEarly,
)
from trainer.gate import Gate
from trainer.optim import Schedule, set_rates
from trainer.position import NoWishes, Position, Progress, Wishes
from trainer.seeds import derived_seed

Switched = tuple[Gate, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One set of batches that is evaluated again and again."""

    batches: Callable[[], Iterable[Batch]]
    """This rank's share of them."""
    every: int = 1
    """Only at every k-th evaluation, and at the last."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What one run trains with."""

    engine: Engine
    """Model and optimizer on this rank."""
    schedule: Schedule
    gate: Gate
    seed: int
    switch: Callable[[int], Switched | None] = lambda _: None
    """Called after so many steps; where another set of tensors begins to train, the engine trains that one from then
    on, and its gate is returned, with the vision blocks that begin, and all that train."""


def fit(
    parts: Parts,
    steps: Iterator[list[Batch]],
    eval_sets: Mapping[str, EvalSet],
    cadence: Cadence,
    save: Callable[[Seen, str], CheckpointSaved | SaveFailed],
    emit: Callable[[Event], None],
    *,
    keep: Callable[[Position], SaveFailed | None] = lambda _: None,
    start: Position | None = None,
    wishes: Wishes | None = None,
) -> Seen:
    """Train for `cadence.total_steps` optimizer steps; pass k of the loop sees the model after k updates.

    All ranks run it together, with the same arguments but for their share of the batches.

    Args:
        parts: engine, schedule, gate.
        steps: this rank's micro-batches of one optimizer step, step after step, from the first one that is not done.
        eval_sets: name -> set; `eval` decides which checkpoint is best, and when to stop early.
        cadence: when evaluating, saving and stopping are due.
        save: writes a checkpoint of the kind it is given (`best`, `last`, `step-N`).
        emit: gets every event, in order.
        keep: writes a resume point.
        start: where an interrupted training goes on; None: at the beginning.
        wishes: of those outside; what one rank is asked for, all do.

    Raises:
        TrainingStopped: the gate failed, or loss or gradient was not finite; the weights are those before the update.
        Interrupted: as wished, or `Paused` at `cadence.pause_after` before the end; a resume point was written.
    """
    here, wishes = start or Position(), wishes or NoWishes()
    if here.ended:
        return here.seen
    for step in range(here.seen.step, cadence.total_steps + 1):
        stop, save_now = (wish > 0 for wish in parts.engine.sum(wishes.stop, wishes.save))
        if not here.passed:
            if stop:
                raise _interrupted(here, keep)
            seen, last = here.seen, step == cadence.total_steps
            progress, result = replace(here.progress, patience=cadence.patience), None
            if last or cadence.evaluates(step, seen.samples, progress.evaluated_at):
                try:
                    result = evaluate_all(parts.engine, eval_sets, seen, progress, wishes, last=last)
                except _CutShort:
                    raise _interrupted(here, keep) from None
                if progress.stop and not last:
                    emit(StoppedEarly(seen, progress.without_better))
                    last = True
                emit(result)

            if parts.gate.after_update(step, parts.engine.weight, last=last):
                emit(GatePassed(seen))
            if result is not None and cadence.saves_best(step, loss := result.losses[EVAL].mean(), progress.best_saved):
                emit(saved := save(seen, "best"))
                if isinstance(saved, CheckpointSaved):
                    progress.best_saved = loss

            if step in cadence.save_steps:
                emit(save(seen, f"step-{step}"))
            if last:
                emit(save(seen, "last"))
            here = Position(seen, progress, passed=True, ended=last)
            if (last or save_now or cadence.keeps(step, evaluated=result is not None)) and (failed := keep(here)):
                emit(failed)
            wishes.save = wishes.save and not save_now
            if last:
                return seen
        if cadence.pause_after is not None and here.seen.samples >= cadence.pause_after:
            raise _interrupted(here, keep, Paused)
        parts = _in_its_stage(parts, here.seen, emit)
        started = time.perf_counter()
        done = train_step(parts, next(steps), here.seen, n_samples=cadence.n_samples)
        seen = replace(done.seen, train_seconds=here.seen.train_seconds + time.perf_counter() - started)
        emit(replace(done, seen=seen))
        here = Position(seen, here.progress)
    raise AssertionError("the last pass returns")


def _in_its_stage(parts: Parts, seen: Seen, emit: Callable[[Event], None]) -> Parts:
    """What the next step trains with: another gate, over an engine that trains more, where a stage begins."""
    if not (switched := parts.switch(seen.step)):
        return parts
    emit(StageBegun(seen, *switched[1:]))
    return replace(parts, gate=switched[0])


class _CutShort(Exception):
    """An evaluation was given up because training is to end."""


def _interrupted(
    here: Position, keep: Callable[[Position], SaveFailed | None], kind: type[Interrupted] = Interrupted
) -> Interrupted:
    """What ends training on request, after a resume point was written."""
    failed = keep(here)
    kept = f"no resume point could be written ({failed.reason})" if failed else "a resume point is written"
    return kind(f"after optimizer step {here.seen.step}, {kept}")


def train_step(parts: Parts, micro_batches: Sequence[Batch], seen: Seen, *, n_samples: int) -> StepDone:
    """One optimizer step: gradients of every micro-batch, the gate's look, clipping, the update."""
    engine, step = parts.engine, seen.step + 1
    rates = set_rates(engine.optimizer, parts.schedule, step)
    samples, tokens, supervised = map(int, engine.sum(*_counts(micro_batches)))
    losses = []
    engine.loss.train()
    for index, batch in enumerate(micro_batches):
        # Dropout has its own stream: its masks depend on where in the run we are, and on nothing that ran before.
        torch.manual_seed(derived_seed(parts.seed, "dropout", step, index, engine.rank))
        losses.append(engine.accumulate(batch, supervised, last=index == len(micro_batches) - 1))
    (loss_sum,) = engine.sum(torch.stack([nll.double().sum() for nll in losses]).sum().item())
    norms = engine.gradient_norms()
    _stop_if_not_finite(engine, step, micro_batches, losses, {"loss": loss_sum, **norms})
    parts.gate.before_update(step, engine.gradient)
    engine.update(norms["total"])
    seen = Seen(
        step=step,
        epoch=(seen.samples + samples) / n_samples,
        samples=seen.samples + samples,
        tokens=seen.tokens + tokens,
        supervised_tokens=seen.supervised_tokens + supervised,
    )
    return StepDone(seen, loss_sum / supervised, supervised, rates, norms)


def evaluate(engine: Engine, batches: Iterable[Batch], wishes: Wishes | None = None) -> RecordLosses:
    """Loss of every record of one set, in eval mode; each rank runs its share and gets the whole.

    Raises:
        _CutShort: on all ranks, when one of them was asked to end.
    """
    engine.loss.eval()
    rows: list[tuple[str, str | None, float, int]] = []
    for batch in batches:
        if wishes is not None and wishes.stop:
            break
        nll = engine.evaluate(batch).double()
        sums = [piece.sum().item() for piece in batch.per_record(nll)]
        rows += zip(batch.record_ids, batch.domains, sums, batch.supervised_counts, strict=True)
    if wishes is not None and engine.sum(wishes.stop)[0]:
        raise _CutShort
    ids, domains, loss_sums, counts = zip(*engine.gather(rows), strict=True)
    return RecordLosses(ids, domains, loss_sums, counts)


def evaluate_all(
    engine: Engine, eval_sets: Mapping[str, EvalSet], seen: Seen, progress: Progress, wishes: Wishes, *, last: bool
) -> EvalDone:
    """Evaluate `eval`, which may say that this is the last time, and then the other sets that are due.

    Raises:
        TrainingStopped: a loss is not finite.
        _CutShort: somebody has asked for the end.
    """
    started, number = time.perf_counter(), progress.evaluations
    losses: dict[str, RecordLosses] = {}
    for name in sorted(eval_sets, key=lambda name: name != EVAL):
        if name == EVAL or last or progress.stop or number % eval_sets[name].every == 0:
            losses[name] = evaluate(engine, eval_sets[name].batches(), wishes)
        if name == EVAL:
            progress.take(losses[EVAL].mean(), seen.samples)
    result = EvalDone(seen, losses, time.perf_counter() - started)
    _stop_if_eval_not_finite(result)
    return result


def _counts(micro_batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Samples, tokens and supervised tokens of a rank's step."""
    return (
        sum(b.n_samples for b in micro_batches),
        sum(b.n_tokens for b in micro_batches),
        sum(b.n_supervised for b in micro_batches),
    )


def _stop_if_eval_not_finite(result: EvalDone) -> None:
    """A model whose evaluation is not finite is lost: going on would only hide it."""
    for name, losses in result.losses.items():
        pairs = zip(losses.record_ids, losses.loss_sums, strict=True)
        if bad := [record_id for record_id, loss in pairs if not math.isfinite(loss)]:
            raise TrainingStopped(
                f"The loss on the set {name} is not finite after step {result.seen.step}, in {len(bad)} records: "
                f"{', '.join(bad[:20])}. Lower the learning rates, or look at these records."
            )


def _stop_if_not_finite(
    engine: Engine, step: int, micro_batches: Sequence[Batch], losses: Sequence[Tensor], whole: Mapping[str, float]
) -> None:
    """A non-finite loss or gradient stops the run before the update, naming where it came from.

    `whole` are the numbers that all ranks share, so that all of them stop, or none.
    """
    if all(math.isfinite(value) for value in whole.values()):
        return
    bad = [
        (index, record_id)
        for index, (batch, nll) in enumerate(zip(micro_batches, losses, strict=True))
        for record_id, piece in zip(batch.record_ids, batch.per_record(nll), strict=True)
        if not torch.isfinite(piece).all()
    ]
    if named := sorted(engine.gather(bad)):
        raise TrainingStopped(
            f"The loss is not finite at step {step}, micro-batch {named[0][0]}, in the records "
            f"{', '.join(record_id for _, record_id in named)}. "
            "Nothing was updated. Look at these records, or lower the learning rates."
        )
    trained_on = engine.gather([record_id for batch in micro_batches for record_id in batch.record_ids])
    parts = [part for part, value in whole.items() if part not in ("loss", "total") and not math.isfinite(value)]
    raise TrainingStopped(
        f"The gradient of {', '.join(parts)} is not finite at step {step} "
        f"(records {', '.join(trained_on)}). "
        "Nothing was updated. Lower the learning rates, or look at these records."
    )
