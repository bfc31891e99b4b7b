"""Measures what a prompt costs that every sample of a pack begins with: repeated in each, or there once.

    python benchmarks/shared_prompt.py --samples 8 --words 0 64 128 256 512 700

`pocket` is a whole training step, forward and backward, of `last6_lora` on one pack of digits behind so many words.
`4B` is one frozen decoder layer at Qwen3-VL-4B's width, forward and backward, on four samples of 200 tokens;
`attention` is what of that its attention takes. Forms take turns; medians.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import facts
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from trainer import build
from trainer.architectures import qwen3_vl_config
from trainer.config.load import load
from trainer.data.loader import Batch, collate
from trainer.data.template import Sample, mrope_positions
from trainer.fused import layers, shared
from trainer.fused.forward import FusedLoss
from trainer.fused.layers import DecoderLayer, Rows
from trainer.fused.shared import Words
from trainer.model import apply_plan

OUT = Path(__file__).parent / "results" / "performance" / "shared_prompt.json"
OWN_TOKENS = 200  # of a sample behind its prompt, in the layer of the 4B


def behind_words(sample: Sample, words: torch.Tensor) -> Sample:
    """The sample behind words of no meaning; its own prompt stays."""
    nothing = torch.zeros(len(words), dtype=torch.bool)
    images = torch.cat([nothing, sample.image_tokens])
    return replace(
        sample,
        input_ids=torch.cat([words, sample.input_ids]),
        image_tokens=images,
        supervised=torch.cat([nothing, sample.supervised]),
        position_ids=mrope_positions(images, sample.image_grid_thw, 2),
    )


def seconds(functions: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Median seconds of each, in turn, after one call that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(times + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: median(of) for name, of in taken.items()}


def pocket(n_samples: int, lengths: list[int], times: int) -> list[dict[str, Any]]:
    """A training step's seconds for every length, with the prompt shared and repeated."""
    resolved = load("last6_lora", overrides={"tuner.lora_dropout": "0"})
    prepared = build.prepare(resolved)
    model = apply_plan(build.load_base(resolved.config, prepared.tools), prepared.plan, seed=17)
    forms = {"shared": FusedLoss(model), "repeated": FusedLoss(model, share_prompts=False)}
    samples = [prepared.encoder.encode(record) for record in prepared.data.train.records[:n_samples]]
    own = samples[0].image_tokens.nonzero()[0].item()  # its own prompt is taken off: 0 words are no prompt
    bare = [replace(s, input_ids=s.input_ids[own:], image_tokens=s.image_tokens[own:], supervised=s.supervised[own:])
            for s in samples]  # fmt: skip
    words = torch.randint(1000, 2000, (max(lengths),), generator=torch.Generator().manual_seed(0)) % 900 + 20

    def step(loss: FusedLoss, batch: Batch) -> None:
        loss(supervised=batch.supervised, **batch.model_inputs()).sum().backward()

    rows = []
    for length in lengths:
        batch = collate([behind_words(sample, words[:length]) for sample in bare], prepared.encoder.pad_id, packed=True)
        found = seconds({name: partial(step, loss, batch) for name, loss in forms.items()}, times)
        rows.append({"model": "pocket", "words": length, "tokens": batch.n_tokens, **found})
    return rows


def layer_of_4b(n_samples: int, lengths: list[int], times: int) -> list[dict[str, Any]]:
    """A frozen decoder layer's seconds, forward and backward, and those of its attention."""
    config = qwen3_vl_config("4b").text_config
    config._attn_implementation = "sdpa"
    layer = DecoderLayer(Qwen3VLTextDecoderLayer(config, 0).requires_grad_(False))
    in_attention = [0.0]
    for name in ("attend", "attend_backward"):
        setattr(layers, name, _timed(getattr(shared, name), in_attention))
    rows = []
    for length in lengths:
        turns = [torch.rand(length + OWN_TOKENS, config.head_dim) for _ in range(2)]
        repeated = _rows(turns, n_samples)
        words = length and layer.with_keys(
            torch.randn(length, config.hidden_size), _rows([t[:length] for t in turns], 1)
        )
        own = _rows([t[length:] for t in turns], n_samples)
        if words:
            own = replace(own, words=Words(length, words[1], words[2]))
        row: dict[str, Any] = {"model": "4B, one layer", "words": length, "tokens": n_samples * (length + OWN_TOKENS)}
        for name, seen, count in (("shared", own, OWN_TOKENS), ("repeated", repeated, length + OWN_TOKENS)):
            x = torch.randn(n_samples * count, config.hidden_size, requires_grad=True)
            taken = []
            in_attention[0] = 0.0
            for _ in range(times + 1):
                started = time.perf_counter()
                layer(x, seen, training=True).sum().backward()
                taken.append(time.perf_counter() - started)
            row |= {name: median(taken[1:]), f"{name}, attention": in_attention[0] / (times + 1)}
        rows.append(row)
    return rows


def _timed(function: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        made = function(*args)
        total[0] += time.perf_counter() - started
        return made

    return call


def _rows(turns: list[torch.Tensor], n: int) -> Rows:
    cos, sin = (t.repeat(n, 1) for t in turns)
    return Rows.of((cos, sin), torch.full((n,), len(turns[0])), torch.float32, extra=0, causal=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="samples of the pack")
    parser.add_argument(
        "--words", type=int, nargs="+", default=[0, 64, 128, 256, 512, 700], help="lengths of the prompt"
    )
    parser.add_argument("--times", type=int, default=5, help="counted calls of each form")
    asked = parser.parse_args()
    rows = pocket(asked.samples, asked.words, asked.times) + layer_of_4b(4, asked.words, max(1, asked.times // 2))
    for row in rows:
        print(json.dumps(row))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"facts": facts(), "threads": torch.get_num_threads(), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
