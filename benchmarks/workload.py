"""The same work for every trainer: a tiny Qwen3-VL with random weights, and pictures of digits with JSON answers.

    python benchmarks/workload.py FOLDER        # writes FOLDER/model and FOLDER/data, the same bytes every time

The model has the 4B's depth and module names (24 vision blocks, DeepStack taps 5, 11, 17, 36 LLM layers). Any folder of
this form is read, whoever wrote it: `model/` in Hugging Face layout and `data/hf_train.jsonl` whose lines have `image`,
`prompt` and `answer`.
"""

import argparse
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainer.data.template import IMAGE_TOKEN, Sample, mrope_positions
from trainer.model import POCKET, load_tools

SEED, N_TRAIN, N_VAL = 1234, 256, 32
VOCABULARY = 2048  # rows of the embedding: twice those that pocket's tokenizer fills
PROMPT = "Describe every digit of this picture as dense JSON: class, box, colour, contrast and caption."
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TINTS = {"grey": (1, 1, 1), "red": (1, 0.3, 0.3), "green": (0.3, 1, 0.3), "blue": (0.3, 0.4, 1), "amber": (1, 0.8, 0.2)}
BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the data."""

    image: Path
    prompt: str
    answer: str


class Workload:
    """The training rows of a folder, encoded anew each time that one is asked for, as in a first epoch."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer, image processor and rows; images are opened when a sample is asked for."""
        self.model = folder / "model"
        tools = load_tools(str(self.model))
        self.tokenizer, self._processor = tools.tokenizer, tools.image_processor
        lines = (folder / "data" / "hf_train.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [Row(Path(r["image"]), r["prompt"], r["answer"]) for r in map(json.loads, lines)]
        self._image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.pad_id: int = self.tokenizer.pad_token_id

    def __len__(self) -> int:
        """Training rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """A row as the model meets it; its answer, the end mark and the line break behind it are supervised."""
        row = self.rows[index]
        content = [{"type": "image"}, {"type": "text", "text": row.prompt}]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        with Image.open(row.image) as image:
            features = self._processor(images=[image.convert("RGB")], return_tensors="pt")
        grid = features["image_grid_thw"]  # (1, 3)
        merge = int(self._processor.merge_size)
        shown = str(prompt).replace(IMAGE_TOKEN, IMAGE_TOKEN * int(grid.prod() // merge**2))
        before, after = self._ids(shown), self._ids(f"{row.answer}<|im_end|>\n")
        input_ids = torch.tensor(before + after)
        image_tokens = input_ids == self._image_id
        return Sample(
            record_id=str(row.image),
            input_ids=input_ids,
            supervised=torch.arange(len(input_ids)) >= len(before),
            image_tokens=image_tokens,
            position_ids=mrope_positions(image_tokens, grid, merge),
            pixel_values=features["pixel_values"],
            image_grid_thw=grid,
            domain=None,
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def ready(folder: Path) -> Workload:
    """The workload of a folder, written there where it is not yet."""
    if not (folder / "data" / "hf_train.jsonl").exists():
        write(folder)
    return Workload(folder)


def write(folder: Path) -> None:
    """Write model and data."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "images").mkdir(parents=True, exist_ok=True)
    _write_model(folder / "model")
    draw = random.Random(SEED)  # noqa: S311  # pictures, no secrets
    noise = np.random.default_rng(SEED)
    rows = [_row(folder.resolve() / "data" / "images" / f"{i:04d}.png", draw, noise) for i in range(N_TRAIN + N_VAL)]
    for name, part in (("val", rows[N_TRAIN:]), ("train", rows[:N_TRAIN])):  # what `ready` looks for comes last
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / f"hf_{name}.jsonl").write_text(lines, encoding="utf-8")


def _row(path: Path, draw: random.Random, noise: np.random.Generator) -> dict[str, str]:
    """One to three digits on noise, and what an annotator would say of them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    width, height = (32 * draw.randint(3, 7) for _ in range(2))
    canvas = noise.integers(0, 90, (height, width, 3)).astype(np.float32)
    objects: list[dict[str, Any]] = []
    for _ in range(draw.choice((1, 1, 2, 2, 2, 3, 3))):
        index, scale, colour = draw.randrange(len(digits.images)), draw.choice((3, 4, 5)), draw.choice(list(TINTS))
        strokes = np.kron(digits.images[index] / 16, np.ones((scale, scale)))[:, :, None] * TINTS[colour] * 255
        side = 8 * scale
        x, y = draw.randint(0, width - side), draw.randint(0, height - side)
        canvas[y : y + side, x : x + side] = np.maximum(canvas[y : y + side, x : x + side], strokes)
        word = WORDS[digits.target[index]]
        known = {"digit": int(digits.target[index]), "box": [x, y, x + side, y + side], "colour": colour}
        known["contrast"] = round(float(strokes.mean() / 255), 2)
        if draw.random() < 0.7:
            known["caption"] = f"a {colour} {word} near the {'top' if y < height / 2 else 'bottom'}"
        objects.append(known)
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path)
    return {"image": str(path), "prompt": PROMPT, "answer": json.dumps({"objects": objects}, separators=(",", ":"))}


def _write_model(folder: Path) -> None:
    for name in BESIDE_WEIGHTS:
        shutil.copy(POCKET / name, folder / name)
    token_id = load_tools(str(folder)).tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 36,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        image_token_id=token_id(IMAGE_TOKEN),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def main() -> None:
    """Write a folder and say what its samples are like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    workload = ready(parser.parse_args().folder)
    samples = [workload[i] for i in range(len(workload))]
    for name in ("input_ids", "image_tokens", "supervised"):
        counts = [len(s.input_ids) if name == "input_ids" else int(getattr(s, name).sum()) for s in samples]
        print(f"{name}: {min(counts)} to {max(counts)}, mean {np.mean(counts):.0f}")


if __name__ == "__main__":
    main()
