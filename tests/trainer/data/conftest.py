"""A small real tokenizer (byte-level BPE, Qwen's chat tokens), Qwen3-VL's chat layout, and records with real images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.data.geometry import Geometry
from trainer.data.prompts import system_prompt
from trainer.data.records import Object, Picture, Record
from trainer.data.template import Encoder

# A busy machine must not fail a property.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# The layout of Qwen3-VL Instruct for what our messages hold: text, and user content of images and text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHAT_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


@pytest.fixture(scope="session")
def tokenizer() -> Qwen2Tokenizer:
    """A Qwen2Tokenizer of 600 tokens, trained on the prompts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [system_prompt("B", language, "norm1000") for language in ("en", "zh")]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen3-VL's patches: 16 pixels, 2 x 2 of them a token."""
    return Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.fixture
def make_encoder(tokenizer: Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil) -> Callable[..., Encoder]:
    """An encoder with scheme A, English, norm1000, room for 4,096 tokens; any of these can be given."""

    def make(**changes: Any) -> Encoder:
        settings: dict[str, Any] = {
            "scheme": "A",
            "language": "en",
            "emit_norm": "norm1000",
            "taxonomy": None,
            "max_length": 4096,
            "truncation": "raise",
            "max_pixels": None,
        }
        return Encoder(tokenizer, image_processor, **(settings | changes))

    return make


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., Record]:
    """A record with drawn images of any size and one box in the middle, or the objects given."""

    def make(
        number: int = 1,
        size: tuple[int, int] = (96, 64),
        objects: tuple[Object, ...] | None = None,
        n_images: int = 1,
        domain: str | None = None,
    ) -> Record:
        width, height = size
        paths = tuple(tmp_path / f"{number}_{index}.png" for index in range(n_images))
        for index, path in enumerate(paths):
            Image.new("RGB", size, (37 * number % 256, 80 * index, 90)).save(path)
        box = Geometry("bbox_2d", (width / 4, height / 4, width / 2, height / 2))
        pictures = tuple(Picture(path, width, height) for path in paths)
        return Record(f"train.jsonl:{number}", pictures, objects or (Object(box, "seven/red"),), domain=domain)

    return make
