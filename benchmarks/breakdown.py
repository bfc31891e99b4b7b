"""Measures where the time of a step goes: by part of the model and of the trainer, and by operation.

    python benchmarks/breakdown.py FOLDER        # the baseline, ours plain, ours with all of it; both arms

Parts are told apart at the modules that begin and end them, which every path calls: the patch embedding and the merger
of the vision tower, the last norm of the language model. Gradients reach the merger's output when the language model's
backward pass is over. On several ranks the exchange is the difference to steps that leave it out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from measured import Job, ask, tell
from ours import batches, parts_of
from plain_trainer import make_trainer
from stopwatch import LEFT_OUT, Watch
from throughput import ARMS, BASELINE, VARIANTS, save
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from workload import ready

from trainer import launch
from trainer.events import Seen
from trainer.fused.products import live
from trainer.loop import train_step

OPERATIONS = 15
"""So many are listed."""
PROFILED = 4
"""Steps of the profile, behind those that are timed: it slows what it watches."""


class Parts:
    """Seconds of each part, step by step."""

    def __init__(self) -> None:
        """No step has begun."""
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._began = self._backward_began = time.perf_counter()

    def end_step(self) -> None:
        """A step is over, and the next begins."""
        now = time.perf_counter()
        self._now["step"] = now - self._began
        self.steps.append(dict(self._now))
        self._now.clear()
        self._began = now

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a method of one object."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.counted(part):
                return method(*args, **kwargs)

        setattr(owner, name, watched)

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count the time of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._now[part] += time.perf_counter() - started

    def watch(self, base: Any) -> None:
        """Tell the parts of a Qwen3-VL apart, from the beginning of the vision tower to its gradient."""
        at = {"last": 0.0}

        def mark(part: str | None) -> Callable[..., None]:
            def note(*_: Any) -> None:
                now = time.perf_counter()
                if part:
                    self._now[part] += now - at["last"]
                at["last"] = now

            return note

        def merged(_: Any, __: Any, out: torch.Tensor) -> None:
            mark("vision forward")()
            if out.requires_grad:
                out.register_hook(lambda _: mark("LLM backward")())

        base.model.visual.patch_embed.register_forward_pre_hook(mark(None))
        live(base.model.visual.merger).register_forward_hook(merged)
        base.model.language_model.norm.register_forward_pre_hook(mark("LLM forward"))
        self.loss_is_there, self.backward_is_over = mark("head and loss"), mark("vision backward")

    def table(self, *, exchange: float = 0.0) -> dict[str, Any]:
        """Milliseconds of each part: means over the counted steps."""
        counted = self.steps[LEFT_OUT:]
        parts = {part: 1000 * mean(step.get(part, 0.0) for step in counted) for part in counted[0]}
        step = parts.pop("step")
        parts["vision backward"] -= exchange
        parts["exchange"] = exchange
        parts["the rest"] = step - sum(parts.values())
        order = (
            "data",
            "vision forward",
            "LLM forward",
            "head and loss",
            "LLM backward",
            "vision backward",
            "exchange",
        )
        return {"step": step, "parts": {part: parts[part] for part in (*order, "optimizer", "the rest")}}


def operations(step: Callable[[], object]) -> list[tuple[str, float, float, float]]:
    """Name, share of all time, calls a step, microseconds a call: those that take longest themselves."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            step()
    averages = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    first = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:OPERATIONS]
    return [(e.key, e.self_cpu_time_total / total, e.count / PROFILED, e.self_cpu_time_total / e.count) for e in first]


def of_ours(job: Job) -> dict[str, Any] | None:
    """Parts and operations of a step of ours; None on ranks but the first."""
    workload, times = ready(Path(job.workload)), Parts()
    parts = parts_of(job, workload)
    engine: Any = parts.engine
    times.watch(engine.loss.model.get_base_model())
    engine.loss.register_forward_hook(lambda *_: times.loss_is_there())
    accumulate, seconds = engine.accumulate, ([], [])
    n, seen = 0, Seen()

    def accumulated(batch: Any, n_supervised: int, *, last: bool) -> torch.Tensor:
        alone = n % 2 == 1 and engine.ranks > 1
        started = time.perf_counter()
        nll: torch.Tensor = accumulate(batch, n_supervised, last=last and not alone)
        times.backward_is_over()
        seconds[alone].append(time.perf_counter() - started)
        return nll

    engine.accumulate = accumulated
    for name in ("gradient_norms", "update"):
        times.timed(engine, name, "optimizer")

    def step() -> None:
        nonlocal n, seen
        with times.counted("data"):
            mine = batches(job, workload, n, engine.rank)
        seen = train_step(parts, mine, seen, n_samples=len(workload)).seen
        times.end_step()
        n += 1

    for _ in range(job.steps):
        step()
    exchange = 0.0
    if engine.ranks > 1:  # steps that left it out are no steps
        exchange = 1000 * (median(seconds[0][LEFT_OUT:]) - median(seconds[1][LEFT_OUT:]))
        times.steps = times.steps[:LEFT_OUT] + times.steps[LEFT_OUT + LEFT_OUT % 2 :: 2]
    found = times.table(exchange=exchange) | {"kernels": operations(step)}
    return found if engine.rank == 0 else None


def of_the_baseline(job: Job) -> dict[str, Any]:
    """Parts and operations of a step of the baseline."""
    workload, times = ready(Path(job.workload)), Parts()
    kernels: list[tuple[str, float, float, float]] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.end_step()

    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make_trainer(job, workload, folder, Watch())
        trainer.add_callback(Ends())
        times.watch(trainer.model.get_base_model())
        times.timed(trainer, "get_batch_samples", "data")
        times.timed(trainer.accelerator, "clip_grad_norm_", "optimizer")
        times.timed(trainer.model, "zero_grad", "optimizer")
        compute, backward, create = trainer.compute_loss, trainer.accelerator.backward, trainer.create_optimizer

        def computed(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            times.loss_is_there()
            return loss

        def went_back(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            times.backward_is_over()

        def created(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            times.timed(trainer.optimizer, "step", "optimizer")
            return made

        trainer.compute_loss, trainer.accelerator.backward, trainer.create_optimizer = computed, went_back, created
        trainer.train()
        found = times.table()

        batch = trainer.data_collator([workload[i] for i in range(2)])

        def step() -> None:
            for _ in range(2):
                trainer.model(**batch).loss.backward()

        kernels = operations(step)
    return found | {"kernels": kernels}


def main() -> None:
    """Measure every contender in a process of its own, or one of them here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", help="folder, see workload.py")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--variants", nargs="+", default=("plain", "fused", "all"), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--prefix", default="", help="such as 'taskset -c 0,1'")
    asked = parser.parse_args()
    contenders = {name: VARIANTS[name] for name in asked.variants}
    rows = []
    for arm in asked.arms:
        job = Job(asked.workload, arm, steps=asked.steps, checkpointing=asked.checkpointing)
        for name in (BASELINE, *contenders):
            of = job if name == BASELINE else replace(job, switches=contenders[name])
            kind = "baseline" if name == BASELINE else "ours"
            rows.append({"arm": arm, "contender": name, **ask(of, f"breakdown.py {kind}", asked.prefix.split())})
            print(json.dumps(rows[-1]), flush=True)
    save("breakdown", contenders, rows)


def measure(kind: str, job: Job) -> None:
    """In this process."""
    found = of_ours(job) if kind == "ours" else of_the_baseline(job)
    if found is not None:
        tell(found)
    launch.end(0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1] in ("ours", "baseline"):
        measure(sys.argv[1], Job.read(sys.argv[2]))
    else:
        main()
