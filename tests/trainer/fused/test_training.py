"""Training with the fused pass is the same training: losses step by step, and on ranks that share a step."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import PAD_ID, take_step, tiny_model, tiny_samples
from tests.running import ROOT, environment
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


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain pass, four packs of one rank."""
    folder = tmp_path_factory.mktemp("plain")
    take(folder, "plain", "float32", 0.0, accumulation=4)
    return outcome(folder)


@pytest.mark.parametrize(
    ("kind", "ranks"), [("plain", 1), ("plain", 2), ("zero", 2)], ids=["one rank", "two ranks", "ZeRO-2 on two ranks"]
)
def test_ranks_that_share_a_step_make_the_step_of_one(
    kind: str, ranks: int, of_one_rank: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    """Loss to 1e-6, every gradient to 1e-5: DistributedDataParallel's and ZeRO-2's exchange, with one silent pack."""
    if ranks == 1:
        take(tmp_path, kind, "float32", 0.0, fused=True, accumulation=4)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "tests.step_on_ranks", str(tmp_path), kind, "float32", "0", "fused"]
        done = subprocess.run(command, cwd=ROOT, env=environment(None), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    (facts, got), (reference, expected) = outcome(tmp_path), of_one_rank
    assert facts["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert facts["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert sum(facts["silent"]) == (ranks == 2)
    assert max(distances(got, expected).values()) < 1e-5
