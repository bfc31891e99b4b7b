"""Measures a training step of a random-weight Qwen3-VL-4B at the published profile on one GPU: ours beside plain HF.

    python benchmarks/gpu.py --out benchmarks/results/performance        # both arms, one process each
    python benchmarks/gpu.py --arm last6_lora --also plain               # one arm, and of the rest the plain runs alone
    python benchmarks/gpu.py --arm last6_lora --device cpu --tiny        # the same code on a tiny model, without a GPU

A sample has 600 words of prompt, an image of 64x64 patches (1,024 tokens) and 376 supervised tokens of answer: 2,000
tokens; a pack of 20,000 tokens holds ten, a micro-batch is two packs, and a step is one micro-batch. Base weights are
bfloat16, trained tensors float32, layers are checkpointed, LoRA drops out 0.1.

- ours: `FusedLoss` over the samples end to end in one row, and `Engine`'s step.
- plain: `Qwen3VLForConditionalGeneration` with the same adapters and labels under autocast, SDPA, transformers' own
  gradient checkpointing, in rows of one sample each and all of one length, so that nothing is padded; at the number of
  rows that is fastest of those tried. AdamW is fused and clipping the same.

Both are measured in one process on one model, one after the other, with batches that lie on the GPU. Samples have
different prompts, but where it is said that they share one. Useful operations are counted from the shapes
(`gpu_model.useful_flops`), and rates are shown beside that of a large product in the same process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_model import TINY, Shape, Subject, gemm_tflops, make_samples, packed, prepare, useful_flops, wait
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn.functional import cosine_similarity
from torch.profiler import ProfilerActivity, profile

from trainer import launch
from trainer.data.loader import Batch, collate
from trainer.engine import Engine
from trainer.fused import layers
from trainer.fused.forward import FusedLoss
from trainer.gradient_checkpointing import checkpoint_layers
from trainer.model import SupervisedLoss
from trainer.optim import make_optimizer
from trainer.provenance import code_version, environment
from trainer.strategy import Part

ARMS = ("last6_lora", "all_full")
ALSO = ("profile", "shared", "memory", "inputs", "zero", "plain")
CARD_TFLOPS = 790.0
"""Dense bfloat16 products of an H200, as they are reached."""
RATE, CLIP, IGNORED, WARM = 1e-4, 0.5, -100, 2

Step = Callable[[Batch], float]
"""Trains on a batch, and tells its loss."""

SHORT = (Shape(40, 16, 30), Shape(70, 24, 50), Shape(21, 8, 12))
"""Samples of different lengths, on which ours is held to the plain forward pass."""

KINDS = (
    ("attention", ("flash", "fmha", "attention")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas")),
    ("compiled small operations", ("triton",)),
    ("patch embedding", ("conv", "im2col")),
    ("optimizer and norms of gradients", ("multi_tensor", "adam", "norm")),
    ("copies", ("copy", "memcpy", "cat", "memset", "fill")),
)
"""A kernel is of the first kind of which its name has a word."""


def fused(of: Subject) -> FusedLoss:
    """Our forward pass."""
    checkpointed = checkpoint_layers(of.model, [Part.VISION, Part.LLM])
    return FusedLoss(of.model, bf16=True, checkpointed=checkpointed).train()


def our_step(of: Subject, loss: FusedLoss, engine_of: type[Engine] = Engine, make_zero: Any = None) -> Step:
    """The step of a run, without its log."""
    optimizer = make_optimizer(of.trained, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    engine = engine_of(launch.join(1, make_zero), loss, optimizer, of.trained, max_grad_norm=CLIP)

    def step(batch: Batch) -> float:
        nll = engine.accumulate(batch, batch.n_supervised, last=True)
        engine.update(engine.gradient_norms()["total"])
        return float(nll.mean())

    return step


def zero_step(of: Subject, loss: FusedLoss) -> Step:
    """The same with ZeRO-2, on this one rank."""
    from accelerate.state import AcceleratorState

    from trainer.config.zero import zero_settings
    from trainer.zero2 import ZeroEngine, deepspeed_accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    settings, n = zero_settings("zero2", "this benchmark")[0], of.plan.trainable_parameters()["total"]
    make = partial(deepspeed_accelerator, settings, micro_batch=1, max_grad_norm=CLIP, n_trained=n)
    return our_step(of, loss, ZeroEngine, make)


def plain_step(of: Subject) -> Step:
    """The baseline: transformers and PEFT alone."""
    model = of.model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # as transformers itself does it: all layers
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    parameters = [tensor.parameter for tensor in of.trained]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, fused=True)

    def step(batch: Batch) -> float:
        with torch.autocast(of.device.type, torch.bfloat16):
            loss = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids[1:], pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw, use_cache=False,
                labels=batch.input_ids.masked_fill(~batch.supervised, IGNORED),
            ).loss  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measured(step: Step, batch: Batch, of: Subject) -> dict[str, Any]:
    """Median seconds of a step, and peak memory; or that it does not fit."""
    seconds: list[float] = []
    try:
        for n in range(WARM + of.shape.steps):
            if n == WARM:
                _reset_peak(of)
            wait(of.device)
            began = time.perf_counter()
            loss = step(batch)
            wait(of.device)
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        forget(of)
        return {"samples": batch.n_samples, "fits": False}
    middle = median(seconds[WARM:])
    return {
        "samples": batch.n_samples,
        "fits": True,
        "first_step_seconds": seconds[0],
        "step_seconds": middle,
        "all_seconds": seconds[WARM:],
        "samples_per_second": batch.n_samples / middle,
        "tokens_per_second": batch.n_tokens / middle,
        "peak_gb": _peak_gb(of),
        "loss": loss,
    }


def forget(of: Subject) -> None:
    """Give memory back between contenders."""
    for tensor in of.trained:
        tensor.parameter.grad = None
    if of.device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(of: Subject) -> None:
    if of.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gb(of: Subject) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if of.device.type == "cuda" else 0.0


def memory_table(step: Step, of: Subject) -> Iterator[dict[str, Any]]:
    """Peak memory of a step at growing micro-batches, until one does not fit."""
    for thousand in of.shape.totals:
        batch = packed(of.samples(max(1, thousand * 1000 // of.shape.tokens)), of.device)
        _reset_peak(of)
        try:
            step(batch)
        except torch.OutOfMemoryError:
            forget(of)
            yield {"tokens": batch.n_tokens, "fits": False}
            return
        yield {"tokens": batch.n_tokens, "fits": True, "peak_gb": _peak_gb(of)}


def compared(of: Subject, loss: FusedLoss) -> dict[str, Any]:
    """Losses and gradients of ours beside those of `SupervisedLoss`, without dropout, in bfloat16 both."""
    samples = [make_samples(shape, 1, of.config, seed=index)[0] for index, shape in enumerate(SHORT)]
    found: list[tuple[Tensor, dict[Part, Tensor]]] = []
    for one, batch in ((SupervisedLoss(of.model, bf16=True), collate(samples, 0)), (loss, packed(samples, of.device))):
        one.eval()
        on_device = batch.to(of.device)
        nll = one(on_device.supervised, **on_device.model_inputs())
        nll.mean().backward()
        found.append((nll.detach(), {part: _flat(of, part) for part in Part}))
        forget(of)
    loss.train()
    (nll, plain), (our_nll, ours) = found
    return {
        "loss_relative": float(abs(our_nll.mean() - nll.mean()) / nll.mean()),
        "token_losses_relative": float((our_nll - nll).norm() / nll.norm()),
        "gradient_cosine": {part.value: float(cosine_similarity(plain[part], ours[part], 0)) for part in Part},
        "gradient_norm_ratio": {part.value: float(ours[part].norm() / plain[part].norm()) for part in Part},
    }


def _flat(of: Subject, part: Part) -> Tensor:
    gradients = [t.parameter.grad for t in of.trained if t.part is part]
    return torch.cat([g.flatten().double() for g in gradients if g is not None])


def profiled(step: Step, batch: Batch, of: Subject) -> dict[str, Any]:
    """Milliseconds of a step's kernels by kind, and the kernels that take longest; nothing on a CPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step(batch)
        wait(of.device)
    kinds: dict[str, float] = {}
    kernels: dict[str, tuple[float, int]] = {}
    for event in found.events() or []:
        if event.device_type != DeviceType.CUDA or "#" in event.name:  # the optimizer's annotation spans its kernels
            continue
        name, milliseconds = event.name, event.time_range.elapsed_us() / 1000
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "the rest")
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
        before = kernels.get(name, (0.0, 0))
        kernels[name] = before[0] + milliseconds, before[1] + 1
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    return {"kinds": kinds, "kernels": [(name[:160], round(ms, 2), count) for name, (ms, count) in longest]}


