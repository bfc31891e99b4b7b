"""Composition: what extends what, what wins, where each value comes from, and how mistakes are told."""

from pathlib import Path

import pytest

from trainer.config.load import SHORT_NAMES, load
from trainer.config.messages import all_keys, field_of
from trainer.config.places import experiments_dir
from trainer.config.problems import ConfigErrors
from trainer.config.schema import Config
from trainer.errors import ConfigError

BASE = experiments_dir() / "base.yaml"


def line_of(path: Path, text: str) -> int:
    """Number of the first line that holds a text."""
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


# --- extends and merging


def test_a_child_lies_over_what_it_extends(write) -> None:
    """Maps merge deep, lists replace, the later value wins."""
    write(
        """
        training: {seed: 1, vit_lr: 2.0e-5}
        tuner: {modules_to_save: [a, b], target_regex: x}
        """,
        "configs/base.yaml",
    )
    config = load(
        write("extends: base.yaml\ntraining: {seed: 2}\ntuner: {modules_to_save: [c]}", "configs/their.yaml")
    ).config
    assert (config.training.seed, config.training.vit_lr) == (2, 2e-5)
    assert (config.tuner.modules_to_save, config.tuner.target_regex) == (("c",), "x")


def test_extends_is_relative_to_its_own_file_and_may_repeat(write) -> None:
    """A grandparent in another folder is found from the parent's folder."""
    write("training: {seed: 5}", "a/grand.yaml")
    write("extends: ../a/grand.yaml\ntraining: {eval_steps: 6}", "b/parent.yaml")
    config = load(write("extends: b/parent.yaml")).config
    assert (config.training.seed, config.training.eval_steps) == (5, 6)


@pytest.mark.parametrize("value", ["[base.yaml]", "3", "{a: 1}", "''"])
def test_extends_names_one_file(fails, value: str) -> None:
    """Anything but one file name is refused with its line."""
    assert fails(f"training: {{seed: 1}}\nextends: {value}").startswith("their.yaml:2: extends")


def test_a_missing_extended_file_is_named_with_the_nearest(write, fails) -> None:
    """The message shows the path tried and the nearest name."""
    write("training: {seed: 1}", "base.yaml")
    told = fails("extends: bsae.yaml")
    assert "their.yaml:1" in told and "did you mean base.yaml?" in told


def test_a_circle_of_extends_is_refused(write, fails) -> None:
    """The whole circle is shown, and nothing hangs."""
    write("extends: their.yaml", "b.yaml")
    assert "their.yaml extends b.yaml extends their.yaml" in fails("extends: b.yaml")


def test_a_file_that_extends_itself_is_refused(fails) -> None:
    """The smallest circle."""
    assert "their.yaml extends their.yaml" in fails("extends: their.yaml")


def test_a_long_chain_of_extends_is_refused(write, fails) -> None:
    """Eight files are the limit."""
    for number in range(12):
        write(f"extends: {number + 1}.yaml", f"{number}.yaml")
    write("training: {seed: 1}", "12.yaml")
    assert "at most 8 files" in fails("extends: 0.yaml")


def test_a_key_written_twice_counts_last_and_warns_once(loaded) -> None:
    """As existing base files have it: the second `template` replaces the first as a whole."""
    resolved = loaded(
        """\
        template: {max_pixels: 100, truncation_strategy: right}
        training: {seed: 1}
        template: {max_pixels: 200}
        """
    )
    assert resolved.config.template.max_pixels == 200
    assert resolved.config.template.truncation_strategy == "raise"
    (warning,) = resolved.warnings
    assert warning.startswith("template is written 2 times in their.yaml: lines 1 and 3")


def test_a_key_written_three_times_still_warns_once(loaded) -> None:
    """All lines in one warning, with the dotted key."""
    (warning,) = loaded("training:\n  seed: 1\n  seed: 2\n  seed: 3\n").warnings
    assert warning.startswith("training.seed is written 3 times in their.yaml: lines 2, 3 and 4")


def test_an_empty_section_says_nothing(loaded) -> None:
    """`training:` with nothing below it leaves every default."""
    assert loaded("training:\ndata:\n").config == Config()


# --- unknown keys and keys without effect


