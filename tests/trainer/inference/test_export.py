"""Exports of a trained run: every tensor is base plus adapter, others load them, and a server answers as `predict`."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from tests.running import ROOT, Trained, environment, trained, trainer, without_mlflow_variables
from tests.server_process import ServerProcess, free_port, listens, started
from trainer.data.images import image_sizes
from trainer.data.records import read_records
from trainer.errors import ModelError, UserError
from trainer.inference.card import CARD
from trainer.inference.export import export
from trainer.inference.merge import check_merged, license_of
from trainer.inference.predictor import load_predictor
from trainer.inference.recipe import recipe_of
from trainer.model import POCKET


@pytest.fixture(scope="module")
def done() -> Trained:
    """A run of last6_lora: LoRA in vision and language model, the aligner trained whole."""
    return trained()


@pytest.fixture(scope="module")
def checkpoint(done: Trained) -> Path:
    """Its best."""
    return done.checkpoint


@pytest.fixture(scope="module")
def merged(done: Trained, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Whole weights."""
    with without_mlflow_variables():
        os.environ["MLFLOW_TRACKING_URI"] = done.store
        yield export(checkpoint, tmp_path_factory.mktemp("exports") / "merged", "merged").folder


def base_tensors() -> dict[str, torch.Tensor]:
    """Of the built-in base, as they are held in training."""
    return {name: tensor.float() for name, tensor in load_file(POCKET / "model.safetensors").items()}


def test_merged_weights_are_base_plus_adapter(checkpoint: Path, merged: Path) -> None:
    """By the definition of LoRA; what trains whole, the vision tower's mergers among it, is really in them."""
    found, base = load_file(merged / "model.safetensors"), base_tensors()
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    qkv = "model.visual.blocks.23.attn.qkv.weight"
    a, b = (adapter[f"base_model.model.model.visual.blocks.23.attn.qkv.lora_{each}.weight"] for each in "AB")
    merger = "model.visual.merger.linear_fc1.weight"
    assert found.keys() == base.keys()
    torch.testing.assert_close(found[qkv], base[qkv] + 2.0 * b @ a)  # alpha 32 over rank 16
    assert not torch.equal(found[qkv], base[qkv])
    assert torch.equal(found[merger], adapter[f"base_model.model.{merger}"])
    assert torch.equal(found["model.visual.blocks.0.attn.qkv.weight"], base["model.visual.blocks.0.attn.qkv.weight"])


def test_merged_weights_load_as_any_model_of_transformers(checkpoint: Path, merged: Path) -> None:
    """And compute what base and adapter compute: the same logits to float32's rounding."""
    ids = torch.arange(20, 40)[None]
    whole = Qwen3VLForConditionalGeneration.from_pretrained(merged)
    base = Qwen3VLForConditionalGeneration.from_pretrained(POCKET, dtype=torch.float32)
    apart: Any = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            whole.eval()(input_ids=ids).logits, apart(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.linear_fc1.weight",
        "model.visual.blocks.23.attn.qkv.weight",
    ],
)
def test_a_tensor_that_is_another_is_found(name: str, checkpoint: Path, merged: Path, tmp_path: Path) -> None:
    """One of the base, one that was trained whole, one with LoRA: as if the merge had lost what was trained."""
    tensors, base = load_file(merged / "model.safetensors"), base_tensors()
    tensors[name] = base[name] * (1.001 if name.startswith("model.visual.blocks.0") else 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=name):
        check_merged(tmp_path, iter(base.items()), checkpoint, dtype=torch.float32)


def test_a_tensor_that_is_missing_or_too_many_is_found(checkpoint: Path, merged: Path, tmp_path: Path) -> None:
    """Nothing is lost, and nothing comes from elsewhere."""
    tensors, base = load_file(merged / "model.safetensors"), base_tensors()
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="extra"):
        check_merged(tmp_path, iter(base.items()), checkpoint, dtype=torch.float32)
    tensors.pop("model.visual.merger.linear_fc1.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not there"):
        check_merged(tmp_path, iter(base.items()), checkpoint, dtype=torch.float32)