def of_ours(of: Subject, also: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(what, figures) of our runs."""
    loss = fused(of)
    yield "compared", compared(of, loss)
    batch, step = packed(of.samples(of.shape.samples), of.device), our_step(of, loss)
    yield "ours", measured(step, batch, of)
    yield "ours_one_pack", measured(step, packed(of.samples(of.shape.samples // 2), of.device), of)
    if "profile" in also:
        yield "profile", profiled(step, batch, of)
    if "shared" in also:
        same = packed(of.samples(of.shape.samples, shared=of.shape.prompt * 5 // 6), of.device)
        yield "ours_shared_prompt", measured(step, same, of)
        del same
    if "memory" in also:
        yield "memory", list(memory_table(step, of))
    if "inputs" in also:
        has_room = layers._has_room
        layers._has_room = lambda wide: False  # checkpointed layers keep their input alone
        yield "ours_inputs_kept", measured(step, batch, of)
        if "memory" in also:
            yield "memory_inputs_kept", list(memory_table(step, of))
        layers._has_room = has_room


def of_plain(of: Subject) -> list[dict[str, Any]]:
    """The baseline's runs, by rows."""
    step = plain_step(of)
    return [measured(step, collate(of.samples(rows), 0).to(of.device), of) for rows in of.shape.plain_rows]


def rates(found: dict[str, Any], flops: float) -> dict[str, Any]:
    """Useful operations a second, their shares of two ceilings, and how much faster ours is than the best plain run."""
    runs = {name: run for name, run in found.items() if name.startswith("ours") and run["fits"]}
    if fitting := [run for run in found.get("plain", []) if run["fits"]]:
        runs["plain"] = max(fitting, key=lambda run: float(run["samples_per_second"]))
    reached = {name: run["samples_per_second"] * flops / 1e12 for name, run in runs.items()}
    shares = {
        name: {"tflops": rate, "of_measured": rate / found["gemm_tflops"], "of_790": rate / CARD_TFLOPS}
        for name, rate in reached.items()
    }
    plain = reached.get("plain")
    return {"rates": shares, "over_plain": {name: rate / plain for name, rate in reached.items()} if plain else None}


def measure(arm: str, shape: Shape, device: torch.device, asked: argparse.Namespace) -> None:
    """Everything of one arm, written down as it comes."""
    found: dict[str, Any] = {"arm": arm, "environment": environment(), "commit": code_version()}
    found |= {"date": datetime.now(UTC).date().isoformat(), "steps": shape.steps}

    def note(what: str, figures: Any) -> None:
        found[what] = figures
        print(json.dumps({what: figures}), flush=True)
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / f"gpu_{arm}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    note("gemm_tflops", gemm_tflops(device, 8192 if device.type == "cuda" else 512))
    of = prepare(arm, shape, device, tiny=asked.tiny)
    flops = useful_flops(of)
    note("useful_gflop_a_sample", {way: count / 1e9 for way, count in flops.items()})
    for what, figures in of_ours(of, asked.also):
        note(what, figures)
    forget(of)
    if "plain" in asked.also:
        note("plain", of_plain(of))
        forget(of)
    if "zero" in asked.also:  # last: it leaves a group of ranks behind
        batch = packed(of.samples(shape.samples), device)
        note("ours_zero2", measured(zero_step(of, fused(of)), batch, of))
    for what, figures in rates(found, sum(flops.values())).items():
        note(what, figures)


def main() -> None:
    """Measure one arm here, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="only this one, in this process")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny samples")
    parser.add_argument("--also", nargs="*", default=ALSO, choices=ALSO, help="beside ours; default: all")
    parser.add_argument("--steps", type=int, help="counted steps of each")
    parser.add_argument("--out", type=Path, help="folder for gpu_ARM.json")
    asked = parser.parse_args()
    if asked.arm is None:
        for arm in ARMS:
            subprocess.run([sys.executable, __file__, "--arm", arm, *sys.argv[1:]], check=True)
        return
    shape = TINY if asked.tiny else Shape()
    if asked.steps:
        shape = replace(shape, steps=asked.steps)
    measure(asked.arm, shape, torch.device(asked.device), asked)
    launch.end(0)


if __name__ == "__main__":
    main()
