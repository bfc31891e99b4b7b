"""The training gate: what it lets pass, what it catches, and the trap it is there for."""

import pytest
import torch

from tests.conftest import ARMS, MakeParts, take_step, tiny_batch
from trainer.gate import GateFailed, Verdict
from trainer.loop import Parts


def two_steps(parts: Parts) -> None:
    """Train two optimizer steps under the gate."""
    for step in (1, 2):
        take_step(parts, [tiny_batch([8, 9], seed=step)], step)
        parts.gate.after_update(step, parts.engine.weight)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("reentrant", [None, False], ids=["no checkpointing", "non-reentrant"])
def test_an_honest_run_passes(make_parts: MakeParts, arm: str, reentrant: bool | None) -> None:
    """Every planned tensor trains, with and without gradient checkpointing as we do it."""
    parts = make_parts(arm, reentrant=reentrant)
    assert parts.gate.verdict is Verdict.OPEN
    two_steps(parts)
    assert parts.gate.verdict is Verdict.PASSED
    report = parts.gate.report()
    assert all(t["gradient_norm"] > 0 and t["update_norm"] > 0 for t in report["trained"].values())


@pytest.mark.parametrize("arm", ["last6_lora", "last6_full", "all_lora", "all_full"])
def test_reentrant_checkpointing_behind_a_frozen_prefix_is_caught(make_parts: MakeParts, arm: str) -> None:
    """No gradient reaches the vision blocks and nobody says so: the gate does, naming them, before any update.

    In all four arms the patch embedding before the first trained block is frozen.
    """
    parts = make_parts(arm, reentrant=True)
    start = [t.parameter.detach().clone() for t in parts.engine.trained]
    with pytest.raises(GateFailed, match=r"visual\.blocks\.\d+\..*no gradient"):
        two_steps(parts)
    assert parts.gate.verdict is Verdict.FAILED
    vision = {t.name for t in parts.engine.trained if t.part == "vision" and not t.behind_zero}
    assert set(parts.gate.report()["faults"]) == vision
    assert all(torch.equal(t.parameter, s) for t, s in zip(parts.engine.trained, start, strict=True))


def test_a_zero_gradient_is_caught(make_parts: MakeParts) -> None:
    """A tensor whose gradient is exactly zero does not train, even though it has one."""
    parts = make_parts()
    mute = next(t for t in parts.engine.trained if t.part == "aligner")
    mute.parameter.register_hook(torch.zeros_like)
    with pytest.raises(GateFailed, match=r"(?s)gradients of step 1.*its gradient is zero"):
        two_steps(parts)
    assert list(parts.gate.report()["faults"]) == [mute.name]


def test_loras_a_is_looked_at_one_step_later(make_parts: MakeParts) -> None:
    """Behind a B of zeros its first gradient is zero and right; a zero in the second is a fault."""
    parts = make_parts()
    mute = next(t for t in parts.engine.trained if t.behind_zero)
    mute.parameter.register_hook(torch.zeros_like)
    take_step(parts, [tiny_batch([8])], 1)
    with pytest.raises(GateFailed, match="gradients of step 2"):
        take_step(parts, [tiny_batch([8])], 2)


def test_a_gradient_on_a_frozen_tensor_is_caught(make_parts: MakeParts) -> None:
    """Something that the plan calls frozen has joined the training."""
    parts = make_parts()
    frozen = next(p for p in parts.engine.loss.parameters() if not p.requires_grad)
    frozen.requires_grad_(True)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(GateFailed, match="frozen, but it has a gradient"):
        two_steps(parts)


def test_an_update_that_never_came_is_caught(make_parts: MakeParts) -> None:
    """Gradients flow and the optimizer does not hold the tensor: the second look sees it standing still."""
    parts = make_parts()
    lost = next(t for t in parts.engine.trained if t.part == "llm")
    for group in parts.engine.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not lost.parameter]
    with pytest.raises(GateFailed, match="2 updates left it as it was"):
        two_steps(parts)
    assert list(parts.gate.report()["faults"]) == [lost.name]


def test_a_frozen_tensor_that_changes_by_one_bit_is_caught(make_parts: MakeParts) -> None:
    """Frozen means bit-identical, not close."""
    parts = make_parts()
    name, frozen = next((n, p) for n, p in parts.engine.loss.named_parameters() if not p.requires_grad)
    take_step(parts, [tiny_batch([8])], 1)
    with torch.no_grad():
        frozen.view(-1)[0] = torch.nextafter(frozen.view(-1)[0], torch.tensor(9.0))
    with pytest.raises(GateFailed, match="its bytes have changed"):
        take_step(parts, [tiny_batch([8])], 2)
        parts.gate.after_update(2, parts.engine.weight)
    assert list(parts.gate.report()["faults"]) == [name.removeprefix("model.")]


def test_a_run_of_one_step_leaves_the_gate_open(make_parts: MakeParts) -> None:
    """LoRA's A has not had its turn: neither passed nor failed, with weight decay and without."""
    for decay in (0.1, 0.0):
        parts = make_parts(last_look=1)
        for group in parts.engine.optimizer.param_groups:
            group["weight_decay"] = decay
        take_step(parts, [tiny_batch([8])], 1)
        assert not parts.gate.after_update(1, parts.engine.weight)
        assert parts.gate.verdict is Verdict.OPEN
