"""`launch.gpus`: which GPUs a run uses, how many ranks follow from that, and what happens where there are none."""

import os
from pathlib import Path

import pytest
import torch

from trainer import gpus
from trainer.config.load import load
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with four GPUs of which torch shows what the variable leaves; there is none where this runs."""

    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 4 if visible is None else sum(part.strip() in "0123" for part in visible.split(",") if part)

    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def configured(folder: Path, text: str, **overrides: str) -> Resolved:
    """A user's file with this `launch` section."""
    path = folder / "mine.yaml"
    path.write_text(f"launch: {text}\n")
    return load(path, overrides=overrides)


@pytest.mark.parametrize(
    ("written", "means"), [("0", "0"), ("0,1", "0,1"), ("'1, 0'", "1,0"), ("[2, 3]", "2,3"), ("null", None)]
)
def test_indices_are_a_number_a_list_or_text(written: str, means: str | None, tmp_path: Path) -> None:
    """YAML makes a number of `0` and text of `0,1`."""
    text = f"{{gpus: {written}}}" if written != "0,1" else f"\n  gpus: {written}"
    assert configured(tmp_path, text).config.launch.gpus == means


@pytest.mark.parametrize("written", ["-1", "0.5", "true", "'0,0'", "cuda", "''", "[]", "0-3"])
def test_anything_else_is_refused(written: str, tmp_path: Path) -> None:
    """With the two forms that there are."""
    with pytest.raises(ConfigError, match=r"(?s)launch\.gpus.*such as 0,1"):
        configured(tmp_path, f"{{gpus: {written}}}")


@pytest.mark.parametrize("text", ["0", "0,1"])
def test_the_launch_line_of_existing_projects_is_an_override(text: str, tmp_path: Path) -> None:
    """`-P gpus=0`; a variable of the environment with that name is not read."""
    assert configured(tmp_path, "{nproc: 1}", gpus=text).config.launch.gpus == text


def test_the_environment_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpus=0 bash ...` of another project must not reach this one by accident."""
    monkeypatch.setenv("gpus", "0")
    assert configured(tmp_path, "{nproc: 1}").config.launch.gpus is None


def test_a_rank_for_each_gpu_where_nproc_is_not_written(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """And its origin is the line that names the GPUs; base.yaml, which writes every key, does not count."""
    ours = load("last6_lora", overrides={"gpus": "0,2"})
    theirs = configured(tmp_path, "{gpus: '0,2'}")
    for resolved in (ours, theirs):
        settled = gpus.settled(resolved)
        assert resolved.config.launch.nproc == "auto" and settled.config.launch.nproc == 2
        assert settled.origins["launch.nproc"] == settled.origins["launch.gpus"]
        assert settled.params()["launch.nproc"] == "2" and "nproc: 2" in settled.to_yaml()


def test_nproc_that_is_written_stays(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """In a file or as an override; more ranks than GPUs are refused."""
    assert gpus.settled(configured(tmp_path, "{gpus: '0,1', nproc: 1}")).config.launch.nproc == 1
    assert (
        gpus.settled(configured(tmp_path, "{nproc: 1}", gpus="0,1", **{"launch.nproc": "2"})).config.launch.nproc == 2
    )
    with pytest.raises(ConfigError, match=r"(?s)mine\.yaml:1: launch\.nproc.*3 ranks on launch\.gpus 0,1"):
        gpus.settled(configured(tmp_path, "{gpus: '0,1', nproc: 3}"))


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """With file, line, and those that can be seen."""
    with pytest.raises(ConfigError, match=r"(?s)mine\.yaml:1: launch\.gpus.*0,4 on a machine.*from 0 to 3"):
        gpus.settled(configured(tmp_path, "{gpus: '0,4'}"))
    machine.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"(?s)-P launch\.gpus.*allowed: 0\n"):
        gpus.settled(configured(tmp_path, "{nproc: 1}", gpus="1"))


def test_without_a_gpu_the_key_has_no_effect_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on the number of ranks: this machine has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resolved = configured(tmp_path, "{gpus: '0,1'}")
    settled = gpus.settled(resolved)
    assert settled.config == resolved.config
    assert settled.no_effect == ("launch.gpus: there is no GPU here (mine.yaml:1)",)
    gpus.see_only(settled.config.launch.gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("visible", "named", "left"), [(None, "1", "1"), (None, "3,0", "3,0"), ("2, 3", "1", "3"), ("1,2,3", "0,2", "1,3")]
)
def test_indices_count_what_is_visible_already(
    visible: str | None, named: str, left: str, machine: pytest.MonkeyPatch
) -> None:
    """A scheduler that has given a job GPUs 2 and 3 calls them so; the job's own first is 2."""
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus.see_only(named)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    assert torch.cuda.device_count() == len(left.split(","))


def test_null_hides_nothing(machine: pytest.MonkeyPatch) -> None:
    """All that are visible."""
    gpus.see_only(None)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_driver_that_does_not_look_again_is_told(machine: pytest.MonkeyPatch) -> None:
    """Rather than training on a GPU that was not named."""
    machine.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"start with CUDA_VISIBLE_DEVICES=1"):
        gpus.see_only("1")


def test_flash_attention_without_a_gpu_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none with a GPU, where it runs or is an error."""
    path = tmp_path / "mine.yaml"
    path.write_text("model: {attn_impl: flash_attention_2}\n")
    (line,) = gpus.stand_ins(load(path))
    assert line.startswith("model.attn_impl: flash_attention_2 needs a GPU") and line.endswith("mine.yaml:1)")
    assert gpus.stand_ins(load(path, overrides={"model.attn_impl": "auto"})) == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus.stand_ins(load(path)) == ()
