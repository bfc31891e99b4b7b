"""DeepSpeed's settings: names, files as users have them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load
from trainer.config.zero import OURS, zero_settings
from trainer.errors import ConfigError

# As ms-swift and transformers ship it: what the trainer knows is left to it.
USUAL: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "overlap_comm": False,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def written(folder: Path, settings: Any) -> str:
    """A DeepSpeed JSON of the user."""
    path = folder / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


def test_a_name_is_a_stage() -> None:
    """`zero2` is ZeRO-2 and nothing else."""
    assert zero_settings("zero2", "x") == ({"zero_optimization": {"stage": 2}}, ())
    assert zero_settings("zero1", "x")[0]["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    "off", [{"cpu_offload": False}, {"offload_param": None}, {"offload_param": {"device": "none"}}]
)
def test_no_offload_may_be_written_in_any_way(off: dict[str, Any], tmp_path: Path) -> None:
    """As older files and those of other programs do."""
    settings, _ = zero_settings(written(tmp_path, {"zero_optimization": {"stage": 2, **off}}), "x")
    assert settings["zero_optimization"] == {"stage": 2, **off}


def test_a_usual_file_is_taken_without_a_word_and_auto_is_ours(tmp_path: Path) -> None:
    """Batch, precision, clipping are this project's; the rest is DeepSpeed's; `auto` inside goes to our defaults."""
    settings, ignored = zero_settings(written(tmp_path, USUAL), "x")
    assert settings == {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "overlap_comm": False,
            "contiguous_gradients": True,
        }
    }
    assert len(ignored) == 1 and ignored[0].startswith("deepspeed.config fp16: ")  # its loss_scale says something


@pytest.mark.parametrize("key", OURS)
def test_what_is_decided_elsewhere_is_left_out_and_listed(key: str, tmp_path: Path) -> None:
    """A file that says it gets one line, with the key that decides."""
    path = written(tmp_path, {"zero_optimization": {"stage": 2}, key: {"enabled": True}})
    settings, (line,) = zero_settings(path, "x")
    assert key not in settings
    assert line.startswith(f"deepspeed.config {key}: ") and path in line


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage '2'"),
        ({"bf16": {"enabled": True}}, "stage None"),
        ({"zero_optimization": 2}, "stage None"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.device 'cpu'"),
        ("[]", "[]"),
        ("{", "broken JSON"),
    ],
    ids=str,
)
def test_what_is_not_zero_2_is_refused(settings: Any, word: str, tmp_path: Path) -> None:
    """Where, what was got, what is allowed, what to do."""
    with pytest.raises(ConfigError) as told:
        zero_settings(written(tmp_path, settings), "mine.yaml:3: deepspeed.config")
    assert word in told.value.got and told.value.where == "mine.yaml:3: deepspeed.config"
    assert told.value.allowed and told.value.do


def test_the_file_is_looked_for_like_every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder, the configuration's, its parent; a name that nobody knows gets the nearest."""
    (tmp_path / "configs").mkdir()
    written(tmp_path, USUAL)
    mine = tmp_path / "configs" / "mine.yaml"
    mine.write_text("deepspeed: {enabled: true, config: ds.json}")
    monkeypatch.chdir(tmp_path / "configs")
    assert load(mine).config.deepspeed.config == str(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="did you mean zero2"):
        load(mine, overrides={"deepspeed.config": "zero3"})
