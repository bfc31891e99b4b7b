"""The built-in base: a real Qwen3-VL with the 4B's depth at small width, and how to train it again from nothing.

`train_base` makes the tokenizer, draws the weights, lets the model learn printed digits (the state the report calls
"stage 2 merged"), rounds to bf16, measures what came out, and writes a folder in Hugging Face layout.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from trainer.data.digits import DigitsPaths, ensure_digits
from trainer.data.geometry import EmitNorm
from trainer.data.prompts import Language, Scheme, Taxonomy
from trainer.data.records import Record, read_records
from trainer.data.template import END_TOKEN, IMAGE_TOKEN, Encoder, mrope_positions
from trainer.generation import answer_lengths, caption
from trainer.model import Tools, load_model, load_tools
from trainer.pocket_cells import CellHeads, cells_of
from trainer.pocket_model import build_tokenizer, initial_model, pocket_config
from trainer.pocket_phases import (
    Phase,
    Say,
    Scenes,
    batched_attention,
    caption_losses,
    learn_captions,
    see,
    warm_up,
)
from trainer.scoring import Score

__all__ = ["Recipe", "pocket_config", "train_base"]


_WARM_UP = Phase(steps=1000, batch=48, muon=0.015, adam=2e-3)
_CAPTIONS = Phase(steps=900, batch=24, muon=0.006, adam=2e-3)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the shipped weights follow from, beside this code."""

    seed: int = 17
    n_train: int = 20000
    n_val: int = 400
    scheme: Scheme = "A"
    language: Language = "en"
    emit_norm: EmitNorm = "norm100"
    warm_up: Phase = _WARM_UP
    captions: Phase = _CAPTIONS
    easy: tuple[int, int] = (100, 16)
    """Steps and batch size at the start of the captions that show one digit only."""
    threads: int = 2


def train_base(output_dir: str | Path, *, recipe: Recipe | None = None, say: Say = print) -> Path:
    """Train the pocket from random weights and write it with its figures.

    Args:
        output_dir: becomes a model folder in Hugging Face layout with a `pocket.json`; the printed digits that it is
            trained on go to a folder beside it.
        recipe: seed, data, phases; the default is that of the shipped weights.
        say: gets lines of progress.

    Returns:
        The folder.
    """
    recipe, folder = recipe or Recipe(), Path(output_dir)
    started = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    data = ensure_digits(
        folder.parent / "digits",
        seed=recipe.seed,
        n_train=recipe.n_train,
        n_val=recipe.n_val,
        n_ood=0,
        look="printed",
    )
    train, val = read_records(data.train).records, read_records(data.val).records
    build_tokenizer(folder, train[:400], Taxonomy.read(data.taxonomy))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = initial_model(pocket_config(tokenizer), recipe.seed)
    heads = CellHeads(model.model.visual.config.out_hidden_size)
    tools = load_tools(str(folder))
    scenes = load_scenes(train, tools, recipe)
    prompt, positions = prompt_tokens(train[0], tools, recipe, max(map(len, scenes.answers)))
    seconds = {"data": time.perf_counter() - started}
    with batched_attention():
        warm_up(model, heads, scenes, recipe.warm_up, recipe.seed, say)
        seconds["warm_up"] = time.perf_counter() - started - sum(seconds.values())
        learn_captions(
            model,
            heads,
            scenes,
            prompt,
            positions,
            recipe.captions,
            easy=recipe.easy,
            seed=recipe.seed,
            say=say,
            checkpoint=lambda _: _save(model, folder),
        )
        seconds["captions"] = time.perf_counter() - started - sum(seconds.values())
        _save(model, folder)
    write_card(folder, recipe, data, val, seconds, say)
    return folder


def load_scenes(records: Sequence[Record], tools: Tools, recipe: Recipe) -> Scenes:
    """Pixels, cells and answers of records that all have one image of one size."""
    encoder, end = make_encoder(tools, recipe), tools.tokenizer.get_vocab()[END_TOKEN]
    pixels = np.stack([np.asarray(Image.open(record.images[0].path)) for record in records])
    answers = [[*tools.tokenizer(encoder.answer(r), add_special_tokens=False).input_ids, end] for r in records]
    return Scenes(
        pixels=torch.from_numpy(pixels),
        cells=torch.stack([cells_of(record) for record in records]),
        answers=tuple(torch.tensor(answer) for answer in answers),
        n_objects=torch.tensor([len(record.objects) for record in records]),
    )