def test_a_head_that_was_tied_in_the_base_may_be_written_as_it_was(
    checkpoint: Path, merged: Path, tmp_path: Path
) -> None:
    """Where the embedding is trained, PEFT unties them: the head keeps the base's matrix, and no other one."""
    tensors, head = load_file(merged / "model.safetensors"), base_tensors()["model.language_model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    check_merged(tmp_path, iter(base_tensors().items()), checkpoint, dtype=torch.float32)
    save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head"):
        check_merged(tmp_path, iter(base_tensors().items()), checkpoint, dtype=torch.float32)


def test_the_card_says_what_it_is(merged: Path, checkpoint: Path) -> None:
    """Fields that the hub reads, figures of this checkpoint, digests, licenses."""
    text, recipe = (merged / CARD).read_text(), recipe_of(checkpoint)
    assert text.startswith("---\nbase_model: pocket\n")
    assert "license: apache-2.0" in text
    assert "license of the training data | unknown" in text
    assert recipe.train_digest in text
    assert "| `eval/loss` |" in text
    assert license_of(str(merged)) == "apache-2.0"


def test_a_merged_folder_is_a_source_of_its_own(merged: Path, checkpoint: Path, done: Trained) -> None:
    """`predict` takes it as it takes an adapter, and it says the same."""
    picture = read_records(done.val_jsonl).records[0].images[0]
    one = [(picture.path, picture.size)]
    said = [
        dict(load_predictor(folder, device="cpu", max_new_tokens=40).predict(one, batch_size=1))[0].text
        for folder in (merged, checkpoint)
    ]
    assert said[0] == said[1] != ""


def test_what_is_there_is_not_written_over(checkpoint: Path, merged: Path) -> None:
    """One message."""
    with pytest.raises(UserError, match="which is there"):
        export(checkpoint, merged, "merged")


def test_a_format_that_would_not_be_used_is_refused(checkpoint: Path, merged: Path, tmp_path: Path) -> None:
    """An adapter stays as it is, and weights that are merged already."""
    for source, form in ((checkpoint, "adapter"), (merged, "mlflow")):
        with pytest.raises(UserError, match="--dtype"):
            export(source, tmp_path / "out", form, dtype="bfloat16")


def test_a_server_answers_as_predict(done: Trained, checkpoint: Path, tmp_path: Path) -> None:
    """A real `mlflow models serve`: objects for images; 400 for a path, which it never opens."""
    model = tmp_path / "served"
    arguments = ("export", str(checkpoint), "--form", "mlflow", "--out", str(model))
    process = trainer(*arguments, cwd=done.folder, store=done.store)
    assert (process.returncode, process.stderr) == (0, "")
    picture = read_records(done.val_jsonl).records[0].images[0]
    image = tmp_path / "image.png"  # longer than an argument of a command can be
    with Image.open(picture.path) as opened:
        long = PngInfo()
        long.add_text("note", "x" * 200_000)
        opened.save(image, pnginfo=long)
    sizes = image_sizes([Path(image)])
    predictor = load_predictor(checkpoint, device="cpu")
    wanted = dict(predictor.predict([(p, s) for p, s in sizes.items() if not isinstance(s, str)], batch_size=1))[0]
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    server = ServerProcess([*command, "--port", str(port)], tmp_path, port, environment(None))
    server.ready = lambda: listens(port) and _status(f"{server.uri}/ping") == 200
    with started(server):
        answer = _posted(server.uri, base64.b64encode(Path(image).read_bytes()).decode())
        assert json.loads(answer) == {"predictions": [wanted.as_json()]}
        for page in (ROOT / "README.md", ROOT / "docs" / "use.md") if shutil.which("curl") else ():  # CI installs it
            assert json.loads(_by_the_page(page, server.uri, Path(image))) == json.loads(answer)
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            _posted(server.uri, str(image))
        assert "send the bytes of the image file" in refused.value.read().decode()


def _by_the_page(page: Path, uri: str, image: Path) -> str:
    """What the `curl` command of a page gets, image and address put in."""
    (command,) = re.findall(r"^    (curl .*\n     +< .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    command, images = re.subn(r"base64 < \S+", f"base64 < {image}", command)
    assert images == 1 and "localhost:5001" in command
    command = command.replace("http://", "").replace("localhost:5001", uri)
    return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout


def _posted(uri: str, image: str) -> str:
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}).encode()
    request = urllib.request.Request(f"{uri}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


def _status(uri: str) -> int:
    try:
        with urllib.request.urlopen(uri, timeout=5) as response:
            return int(response.status)
    except OSError:
        return 0