@pytest.mark.parametrize(
    ("text", "where", "guess"),
    [
        ("training:\n  vit_Ir: 1e-4", "their.yaml:2: training.vit_Ir", "training.vit_lr"),
        ("trainning: {seed: 1}", "their.yaml:1: trainning", "training"),
        ("tuner: {lora_rnk: 8}", "their.yaml:1: tuner.lora_rnk", "tuner.lora_rank"),
        ("seed: 1", "their.yaml:1: seed", "training.seed"),
        ("model: {vit_lr: 1e-4}", "their.yaml:1: model.vit_lr", "training.vit_lr"),
        ("training.seed: 1", "their.yaml:1: training.seed", "training.seed"),
        ("strategy:\n  vision:\n    block: all", "their.yaml:3: strategy.vision.block", "strategy.vision.blocks"),
        ("custom: {augmentation: {op: []}}", "their.yaml:1: custom.augmentation.op", "custom.augmentation.ops"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(fails, text: str, where: str, guess: str) -> None:
    """File, line, dotted key, and what was probably meant."""
    told = fails(text)
    assert told.startswith(where + "\n")
    if where.partition(": ")[2] != guess:
        assert f"did you mean {guess}?" in told


def test_an_unknown_key_far_from_all_others_has_no_guess(fails) -> None:
    """No guess is better than a silly one."""
    assert "did you mean" not in fails("training: {xqzwk: 1}")


def test_an_unknown_key_of_an_augmentation_op_is_refused(fails) -> None:
    """Inside lists too."""
    assert "custom.augmentation.ops[0].prob" in fails("custom: {augmentation: {ops: [{name: hflip, prob: 0.5}]}}")


def test_keys_without_effect_are_accepted_and_listed_once(write) -> None:
    """Also where parent and child both have them; the reason stands beside the key."""
    write("training: {report_to: tensorboard}\ndata: {dataset: [placeholder]}", "base.yaml")
    resolved = load(write("extends: base.yaml\ntraining: {report_to: null, add_version: true}"))
    assert len(resolved.no_effect) == 3
    assert [line for line in resolved.no_effect if line.startswith("training.report_to: metrics go to MLflow")]
    assert resolved.config == Config()


def test_all_mistakes_are_told_together(write) -> None:
    """Unknown keys, wrong values and missing files of one configuration end in one message."""
    text = "training: {vit_Ir: 1, warmup_ratio: 2.0}\ntuner: {lora_rank: 0}\ncustom: {taxonomy: no.yaml}\n"
    with pytest.raises(ConfigErrors) as caught:
        load(write(text), overrides={"seed": "x"})
    told = str(caught.value)
    assert told.startswith("5 mistakes")
    for key in ("training.vit_Ir", "training.warmup_ratio", "tuner.lora_rank", "custom.taxonomy", "-P training.seed"):
        assert key in told


# --- YAML as people write it


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4), ("6.0e-5", 6e-5), ("1E-4", 1e-4), ("0.0001", 1e-4), ("1.e-4", 1e-4), (".0001", 1e-4),
        ("+1e-4", 1e-4), ("1", 1.0),
    ],
)  # fmt: skip
def test_numbers_are_numbers_however_they_are_written(loaded, written: str, value: float) -> None:
    """YAML 1.1 takes `1e-4` for text; we do not."""
    assert loaded(f"training: {{vit_lr: {written}}}").config.training.vit_lr == value


@pytest.mark.parametrize("written", ["2026-10-25", "18:23", "007", "1_2_3a", "'yes'"])
def test_dates_times_and_leading_zeros_stay_text(loaded, written: str) -> None:
    """YAML 1.1 would make a date, 1103 and 7 of the first three."""
    assert loaded(f"training: {{run_name: {written}}}").config.training.run_name == written.strip("'")


def test_yaml_anchors_and_merge_keys_work(loaded) -> None:
    """What is written beside `<<` wins over what it brings in."""
    config = loaded("training: &t {seed: 3, eval_steps: 4}\n").config
    assert config.training.seed == 3
    text = (
        "custom:\n  augmentation:\n    ops:\n    - &o {name: hflip, params: {prob: 0.5}}\n    - {<<: *o, name: vflip}\n"
    )
    first, second = loaded(text).config.custom.augmentation.ops
    assert (first.name, second.name, second.params.prob) == ("hflip", "vflip", 0.5)


# --- overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.vit_lr", "1e-4", 1e-4),
        ("training.seed", "3", 3),
        ("training.packing", "true", True),
        ("training.max_steps", "null", None),
        ("training.run_name", "17", "17"),
        ("training.run_name", "a: b # c", "a: b # c"),
        ("training.run_name", "null", None),
        ("tuner.modules_to_save", "[a, b]", ("a", "b")),
        ("prompts.scheme", "B", "B"),
        ("strategy.vision.blocks", "18", "18"),
    ],
)
def test_an_override_is_read_as_the_declared_type(loaded, key: str, text: str, value: object) -> None:
    """Text stays as it is given, everything else is YAML; the origin is `-P`."""
    overrides = {key: text, "strategy.vision.method": "lora"} if "blocks" in key else {key: text}
    resolved = loaded("training: {seed: 1, max_steps: 5}", overrides)
    found: object = resolved.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    assert resolved.origins[key] == "-P"


