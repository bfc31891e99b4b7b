"""Strategies as rules over parameter names: the rule language, and the plan of every arm on every released size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ARMS
from trainer.architectures import SIZES
from trainer.build import strategy_from
from trainer.config.load import load
from trainer.errors import StrategyError
from trainer.model import parameter_shapes
from trainer.strategy import (
    Lora,
    Method,
    ParameterPlan,
    Part,
    Rule,
    Strategy,
    Target,
    make_plan,
    part_of,
    plan_rules,
    resolve_blocks,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "plans.json"
SHIPPED = (*ARMS, "last4_lora", "last8_lora")
"""The files of `experiments/` whose plans are kept: the five arms, and the ablations of depth."""
LORA = Lora(rank=4, alpha=8, dropout=0.0)

# Two vision blocks, one merger, one DeepStack merger and two LLM layers, by hand.
TOY = {
    "model.visual.patch_embed.proj.weight": (8, 3),
    "model.visual.blocks.0.norm1.weight": (8,),
    "model.visual.blocks.0.attn.qkv.weight": (24, 8),
    "model.visual.blocks.1.norm1.weight": (8,),
    "model.visual.blocks.1.attn.qkv.weight": (24, 8),
    "model.visual.merger.linear_fc1.weight": (16, 16),
    "model.visual.deepstack_merger_list.0.linear_fc1.weight": (16, 16),
    "model.language_model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.language_model.layers.1.self_attn.q_proj.weight": (6, 6),
    "lm_head.weight": (10, 6),
}


def plan(**targets: Target) -> ParameterPlan:
    """A plan of the toy, frozen where nothing is said."""
    frozen = Target("none", Method.FROZEN)
    parts = {"vision": frozen, "aligner": Target("all", Method.FROZEN), "llm": frozen} | targets
    return make_plan(Strategy(**parts, lora=LORA), TOY)


def methods(of: ParameterPlan) -> dict[str, Method]:
    """Tensor -> method, of the trained tensors."""
    return {t.name: t.method for t in of.trained()}


def test_full_trains_whole_blocks_and_lora_only_their_linear_layers() -> None:
    """`full` takes norms and biases too; `lora` takes weights of linear layers."""
    assert methods(plan(vision=Target("1", Method.FULL))) == {
        "model.visual.blocks.1.norm1.weight": Method.FULL,
        "model.visual.blocks.1.attn.qkv.weight": Method.FULL,
    }
    assert methods(plan(vision=Target("1", Method.LORA))) == {"model.visual.blocks.1.attn.qkv.weight": Method.LORA}


def test_the_aligner_is_the_merger_and_the_deepstack_mergers() -> None:
    """Both kinds of merger lie inside `model.visual`, and neither belongs to the vision tower."""
    assert set(methods(plan(aligner=Target("all", Method.FULL)))) == {
        "model.visual.merger.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    }
    assert part_of("model.visual.deepstack_merger_list.2.norm.weight") is Part.ALIGNER
    assert part_of("model.visual.pos_embed.weight") is Part.VISION
    assert part_of("lm_head.weight") is Part.LLM


def test_first_match_wins() -> None:
    """A later rule does not take back what an earlier one caught."""
    rules = (Rule(r"model\.visual\.blocks\.1\..+", Method.FROZEN), Rule(r"model\.visual\..+", Method.FULL))
    made = plan_rules((*rules, Rule(".+", Method.FROZEN)), TOY, LORA)
    assert "model.visual.blocks.1.norm1.weight" not in methods(made)
    assert methods(made)["model.visual.blocks.0.norm1.weight"] is Method.FULL


def test_a_pattern_must_match_the_whole_name() -> None:
    """Block 1 is not block 11: nothing is found by its beginning or its end."""
    shapes = {**TOY, "model.visual.blocks.11.norm1.weight": (8,)}
    rules = (Rule(r"model\.visual\.blocks\.1\..+", Method.FULL), Rule(".+", Method.FROZEN))
    assert "model.visual.blocks.11.norm1.weight" not in methods(plan_rules(rules, shapes, LORA))


def test_a_rule_that_hits_nothing_is_an_error() -> None:
    """A silent miss would train less than was asked."""
    rules = (Rule(r"model\.vision\..+", Method.FULL), Rule(".+", Method.FROZEN))
    with pytest.raises(StrategyError, match="catches no tensor"):
        plan_rules(rules, TOY, LORA)


def test_every_tensor_needs_a_rule() -> None:
    """Without a rule at the end for the rest, the first uncovered tensor is named."""
    with pytest.raises(StrategyError, match=r"no rule for model\.visual\.patch_embed\.proj\.weight"):
        plan_rules((Rule(r"lm_head\..+", Method.FULL),), TOY, LORA)


def test_a_block_cannot_train_partly_in_full() -> None:
    """PEFT copies modules as a whole, so a rule that takes half a block in full is refused."""
    rules = (Rule(r"model\.visual\.blocks\.1\.norm1\.weight", Method.FULL), Rule(".+", Method.FROZEN))
    with pytest.raises(StrategyError, match="trains as a whole"):
        plan_rules(rules, TOY, LORA)


def test_a_tensor_outside_qwen3_vl_is_named() -> None:
    """Another model family is refused by the first name that does not fit."""
    with pytest.raises(StrategyError, match=r"vision_tower\.blocks"):
        part_of("vision_tower.blocks.0.weight")


def test_lora_counts_rank_times_both_sides() -> None:
    """LoRA on (24, 8) at rank 4 has 4 * 32 parameters."""
    counts = plan(vision=Target("1", Method.LORA)).trainable_parameters()
    assert counts == {"vision": 128, "aligner": 0, "llm": 0, "total": 128}


@pytest.mark.parametrize(
    ("spec", "available", "indices"),
    [
        ("none", 24, ()),
        ("all", 3, (0, 1, 2)),
        ("last-6", 24, (18, 19, 20, 21, 22, 23)),
        ("last-6", 27, (21, 22, 23, 24, 25, 26)),
        ("last-1", 1, (0,)),
        ("last-3", 3, (0, 1, 2)),
        ("18-23", 24, (18, 19, 20, 21, 22, 23)),
        ("5,11,17", 24, (5, 11, 17)),
        ("0", 1, (0,)),
    ],
)
def test_blocks_are_resolved_against_the_real_depth(spec: str, available: int, indices: tuple[int, ...]) -> None:
    """`last-6` are other blocks in a deeper tower."""
    assert resolve_blocks(spec, available, where="here", noun="vision blocks") == indices


@pytest.mark.parametrize("spec", ["18-30", "last-25", "24", "last-0", "first-6", "5-3", "", "-1"])
def test_blocks_that_the_model_does_not_have_are_an_error(spec: str) -> None:
    """The message says how many there are and which would be right."""
    with pytest.raises(StrategyError, match=r"24 vision blocks(.|\n)*from 0 to 23"):
        resolve_blocks(spec, 24, where="here", noun="vision blocks")


def test_an_error_names_the_line_that_holds_the_blocks() -> None:
    """The origin of the value is where a user has to look."""
    wrong = Strategy(Target("18-30", Method.LORA), Target("all", Method.FULL), Target("none", Method.FROZEN), LORA)
    with pytest.raises(StrategyError, match=r"mine\.yaml:3: strategy\.vision\.blocks"):
        make_plan(wrong, TOY, origins={"strategy.vision.blocks": "mine.yaml:3"})


def test_resolving_needs_no_torch() -> None:
    """Plans are made from names and shapes: in milliseconds, on any machine."""
    code = "import trainer.strategy, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def summary(of: ParameterPlan) -> dict[str, object]:
    """What the golden table holds of a plan: enough to notice a single tensor that moves."""
    rows = {
        f"{part}: {rule.pattern} -> {rule.method}": [len(tensors), sum(t.size for t in tensors)]
        for part, rule, tensors in of.by_rule()
    }
    return {"blocks": list(of.vision_blocks), "trainable": of.trainable_parameters(), "rules": rows}


def shipped_plan(arm: str, size: str) -> ParameterPlan:
    """The plan of `experiments/ARM.yaml` on a released size."""
    return make_plan(strategy_from(load(arm).config), parameter_shapes(f"random:{size}"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", SHIPPED)
def test_the_plan_of_every_arm_on_every_released_size_is_the_golden_one(arm: str, size: str) -> None:
    """The shipped files on 2B, 4B, 8B and 32B (meta device); `python -m tests.trainer.test_strategy` writes it anew."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert summary(shipped_plan(arm, size)) == golden[size][arm]


@pytest.mark.parametrize("size", ["8b", "32b"])
@pytest.mark.parametrize(
    ("arm", "first"), [("last4_lora", 23), ("last6_lora", 21), ("last6_full", 21), ("last8_lora", 19)]
)
def test_the_last_blocks_of_an_8b_or_32b_are_those_before_block_27(arm: str, first: int, size: str) -> None:
    """Their towers are three blocks deeper than a 2B's or 4B's: last-6 is 21-26, and no block before trains."""
    made = shipped_plan(arm, size)
    assert made.vision_blocks == tuple(range(first, 27))
    trained = {t.name.split(".")[3] for t in made.trained() if ".visual.blocks." in t.name}
    assert trained == {str(block) for block in range(first, 27)}


if __name__ == "__main__":
    table = {size: {arm: summary(shipped_plan(arm, size)) for arm in SHIPPED} for size in SIZES}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
