"""Gradient checkpointing: on the layers that have a gradient to pass on, changing memory and nothing else."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.conftest import ARMS, PAD_ID, shapes_of, strategy, tiny_batch, tiny_model, tiny_samples
from trainer.data.loader import Batch, collate
from trainer.engine import Engine
from trainer.gradient_checkpointing import checkpoint_layers
from trainer.model import SupervisedLoss, apply_plan, trained_tensors
from trainer.optim import make_optimizer
from trainer.strategy import Lora, Method, Part, Strategy, Target, make_plan

BOTH = (Part.VISION, Part.LLM)
BLOCKS, LAYERS = 24, 4
LLM_ONLY = "llm_last2"

# First vision block and first LLM layer with a gradient to pass on; a part without any starts behind its end.
FIRST: dict[str, tuple[int, int]] = {
    "last6_lora": (18, 0),
    "last6_full": (18, 0),
    "all_lora": (0, 0),
    "all_full": (0, 0),
    "frozen_vision": (BLOCKS, 0),  # the aligner trains, and its features enter before the first LLM layer
    LLM_ONLY: (BLOCKS, 2),
}


def strategy_of(name: str, dropout: float) -> Strategy:
    """An arm, or one in which the LLM's last two layers train and nothing else."""
    if name in ARMS:
        return strategy(name, dropout=dropout)
    frozen = Target("none", Method.FROZEN)
    return Strategy(frozen, Target("all", Method.FROZEN), Target("last-2", Method.LORA), Lora(4, 8, dropout))


def names_of(name: str, parts: Iterable[Part]) -> list[str]:
    """The layers that should be checkpointed."""
    first_block, first_layer = FIRST[name]
    blocks = [f"model.visual.blocks.{i}" for i in range(first_block, BLOCKS)]
    layers = [f"model.language_model.layers.{i}" for i in range(first_layer, LAYERS)]
    return blocks * (Part.VISION in parts) + layers * (Part.LLM in parts)


class Rig:
    """The tiny model under an engine, counting what each of its layers does."""

    def __init__(self, name: str, parts: Iterable[Part] | None, *, dropout: float = 0.0) -> None:
        """Build it; without `parts`, `checkpoint_layers` is never called."""
        base = tiny_model()
        self.model = apply_plan(base, make_plan(strategy_of(name, dropout), shapes_of(base)), seed=1)
        self.checkpointed = [] if parts is None else checkpoint_layers(self.model, parts)
        trained = list(trained_tensors(self.model))
        # LoRA B is zero at the start, which would leave every A without a gradient: nothing to compare there.
        generator = torch.Generator().manual_seed(3)
        for tensor in trained:
            if ".lora_B." in tensor.name:
                tensor.parameter.data.normal_(std=0.02, generator=generator)
        loss = SupervisedLoss(self.model)
        optimizer = make_optimizer(trained, weight_decay=0.1)
        self.engine = Engine(Accelerator(cpu=True), loss, optimizer, trained, max_grad_norm=0.5)
        self.engine.loss.train()
        self.runs: Counter[str] = Counter()
        self.passes_gradient: set[str] = set()
        for layer_name, attention in self._attentions(base):
            attention.register_forward_hook(self._counter(layer_name))

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward, with one dropout stream; returns the losses."""
        torch.manual_seed(5)
        return self.engine.accumulate(batch, batch.n_supervised, last=True)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient of everything that trains."""
        return {t.name: t.parameter.grad for t in self.engine.trained if t.parameter.grad is not None}

    def _counter(self, layer_name: str) -> Any:
        def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.runs[layer_name] += 1
            if (output[0] if isinstance(output, tuple) else output).requires_grad:
                self.passes_gradient.add(layer_name)

        return count

    @staticmethod
    def _attentions(base: Any) -> Iterator[tuple[str, nn.Module]]:
        """Attention of every layer; of a fully trained one, PEFT's copy, which is what runs."""
        of_parts = {
            "model.visual.blocks": base.model.visual.blocks,
            "model.language_model.layers": base.model.language_model.layers,
        }
        for stem, layers in of_parts.items():
            for index, layer in enumerate(layers):
                runs = layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else layer
                yield f"{stem}.{index}", runs.attn if "visual" in stem else runs.self_attn