def test_a_whole_section_can_be_overridden(loaded) -> None:
    """A map merges into what is there."""
    vision = loaded("training: {seed: 1}", {"strategy.vision": "{blocks: last-2, method: full}"}).config.strategy.vision
    assert (vision.blocks, vision.method) == ("last-2", "full")


@pytest.mark.parametrize(("short", "key"), SHORT_NAMES.items())
def test_a_short_name_stands_for_a_full_key(short: str, key: str) -> None:
    """Every short name leads to a key of the schema."""
    assert field_of(key) is not None and "." not in short


def test_short_and_full_override_alike(loaded) -> None:
    """`-P seed=3` is `-P training.seed=3`."""
    assert loaded("data:", {"seed": "3"}).config == loaded("data:", {"training.seed": "3"}).config


def test_a_key_given_by_short_and_full_name_is_refused(fails) -> None:
    """Nobody knows which was meant."""
    assert "given twice" in fails("data:", overrides={"seed": "3", "training.seed": "4"})


def test_an_empty_override_counts_as_not_given(loaded) -> None:
    """As the parameters of an MLproject have it."""
    assert loaded("training: {seed: 4}", {"seed": "", "model": ""}).config.training.seed == 4


@pytest.mark.parametrize(
    ("key", "text", "part"),
    [
        ("training.vit_Ir", "1", "did you mean training.vit_lr?"),
        ("vit_lr", "1", "did you mean training.vit_lr?"),
        ("sead", "1", "did you mean training.seed?"),
        ("training.seed", "x", "a whole number"),
        ("training.seed.deep", "1", "a key that nobody knows"),
        ("strategy.vision", "{block: all}", "did you mean strategy.vision.blocks?"),
        ("tuner.lora_rank", "[1", "one YAML document"),
        ("tuner.lora_rank", "a\nb: c", "one YAML document"),
        ("", "1", "a key that nobody knows"),
        ("..", "1", "a key that nobody knows"),
    ],
)
def test_a_wrong_override_is_told_by_its_key(fails, key: str, text: str, part: str) -> None:
    """`-P key` is the place, and the rest is as in a file."""
    told = fails("data:", overrides={key: text})
    assert told.startswith(f"-P {key}") and part in told


def test_a_key_without_effect_may_be_overridden_too(loaded) -> None:
    """It is listed with `-P` as its place."""
    assert "(-P)" in loaded("data:", {"training.report_to": "none"}).no_effect[0]


# --- profiles


def test_files_of_experiments_get_the_pocket_profile() -> None:
    """And `none` means none; an empty name counts as not given."""
    assert load("last6_lora").profile == "pocket"
    assert load("last6_lora", profile="").profile == "pocket"
    assert load("last6_lora", profile="none").profile is None
    assert load("last6_lora", profile="published").config.training.packing is True


def test_a_file_from_anywhere_else_gets_no_profile(loaded) -> None:
    """A user's own settings are never overridden unless asked."""
    assert loaded("training: {num_train_epochs: 7}").profile is None


def test_a_profile_lies_over_the_strategy_and_under_overrides() -> None:
    """`base.yaml` <- strategy <- profile <- overrides, each value with its origin."""
    resolved = load("last6_lora", overrides={"training.num_train_epochs": "2"})
    profile = experiments_dir() / "profiles" / "pocket.yaml"
    assert resolved.origins["training.num_train_epochs"] == "-P"
    assert resolved.origins["global_max_length"] == f"experiments/profiles/pocket.yaml:{line_of(profile, 'global_max')}"
    strategy = experiments_dir() / "last6_lora.yaml"
    assert resolved.origins["training.vit_lr"] == f"experiments/last6_lora.yaml:{line_of(strategy, 'vit_lr')}"
    assert resolved.origins["training.weight_decay"] == f"experiments/base.yaml:{line_of(BASE, 'weight_decay')}"


def test_a_profile_may_not_set_a_key_that_a_strategy_sets(write) -> None:
    """The message names both places; the parent of the strategy file counts too, base.yaml does not."""
    write(f"extends: {BASE}\ntraining:\n  eval_steps: 5", "parent.yaml")
    write("training: {seed: 9, eval_steps: 7}", "mine.yaml")
    their = write("extends: parent.yaml\nstrategy: {aligner: {method: lora}}")
    with pytest.raises(ConfigError) as caught:
        load(their, profile="mine.yaml")
    told = str(caught.value)
    assert "mine.yaml:1: training.eval_steps" in told and "parent.yaml:3" in told
    assert "training.seed" not in told


