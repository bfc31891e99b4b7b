"""Training with the fused pass is the same training: a step that is put together, and losses step by step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import PAD_ID, take_step, tiny_model, tiny_samples
from tests.step_on_ranks import take
from tests.trainer.fused.conftest import PASSES, arm, distances
from trainer.data.loader import collate
from trainer.engine import Engine
from trainer.gate import Gate
from trainer.launch import join
from trainer.loop import Parts
from trainer.model import trained_tensors
from trainer.optim import Schedule, make_optimizer

STEPS, RATE, CLIP = 30, 1e-3, 0.5
PLAIN, FUSED = PASSES


def losses(of: Callable[..., nn.Module], name: str, *, packed: bool = True, backwards: bool = False) -> Tensor:
    """A run's losses, (STEPS,) nats a token; `backwards` lays the same samples into each pack the other way round."""
    model = arm(name, tiny_model())
    trained = list(trained_tensors(model))
    optimizer = make_optimizer(trained, weight_decay=0.1)
    engine = Engine(join(1, None), of(model).train(), optimizer, trained, max_grad_norm=CLIP)
    schedule = Schedule(dict.fromkeys(("vision", "aligner", "llm"), RATE), 1e-6, 2, STEPS)
    parts = Parts(engine, schedule, Gate(trained, {}, last_look=STEPS), 17)
    found = []
    for step in range(1, STEPS + 1):
        samples = tiny_samples((9, 14), seed=step % 5, grids=[(2, 4), (4, 4)])[:: -1 if backwards else 1]
        found.append(take_step(parts, [collate(samples, PAD_ID, packed=packed)], step).loss)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["last6_lora", "all_full"])
def test_losses_of_thirty_steps_are_those_of_the_plain_pass(name: str) -> None:
    """Within 1e-4, and no further apart than three times what other orders of the same sums make of the plain pass."""
    plain = losses(PLAIN, name)
    assert plain[0] - plain[-1] > 0.03 * plain[0]
    apart = ((losses(FUSED, name) - plain) / plain).abs().max()
    others = (losses(PLAIN, name, packed=False), losses(PLAIN, name, backwards=True))
    spread = max(((other - plain) / plain).abs().max() for other in others)
    assert apart < 1e-4
    assert apart < 3 * spread


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and gradients that a step has written."""
    tensors = load_file(folder / "step.safetensors")
    gradients = {key: tensor for key, tensor in tensors.items() if key.startswith("gradient/")}
    return json.loads((folder / "step.json").read_text()), gradients


def test_a_step_that_is_accumulated_is_the_plain_one(tmp_path: Path) -> None:
    """Four packs of one rank: loss, norms by part, and every gradient; `tests.test_ranks` has two ranks."""
    for name in ("plain", "fused"):
        (tmp_path / name).mkdir()
        take(tmp_path / name, "plain", "float32", 0.0, fused=name == "fused", accumulation=4)
    (reference, expected), (facts, got) = (outcome(tmp_path / name) for name in ("plain", "fused"))
    assert facts["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert facts["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert max(distances(got, expected).values()) < 1e-5
