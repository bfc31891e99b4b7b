"""The shipped experiment files: each loads, holds its few differences, and says what it is for."""

from pathlib import Path

import pytest
import yaml

from trainer.config.load import load
from trainer.config.messages import all_keys
from trainer.config.places import experiments_dir
from trainer.config.schema import Config

# The table of the design: vision blocks, method, vision learning rate, accumulation.
ARMS = {
    "last6_lora": ("last-6", "lora", 1.2e-4, 2),
    "last6_full": ("last-6", "full", 6e-5, 2),
    "all_lora": ("all", "lora", 1.5e-4, 2),
    "all_full": ("all", "full", 3e-5, 4),
    "frozen_vision": ("none", "frozen", 1e-4, 2),
}
FILES = sorted(path for path in experiments_dir().glob("*.yaml") if path.stem != "base")
PROFILES = sorted(path.stem for path in (experiments_dir() / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("profile", ["none", *PROFILES])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_loads_under_every_profile(path: Path, profile: str) -> None:
    """No warning, nothing without effect, and every value written in a file."""
    resolved = load(path.stem, profile=profile)
    assert not resolved.warnings and not resolved.no_effect
    assert "default" not in resolved.origins.values()


@pytest.mark.parametrize("arm", ARMS)
def test_the_strategies_are_those_of_the_design(arm: str) -> None:
    """Blocks, method, learning rate and accumulation; all else is common."""
    config = load(arm, profile="none").config
    assert config.strategy is not None
    vision, training, tuner = config.strategy.vision, config.training, config.tuner
    assert (vision.blocks, vision.method, training.vit_lr, training.gradient_accumulation_steps) == ARMS[arm]
    assert (config.strategy.aligner.method, config.strategy.llm.layers, config.strategy.llm.method) == (
        "full",
        "last-2",
        "lora",
    )
    assert (tuner.lora_rank, tuner.lora_alpha, tuner.lora_dropout) == (16, 32, 0.1)
    assert (training.learning_rate, training.aligner_lr, training.weight_decay) == (1e-4, 1e-4, 0.1)
    assert (training.warmup_ratio, training.lr_scheduler_kwargs.min_lr) == (0.2, 1e-6)
    assert (training.max_grad_norm, training.seed) == (0.5, 17)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_holds_a_header_and_few_lines(path: Path) -> None:
    """The header says question, command, time and result; the rest is what differs."""
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    for word in ("Question:", "Command:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), word
    assert f"mlflow run . -e {path.stem}" in "\n".join(header)
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 12


def test_base_holds_every_key_once_and_equals_the_defaults() -> None:
    """A user's own file without `extends` runs as if it extended base.yaml."""
    resolved = load("base", profile="none")
    assert set(resolved.origins) == set(all_keys())
    assert "default" not in resolved.origins.values() and not resolved.warnings
    custom = resolved.config.custom
    no_chain = custom.augmentation.model_copy(update={"ops": ()})  # a file of a user's writes its own operations
    default = custom.model_copy(update={"augmentation": no_chain})
    assert custom.augmentation.ops and resolved.config.model_copy(update={"custom": default}) == Config()


def test_every_key_of_base_has_a_comment_or_speaks_for_itself() -> None:
    """A number without its unit is a question to the reader."""
    for line in (experiments_dir() / "base.yaml").read_text().splitlines():
        value = line.partition(":")[2].partition("#")[0].strip()
        if line.lstrip().startswith("- "):  # an operation; their units stand in the schema
            continue
        if value and not line.startswith("#") and isinstance(yaml.safe_load(value), int | float) and value != "false":
            assert "#" in line, line


def test_published_is_the_published_recipe() -> None:
    """Its scale, as the report has it."""
    config = load("last6_lora", profile="published").config
    training = config.training
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (2, 2)
    assert (training.packing, training.gradient_checkpointing, training.bf16) == (True, True, True)
    assert (training.num_train_epochs, training.eval_steps) == (50, 20)
    assert (config.global_max_length, config.prompts.scheme) == (20000, "B")
    assert (config.deepspeed.enabled, config.deepspeed.config) == (True, "zero2")


def test_pocket_needs_neither_network_nor_gpu() -> None:
    """The built-in model and data in float32, as many ranks as there are cores for, no DeepSpeed."""
    config = load("last6_lora").config
    assert (config.model.model, config.model.torch_dtype, config.custom.train_jsonl) == ("pocket", "float32", None)
    assert not (config.deepspeed.enabled or config.training.bf16)
    assert (config.launch.nproc, config.launch.gpus) == ("auto", None)
    assert (config.custom.emit_norm, config.prompts.scheme, config.prompts.language) == ("norm100", "A", "en")


def test_a_profile_that_nobody_asked_for_is_told_where_the_model_is_another() -> None:
    """Rates and lengths of the built-in base ruin a real model without a word."""
    (told,) = load("last6_lora", overrides={"model": "random:4b"}).warnings
    assert "profile pocket" in told and "--profile published" in told
    asked = load("last6_lora", profile="published", overrides={"model": "random:4b"})
    assert asked.warnings == load("last6_lora").warnings == ()
