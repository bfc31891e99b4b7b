"""Every file in `experiments/` by glob: it loads, says what it is for, resolves, and trains through its gate."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ARMS, MakeParts, take_step, tiny_batch
from trainer.budget import budget_from, schedule_from
from trainer.build import strategy_from
from trainer.config.load import load
from trainer.data.packing import Fixed
from trainer.gate import Verdict
from trainer.model import parameter_shapes
from trainer.strategy import make_plan

FOLDER = Path(__file__).parents[1] / "experiments"
STRATEGIES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "base")
PROFILES = sorted((FOLDER / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda p: p.stem)
def test_the_header_says_question_command_time_and_result(path: Path) -> None:
    """A strategy file is its header and the few lines that differ from base."""
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Question:", "Command:", "Time:", "Result:"):
        assert re.search(rf"^# {word} +\S", text, re.MULTILINE), word
    assert f"mlflow run . -e {path.stem}" in text
    assert "TODO" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda p: p.stem)
def test_a_strategy_file_repeats_nothing_of_base(path: Path) -> None:
    """Only the difference from the file that it extends is written down."""
    child = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = yaml.safe_load((FOLDER / child.pop("extends")).read_text(encoding="utf-8"))

    def repeated(child: dict, parent: dict, prefix: str = "") -> list[str]:
        same = []
        for key, value in child.items():
            if isinstance(value, dict):
                same += repeated(value, parent.get(key) or {}, f"{prefix}{key}.")
            elif key in parent and parent[key] == value:
                same.append(prefix + key)
        return same

    # the two keys of one target are written together even where one of them is the base's
    assert [key for key in repeated(child, base) if not key.startswith("strategy.")] in ([], ["training.vit_lr"])


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda p: p.stem)
def test_every_strategy_resolves_on_pocket(path: Path) -> None:
    """Against the depth of the built-in model, with the pocket profile that is its default."""
    resolved = load(path.stem)
    plan = make_plan(strategy_from(resolved.config), parameter_shapes("pocket"), origins=resolved.origins)
    assert plan.trainable_parameters()["total"] > 0
    assert resolved.profile == "pocket"


def test_the_five_arms_are_those_of_the_published_comparison() -> None:
    """Blocks, method, vision learning rate and accumulation as published, and the control beside them."""
    published = {
        "last6_lora": ("last-6", "lora", 1.2e-4, 2),
        "last6_full": ("last-6", "full", 6e-5, 2),
        "all_lora": ("all", "lora", 1.5e-4, 2),
        "all_full": ("all", "full", 3e-5, 4),
    }
    for arm, expected in published.items():
        config = load(arm).config
        vision = config.strategy.vision
        training = config.training
        assert (vision.blocks, vision.method, training.vit_lr, training.gradient_accumulation_steps) == expected
    assert load("frozen_vision").config.strategy.vision.method == "frozen"
    assert {p.stem for p in STRATEGIES} >= set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_what_all_arms_share_is_what_the_report_lists(arm: str) -> None:
    """Aligner full, LLM last two LoRA, rank 16, alpha 32, dropout 0.1, rates, decay, warm-up, floor, clip, seed."""
    config = load(arm).config
    assert config.strategy.aligner.method == "full"
    assert (config.strategy.llm.layers, config.strategy.llm.method) == ("last-2", "lora")
    assert (config.tuner.lora_rank, config.tuner.lora_alpha, config.tuner.lora_dropout) == (16, 32, 0.1)
    training = config.training
    assert (training.learning_rate, training.aligner_lr, training.weight_decay) == (1e-4, 1e-4, 0.1)
    assert (training.warmup_ratio, training.max_grad_norm, training.seed) == (0.2, 0.5, 17)
    assert training.lr_scheduler_kwargs.min_lr == 1e-6


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_every_profile_goes_with_every_strategy(path: Path) -> None:
    """A profile sets no key that a strategy sets, so arms stay what they are at any scale."""
    for strategy in STRATEGIES:
        assert load(strategy.stem, profile=path.stem).profile == path.stem


def test_the_published_profile_is_the_published_recipe() -> None:
    """Batch 2, packs of 20,000 tokens, checkpointing, 50 epochs, ZeRO-2, bf16, evaluation every 20 steps, scheme B."""
    config = load("last6_lora", profile="published").config
    training = config.training
    assert (training.per_device_train_batch_size, training.packing, config.global_max_length) == (2, True, 20000)
    assert (training.gradient_checkpointing, training.num_train_epochs, training.bf16) == (True, 50, True)
    assert (config.deepspeed.enabled, config.deepspeed.config) == (True, "zero2")
    assert (training.eval_steps, config.prompts.scheme, config.model.torch_dtype) == (20, "B", "bfloat16")


@pytest.mark.parametrize("arm", ARMS)
def test_lr_scale_keeps_the_ratios_between_arms(arm: str) -> None:
    """Every peak and the floor are multiplied by the same number."""
    config = load(arm).config
    plain = load(arm, overrides={"training.lr_scale": "1"}).config
    scale = config.training.lr_scale
    a, b = (schedule_from(c, budget_from(c, Fixed((100,) * 100))) for c in (config, plain))
    assert a.peaks == {part: pytest.approx(peak * scale) for part, peak in b.peaks.items()}
    assert a.floor == pytest.approx(b.floor * scale)


@pytest.mark.parametrize("arm", ARMS)
def test_two_steps_pass_the_gate(arm: str, make_parts: MakeParts) -> None:
    """On the tiny model with the real depth of vision, dropout as shipped."""
    parts = make_parts(arm, dropout=load(arm).config.tuner.lora_dropout)
    for step in (1, 2):
        take_step(parts, [tiny_batch([8, 9], seed=step)], step)
        parts.gate.after_update(step, parts.engine.weight)
    assert parts.gate.verdict is Verdict.PASSED
