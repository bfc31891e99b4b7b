"""Configuration files that users already have run unchanged: `fixtures/existing` is such a project, written for us."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.running import empty_store, flags, runs_in, trainer
from tests.trainer.config.test_schema import KEYS_OF_EXISTING_FILES
from trainer import names
from trainer.build import plan_from, strategy_from
from trainer.config.augmentation import PARAMS
from trainer.config.compat import NO_EFFECT
from trainer.config.load import load
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError
from trainer.model import apply_plan, load_model, load_tools, parameter_shapes
from trainer.strategy import make_plan

PROJECT = Path(__file__).parent / "fixtures" / "existing"
ARMS = ("last6_lora", "last6_full", "all_lora", "all_full")
POCKET = {"model": "pocket"}

# What is said of the files and changes nothing, beside what `NO_EFFECT` lists.
DECIDED_ELSEWHERE = (
    "template.max_length", "tuner.target_modules", "tuner.freeze_llm", "tuner.freeze_vit", "tuner.freeze_aligner",
)  # fmt: skip

# What a run of a minute needs otherwise than fifty epochs on a GPU; the files themselves stay as they are.
QUICK = {
    "model": "pocket",
    "max_steps": "2",
    "deepspeed.enabled": "false",
    "data.dataloader_num_workers": "0",
    "tracking.generate_records": "1",
}


def their(arm: str, folder: Path = PROJECT, **overrides: str) -> Resolved:
    """One of the four files, by its path, on the built-in model."""
    return load(folder / "configs" / f"{arm}.yaml", overrides=POCKET | overrides)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project that a test may break; the current directory is another one."""
    shutil.copytree(PROJECT, tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def changed(project: Path, old: str, new: str, file: str = "base.yaml") -> int:
    """Replace one line's text in a file of the project; the number of that line."""
    path = project / "configs" / file
    lines = path.read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.strip().startswith(old)]
    lines[number] = lines[number].replace(old, new)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return number + 1


# --- what they hold


def test_the_project_holds_every_key_that_existing_files_hold() -> None:
    """Otherwise the tests below would prove less than they say; every operation, and a key written twice, too."""
    text = "".join(
        (PROJECT / "configs" / f"{name}.yaml").read_text(encoding="utf-8") for name in ("base", "last6_lora")
    )
    for section, keys in KEYS_OF_EXISTING_FILES.items():
        for key in keys.split():
            assert re.search(rf"^  {key}:", text, re.MULTILINE), f"{section}.{key}"
    assert len(re.findall(r"^template:", text, re.MULTILINE)) == 2
    assert set(re.findall(r"- name: (\w+)", text)) == set(PARAMS)


@pytest.mark.parametrize("arm", ARMS)
def test_every_key_is_accepted_and_what_changes_nothing_is_listed_once(arm: str) -> None:
    """One line a key, with the file and line that hold it, and one for the section that is written twice."""
    resolved = their(arm)
    told = [line.partition(": ")[0] for line in resolved.no_effect]
    assert sorted(told) == sorted((*NO_EFFECT, *DECIDED_ELSEWHERE))
    assert all(re.search(r"existing/configs/base\.yaml:\d+\)$", line) for line in resolved.no_effect)
    (warning,) = resolved.warnings
    assert warning.startswith("template is written 2 times") and "lines 5 and 15; line 15 counts" in warning


def test_the_second_section_of_a_name_counts_as_a_whole() -> None:
    """The first `template` cuts at the right; the second does not, and nothing of the first is left."""
    template = their("last6_lora").config.template
    assert (template.truncation_strategy, template.max_pixels, template.max_length) == ("raise", 100_000_000, 32000)


@pytest.mark.parametrize("arm", ARMS)
def test_their_settings_are_those_of_our_arm_under_the_published_profile(arm: str) -> None:
    """Rates, batches, schedule, clipping, seed: the same recipe from either file."""
    theirs, ours = their(arm).config, load(arm, profile="published", overrides=POCKET).config
    own = {"output_dir", "run_name", "save_delay_steps"}
    assert theirs.training.model_dump(exclude=own) == ours.training.model_dump(exclude=own)
    assert (theirs.training.save_delay_steps, theirs.training.run_name) == (100, f"stage_3_{arm}")
    assert (theirs.max_length, theirs.deepspeed, theirs.prompts) == (ours.max_length, ours.deepspeed, ours.prompts)
    assert theirs.custom.augmentation.mode == "clean"


