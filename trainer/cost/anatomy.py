"""A Qwen3-VL as costs see it: its layers, the products in each, what of them trains and what passes a gradient on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.strategy import Method, ParameterPlan, Part, PlannedTensor

_LAYER = re.compile(r"model\.(visual\.blocks|language_model\.layers)\.(\d+)\.(.+)")
_PRODUCTS = {
    "qkv": ("attn.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("attn.proj", "self_attn.o_proj"),
    "up": ("mlp.linear_fc1", "mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.linear_fc2", "mlp.down_proj"),
}
"""The four products of a layer, each with the modules that it is made of."""


@dataclass(frozen=True, slots=True)
class Product:
    """Rows times a weight."""

    inputs: int
    outputs: int
    ranks: int = 0
    """Of its adapters together."""
    adapters: int = 0
    """Parameters of its adapters."""
    full: bool = False
    """Whether its weight trains itself."""

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs

    @property
    def trained(self) -> bool:
        """Whether it has a gradient of its own, so that its input is needed again."""
        return self.full or self.ranks > 0


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer or a vision block."""

    qkv: Product
    out: Product
    up: Product
    down: Product
    trained: int
    """Parameters that train."""
    full: bool
    """Whether it trains as a whole, norms too."""
    reached: bool
    """Whether something trains in it or before it: its backward pass runs."""

    @property
    def products(self) -> tuple[Product, ...]:
        """In the order of the forward pass."""
        return self.qkv, self.out, self.up, self.down


@dataclass(frozen=True, slots=True)
class Stack:
    """The blocks of the vision tower, or the layers of the language model."""

    layers: tuple[Layer, ...]
    width: int
    heads: int
    key_heads: int
    head: int
    """Numbers of a head."""
    wide: int
    """Numbers of a row that go into the MLP's gate."""
    gated: int
    """Numbers that come out of it."""
    causal: bool
    fed: bool
    """Whether something trains before it, so that its own input has a gradient."""

    @property
    def attended(self) -> int:
        """Numbers of a row of queries."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Numbers of a row of keys, or of values."""
        return self.key_heads * self.head

    @property
    def frozen(self) -> int:
        """Layers before everything that trains in this stack."""
        return next((i for i, layer in enumerate(self.layers) if layer.trained), len(self.layers))

    def passes_on(self, index: int) -> bool:
        """Whether a layer's input has a gradient that something needs."""
        return self.fed if index == 0 else self.layers[index - 1].reached


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All of a model that costs follow from."""

    vision: Stack
    text: Stack
    mergers: tuple[tuple[Product, Product], ...]
    """The two products of each, over merged tokens; the first merger makes image tokens, the others are DeepStack's."""
    merged: int
    """Patches that become one token."""
    taps: tuple[int, ...]
    """Vision blocks behind which DeepStack's mergers read."""
    patch: int
    """Numbers of a patch."""
    vocabulary: int
    parameters: dict[Part, int]
    """Of the base model."""
    trained: dict[Part, int]
    copied: dict[Part, int]
    """Of modules that train in full: PEFT keeps the original beside the copy."""
    dropout: bool
    """Whether adapters drop out."""

    @property
    def all_trained(self) -> int:
        """Parameters that train."""
        return sum(self.trained.values())

    @property
    def aligner_reached(self) -> bool:
        """Whether the mergers have a backward pass."""
        return self.trained[Part.ALIGNER] > 0 or self.vision.layers[-1].reached


def anatomy_of(config: Any, plan: ParameterPlan) -> Anatomy:
    """Read it off a `Qwen3VLConfig` and the plan for every tensor.

    Args:
        config: of the base model; heads and taps, which shapes do not tell, are read from it.
        plan: shapes, and what trains.
    """
    vision, text = config.vision_config, config.text_config
    before_text = any(t.part is not Part.LLM for t in plan.trained())
    head = int(vision.hidden_size) // int(vision.num_heads)
    tower = Stack(
        _layers("visual.blocks", plan, reached=False),
        vision.hidden_size, vision.num_heads, vision.num_heads, head,
        vision.intermediate_size, vision.intermediate_size, causal=False, fed=False,
    )  # fmt: skip
    language = Stack(
        _layers("language_model.layers", plan, reached=before_text),
        text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim,
        2 * text.intermediate_size, text.intermediate_size, causal=True, fed=before_text,
    )  # fmt: skip
    counts = {part: 0 for part in Part}
    trained, copied = dict(counts), dict(counts)
    for tensor in plan.tensors:
        counts[tensor.part] += tensor.size
        trained[tensor.part] += _trained(tensor, plan)
        copied[tensor.part] += tensor.size if tensor.method is Method.FULL else 0
    return Anatomy(
        vision=tower,
        text=language,
        mergers=_mergers(plan),
        merged=int(vision.spatial_merge_size) ** 2,
        taps=tuple(vision.deepstack_visual_indexes),
        patch=int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2),
        vocabulary=int(text.vocab_size),
        parameters=counts,
        trained=trained,
        copied=copied,
        dropout=plan.lora.dropout > 0,
    )


def _layers(stem: str, plan: ParameterPlan, *, reached: bool) -> tuple[Layer, ...]:
    tensors: dict[int, dict[str, PlannedTensor]] = {}
    for tensor in plan.tensors:
        if (match := _LAYER.fullmatch(tensor.name)) and match.group(1) == stem:
            tensors.setdefault(int(match.group(2)), {})[match.group(3)] = tensor
    made = []
    for _, own in sorted(tensors.items()):
        trained = sum(_trained(tensor, plan) for tensor in own.values())
        reached = reached or trained > 0
        weights = {
            name: [own[f"{module}.weight"] for module in modules if f"{module}.weight" in own]
            for name, modules in _PRODUCTS.items()
        }
        full = any(tensor.method is Method.FULL for tensor in own.values())
        qkv, out, up, down = (_product(of, plan) for of in weights.values())
        made.append(Layer(qkv, out, up, down, trained, full, reached))
    return tuple(made)


def _mergers(plan: ParameterPlan) -> tuple[tuple[Product, Product], ...]:
    modules: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.part is Part.ALIGNER and len(tensor.shape) == 2:
            modules.setdefault(tensor.name.partition(".linear_fc")[0], []).append(tensor)
    pairs = [modules[name] for name in sorted(modules, key=lambda name: "deepstack" in name)]
    return tuple((_product([first], plan), _product([second], plan)) for first, second in pairs)


def _product(weights: Sequence[PlannedTensor], plan: ParameterPlan) -> Product:
    """Modules that read the same input, as one."""
    adapted = [tensor for tensor in weights if tensor.method is Method.LORA]
    return Product(
        inputs=weights[0].shape[1],
        outputs=sum(tensor.shape[0] for tensor in weights),
        ranks=plan.lora.rank * len(adapted),
        adapters=sum(_trained(tensor, plan) for tensor in adapted),
        full=any(tensor.method is Method.FULL for tensor in weights),
    )


def _trained(tensor: PlannedTensor, plan: ParameterPlan) -> int:
    """Parameters that train for a tensor of the base model."""
    if tensor.method is Method.FROZEN:
        return 0
    return plan.lora.rank * sum(tensor.shape) if tensor.method is Method.LORA else tensor.size