def prompt_tokens(record: Record, tools: Tools, recipe: Recipe, n_answer: int) -> tuple[Tensor, Tensor]:
    """Token ids of the prompt that all records share, and (3, prompt + n_answer) positions."""
    sample = make_encoder(tools, recipe).prompt(record)
    ids = torch.cat([sample.input_ids, torch.zeros(n_answer, dtype=torch.long)])
    image = ids == tools.tokenizer.get_vocab()[IMAGE_TOKEN]
    return sample.input_ids, mrope_positions(image, sample.image_grid_thw, int(tools.image_processor.merge_size))


def make_encoder(tools: Tools, recipe: Recipe) -> Encoder:
    """The data path of every run, as the recipe words it."""
    return Encoder(
        tools.tokenizer,
        tools.image_processor,
        scheme=recipe.scheme,
        language=recipe.language,
        emit_norm=recipe.emit_norm,
        taxonomy=None,
        max_length=1024,
        truncation="raise",
        max_pixels=None,
    )


def _save(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Write configuration and weights, rounded to bf16; the model itself stays as it is."""
    rounded = {
        name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=rounded)
    (folder / "model.safetensors").chmod(0o644)


def write_card(
    folder: Path, recipe: Recipe, data: DigitsPaths, val: Sequence[Record], seconds: dict[str, float], say: Say
) -> None:
    """Measure the weights in `folder` and write what they are into `pocket.json`."""
    card = {
        "what": "Qwen3-VL at pocket size, trained on printed digits: stands for the stage-2 merged model",
        "command": "python -m trainer pocket_base --output_dir output/pocket_base",
        "seconds": {name: round(value) for name, value in seconds.items()},
        "recipe": asdict(recipe),
        "data": {"look": "printed", "train_digest": _digest(data.train), "val_digest": _digest(data.val)},
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "figures_after_rounding_to_bf16": measure(folder, recipe, val),
    }
    say(json.dumps(card["figures_after_rounding_to_bf16"]))
    (folder / "pocket.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(folder: Path, recipe: Recipe, records: Sequence[Record], *, generated: int = 200) -> dict[str, Any]:
    """Losses with own and exchanged images over all records, and scores of what is generated for the first ones.

    The weights are loaded as float32 from the rounded ones.
    """
    tools = load_tools(str(folder))
    model = load_model(str(folder), tools, dtype=torch.float32, attn_impl="sdpa", seed=recipe.seed)
    model.train(False)
    scenes = load_scenes(records, tools, recipe)
    prompt, positions = prompt_tokens(records[0], tools, recipe, max(map(len, scenes.answers)))

    def loss(pixels: Tensor) -> float:
        parts = [
            caption_losses(model, see(model, pixels[i : i + 50]), prompt, positions, scenes.answers[i : i + 50])
            for i in range(0, len(pixels), 50)
        ]
        return torch.cat(parts).double().mean().item()

    encoder = make_encoder(tools, recipe)
    longest = max(answer_lengths(encoder, records))
    captions = caption(model, encoder, records[:generated], batch_size=50, max_new_tokens=longest + 8)
    score = sum((c.score for c in captions), Score())
    own, exchanged = loss(scenes.pixels), loss(scenes.pixels.roll(1, 0))
    return {
        "records": len(records),
        "eval_loss": round(own, 4),
        "eval_loss_exchanged_images": round(exchanged, 4),
        "vision_gain": round(exchanged - own, 4),
        "generated_records": min(generated, len(records)),
        "f1": round(score.f1, 4),
        "f1_attributes": round(score.f1_attributes, 4),
        "boxes_found": round(score.located / score.true, 4),
        "class_accuracy": round(score.class_accuracy, 4),
    }


def _digest(jsonl: Path) -> str:
    """32 hex characters over the records and the bytes of their images."""
    digest = hashlib.blake2b(jsonl.read_bytes(), digest_size=16)
    for record in read_records(jsonl).records:
        for image in record.images:
            digest.update(image.path.read_bytes())
    return digest.hexdigest()
