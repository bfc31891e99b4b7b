"""Objects that many tests share: a tiny Qwen3-VL with the real depth of vision, and batches made by hand."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainer.data.loader import Batch
from trainer.data.template import mrope_positions
from trainer.gate import Gate
from trainer.loop import Parts
from trainer.model import SupervisedLoss, apply_plan, trained_tensors
from trainer.optim import Schedule, make_optimizer
from trainer.strategy import Lora, Method, Strategy, Target, make_plan

IMAGE_ID, PAD_ID = 5, 0
VOCABULARY = 128

# The five arms of the comparison, as `experiments/` writes them.
ARMS: dict[str, tuple[str, Method]] = {
    "last6_lora": ("last-6", Method.LORA),
    "last6_full": ("last-6", Method.FULL),
    "all_lora": ("all", Method.LORA),
    "all_full": ("all", Method.FULL),
    "frozen_vision": ("none", Method.FROZEN),
}


def strategy(arm: str, *, dropout: float = 0.0) -> Strategy:
    """One of the five arms, at LoRA rank 4."""
    blocks, method = ARMS[arm]
    return Strategy(
        vision=Target(blocks, method),
        aligner=Target("all", Method.FULL),
        llm=Target("last-2", Method.LORA),
        lora=Lora(rank=4, alpha=8, dropout=dropout),
    )


def tiny_model(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """24 vision blocks with taps 5, 11, 17 and 4 LLM layers, all of width 32, random weights."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE_ID,
        video_token_id=6,
    )
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every parameter."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tiny_batch(lengths: Sequence[int], *, seed: int = 0) -> Batch:
    """Samples of one 64x32 image (2 tokens) and `length` tokens of text each, the second half supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows, masks, positions, pixels = [], [], [], []
    grid = torch.tensor([[1, 2, 4]])
    for length in lengths:
        text = torch.randint(10, VOCABULARY, (length,), generator=generator)
        ids = torch.cat([text[:2], torch.tensor([IMAGE_ID, IMAGE_ID]), text[2:]])
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[-(length // 2) :] = True
        rows.append(ids)
        masks.append(mask)
        mrope = mrope_positions(ids == IMAGE_ID, grid, 2)
        positions.append(torch.cat([torch.arange(len(ids))[None], mrope]))
        pixels.append(torch.randn(8, 3 * 2 * 16 * 16, generator=generator))
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        record_ids=tuple(f"toy.jsonl:{seed * 100 + i}" for i in range(len(lengths))),
        domains=tuple("ab"[i % 2] for i in range(len(lengths))),
        input_ids=pad(rows, True, PAD_ID),
        attention_mask=pad([torch.ones_like(row) for row in rows], True, 0),
        supervised=pad(masks, True, False),
        position_ids=pad([p.T for p in positions], True, 0).permute(2, 0, 1).contiguous(),
        pixel_values=torch.cat(pixels),
        image_grid_thw=grid.repeat(len(lengths), 1),
    )


MakeParts = Callable[..., Parts]


@pytest.fixture
def make_parts() -> MakeParts:
    """Builds what the loop trains with, for one arm on the tiny model."""

    def build(
        arm: str = "last6_lora",
        *,
        dropout: float = 0.0,
        total_steps: int = 4,
        reentrant: bool | None = None,
        last_look: int = 2,
        learning_rate: float = 1e-2,
    ) -> Parts:
        base = tiny_model()
        model = apply_plan(base, make_plan(strategy(arm, dropout=dropout), shapes_of(base)), seed=1)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        trained = list(trained_tensors(model))
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        accelerator = Accelerator(cpu=True)
        loss, optimizer = accelerator.prepare(SupervisedLoss(model), make_optimizer(trained, weight_decay=0.1))
        return Parts(
            accelerator=accelerator,
            model=loss,
            optimizer=optimizer,
            schedule=Schedule(
                {"vision": learning_rate, "aligner": learning_rate, "llm": learning_rate}, 1e-6, 2, total_steps
            ),
            trained=trained,
            gate=Gate(trained, frozen, last_look=last_look),
            max_grad_norm=0.5,
            seed=17,
        )

    return build
