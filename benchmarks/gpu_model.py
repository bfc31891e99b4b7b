"""A random-weight Qwen3-VL and samples at the published profile, and what a step on them needs; for gpu.py."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainer import build
from trainer.architectures import qwen3_vl_config
from trainer.config.load import load
from trainer.data.loader import Batch, collate
from trainer.data.template import Sample, mrope_positions
from trainer.model import TrainedTensor, apply_plan, trained_tensors
from trainer.strategy import Method, ParameterPlan, Part, make_plan

WORDS = 100_000
"""Ids below this are words; special ones come later."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the samples, and of what is tried with them."""

    prompt: int = 600
    side: int = 64
    """Patches of an image's side."""
    answer: int = 376
    samples: int = 20
    """Of a micro-batch: two packs of ten."""
    plain_rows: tuple[int, ...] = (4, 10, 20)
    totals: tuple[int, ...] = (4, 8, 16, 20, 32, 40, 64, 80)
    """Thousands of tokens in a micro-batch, of which memory is shown."""
    steps: int = 6

    @property
    def tokens(self) -> int:
        """Of a sample."""
        return self.prompt + self.side**2 // 4 + self.answer


TINY = Shape(prompt=20, side=8, answer=12, samples=4, plain_rows=(2, 4), totals=(1,), steps=2)


def tiny_config() -> Qwen3VLConfig:
    """A model whose every step takes a moment on a CPU."""
    config = qwen3_vl_config("2b")
    vision: Any = config.vision_config
    text: Any = config.text_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 8, 32, 64, 2
    vision.deepstack_visual_indexes, vision.out_hidden_size = [1, 3, 5], 64
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 4, 64, 96
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
    text.rope_parameters = text.rope_parameters | {"mrope_section": [4, 2, 2]}
    return config


def make_samples(shape: Shape, count: int, config: Any, *, shared: int = 0, seed: int = 0) -> list[Sample]:
    """Samples of random words and noise, of which the first `shared` words are the same."""
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(WORDS, (shape.prompt,), generator=draw)
    patch = config.vision_config
    numbers = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    grid = torch.tensor([[1, shape.side, shape.side]])
    image = torch.zeros(shape.tokens, dtype=torch.bool)
    image[shape.prompt : shape.tokens - shape.answer] = True
    supervised = torch.arange(shape.tokens) >= shape.tokens - shape.answer
    made = []
    for index in range(count):
        ids = torch.randint(WORDS, (shape.tokens,), generator=draw)
        ids[:shared] = prompt[:shared]
        ids[image] = config.image_token_id
        pixels = torch.randn(shape.side**2, numbers, generator=draw)
        places = mrope_positions(image, grid, patch.spatial_merge_size)
        made.append(Sample(str(index), ids, supervised, image, places, pixels, grid, None))
    return made


def packed(samples: Sequence[Sample], device: torch.device) -> Batch:
    """One row, on the device."""
    return collate(samples, 0, packed=True).to(device)


@dataclass(frozen=True)
class Subject:
    """A model that is trained, and with what."""

    model: Any
    """PEFT-wrapped."""
    plan: ParameterPlan
    trained: list[TrainedTensor]
    shape: Shape
    device: torch.device
    config: Any

    def samples(self, count: int, **how: Any) -> list[Sample]:
        """Of the profile's shape; see `make_samples`."""
        return make_samples(self.shape, count, self.config, **how)


def prepare(arm: str, shape: Shape, device: torch.device, *, tiny: bool) -> Subject:
    """A model with random weights, wrapped by an arm's plan."""
    config = tiny_config() if tiny else qwen3_vl_config("4b")
    make: Callable[..., Qwen3VLForConditionalGeneration] = Qwen3VLForConditionalGeneration._from_config
    torch.manual_seed(17)
    with torch.device(device):  # random numbers are drawn where they stay: seconds instead of minutes
        base = make(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    plan = make_plan(build.strategy_from(load(arm).config), shapes)
    model = apply_plan(base, plan, seed=17).to(device)
    trained = list(trained_tensors(model))
    for tensor in trained:  # B of a LoRA starts at zero, and then A has no gradient to compare
        if ".lora_B." in tensor.name:
            torch.nn.init.normal_(tensor.parameter, std=0.02)
    return Subject(model, plan, trained, shape, device, config)


def useful_flops(of: Subject) -> dict[str, float]:
    """Floating-point operations of one sample that nobody can do without, forward and backward; two a multiply-add.

    Counted: products with every weight of blocks, mergers, layers and patch embedding, attention's two products a
    forward pass (the causal half of them in the language model) and its four a backward pass, the head at supervised
    positions. Of the backward pass: a weight's gradient where it trains in full, the gradient of a product's input
    where something before it trains, LoRA's three products each way. Not counted: what checkpointing runs again, the
    scores that flash-attention makes again, everything that is no product.
    """
    shape, config = of.shape, of.config
    patches, image, tokens = shape.side**2, shape.side**2 // 4, shape.tokens
    first = min((int(t.name.split(".")[3]) for t in of.plan.trained() if t.part is Part.VISION), default=10**9)
    flops = {"forward": 0.0, "backward": 0.0}
    for tensor in of.plan.tensors:
        name = tensor.name
        if len(tensor.shape) < 2 or "pos_embed" in name:
            continue
        block = int(name.split(".")[3]) if ".blocks." in name else None
        if "embed_tokens" in name or "lm_head" in name:  # tied: the head
            rows, gradient = shape.answer, True
        elif "patch_embed" in name:
            rows, gradient = patches, False
        elif block is not None:
            rows, gradient = patches, block > first or (block == first and ".attn.qkv." not in name)
        elif "merger" in name:
            rows, gradient = image, "linear_fc2" in name or first < 10**9
        else:
            rows, gradient = tokens, True
        product = 2.0 * rows * math.prod(tensor.shape)
        lora = 2.0 * rows * of.plan.lora.rank * sum(tensor.shape) if tensor.method is Method.LORA else 0.0
        flops["forward"] += product + lora
        flops["backward"] += product * (gradient + (tensor.method is Method.FULL)) + 2 * lora
    text, vision = config.text_config, config.vision_config
    of_layer = 2.0 * tokens**2 * text.num_attention_heads * text.head_dim
    of_block = 4.0 * patches**2 * vision.hidden_size
    flops["forward"] += text.num_hidden_layers * of_layer + vision.depth * of_block
    flops["backward"] += 2 * (text.num_hidden_layers * of_layer + max(0, vision.depth - first) * of_block)
    return flops


def gemm_tflops(device: torch.device, n: int = 8192) -> float:
    """Rate of a square bfloat16 product of random numbers, mean of twenty."""
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        x @ y
    wait(device)
    started = time.perf_counter()
    for _ in range(20):
        x @ y
    wait(device)
    return 20 * 2 * n**3 / (time.perf_counter() - started) / 1e12


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
