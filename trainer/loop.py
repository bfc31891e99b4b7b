"""The training loop, read as the algorithm: evaluate, save, step. Tensors in, events out.

It knows no MLflow, no configuration and no strategy. Loss is a sum over supervised tokens divided by the number of
supervised tokens of the *whole* optimizer step:

    L = sum_m sum_{t in m} nll_t / N,   N = sum_m |supervised tokens of micro-batch m|

so that every supervised token counts the same, however the samples are laid out in micro-batches.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.data.loader import Batch
from trainer.errors import TrainingStopped
from trainer.events import EVAL, CheckpointSaved, EvalDone, Event, GatePassed, RecordLosses, Seen, StepDone
from trainer.gate import Gate
from trainer.model import TrainedTensor
from trainer.optim import Schedule, set_rates


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One set of batches that is evaluated again and again."""

    batches: Callable[[], Iterable[Batch]]
    every: int = 1
    """Only at every k-th evaluation, and at the last."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things are due, in optimizer steps; all of it known before training starts."""

    total_steps: int
    steps_per_epoch: int
    eval_steps: frozenset[int]
    save_steps: frozenset[int] = frozenset()
    save_best_from: int | None = None
    """First step from which the lowest eval loss gets a `best` checkpoint (step 0 has no adapter); None: never."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What one run trains with; everything has gone through `accelerator.prepare`."""

    accelerator: Accelerator
    model: nn.Module
    """`SupervisedLoss`: inputs -> loss of each supervised token."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    trained: Sequence[TrainedTensor]
    gate: Gate
    max_grad_norm: float
    seed: int


def fit(
    parts: Parts,
    steps: Iterator[list[Batch]],
    eval_sets: Mapping[str, EvalSet],
    cadence: Cadence,
    save: Callable[[Seen, str], CheckpointSaved],
    emit: Callable[[Event], None],
) -> Seen:
    """Train for `cadence.total_steps` optimizer steps; pass k of the loop sees the model after k updates.

    Args:
        parts: model, optimizer, schedule, gate.
        steps: the micro-batches of one optimizer step, step after step.
        eval_sets: name -> set; `eval` decides which checkpoint is best.
        cadence: when evaluating and saving are due.
        save: writes a checkpoint of the kind it is given (`best`, `last`, `step-N`).
        emit: gets every event, in order.

    Raises:
        TrainingStopped: the gate failed, or loss or gradient was not finite; the weights are those before the update.
    """
    seen, best, evaluations = Seen(), math.inf, 0
    for step in range(cadence.total_steps + 1):
        last = step == cadence.total_steps

        if last or step in cadence.eval_steps:
            due = {name: s for name, s in eval_sets.items() if last or evaluations % s.every == 0}
            result = evaluate_all(parts, due, seen)
            _stop_if_eval_not_finite(result)
            evaluations += 1
            emit(result)
            loss = result.losses[EVAL].mean()
            if loss < best and cadence.save_best_from is not None and step >= cadence.save_best_from:
                best = loss
                emit(save(seen, "best"))

        if step in cadence.save_steps:
            emit(save(seen, f"step-{step}"))
        if last:
            emit(save(seen, "last"))
            return seen

        started = time.perf_counter()
        micro_batches = next(steps)
        done = train_step(parts, micro_batches, step + 1)
        seen = _add(seen, micro_batches, cadence.steps_per_epoch, time.perf_counter() - started)
        if parts.gate.after_update(step + 1):
            emit(GatePassed(seen))
        emit(replace(done, seen=seen))
    raise AssertionError("the last pass returns")


def train_step(parts: Parts, micro_batches: Sequence[Batch], step: int) -> StepDone:
    """One optimizer step: gradients of every micro-batch, the gate's look, clipping, the update."""
    accelerator, optimizer = parts.accelerator, parts.optimizer
    rates = set_rates(optimizer, parts.schedule, step)
    count = sum(batch.n_supervised for batch in micro_batches)
    losses = []
    parts.model.train()
    for index, batch in enumerate(micro_batches):
        # Dropout has its own stream: its masks depend on where in the run we are, and on nothing that ran before.
        torch.manual_seed(derived_seed(parts.seed, "dropout", step, index, accelerator.process_index))
        nll = token_losses(parts, batch)
        accelerator.backward(nll.sum() / count)
        losses.append(nll.detach())
    loss = (torch.stack([nll.sum() for nll in losses]).sum() / count).item()
    norms = gradient_norms(parts.trained)
    _stop_if_not_finite(step, micro_batches, losses, norms)
    parts.gate.before_update(step)
    scale = parts.max_grad_norm / (norms["total"] + 1e-6)  # the same guard as torch.nn.utils.clip_grad_norm_
    if scale < 1:
        torch._foreach_mul_([t.parameter.grad for t in parts.trained if t.parameter.grad is not None], scale)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepDone(Seen(), loss, count, rates, norms)