@pytest.mark.parametrize("key", ["strategy", "tuner.target_modules"])
def test_a_profile_may_not_set_a_section_that_a_strategy_sets_a_key_of(write, key: str) -> None:
    """Equal keys conflict even when one place writes less of them."""
    values = {"strategy": ("strategy: {vision: {blocks: all, method: lora}}", "strategy: null"),
              "tuner.target_modules": ("tuner: {target_modules: [a]}", "tuner: {target_modules: [b]}")}  # fmt: skip
    theirs, profiles = values[key]
    write(profiles, "mine.yaml")
    with pytest.raises(ConfigError, match=r"which their\.yaml:1 sets too"):
        load(write(theirs), profile="mine.yaml")


def test_an_unknown_profile_is_told_with_the_nearest() -> None:
    """And with the names that there are."""
    with pytest.raises(ConfigError, match=r"did you mean pocket\?"):
        load("last6_lora", profile="pokcet")


# --- the two forms of a strategy


def test_the_raw_form_takes_the_place_of_the_default_strategy(write) -> None:
    """Whether the file extends our base.yaml or nothing."""
    raw = "tuner: {target_regex: '.*qkv', modules_to_save: [model.visual.merger]}"
    for text in (raw, f"extends: {BASE}\n{raw}"):
        resolved = load(write(text))
        assert resolved.config.strategy is None
        assert resolved.config.raw_strategy == ("target_regex", "modules_to_save")


@pytest.mark.parametrize(
    "key", ["freeze_vit: false", "target_modules: [all-linear]", "target_regex: a", "modules_to_save: [a]"]
)
def test_both_forms_of_a_strategy_are_refused(fails, key: str) -> None:
    """The message names both places and which one to keep."""
    told = fails(f"tuner:\n  {key}\nstrategy:\n  vision: {{blocks: all, method: lora}}\n")
    assert told.startswith("their.yaml:4: strategy.vision.blocks")
    assert "their.yaml:2" in told and "the strategy section is the one to keep" in told


def test_an_override_of_the_strategy_beside_the_raw_form_is_refused(fails) -> None:
    """`-P strategy...` is a strategy section too."""
    assert "-P strategy" in fails("tuner: {target_regex: a}", overrides={"strategy.aligner.method": "lora"})


# --- files and paths


@pytest.mark.parametrize(
    "name", ["last6_lora", "last6_lora.yaml", "experiments/last6_lora.yaml", "experiments/last6_lora"]
)
def test_an_experiment_is_found_by_name_from_anywhere(write, name: str) -> None:
    """Without folder and ending, or with them."""
    write("", "unrelated.yaml")
    assert load(name).path == experiments_dir() / "last6_lora.yaml"


def test_a_file_in_the_current_directory_comes_first(write) -> None:
    """Named with or without its ending."""
    path = write("training: {seed: 99}", "last6_lora.yaml")
    assert load("last6_lora").path == path
    assert load(path).name == "last6_lora"


@pytest.mark.parametrize("name", ["last6_lore", "x" * 5000, "a\0b", "", ".", "/"])
def test_a_configuration_that_is_not_there_is_told_with_the_places(write, name: str) -> None:
    """The places tried, the names that there are, the nearest one."""
    write("", "unrelated.txt")
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert "tried" in str(caught.value)
    if name == "last6_lore":
        assert "did you mean last6_lora?" in str(caught.value)


@pytest.mark.parametrize("key", ["train_jsonl", "ood_jsonl", "taxonomy", "model"])
def test_relative_paths_are_looked_for_in_three_places(write, monkeypatch, tmp_path: Path, key: str) -> None:
    """The current directory, the file's folder, that folder's parent; the first that has it."""
    section = "model" if key == "model" else "custom"
    also = "" if key in ("model", "taxonomy") else ", val_jsonl: there, train_jsonl: there"
    also = also.replace(f", {key}: there", "")
    their = write(f"{section}: {{{key}: there{also}}}", "project/configs/their.yaml")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ConfigError) as caught:
        load(their)
    for place in (tmp_path / "cwd", their.parent, their.parent.parent):
        assert str(place / "there") in str(caught.value)
    assert f"{section}.{key}" in str(caught.value)
    for place in (their.parent.parent, their.parent, tmp_path / "cwd"):
        (place / "there").mkdir() if key == "model" else (place / "there").touch()
        assert getattr(getattr(load(their).config, section), key) == str(place / "there")


