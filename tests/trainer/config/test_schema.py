"""What may be said in a configuration: keys, types, bounds and combinations."""

import re
from collections.abc import Iterator

import pytest

from trainer.config.augmentation import PARAMS
from trainer.config.compat import NO_EFFECT
from trainer.config.fields import Section, section_of
from trainer.config.messages import all_keys, field_of
from trainer.config.parts import RAW_STRATEGY_KEYS
from trainer.config.schema import Config

# Every key that existing files hold, by section.
KEYS_OF_EXISTING_FILES = {
    "model": "model torch_dtype attn_impl",
    "template": "template truncation_strategy max_pixels max_length",
    "prompts": "scheme",
    "tuner": "train_type use_swift_lora freeze_llm freeze_vit freeze_aligner target_modules target_regex "
    "modules_to_save lora_rank lora_alpha lora_dropout lora_bias",
    "training": "output_dir run_name logging_dir add_version save_safetensors per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps packing gradient_checkpointing bf16 seed optimizer "
    "learning_rate vit_lr aligner_lr weight_decay max_grad_norm warmup_ratio lr_scheduler_type lr_scheduler_kwargs "
    "num_train_epochs eval_strategy eval_steps save_strategy save_steps save_total_limit save_delay_steps "
    "load_best_model_at_end metric_for_best_model greater_is_better logging_steps logging_first_step report_to",
    "data": "dataset eval_dataset dataset_num_proc dataloader_num_workers dataloader_pin_memory",
    "deepspeed": "enabled config",
    "custom": "train_jsonl val_jsonl emit_norm images_per_user_turn dump_conversation_text augmentation",
}


def sections(model: type[Section] = Config) -> Iterator[type[Section]]:
    """Every section model that a configuration is made of."""
    yield model
    for field in model.model_fields.values():
        if below := section_of(field.annotation):
            yield from sections(below)


SECTIONS = [*sections(), *dict.fromkeys(PARAMS.values())]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring(section: type[Section]) -> None:
    """The unit and meaning stand under each field."""
    for name, field in section.model_fields.items():
        assert field.description and len(field.description) > 5, name


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_frozen_and_closed(section: type[Section]) -> None:
    """No configuration object changes after loading, and none takes a key it does not know."""
    assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    "key", [f"{section}.{key}" for section, keys in KEYS_OF_EXISTING_FILES.items() for key in keys.split()]
)
def test_every_key_of_existing_files_is_known(key: str) -> None:
    """In the schema with an effect, or listed as without effect with a reason; never both."""
    assert (field_of(key) is not None) != (key in NO_EFFECT)


def test_keys_without_effect_have_a_reason() -> None:
    """The reason is a sentence, not a repetition of the key."""
    assert all(len(reason.split()) > 3 for reason in NO_EFFECT.values())


def test_the_raw_strategy_keys_are_keys_of_tuner() -> None:
    """The list that decides between the two forms names real keys."""
    assert {f"tuner.{key}" for key in RAW_STRATEGY_KEYS} <= set(all_keys())


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("all", "all"), ("last-6", "last-6"), ("18-23", "18-23"), ("5,11,17", "5,11,17"), ("18", "18"),
        ("[5, 11, 17]", "5,11,17"), ('"5, 11"', "5,11"), ("0-0", "0-0"),
    ],
)  # fmt: skip
def test_blocks_are_written_in_five_forms(loaded, written: str, means: str) -> None:
    """All, last-N, A-B, one number, and a list of numbers; depth is the model's matter."""
    vision = loaded(f"strategy:\n  vision:\n    blocks: {written}\n    method: lora\n")
    assert vision.config.strategy.vision.blocks == means


