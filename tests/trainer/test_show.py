"""What `trainer plan` prints: origins, plan, counts, steps and the effective batch with its arithmetic."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from trainer.config.load import load
from trainer.data.digits import ensure_digits
from trainer.show import show_plan


def printed(config: str, **overrides: str) -> str:
    """The plan as plain text; `__` stands for the dot of a key."""
    text = io.StringIO()
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    show_plan(load(config, overrides=keys), Console(file=text, width=200, highlight=False))
    return text.getvalue()


@pytest.fixture(scope="module")
def plan() -> str:
    """Of `all_full` on 40 scenes."""
    return printed("all_full", custom__digits__train="40", training__num_train_epochs="3")


def test_every_value_has_its_origin(plan: str) -> None:
    """The strategy's own line, base's line, the profile's, and the command line."""
    for pattern in (
        "training.gradient_accumulation_steps: 4 .*# experiments/all_full.yaml:",
        "tuner.lora_rank: 16 .*# experiments/base.yaml:",
        "custom.emit_norm: .norm100. .*# experiments/profiles/pocket.yaml:",
        "training.num_train_epochs: 3.0 .*# -P",
    ):
        assert re.search(pattern, plan), pattern


def test_the_rows_add_up_to_the_counts(plan: str) -> None:
    """Trained parameters of all rules are the total; packs, batch and steps with their arithmetic, packed and not."""
    rows = [line.split() for line in plan.splitlines() if re.match(r"(vision|aligner|llm) +(full|lora|frozen) ", line)]
    assert "stages " not in plan
    numbers = {(row[0], row[1]): int(row[3].replace(",", "")) for row in rows}
    assert numbers["vision", "full"] + numbers["aligner", "full"] + numbers["llm", "lora"] == trainable(plan)
    assert "40 samples in 5 packs of at most 1408 tokens in the first epoch: 8.0 samples a pack" in plan
    assert "1 pack a micro-batch x 4 accumulated x 1 rank = 4 packs" in plan
    assert "ceil(5 / 4) = 2 an epoch; 3 epochs = 6 in all, of which 2 warm-up" in plan
    rows_of_eight = {"training__packing": "false", "training__per_device_train_batch_size": "8"}
    unpacked = printed("all_full", custom__digits__train="40", training__num_train_epochs="3", **rows_of_eight)
    assert "8 samples a micro-batch x 4 accumulated x 1 rank = 32 samples" in unpacked
    assert "ceil(40 / 32) = 2 an epoch; 3 epochs = 6 in all, of which 2 warm-up" in unpacked


def trainable(plan: str) -> int:
    """The total that the plan states."""
    (line,) = [line for line in plan.splitlines() if line.startswith("trainable ")]
    return int(line.split()[1].replace(",", ""))


def test_stages_are_printed_with_their_steps_blocks_and_warm_up() -> None:
    """Of a curriculum; a plan of one stage has no such lines."""
    text = printed("progressive_lora", custom__digits__train="40", training__max_steps="30")
    assert "stages           steps 1-10: vision blocks 22-23\n" in text
    assert "steps 11-20: vision blocks 20-23; 20-21 new, with 4 steps of warm-up\n" in text
    assert "steps 21-30: vision blocks 18-23; 18-19 new, with 2 steps of warm-up\n" in text
    assert "of which 6 warm-up" in text and "30 in all" in text


def test_records_left_out_are_counted(tmp_path: Path) -> None:
    """`on_bad_record: skip` does not hide what it did."""
    paths = ensure_digits(tmp_path, seed=1, n_train=3, n_val=2, n_ood=1)
    mine = tmp_path / "mine.jsonl"
    shutil.copytree(paths.train.parent / "train", tmp_path / "train")
    good = paths.train.read_text()
    mine.write_text(good + json.dumps({**json.loads(good.splitlines()[0]), "images": ["gone.png"]}) + "\n")
    given = {"custom__train_jsonl": str(mine), "custom__val_jsonl": str(paths.val)}
    text = printed("last6_lora", **given, custom__on_bad_record="skip")
    assert "left out         1 bad records" in text
    assert "3 training" in text


def test_what_changes_nothing_on_this_machine_or_model_is_printed_beside_the_settings() -> None:
    """In an existing file: the attention that needs a GPU, and layers that this model does not have."""
    theirs = str(Path(__file__).parents[1] / "fixtures" / "existing" / "configs" / "all_lora.yaml")
    regex = r"language_model\.layers\.(35|36)\.mlp\.up_proj"
    text = printed(theirs, model="pocket", training__max_steps="2", tuner__target_regex=regex)
    assert "model.attn_impl: flash_attention_2 needs a GPU" in text
    assert "tuner.target_regex: its alternatives '36' catch nothing more here (-P)" in text
    assert r"model\.language_model\.layers\.(35)\.mlp\.up_proj\.weight" in text
