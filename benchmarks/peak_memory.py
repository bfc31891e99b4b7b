"""Measures what a training step on pocket holds at its peak, tensor by tensor, to hold the cost model against.

    python benchmarks/peak_memory.py                        # every cell, into results/scaling/pocket_memory.json
    python benchmarks/peak_memory.py --cell last6_lora:8    # one: ARM:SAMPLES[:checkpointed parts[:ranks[:zero]]]

A cell is a process of its own (one a rank): the arm's model, one micro-batch of so many scenes of digits end to end in
the fused pass, three optimizer steps. Measured is the third: bytes of all tensors that are there before it, and the
highest sum of what the step allocates and frees, as torch's profiler tells it. The resident set of a process would have
Python, libraries and the allocator's gaps in it. `accumulation` is 2 where a cell says so: the second micro-batch then
finds gradients of the first.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainer import build
from trainer.config.load import load
from trainer.cost.anatomy import anatomy_of
from trainer.cost.memory import peak_memory
from trainer.cost.microbatch import MicroBatch
from trainer.curriculum import Course
from trainer.data.loader import collate
from trainer.engines import join_ranks, make_engine, material_of
from trainer.estimate import layout_from
from trainer.fused import native
from trainer.model import apply_plan, read_config

RESULTS = Path(__file__).parent / "results" / "scaling" / "pocket_memory.json"
ARMS = ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")
PARTS = {"none": ("false", "false"), "vision": ("false", "true"), "both": ("true", "true")}
"""What is checkpointed -> `training.gradient_checkpointing`, and that of the vision blocks."""
RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Cell:
    """What one process measures, or several ranks together."""

    arm: str
    samples: int
    """Of a micro-batch; eight fill a pack of the pocket profile."""
    checkpointed: str = "none"
    ranks: int = 1
    zero: bool = False
    accumulation: int = 1

    @classmethod
    def read(cls, text: str) -> "Cell":
        """From `last6_lora:8:both:2:zero:2`; what is left out is the default."""
        arm, samples, *rest = text.split(":")
        parts, ranks, zero, accumulation = (*rest, *("none", "1", "", "1")[len(rest) :])
        return cls(arm, int(samples), parts, int(ranks), zero == "zero", int(accumulation))

    def __str__(self) -> str:
        zero = "zero" if self.zero else ""
        return f"{self.arm}:{self.samples}:{self.checkpointed}:{self.ranks}:{zero}:{self.accumulation}"

    def overrides(self) -> dict[str, str]:
        """The settings of a run that would do this."""
        text, vision = PARTS[self.checkpointed]
        return {
            "custom.digits.train": str(max(32, self.samples * self.ranks)),
            "custom.digits.val": "2",
            "custom.digits.ood": "2",
            "launch.nproc": str(self.ranks),
            "deepspeed.enabled": str(self.zero).lower(),
            "training.gradient_checkpointing": text,
            "training.vit_gradient_checkpointing": vision,
            "training.gradient_accumulation_steps": str(self.accumulation),
        }


CELLS = (
    *(Cell(arm, n, parts) for arm in ARMS for n in (2, 8) for parts in ("none", "both")),
    *(Cell(arm, 16, parts) for arm in ("last6_lora", "all_full") for parts in ("none", "both")),
    Cell("all_full", 8, "vision"),
    Cell("all_full", 8, "both", accumulation=2),
    *(Cell("all_full", 8, "none", 2, zero) for zero in (False, True)),
    Cell("all_full", 2, "both", 2, zero=True),
)


def measure(cell: Cell) -> dict[str, Any]:
    """Three steps on this rank."""
    resolved = load(cell.arm, overrides=cell.overrides())
    config, prepared = resolved.config, build.prepare(resolved)
    accelerator = join_ranks(prepared.zero, prepared.plan, prepared.budget, config)
    model = apply_plan(build.load_base(config, prepared.tools), prepared.plan, seed=17)
    course = Course(model, prepared.stages, step=0)
    engine = make_engine(
        accelerator, material_of(model, course, prepared.forward_pass, accelerator, config), course, config
    )
    loss: Any = engine.loss
    for group in engine.optimizer.param_groups:
        group["lr"] = RATE
    first = engine.rank * cell.samples
    records = prepared.data.train.records[first : first + cell.samples]
    batch = collate([prepared.encoder.encode(record) for record in records], prepared.encoder.pad_id, packed=True)
    loss.train()

    def step() -> None:
        for index in range(cell.accumulation):
            engine.accumulate(batch, batch.n_supervised * cell.accumulation, last=index == cell.accumulation - 1)
        engine.update(engine.gradient_norms()["total"])

    step()
    step()
    there = alive_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    shared = len(loss._prompts.known[0].ids) if loss._prompts.known else 0
    work = MicroBatch(batch.token_counts, tuple(batch.image_grid_thw.prod(1).tolist()), batch.n_supervised, shared)
    expected = peak_memory(
        anatomy_of(read_config(config.model.model), prepared.plan), work, layout_from(config, prepared)
    )
    return {
        **asdict(cell), "batch": asdict(work), "alive_bytes": there, "above_bytes": highest(profiled),
        "peak_bytes": there + highest(profiled), "computed_bytes": expected.total,
        "kernels": native.library() is not None,
    }  # fmt: skip


def alive_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if issubclass(type(found), Tensor) and found.device.type == "cpu" and found.layout is torch.strided
    }
    return sum(storages.values())


def highest(profiled: Any) -> int:
    """The highest running sum of what was allocated and freed, in bytes."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def in_processes(cell: Cell) -> dict[str, Any]:
    """Measure a cell apart from everything else; of several ranks, the one that holds most."""
    command = [sys.executable]
    if cell.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, __file__, "--cell", str(cell)], env=environment, capture_output=True, text=True)
    lines = [line[line.index('{"arm"') :] for line in done.stdout.splitlines() if '{"arm"' in line]
    if done.returncode or len(lines) != cell.ranks:
        raise RuntimeError(f"{cell} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = max(map(json.loads, lines), key=lambda told: int(told["peak_bytes"]))
    return found


def main() -> None:
    """Measure one cell here, or each apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Cell.read, help="only this one, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for all of them")
    asked = parser.parse_args()
    if asked.cell is not None:
        sys.stdout.write(json.dumps(measure(asked.cell)) + "\n")
        sys.stdout.flush()
        os._exit(0)  # a group of ranks could wait for ever while it ends
    from machine import facts

    runs = []
    for cell in CELLS:
        runs.append(in_processes(cell))
        off = 100 * (runs[-1]["computed_bytes"] / runs[-1]["peak_bytes"] - 1)
        print(f"{cell!s:<40}{runs[-1]['peak_bytes'] / 1e6:>8.1f} MB, computed {off:+.1f} %", flush=True)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({"facts": facts(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
