"""Checkpoints: whole or not at all, described by their manifest, read back to the bit."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel

from tests.conftest import ARMS, shapes_of, strategy, tiny_batch, tiny_model
from trainer.checkpoint import MANIFEST, Saver, file_sha256, load_adapter, write_adapter
from trainer.events import Seen
from trainer.model import SupervisedLoss, apply_plan, trained_tensors
from trainer.strategy import make_plan


def trained_model(arm: str) -> PeftModel:
    """A wrapped tiny model whose trained tensors have all moved."""
    base = tiny_model()
    model = apply_plan(base, make_plan(strategy(arm), shapes_of(base)), seed=1)
    generator = torch.Generator().manual_seed(5)
    for tensor in trained_tensors(model):
        with torch.no_grad():
            tensor.parameter.add_(0.1 * torch.randn(tensor.parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("arm", ARMS)
def test_an_adapter_loads_with_plain_peft_and_gives_the_same_loss(arm: str, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` on a fresh base, and nothing of ours."""
    model, batch = trained_model(arm), tiny_batch([8, 12])
    write_adapter(model, tmp_path / "best", {})
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "best")
    with torch.no_grad():
        a, b = (SupervisedLoss(m.eval())(supervised=batch.supervised, **batch.model_inputs()) for m in (model, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("arm", ARMS)
def test_loading_puts_every_trained_tensor_back(arm: str, tmp_path: Path) -> None:
    """Into the model that training goes on with, to the bit."""
    model = trained_model(arm)
    write_adapter(model, tmp_path / "best", {})
    saved = {t.name: t.parameter.detach().clone() for t in trained_tensors(model)}
    for tensor in trained_tensors(model):
        with torch.no_grad():
            tensor.parameter.zero_()
    load_adapter(model, tmp_path / "best")
    for tensor in trained_tensors(model):
        assert torch.equal(tensor.parameter, saved[tensor.name]), tensor.name


def test_the_manifest_names_every_file_with_its_digest(tmp_path: Path) -> None:
    """And the facts it was given; nothing else lies in the folder."""
    write_adapter(trained_model("last6_lora"), tmp_path / "best", {"step": 3})
    manifest = json.loads((tmp_path / "best" / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert {p.name for p in (tmp_path / "best").iterdir()} == {*manifest["files"], MANIFEST}
    for name, facts in manifest["files"].items():
        path = tmp_path / "best" / name
        assert (file_sha256(path), path.stat().st_size) == (facts["sha256"], facts["bytes"])


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written aside and put in place at the end."""
    model = trained_model("last6_lora")
    write_adapter(model, tmp_path / "best", {"step": 1})
    monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_adapter(model, tmp_path / "best", {"step": 2})
    assert json.loads((tmp_path / "best" / MANIFEST).read_text())["step"] == 1


@pytest.mark.parametrize(
    ("keep", "left"), [(2, ["step-30"]), (3, ["step-20", "step-30"]), (None, ["step-10", "step-20", "step-30"])]
)
def test_older_steps_are_removed_and_best_and_last_never(tmp_path: Path, keep: int | None, left: list[str]) -> None:
    """`keep` counts the best one, as `save_total_limit` does."""
    save = Saver(trained_model("frozen_vision"), tmp_path, keep=keep, accelerator=Accelerator(cpu=True))
    for step in (10, 20, 30):
        save(Seen(step=step), "best")
        save(Seen(step=step), f"step-{step}")
    saved = save(Seen(step=30), "last")
    assert saved.size_bytes == sum(p.stat().st_size for p in (tmp_path / "last").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", *left]
