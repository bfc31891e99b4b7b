"""Objects that many tests share: a tiny Qwen3-VL with the real depth of vision, and batches made by hand."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainer.attention import PACKED_SDPA
from trainer.data.loader import Batch, collate
from trainer.data.template import Sample, mrope_positions
from trainer.engine import Engine
from trainer.events import Seen, StepDone
from trainer.gate import Gate
from trainer.loop import Parts, train_step
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


def tiny_model(
    *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = PACKED_SDPA
) -> Qwen3VLForConditionalGeneration:
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
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every parameter."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tiny_samples(
    lengths: Sequence[int], *, seed: int = 0, grids: Sequence[tuple[int, int]] = ((2, 4),)
) -> list[Sample]:
    """Samples of one image each (`grids`: rows and columns of patches, in turn) and `length` tokens of text, the second
    half of them supervised.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        height, width = grids[index % len(grids)]
        text = torch.randint(10, VOCABULARY, (length,), generator=generator)
        ids = torch.cat([text[:2], torch.full((height * width // 4,), IMAGE_ID), text[2:]])
        grid = torch.tensor([[1, height, width]])
        samples.append(
            Sample(
                record_id=f"toy.jsonl:{seed * 100 + index}",
                input_ids=ids,
                supervised=torch.arange(len(ids)) >= len(ids) - length // 2,
                image_tokens=ids == IMAGE_ID,
                position_ids=mrope_positions(ids == IMAGE_ID, grid, 2),
                pixel_values=torch.randn(height * width, 3 * 2 * 16 * 16, generator=generator),
                image_grid_thw=grid,
                domain="ab"[index % 2],
            )
        )
    return samples


def tiny_batch(lengths: Sequence[int], *, seed: int = 0, packed: bool = False) -> Batch:
    """`tiny_samples` in one batch, padded or packed."""
    return collate(tiny_samples(lengths, seed=seed), PAD_ID, packed=packed)


MakeParts = Callable[..., Parts]


def take_step(parts: Parts, micro_batches: Sequence[Batch], step: int) -> StepDone:
    """Optimizer step number `step` (from 1), of an epoch of four samples."""
    return train_step(parts, micro_batches, Seen(step=step - 1), n_samples=4)


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
        optimizer = make_optimizer(trained, weight_decay=0.1)
        return Parts(
            engine=Engine(Accelerator(cpu=True), SupervisedLoss(model), optimizer, trained, max_grad_norm=0.5),
            schedule=Schedule(
                {"vision": learning_rate, "aligner": learning_rate, "llm": learning_rate}, 1e-6, 2, total_steps
            ),
            gate=Gate(trained, frozen, last_look=last_look),
            seed=17,
        )

    return build


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--screenshots docs` keeps what the browser tests see, for the documentation; `--long` is for `tests/faults`."""
    parser.addoption("--screenshots", help="folder that the browser tests write their screenshots to")
    parser.addoption("--long", action="store_true", help="faults as often as docs/reliability.md says: an hour")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `long` runs with `--long` alone."""
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="only with --long: make test-faults ARGS=--long"))
