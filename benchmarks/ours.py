"""One measured process of ours: the parts that a run is made of, the loop's own step, a stopwatch around it.

Started by throughput.py, one process a rank.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measured import CLIP, EVAL_BATCH, MICRO_BATCH, RATE, SEED, Job, indices, tell
from stopwatch import LEFT_OUT, Watch
from workload import Workload, ready

from trainer import build, launch
from trainer.config.load import load
from trainer.data.loader import Batch, collate
from trainer.engine import Engine
from trainer.events import Seen
from trainer.fused import products
from trainer.fused.choice import ForwardPass
from trainer.fused.features import NOTHING, Keep
from trainer.gate import Gate
from trainer.loop import Parts, evaluate, train_step
from trainer.model import apply_plan, load_model, load_tools, parameter_shapes, trained_tensors
from trainer.optim import Schedule, make_optimizer
from trainer.strategy import ParameterPlan, Part, make_plan


def plan_of(job: Job, model: str) -> ParameterPlan:
    """What an arm of `experiments/` means for the workload's model."""
    resolved = load(job.arm, overrides={"tuner.lora_dropout": str(job.dropout)})
    return make_plan(build.strategy_from(resolved.config), parameter_shapes(model))


def parts_of(job: Job, workload: Workload) -> Parts:
    """What a step takes."""
    switches, name = job.switches, str(workload.model)
    os.environ["VTE_NATIVE"] = str(int(switches.native))
    if not switches.onednn:
        products.prefers_onednn = lambda: False  # type: ignore[assignment]
    base = load_model(name, load_tools(name), dtype=torch.float32, attn_impl="sdpa", seed=SEED)
    model = apply_plan(base, plan_of(job, name), seed=SEED)
    trained = list(trained_tensors(model))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    gate = Gate(trained, frozen, last_look=job.steps)
    forward_pass = ForwardPass(switches.fused, "", Keep(10**9, in_training=True) if switches.seen else NOTHING)
    checkpointed = [Part.VISION, Part.LLM] if job.checkpointing else []
    loss: Any = forward_pass.of(model, bf16=False, checkpointed=checkpointed)
    accelerator = launch.join(switches.ranks, None)
    engine = Engine(accelerator, loss, make_optimizer(trained, weight_decay=0.0), trained, max_grad_norm=CLIP)
    constant = Schedule(dict.fromkeys((part.value for part in Part), RATE), RATE, 0, job.steps)
    return Parts(engine, constant, gate, SEED)


def batches(job: Job, workload: Workload, step: int, rank: int) -> list[Batch]:
    """A rank's micro-batches of an optimizer step, from picture files to tensors."""
    mine = indices(step, rank, job.switches.ranks)
    size = len(mine) if job.switches.one_batch else MICRO_BATCH
    rows = [mine[start : start + size] for start in range(0, len(mine), size)]
    return [collate([workload[i] for i in row], workload.pad_id, packed=job.switches.packed) for row in rows]


def train(job: Job, workload: Workload, parts: Parts, watch: Watch) -> None:
    """Optimizer step after optimizer step."""
    seen = Seen()
    for step in range(job.steps):
        done = train_step(parts, batches(job, workload, step, parts.engine.rank), seen, n_samples=len(workload))
        watch.losses.append(done.loss)
        watch.step(done.seen.samples - seen.samples, done.supervised_tokens)
        seen = done.seen


def of_all_steps(job: Job, workload: Workload, engine: Engine, steps: int) -> Iterator[Batch]:
    """A rank's samples of the first so many steps, in batches of an evaluation."""
    mine = [i for step in range(steps) for i in indices(step, engine.rank, engine.ranks)]
    for start in range(0, len(mine), EVAL_BATCH):
        samples = [workload[i] for i in mine[start : start + EVAL_BATCH]]
        yield collate(samples, workload.pad_id, packed=job.switches.packed)


def evaluate_only(job: Job, workload: Workload, parts: Parts, watch: Watch) -> None:
    """The same samples forward only, a few to warm up and then counted."""
    for steps in (LEFT_OUT, job.steps):
        losses = evaluate(parts.engine, of_all_steps(job, workload, parts.engine, steps))
        watch.step(len(losses.record_ids), sum(losses.token_counts))
    watch.losses.append(losses.mean())


def main() -> None:
    """Measure the job on the command line, and tell."""
    job = Job.read(sys.argv[1])
    workload = ready(Path(job.workload))
    with tempfile.TemporaryDirectory() as kept:
        if job.switches.seen:
            os.environ["XDG_CACHE_HOME"] = kept
        measure(job, workload)
    launch.end(0)


def measure(job: Job, workload: Workload) -> None:
    """Train or evaluate under the stopwatch."""
    parts, watch = parts_of(job, workload), Watch(LEFT_OUT if job.work == "train" else 1)
    if job.switches.seen:
        evaluate(parts.engine, of_all_steps(job, workload, parts.engine, job.steps))
    (train if job.work == "train" else evaluate_only)(job, workload, parts, watch)
    if parts.engine.rank == 0:
        tell(asdict(watch.result()))
    parts.engine.sum(0.0)  # the first rank reads the others' memory before they end


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