@pytest.mark.parametrize("arm", ARMS)
def test_the_configuration_that_a_run_keeps_loads_to_an_equal_one(arm: str, tmp_path: Path) -> None:
    """Without the files that it came from."""
    resolved = their(arm)
    (tmp_path / "kept.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    again = load(tmp_path / "kept.yaml")
    assert again.config == resolved.config and again.warnings == ()


# --- what they train


@pytest.mark.parametrize("model", ["pocket", "random:4b"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_plan_is_that_of_our_strategy_tensor_by_tensor(arm: str, model: str) -> None:
    """Name, shape, part and method of every tensor, LoRA's numbers, and the vision blocks."""
    shapes = parameter_shapes(model)
    theirs, notes = plan_from(their(arm), shapes)
    ours = make_plan(strategy_from(load(arm).config), shapes)
    assert [(t.name, t.shape, t.part, t.method) for t in theirs.tensors] == [
        (t.name, t.shape, t.part, t.method) for t in ours.tensors
    ]
    assert (theirs.lora, theirs.vision_blocks, notes) == (ours.lora, ours.vision_blocks, ())
    assert theirs.trainable_parameters() == ours.trainable_parameters()


@pytest.mark.parametrize("arm", ARMS)
def test_peft_trains_what_they_name(arm: str) -> None:
    """On the built-in model, `apply_plan` proves it and raises where it is not so; the saved adapter says it alike."""
    model = load_model("pocket", load_tools("pocket"), dtype=torch.float32, attn_impl="flash_attention_2", seed=0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    planned, _ = plan_from(their(arm), shapes)
    wrapped = apply_plan(model, planned, seed=17)
    saved = set(wrapped.peft_config["default"].modules_to_save)
    assert {"model.visual.merger", "model.visual.deepstack_merger_list.2"} <= saved
    assert ("model.visual.blocks.23" in saved) == arm.endswith("full")


def test_a_file_for_another_depth_is_told(project: Path) -> None:
    """The 2B has 28 LLM layers: without the two that the file names, nothing of the language model would train."""
    shapes = parameter_shapes("random:2b")
    _, (note,) = plan_from(their("last6_lora"), shapes)
    assert note.startswith("tuner.target_regex: its alternatives 'language_model") and "last6_lora.yaml:5" in note


# --- what is missing or misspelt


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("custom.train_jsonl", "train_jsonl: data/train.jsonl", "train_jsonl: data/gone.jsonl"),
        ("custom.val_jsonl", "val_jsonl: data/val.jsonl", "val_jsonl: data/gone.jsonl"),
        ("custom.taxonomy", "emit_norm: norm1000", "taxonomy: configs/gone.yaml"),
        ("deepspeed.config", "config: zero2", "config: configs/gone.json"),
        ("model.model", "model: output/stage_2/merged", "model: ./output/gone"),
    ],
)
def test_a_missing_file_is_named_with_its_key_line_and_the_places_tried(
    project: Path, tmp_path: Path, key: str, old: str, new: str
) -> None:
    """The current directory, the folder of the file that says it, and the project's root."""
    line = changed(project, old, new)
    overrides = {} if key == "model.model" else POCKET
    with pytest.raises(ConfigError) as caught:
        load(project / "configs" / "all_full.yaml", overrides=overrides)
    assert caught.value.where.endswith(f"configs/base.yaml:{line}: {key}")
    name = new.partition(": ")[2]
    for folder in (tmp_path / "elsewhere", project / "configs", project):
        assert str(folder / name) in caught.value.allowed


def test_a_missing_base_file_is_named_with_its_line_and_the_nearest(project: Path) -> None:
    """`extends` is relative to the file that says it."""
    line = changed(project, "extends: base.yaml", "extends: bsae.yaml", "all_lora.yaml")
    with pytest.raises(ConfigError) as caught:
        their("all_lora", project)
    assert caught.value.where.endswith(f"configs/all_lora.yaml:{line}: extends")
    assert str(project / "configs" / "bsae.yaml") in str(caught.value) and "did you mean base.yaml?" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("old", "new", "key", "guess"),
    [
        ("vit_lr: 1.0e-4", "vit_Ir: 1.0e-4", "training.vit_Ir", "training.vit_lr"),
        ("freeze_vit: false", "frezze_vit: false", "tuner.frezze_vit", "tuner.freeze_vit"),
        ("report_to:", "reprot_to:", "training.reprot_to", None),
        ("bypass_prob: 0.1", "bypas_prob: 0.1", "custom.augmentation.bypas_prob", "custom.augmentation.bypass_prob"),
    ],
)
def test_a_misspelt_key_names_the_nearest(project: Path, old: str, new: str, key: str, guess: str | None) -> None:
    """With file and line; nothing runs."""
    line = changed(project, old, new)
    with pytest.raises(ConfigError) as caught:
        their("last6_lora", project)
    assert caught.value.where.endswith(f"configs/base.yaml:{line}: {key}")
    if guess:
        assert caught.value.do == f"did you mean {guess}?"


def test_paths_are_found_from_the_projects_root(project: Path) -> None:
    """Whatever the current directory is."""
    config = their("all_lora", project).config
    assert config.custom.train_jsonl == str(project / "data" / "train.jsonl")
    assert config.custom.val_jsonl == str(project / "data" / "val.jsonl")


# --- a run


@pytest.mark.slow
def test_such_a_file_trains_on_a_cpu(tmp_path: Path) -> None:
    """bf16, packs of up to 20,000 tokens, augmentation, flash-attention that is not there: one line each, no error."""
    store = empty_store(tmp_path)
    path = PROJECT / "configs" / "last6_lora.yaml"
    done = trainer("run", str(path), *flags(QUICK | {"gpus": "0"}), cwd=tmp_path, store=store)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(store)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "stage_3_last6_lora")
    assert run.data.tags[names.TAG_GATE] == "passed" and run.data.tags[names.TAG_STRATEGY] == "last6_lora"
    assert (
        run.data.params["dtype/vision"] == "float32"
        and run.data.params[names.VISION_BLOCKS] == "[18, 19, 20, 21, 22, 23]"
    )
    said = done.stderr.splitlines()
    for key in (*NO_EFFECT, *DECIDED_ELSEWHERE, "model.attn_impl", "launch.gpus"):
        assert sum(line.startswith(f"{key}: ") for line in said) == 1, key
    assert sum(line.startswith("template is written 2 times") for line in said) == 1
    adapters = list((tmp_path / "output" / "stage_3").glob("*/best/adapter_model.safetensors"))
    assert len(adapters) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["last6_lora", "all_full"])
def test_such_a_file_trains_with_nothing_changed_but_the_base(arm: str, tmp_path: Path) -> None:
    """Fifty epochs under ZeRO-2 with worker processes, as written."""
    store = empty_store(tmp_path)
    done = trainer(
        "run", str(PROJECT / "configs" / f"{arm}.yaml"), *flags(POCKET), cwd=tmp_path, store=store, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(store)
    assert run.data.tags[names.TAG_GATE] == "passed" and run.data.metrics[names.SAMPLES_SEEN] == 600
