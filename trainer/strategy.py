"""Turns a strategy into ordered rules over full parameter names, and the rules into a plan for every tensor.

Needs only names and shapes: no torch, no weights. The rules are matched with `re.fullmatch`, the first match wins, a
rule that hits nothing is an error, and every tensor of the model gets exactly one entry in the plan.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trainer.errors import StrategyError

Shapes = Mapping[str, tuple[int, ...]]


class Method(StrEnum):
    """How a tensor is trained."""

    FROZEN = "frozen"
    LORA = "lora"
    FULL = "full"


class Part(StrEnum):
    """The part of the model that a tensor belongs to; each part has its own learning rate."""

    VISION = "vision"
    ALIGNER = "aligner"
    LLM = "llm"


_MERGERS = r"model\.visual\.(merger|deepstack_merger_list\.\d+)"
BLOCK = r"model\.visual\.blocks\.(\d+)"
_LAYER = r"model\.language_model\.layers\.(\d+)"

# First match wins: the aligner lives inside `model.visual`, so it stands before the vision tower.
PART_PATTERNS: tuple[tuple[Part, str], ...] = (
    (Part.ALIGNER, _MERGERS + r"\..+"),
    (Part.VISION, r"model\.visual\..+"),
    (Part.LLM, r"(model\.language_model|lm_head)\..+"),
)

# The linear layers that LoRA wraps inside one vision block, one merger, one LLM layer.
_LORA_INSIDE = {
    Part.VISION: r"(attn\.(qkv|proj)|mlp\.(linear_fc1|linear_fc2))\.weight",
    Part.ALIGNER: r"(linear_fc1|linear_fc2)\.weight",
    Part.LLM: r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))\.weight",
}

# A module that full fine-tuning copies whole (PEFT `modules_to_save`): one block, one layer, one merger.
_UNIT = re.compile(rf"({_MERGERS}|{BLOCK}|{_LAYER})\..+")


@dataclass(frozen=True, slots=True)
class Target:
    """What a strategy says of one part: which blocks or layers, and the method."""

    blocks: str
    """`all`, `none`, `last-N`, `A-B` or a comma-separated list of indices; the aligner has no blocks and says `all`."""
    method: Method
    key: str = "blocks"
    """Last name of the key that says the blocks."""


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA's numbers, common to all parts (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Strategy:
    """One arm of a comparison: what is trained, and how."""

    vision: Target
    aligner: Target
    llm: Target
    lora: Lora


@dataclass(frozen=True, slots=True)
class Rule:
    """`pattern` is a regular expression that a full parameter name must match as a whole."""

    pattern: str
    method: Method


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What the plan says of one tensor of the base model."""

    name: str
    shape: tuple[int, ...]
    part: Part
    method: Method
    rule: str
    """The pattern that caught it."""

    @property
    def size(self) -> int:
        """Number of elements of the base tensor."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that PEFT wraps for it: the linear layer for LoRA, the whole block, layer or merger for full."""
        unit = unit_of(self.name) if self.method is Method.FULL else None
        return unit or self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """What happens to every tensor of the base model, in the model's own order."""

    tensors: tuple[PlannedTensor, ...]
    lora: Lora
    vision_blocks: tuple[int, ...]
    """The vision blocks that train, resolved against the model's real depth."""

    def trained(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are trained by any method."""
        return tuple(t for t in self.tensors if t.method is not Method.FROZEN)

    def modules(self, method: Method) -> tuple[str, ...]:
        """Full names of the modules that PEFT wraps for a method, in model order, each once."""
        return tuple(dict.fromkeys(t.module for t in self.tensors if t.method is method))

    def trainable_parameters(self) -> dict[str, int]:
        """Trainable parameters of each part, and their `total`; LoRA on (out, in) counts rank * (out + in)."""
        counts = {part.value: 0 for part in Part}
        for tensor in self.trained():
            if tensor.method is Method.LORA:
                counts[tensor.part] += self.lora.rank * sum(tensor.shape)
            else:
                counts[tensor.part] += tensor.size
        return {**counts, "total": sum(counts.values())}

    def total_parameters(self) -> int:
        """Number of parameters of the base model."""
        return sum(t.size for t in self.tensors)

    def by_rule(self) -> list[tuple[Part, Rule, tuple[PlannedTensor, ...]]]:
        """The tensors grouped by (part, rule), trained ones first: the rows of a table."""
        groups: dict[tuple[Part, str, Method], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.part, tensor.rule, tensor.method), []).append(tensor)
        rows = [(part, Rule(rule, method), tuple(ts)) for (part, rule, method), ts in groups.items()]
        return sorted(rows, key=lambda row: (row[1].method is Method.FROZEN, list(Part).index(row[0])))


def part_of(name: str) -> Part:
    """The part a parameter belongs to.

    Raises:
        StrategyError: the name is in none of Qwen3-VL's parts.
    """
    for part, pattern in PART_PATTERNS:
        if re.fullmatch(pattern, name):
            return part
    raise StrategyError(
        "the model",
        f"a parameter named {name}",
        "parameters under model.visual, model.language_model or lm_head, as Qwen3-VL names them",
        "use a Qwen3-VL checkpoint",
    )


def unit_of(name: str) -> str | None:
    """The block, layer or merger that a parameter lies in, which PEFT copies as a whole; None outside of all."""
    unit = _UNIT.fullmatch(name)
    return unit.group(1) if unit else None


def depth(shapes: Shapes, pattern: str) -> int:
    """Number of blocks or layers whose index is the first group of `pattern`."""
    indices = {int(m.group(1)) for name in shapes if (m := re.match(pattern + r"\.", name))}
    return max(indices) + 1 if indices else 0


def resolve_blocks(spec: str, available: int, *, where: str, noun: str) -> tuple[int, ...]:
    """Indices that `all`, `none`, `last-N`, `A-B` or a comma list mean in a model with `available` blocks.

    Raises:
        StrategyError: the spec cannot be read, or names a block the model does not have.
    """
    text = spec.strip()
    if text == "none":
        return ()
    if text == "all":
        return tuple(range(available))
    if match := re.fullmatch(r"last-(\d+)", text):
        count = int(match.group(1))
        indices = tuple(range(available - count, available))
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        indices = tuple(range(int(match.group(1)), int(match.group(2)) + 1))
    elif re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        indices = tuple(sorted({int(i) for i in text.split(",")}))
    else:
        indices = ()
    if not indices or indices[0] < 0 or indices[-1] >= available:
        raise StrategyError(
            where,
            f"{spec!r} in a model with {available} {noun}",
            f"all, none, last-N with N from 1 to {available}, or indices from 0 to {available - 1} as A-B or A,B,C",
            f"name {noun} that exist",
        )
    return indices


def rules_for(strategy: Strategy, shapes: Shapes, *, origins: Mapping[str, str] | None = None) -> tuple[Rule, ...]:
    """The ordered rules that a strategy means for a model; the last one freezes all that is left.

    Args:
        strategy: the arm.
        shapes: full parameter name -> shape of the base model.
        origins: dotted key -> file and line, named in errors.
    """

    def where(key: str) -> str:
        origin = (origins or {}).get(key)
        return f"-P {key}" if origin == "-P" else f"{origin}: {key}" if origin else key

    key = f"strategy.vision.{strategy.vision.key}"
    blocks = resolve_blocks(strategy.vision.blocks, depth(shapes, BLOCK), where=where(key), noun="vision blocks")
    layers = resolve_blocks(
        strategy.llm.blocks, depth(shapes, _LAYER), where=where("strategy.llm.layers"), noun="LLM layers"
    )
    rules = [
        *_part_rules(Part.VISION, _indexed(r"model\.visual\.blocks", blocks), strategy.vision.method),
        *_part_rules(Part.ALIGNER, (_MERGERS,), strategy.aligner.method),
        *_part_rules(Part.LLM, _indexed(r"model\.language_model\.layers", layers), strategy.llm.method),
    ]
    return (*rules, Rule(r".+", Method.FROZEN))


def plan_rules(rules: Sequence[Rule], shapes: Shapes, lora: Lora) -> ParameterPlan:
    """Give every tensor to the first rule that matches its full name.

    Raises:
        StrategyError: a rule catches nothing, a tensor is caught by no rule, or a fully trained module is not whole.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    hits = dict.fromkeys((rule.pattern for rule in rules), 0)
    tensors = []
    for name, shape in shapes.items():
        rule = next((rule for pattern, rule in compiled if pattern.fullmatch(name)), None)
        if rule is None:
            raise StrategyError("the rules", f"no rule for {name}", "a rule for every tensor", "end with a frozen .+")
        hits[rule.pattern] += 1
        tensors.append(PlannedTensor(name, shape, part_of(name), rule.method, rule.pattern))
    for rule in rules:
        if not hits[rule.pattern] and rule.pattern != ".+":
            raise StrategyError(
                f"rule {rule.pattern} -> {rule.method}",
                "it catches no tensor of this model (or earlier rules took them all)",
                "rules that catch at least one tensor",
                "compare it with the names `python -m trainer plan` lists",
            )
    _check_whole_modules(tensors)
    trained_blocks = {
        int(m.group(1)) for t in tensors if t.method is not Method.FROZEN and (m := re.match(BLOCK + r"\.", t.name))
    }
    return ParameterPlan(tuple(tensors), lora, tuple(sorted(trained_blocks)))


def make_plan(strategy: Strategy, shapes: Shapes, *, origins: Mapping[str, str] | None = None) -> ParameterPlan:
    """Resolve a strategy against a model: `rules_for`, then `plan_rules`."""
    return plan_rules(rules_for(strategy, shapes, origins=origins), shapes, strategy.lora)


def _indexed(stem: str, indices: Iterable[int]) -> tuple[str, ...]:
    listed = "|".join(map(str, indices))
    return (rf"{stem}\.({listed})",) if listed else ()


def _part_rules(part: Part, stems: Iterable[str], method: Method) -> list[Rule]:
    """The rules of one part: LoRA on the linear layers inside each stem, or the whole of it."""
    inside = {Method.LORA: _LORA_INSIDE[part], Method.FULL: r".+"}
    return [Rule(rf"{stem}\.{inside[method]}", method) for stem in stems if method is not Method.FROZEN]


def _check_whole_modules(tensors: Sequence[PlannedTensor]) -> None:
    """PEFT copies a fully trained module as a whole, so all of its tensors must be planned full."""
    full = {t.module for t in tensors if t.method is Method.FULL}
    for tensor in tensors:
        unit = unit_of(tensor.name)
        if unit in full and tensor.method is not Method.FULL:
            raise StrategyError(
                f"rule {tensor.rule} -> {tensor.method}",
                f"{tensor.name} inside {unit}, of which other tensors train in full",
                "a block, layer or merger that trains in full trains as a whole",
                "choose full for the whole module, or LoRA for its linear layers",
            )
