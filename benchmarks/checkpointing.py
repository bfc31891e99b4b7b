"""Measures what gradient checkpointing saves and costs on pocket: peak memory of a process, and seconds a step.

    python benchmarks/checkpointing.py --arm last6_lora --tokens 4096 --steps 3

Every row is a process of its own, in turn, that trains on one packed micro-batch of digits; its first step is not
timed. Memory is the peak resident set, interpreter and libraries with it: `idle` is that before the first step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator

from trainer import build
from trainer.config.load import load
from trainer.data.loader import Batch, collate
from trainer.engine import Engine
from trainer.gradient_checkpointing import checkpoint_layers
from trainer.model import SupervisedLoss, apply_plan, load_model, trained_tensors
from trainer.optim import make_optimizer
from trainer.strategy import Part

VARIANTS = {"none": (), "vision": (Part.VISION,), "LLM": (Part.LLM,), "both": (Part.VISION, Part.LLM)}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process found."""

    layers: int  # checkpointed
    tokens: int
    idle_bytes: int
    peak_bytes: int
    seconds: float  # median of the timed steps


def peak_resident() -> int:
    """Bytes of this process's peak resident set; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_pack(prepared: build.Prepared, tokens: int) -> Batch:
    """The first training samples end to end, as many as `tokens` have room for."""
    samples, used = [], 0
    for record in prepared.data.train.records:
        used += prepared.encoder.length(record)
        if used > tokens:
            break
        samples.append(prepared.encoder.encode(record))
    return collate(samples, prepared.encoder.pad_id, packed=True)


def measure(variant: str, arm: str, tokens: int, steps: int) -> Measured:
    """Train a few steps in this process."""
    prepared = build.prepare(load(arm, overrides={"global_max_length": str(tokens)}))
    base = load_model("pocket", prepared.tools, dtype=torch.float32, attn_impl="sdpa", seed=0)
    model = apply_plan(base, prepared.plan, seed=0)
    layers = checkpoint_layers(model, VARIANTS[variant])
    trained = list(trained_tensors(model))
    optimizer = make_optimizer(trained, weight_decay=0.1)
    engine = Engine(Accelerator(cpu=True), SupervisedLoss(model), optimizer, trained, max_grad_norm=1.0)
    batch = one_pack(prepared, tokens)
    engine.loss.train()
    idle, seconds = peak_resident(), []
    for _ in range(steps + 1):
        started = time.perf_counter()
        engine.accumulate(batch, batch.n_supervised, last=True)
        engine.update(engine.gradient_norms()["total"])
        seconds.append(time.perf_counter() - started)
    return Measured(len(layers), batch.n_tokens, idle, peak_resident(), statistics.median(seconds[1:]))


def table(arm: str, rows: dict[str, Measured]) -> str:
    """In Markdown: peak memory and seconds a step, each also as a ratio to no checkpointing."""
    none = rows["none"]
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"{arm}, a pack of {none.tokens} tokens; {machine}\n",
        "| checkpointed | layers | idle MiB | peak MiB | ratio | above idle MiB | ratio | s/step | ratio |",
        "| --- |" + " ---: |" * 8,
    ]
    for variant, row in rows.items():
        above, above_none = row.peak_bytes - row.idle_bytes, none.peak_bytes - none.idle_bytes
        cells = [f"{row.layers}", f"{row.idle_bytes / 2**20:.0f}", f"{row.peak_bytes / 2**20:.0f}"]
        cells += [f"{row.peak_bytes / none.peak_bytes:.2f}", f"{above / 2**20:.0f}", f"{above / above_none:.2f}"]
        cells += [f"{row.seconds:.2f}", f"{row.seconds / none.seconds:.2f}"]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every variant in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="last6_lora", help="a file of experiments/")
    parser.add_argument("--tokens", type=int, default=4096, help="at most so many in the pack")
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one that is not")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(asdict(measure(**vars(arguments)))))
        return
    rows = {}
    for variant in VARIANTS:
        command = [sys.executable, *sys.orig_argv[1:], "--variant", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[variant] = Measured(**json.loads(done.stdout.splitlines()[-1]))
    print(table(arguments.arm, rows))


if __name__ == "__main__":
    main()
