"""Merges an adapter into its base: whole weights in Hugging Face layout, every tensor checked against the files."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint import ADAPTER_WEIGHTS
from trainer.errors import ModelError
from trainer.inference.predictor import load_trained
from trainer.inference.recipe import Recipe
from trainer.model import folder_of, load_model, load_tools

_SHARD = "5GB"
_PREFIX = "base_model.model."
"""What PEFT puts before the base's name of a tensor."""
_TOOLS = ("*token*", "vocab*", "merges*", "chat_template*", "*preprocessor_config.json", "generation_config.json")
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Merged:
    """Tensors of a merged model by what they were found to be."""

    untouched: int = 0
    """Bit for bit those of the base."""
    copied: int = 0
    """Bit for bit those of the adapter that were trained whole, rounded to the number format once."""
    added: int = 0
    """Base plus scaled LoRA product, to the last place."""


def write_merged(checkpoint: Path, recipe: Recipe, folder: Path, *, dtype: torch.dtype) -> Merged:
    """Merge a checkpoint into its base and write the whole model.

    Merged in float32 and rounded once at the end: added to bf16 weights, small updates would vanish.

    Args:
        checkpoint: of an adapter.
        recipe: of it, on the base as it lies here.
        folder: an empty one, to write to.
        dtype: number format of the written weights.

    Raises:
        ModelError: base or adapter cannot be used, or what was written is not base plus adapter.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # PEFT asks DeepSpeed, which wonders aloud where the GPU is
    model = load_trained(checkpoint, replace(recipe, torch_dtype="float32"), device="cpu")
    whole: Any = model.merge_and_unload(safe_merge=True)
    whole.to(dtype).save_pretrained(str(folder), max_shard_size=_SHARD)
    base = folder_of(recipe.base_model)
    # As they are: what transformers writes of an image processor depends on whether torchvision is installed.
    for path in (path for pattern in _TOOLS for path in base.glob(pattern)):
        shutil.copy(path, folder / path.name)
    return check_merged(folder, _base_tensors(recipe), checkpoint, dtype=dtype)


def check_merged(folder: Path, base: Iterator[tuple[str, Tensor]], checkpoint: Path, *, dtype: torch.dtype) -> Merged:
    """Hold a merged model against the files that it is made of, without any library that has merged it.

    A tensor is the base's W; or the one that was trained in its place; or W + alpha / r B A (Hu et al. 2021, section
    4.1), whose sums may be made in another order.

    Args:
        folder: with the merged weights.
        base: every tensor of the base under its name.
        checkpoint: of the adapter.
        dtype: number format of the merged weights.

    Raises:
        ModelError: it is something else.
    """
    written, adapter = dict(_tensors(folder)), load_file(checkpoint / ADAPTER_WEIGHTS)
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    counts = dict.fromkeys(("untouched", "copied", "added"), 0)
    embedding = None
    for name, weight in base:
        stem, full = name.removesuffix(".weight"), adapter.pop(_PREFIX + name, None)
        a, b = (adapter.pop(f"{_PREFIX}{stem}.lora_{each}.weight", None) for each in "AB")
        found = written.pop(name, None)
        if found is None and name == _HEAD:
            continue  # tied to the embedding, and not written twice
        if name == _EMBEDDING:
            embedding = weight
        kind = "copied" if full is not None else "added" if a is not None else "untouched"
        wanted = weight.float() if full is None else full.float()
        if a is not None and b is not None:
            wanted = wanted + scale * (b.float() @ a.float())
        if found is None or found.dtype != dtype or not _same(found, wanted.to(dtype), exact=kind != "added"):
            raise _wrong(folder, name, "not there" if found is None else f"not what {kind} tensors have to be")
        counts[kind] += 1
    if _HEAD in written and embedding is not None and _same(written[_HEAD], embedding.to(dtype), exact=True):
        del written[_HEAD]  # tied in the base, whose embedding was trained alone: the head stayed as it was
    if left := [*written, *adapter]:
        raise _wrong(folder, left[0], f"not of base and adapter, nor are {len(left) - 1} more")
    return Merged(**counts)


def _base_tensors(recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    if recipe.base_model.startswith("random:"):
        tools = load_tools(recipe.base_model)
        model = load_model(recipe.base_model, tools, dtype=recipe.dtype, attn_impl="auto", seed=recipe.seed)
        yield from ((name, tensor.detach()) for name, tensor in model.named_parameters())
    else:
        yield from _tensors(folder_of(recipe.base_model, weights=True))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's weight files, read when it is its turn."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                yield name, file.get_tensor(name)


def _same(found: Tensor, wanted: Tensor, *, exact: bool) -> bool:
    """Equal; or, where sums came in another order, to one unit in the last place of the largest weight."""
    if exact or found.shape != wanted.shape:
        return torch.equal(found, wanted)
    room = torch.finfo(wanted.dtype).eps * wanted.abs().max().float()
    return bool(((found.float() - wanted.float()).abs() <= room).all())


def _wrong(folder: Path, name: str, got: str) -> ModelError:
    return ModelError(
        f"{folder}: {name}", got, "base plus adapter, tensor by tensor", "report it: this is a bug of ours"
    )


def license_of(base: str) -> str:
    """The license that a base model's own card names; empty where there is none."""
    card = folder_of(base) / "README.md"
    if not card.is_file():
        return ""
    lines: Mapping[str, str] = {
        key.strip(): value.strip()
        for key, colon, value in (line.partition(":") for line in card.read_text(encoding="utf-8").splitlines()[:40])
        if colon
    }
    return lines.get("license", "")