@torch.no_grad()
def evaluate(parts: Parts, batches: Iterable[Batch]) -> RecordLosses:
    """Loss of every record of one set, in eval mode."""
    parts.model.eval()
    ids: list[str] = []
    domains: list[str | None] = []
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches:
        per_record = batch.supervised.sum(dim=1).tolist()
        nll = token_losses(parts, batch).double()
        ids += batch.record_ids
        domains += batch.domains
        sums += [chunk.sum().item() for chunk in torch.split(nll, per_record)]
        counts += per_record
    return RecordLosses(tuple(ids), tuple(domains), tuple(sums), tuple(counts))


def evaluate_all(parts: Parts, eval_sets: Mapping[str, EvalSet], seen: Seen) -> EvalDone:
    """Evaluate the sets that are due."""
    started = time.perf_counter()
    losses = {name: evaluate(parts, eval_set.batches()) for name, eval_set in eval_sets.items()}
    return EvalDone(seen, losses, time.perf_counter() - started)


def token_losses(parts: Parts, batch: Batch) -> Tensor:
    """(number of supervised tokens of the batch,) nats, row by row."""
    moved = batch.to(parts.accelerator.device)
    with parts.accelerator.autocast():
        losses: Tensor = parts.model(supervised=moved.supervised, **moved.model_inputs())
    return losses


def gradient_norms(trained: Sequence[TrainedTensor]) -> dict[str, float]:
    """L2 norm of the gradient over each part, and `total`."""
    squares: dict[str, list[Tensor]] = {}
    for tensor in trained:
        if tensor.parameter.grad is not None:
            squares.setdefault(tensor.part.value, []).append(tensor.parameter.grad)
    norms = {part: torch.nn.utils.get_total_norm(gradients).item() for part, gradients in squares.items()}
    return {**norms, "total": math.hypot(*norms.values())}


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: equal arguments give equal streams, different ones independent streams."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _add(seen: Seen, micro_batches: Sequence[Batch], steps_per_epoch: int, seconds: float) -> Seen:
    step = seen.step + 1
    return Seen(
        step=step,
        epoch=step / steps_per_epoch,
        samples=seen.samples + sum(b.n_samples for b in micro_batches),
        tokens=seen.tokens + sum(b.n_tokens for b in micro_batches),
        supervised_tokens=seen.supervised_tokens + sum(b.n_supervised for b in micro_batches),
        train_seconds=seen.train_seconds + seconds,
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
    step: int, micro_batches: Sequence[Batch], losses: Sequence[Tensor], norms: Mapping[str, float]
) -> None:
    """A non-finite loss or gradient stops the run before the update, naming where it came from."""
    for index, (batch, nll) in enumerate(zip(micro_batches, losses, strict=True)):
        chunks = torch.split(nll, batch.supervised.sum(dim=1).tolist())
        bad = [i for i, chunk in zip(batch.record_ids, chunks, strict=True) if not torch.isfinite(chunk).all()]
        if bad:
            raise TrainingStopped(
                f"The loss is not finite at step {step}, micro-batch {index}, in the records {', '.join(bad)}. "
                "Nothing was updated. Look at these records, or lower the learning rates."
            )
    bad_parts = [part for part, norm in norms.items() if part != "total" and not math.isfinite(norm)]
    if bad_parts:
        records = ", ".join(i for batch in micro_batches for i in batch.record_ids)
        raise TrainingStopped(
            f"The gradient of {', '.join(bad_parts)} is not finite at step {step} (records {records}). "
            "Nothing was updated. Lower the learning rates, or look at these records."
        )