@pytest.fixture
def batch() -> Batch:
    """Three samples in one pack."""
    return tiny_batch([9, 14, 11], packed=True)


@pytest.mark.parametrize("parts", [BOTH, (Part.VISION,), (Part.LLM,), ()], ids=["both", "vision", "llm", "none"])
@pytest.mark.parametrize("name", FIRST)
def test_only_what_is_asked_for_and_has_a_gradient_to_pass_on_is_run_twice(
    name: str, parts: tuple[Part, ...], batch: Batch
) -> None:
    """The layers named run forward again in the backward pass; frozen prefix, and parts not asked for, run once."""
    rig = Rig(name, parts)
    expected = names_of(name, parts)
    assert rig.checkpointed == expected
    rig.step(batch)
    everything = [f"model.visual.blocks.{i}" for i in range(BLOCKS)]
    everything += [f"model.language_model.layers.{i}" for i in range(LAYERS)]
    assert rig.runs == {layer: 2 if layer in expected else 1 for layer in everything}


@pytest.mark.parametrize("parts", [BOTH, ()], ids=["both", "none"])
@pytest.mark.parametrize("name", FIRST)
def test_a_frozen_prefix_stays_outside_the_graph(name: str, parts: tuple[Part, ...], batch: Batch) -> None:
    """It keeps nothing for the backward pass, because nothing in it requires a gradient, checkpointing or not."""
    rig = Rig(name, parts)
    rig.step(batch)
    assert rig.passes_gradient == set(names_of(name, BOTH))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", FIRST)
def test_losses_and_gradients_are_the_same_to_the_bit(name: str, dropout: float, batch: Batch) -> None:
    """Layers run again see the same input and the same dropout masks, and so compute the same numbers."""
    plain, checkpointed = Rig(name, None, dropout=dropout), Rig(name, BOTH, dropout=dropout)
    assert torch.equal(plain.step(batch), checkpointed.step(batch))
    before, after = plain.gradients(), checkpointed.gradients()
    assert before.keys() == after.keys() == {tensor.name for tensor in plain.engine.trained}
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_dropout_is_at_work_where_it_is_compared(batch: Batch) -> None:
    """Otherwise the comparison at dropout 0.1 would say nothing."""
    assert not torch.equal(Rig("all_lora", None).step(batch), Rig("all_lora", None, dropout=0.1).step(batch))


def test_layers_run_once_in_an_evaluation(batch: Batch) -> None:
    """There is no backward pass to save anything for."""
    rig = Rig("all_full", BOTH)
    rig.engine.loss.eval()
    rig.engine.evaluate(batch)
    assert set(rig.runs.values()) == {1}


def peak_bytes(rig: Rig, batch: Batch, folder: Path) -> int:
    """Most memory that one step holds at once beyond what was there before, as the allocator reports it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        rig.step(batch)
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ["all_lora", "all_full"])
def test_memory_of_a_step_falls_with_each_part(name: str, tmp_path: Path) -> None:
    """On a long pack activations dominate: a checkpointed layer keeps its input instead of a dozen tensors as large."""
    # 2,528 tokens and 512 patches, so that both parts weigh; the allocator counts, and so there is no noise
    long = collate(tiny_samples([300] * 8, grids=[(8, 8)]), PAD_ID, packed=True)
    parts: dict[str, tuple[Part, ...]] = {"none": (), "vision": (Part.VISION,), "llm": (Part.LLM,), "both": BOTH}
    peaks = {which: peak_bytes(Rig(name, of), long, tmp_path) for which, of in parts.items()}
    assert peaks["both"] < 0.5 * peaks["none"], peaks
    assert peaks["vision"] < 0.8 * peaks["none"], peaks
    assert peaks["llm"] < 0.8 * peaks["none"], peaks