def test_a_path_in_a_parent_file_is_looked_for_beside_that_file(write, tmp_path: Path) -> None:
    """The file that says it, not the one that extends it."""
    write("custom: {taxonomy: t.yaml}", "a/base.yaml")
    write("", "a/t.yaml")
    resolved = load(write("extends: ../../a/base.yaml", "b/c/their.yaml"))
    assert resolved.config.custom.taxonomy == str(tmp_path / "a" / "t.yaml")


def test_a_path_given_as_an_override_is_looked_for_too(write, tmp_path: Path) -> None:
    """From the current directory, then beside the configuration."""
    write("", "configs/t.yaml")
    resolved = load(write("data:", "configs/their.yaml"), overrides={"taxonomy": "t.yaml"})
    assert resolved.config.custom.taxonomy == str(tmp_path / "configs" / "t.yaml")


@pytest.mark.parametrize(
    "model", ["pocket", "random:2b", "random:4b", "random:8b", "random:32b", "Qwen/Qwen3-VL-4B-Instruct"]
)
def test_models_that_are_not_paths_stay_as_they_are(loaded, model: str) -> None:
    """Built-in, random and hub names are not resolved."""
    assert loaded(f"model: {{model: '{model}'}}").config.model.model == model


@pytest.mark.parametrize(
    ("model", "guess"), [("pockett", "pocket"), ("random:5b", "random:"), ("./gone", ""), ("/gone/x", "")]
)
def test_a_model_that_is_nowhere_is_told_with_the_places(fails, model: str, guess: str) -> None:
    """And with the names that there are."""
    told = fails(f"model:\n  model: '{model}'")
    assert told.startswith("their.yaml:2: model.model") and "tried" in told
    assert not guess or f"did you mean {guess}" in told


# --- what comes out


def test_every_value_has_an_origin_and_a_line() -> None:
    """One line a value, in the form `key: value   # where`."""
    resolved = load("last6_lora", overrides={"seed": "5"})
    lines = {line.partition(":")[0]: line for line in resolved.lines()}
    assert set(lines) == set(all_keys()) == set(resolved.origins) == set(resolved.params())
    strategy = experiments_dir() / "last6_lora.yaml"
    assert lines["training.vit_lr"].split() == [
        "training.vit_lr:", "0.00012", "#", f"experiments/last6_lora.yaml:{line_of(strategy, 'vit_lr')}",
    ]  # fmt: skip
    assert lines["training.seed"].endswith("# -P")


def test_a_value_that_nobody_wrote_has_the_origin_default(loaded) -> None:
    """Schema defaults are told apart from written values."""
    origins = loaded("training: {seed: 17}").origins
    assert (origins["training.seed"], origins["training.vit_lr"]) == ("their.yaml:1", "default")


@pytest.mark.parametrize(
    "text",
    [
        "training: {run_name: '1e-4'}",
        "training: {run_name: 'null', vit_lr: 1e-5}",
        "training: {run_name: '2026-10-25'}",
        "training: {run_name: 'a: b # 中文 \\ \"'}",
        "tuner: {target_regex: '^model\\.visual\\..*$', modules_to_save: [a, b]}",
        "custom: {augmentation: {ops: [{name: clahe, params: {prob: 0.5, tile_grid_size: [4, 2]}}]}}",
        "{global_max_length: 100, template: {max_length: 200}}",
        "strategy: {vision: {blocks: [1, 2], method: full}}",
    ],
)
def test_a_saved_configuration_loads_to_an_equal_one(loaded, write, text: str) -> None:
    """Whatever the text looks like; anywhere, without the files that it came from."""
    resolved = loaded(text)
    again = load(write(resolved.to_yaml(), "saved/resolved.yaml"))
    assert again.config == resolved.config
    assert again.tree == resolved.tree


def test_params_are_flat_text(loaded) -> None:
    """Lists as JSON, null and booleans as JSON writes them, text as it is."""
    params = loaded("tuner: {modules_to_save: [a, b]}\ntraining: {vit_lr: 1.2e-4, run_name: x}").params()
    assert params["tuner.modules_to_save"] == '["a", "b"]'
    assert (params["training.vit_lr"], params["training.run_name"]) == ("0.00012", "x")
    assert (params["training.packing"], params["training.max_steps"]) == ("false", "null")


def test_a_broken_profile_says_which_file_is_broken(write) -> None:
    """The place is the profile's, not the strategy's."""
    write("training: {sed: 1}", "mine.yaml")
    with pytest.raises(ConfigError, match=r"^mine\.yaml:1: training\.sed"):
        load(write("data:"), profile="mine.yaml")