@pytest.mark.parametrize(
    "written", ["last-0", "23-18", "last6", "-1", "'5,5'", "''", "1.5", "true", "null", "[]", "[a]"]
)
def test_other_forms_of_blocks_are_refused(fails, written: str) -> None:
    """The message shows the forms that there are."""
    told = fails(f"strategy:\n  vision:\n    method: lora\n    blocks: {written}\n")
    assert told.startswith("their.yaml:4: strategy.vision.blocks") and "last-N" in told


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("tuner.lora_rank", "0", "at least 1"),
        ("tuner.lora_rank", "8.0", "a whole number"),
        ("tuner.lora_dropout", "1.0", "less than 1"),
        ("tuner.lora_dropout", "-0.1", "at least 0"),
        ("tuner.lora_bias", "all", "'none'"),
        ("tuner.target_modules", "all-linear", "a list"),
        ("tuner.target_regex", "'['", "a Python regular expression"),
        ("training.warmup_ratio", "2.0", "at most 1"),
        ("training.warmup_ratio", "-0.1", "at least 0"),
        ("training.vit_lr", "0", "more than 0"),
        ("training.vit_lr", "-1e-4", "more than 0"),
        ("training.vit_lr", "1e4", "at most 1"),
        ("training.vit_lr", ".nan", "a finite number"),
        ("training.learning_rate", ".inf", "a finite number"),
        ("training.aligner_lr", "'1e-4'", "a number"),
        ("training.lr_scale", "0", "more than 0"),
        ("training.seed", "-1", "at least 0"),
        ("training.seed", "017", "a whole number"),
        ("training.seed", "true", "a whole number"),
        ("training.packing", "1", "true or false"),
        ("training.run_name", "17", "text"),
        ("training.eval_steps", "0", "at least 1"),
        ("training.per_device_train_batch_size", "0", "at least 1"),
        ("training.gradient_accumulation_steps", "1000000000000", "at most 1000000000"),
        ("training.num_train_epochs", "0", "more than 0"),
        ("training.max_steps", "0", "at least 1"),
        ("training.save_strategy", "never", "'best', 'epoch' or 'steps'"),
        ("training.optimizer", "adamw", "'multimodal'"),
        ("training.greater_is_better", "true", "False"),
        ("training.lr_scheduler_kwargs", "1", "a map of keys"),
        ("training", "5", "a map of keys"),
        ("prompts.scheme", "C", "'A' or 'B'"),
        ("model.torch_dtype", "float8", "'float32' or 'bfloat16'"),
        ("model.model", "''", "text that is not empty"),
        ("custom.emit_norm", "norm10", "norm1000"),
        ("custom.augmentation.ops", "[{name: flip}]", "hflip, vflip"),
        ("custom.augmentation.ops", "[{params: {}}]", "hflip, vflip"),
        ("custom.augmentation.bypass_prob", "1.1", "at most 1"),
        ("custom.augmentation.mode", "noisy", "'published_noisy'"),
        ("tracking.smoothing_weight", "1.0", "less than 1"),
        ("launch.nproc", "0", "at least 1"),
        ("launch.nproc", "1025", "at most 1024"),
        ("launch.nproc", "Auto", "auto, or a number of ranks"),
        ("launch.nproc", "2.0", "auto, or a number of ranks"),
        ("launch.nproc", "true", "auto, or a number of ranks"),
    ],
)
def test_wrong_types_and_impossible_values_are_refused(fails, key: str, value: str, allowed: str) -> None:
    """One message: file and line, dotted key, the value, what is allowed."""
    *above, last = key.split(".")
    text = (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(above))
        + f"{'  ' * len(above)}{last}: {value}\n"
    )
    told = fails(text)
    assert told.startswith(f"their.yaml:{len(above) + 1}: {key}")
    assert re.search(rf"allowed: .*{re.escape(allowed)}", told)
    assert told.count("got:") == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("strategy: {vision: {blocks: none, method: lora}}", "strategy.vision"),
        ("strategy: {vision: {blocks: last-6, method: frozen}}", "strategy.vision"),
        ("strategy: {llm: {layers: none, method: full}}", "strategy.llm"),
        ("strategy: {aligner: {method: frozen}, llm: {layers: none, method: frozen}}", "strategy"),
        ("training: {lr_scheduler_kwargs: {min_lr: 1e-3}}", "training.lr_scheduler_kwargs.min_lr"),
        ("custom: {train_jsonl: their.yaml}", "custom.train_jsonl"),
        ("custom: {augmentation: {mode: clean}}", "custom.augmentation.ops"),
        ("custom: {augmentation: {enabled: false, mode: clean, ops: [{name: hflip}]}}", "custom.augmentation.enabled"),
        ("strategy: null", "strategy"),
    ],
)
def test_impossible_combinations_are_refused(fails, text: str, where: str) -> None:
    """Each value is fine alone; together no run can have them."""
    assert fails(text).startswith(f"their.yaml:1: {where}\n")


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("{name: rotate, params: }", {"max_deg": 10}),
        ("{name: color_jitter, params: {brightness: 0.2}}", {"brightness": (0.8, 1.2)}),
        ("{name: color_jitter, params: {brightness: 1}}", {"brightness": (0, 2)}),
        ("{name: hsv, params: {hue_delta_deg: -8}}", {"hue_delta_deg": (-8, 8)}),
        ("{name: random_crop, params: {scale: 0.8}}", {"scale": (0.8, 0.8)}),
        ("{name: clahe, params: {tile_grid_size: 4}}", {"tile_grid_size": (4, 4)}),
    ],
)
def test_an_operation_may_be_written_short(loaded, op: str, expected: dict[str, object]) -> None:
    """No parameters, and one number in the place of two."""
    (found,) = loaded(f"custom: {{augmentation: {{ops: [{op}]}}}}").config.custom.augmentation.ops
    assert {key: getattr(found.params, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("op", "where", "got", "allowed"),
    [
        ("{name: sharpness, params: {factor: 1.5}}", "factor", "1.5", "one number d"),
        ("{name: gamma, params: {gamma: 2}}", "gamma", "2", "one number d"),
        ("{name: gamma, params: {gamma: 1}}", "gamma", "1", "one number d"),
        ("{name: random_crop, params: {aspect_ratio: 1.0}}", "aspect_ratio", "1", "one number d"),
        ("{name: clahe, params: {tile_grid_size: [9999, 8]}}", "tile_grid_size[0]", "9999", "at most 256"),
    ],
)
def test_a_number_that_cannot_stand_for_a_range_is_told_as_it_is_written(
    fails, op: str, where: str, got: str, allowed: str
) -> None:
    """Not as an end of a range that nobody wrote."""
    told = fails(f"custom: {{augmentation: {{ops: [{op}]}}}}")
    assert told.startswith(f"their.yaml:1: custom.augmentation.ops[0].params.{where}\n")
    assert f"got:     {got}\n" in told and allowed in told


def test_evaluation_goes_by_samples_or_by_steps(loaded, fails) -> None:
    """Both in one file, or in one command line, are a mistake; over the steps of another file the samples win."""
    told = fails("training: {eval_steps: 4, eval_samples: 100}")
    assert told.startswith("their.yaml:1: training.eval_samples") and "keep one of the two" in told
    assert loaded("training: {eval_samples: 100}").no_effect == ()
    (line,) = loaded("training: {eval_steps: 4}", {"training.eval_samples": "100"}).no_effect
    assert line.startswith("training.eval_steps: training.eval_samples takes its place")


def test_the_floor_may_equal_the_lowest_peak(loaded) -> None:
    """A flat schedule after warm-up is legal."""
    assert loaded("training: {lr_scheduler_kwargs: {min_lr: 1e-4}}").config.training.lr_scheduler_kwargs.min_lr == 1e-4


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("template: {max_length: 300}", 300),
        ("global_max_length: 200", 200),
        ("{global_max_length: 200, template: {max_length: 300}}", 200),
    ],
)
def test_global_max_length_is_the_one_length_knob(loaded, text: str, limit: int) -> None:
    """Where it is given it decides, and a template's own limit beside it is listed as without effect."""
    resolved = loaded(text)
    assert resolved.config.max_length == limit
    assert bool(resolved.no_effect) == ("300" in text and "200" in text)
