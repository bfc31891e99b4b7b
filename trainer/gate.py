"""The training gate: proves in every run that exactly the planned tensors train, or stops the run and names the others.

With gradient checkpointing in its re-entrant form a trainable block behind a frozen prefix gets no gradient and no
error, while the loss still falls because aligner and LLM learn. The gate takes two looks:

1. at the gradients before the first update: every trained tensor has a finite, non-zero gradient, no frozen one has any
   (LoRA's A stands behind a B that starts at zero, so it is looked at before the second update);
2. at the weights at the end of warm-up (or the last step): every trained tensor differs from its start, every frozen
   tensor's digest is unchanged. (Weight decay alone would move a matrix too: that gradients move it is the first look's
   finding, that the optimizer holds it is this one's.)
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trainer.errors import TrainingStopped
from trainer.model import TrainedTensor


class Verdict(StrEnum):
    """What the tag `training_gate` says; `open` when the run ended before the gate had seen enough."""

    PASSED = "passed"
    FAILED = "failed"
    OPEN = "open"


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, 32 hex characters."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()[:32]


class GateFailed(TrainingStopped):
    """A look found tensors that do not do what the plan says."""


class Gate:
    """Watches one stretch of training in which the set of trained tensors does not change."""

    def __init__(
        self,
        trained: Sequence[TrainedTensor],
        frozen: Mapping[str, Tensor],
        *,
        last_look: int,
        first: int = 0,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Remember how every tensor starts.

        Args:
            trained: the tensors that the plan calls trainable.
            frozen: name -> every other tensor of the model.
            last_look: the optimizer step after which the weights are looked at; the last one where that comes first.
            first: optimizer steps before the stretch; what `start`s earlier goes on training in it.
            known: digests of frozen tensors by the gate of the stretch before (see `hand_over`).
        """
        self._trained, self._frozen = trained, frozen
        self._first, self._last_look = first, last_look
        # what goes on training is kept as a digest, which a resume point can hold: its start is not made again
        self._start = {t.name: t.parameter.detach().cpu().clone() for t in trained if t.start == first}
        self._went_on = {t.name: digest(t.parameter) for t in trained if t.start < first}
        self._frozen_digests = {name: known.get(name) or digest(tensor) for name, tensor in frozen.items()}
        self._gradient_norms: dict[str, float] = {}
        self._update_norms: dict[str, float] = {}
        self._faults: dict[str, str] = {}
        self._seen_weights, self._looked_after = False, last_look

    def before_update(self, step: int, gradient_of: Callable[[TrainedTensor], Tensor | None]) -> None:
        """Look at the gradients of an optimizer step.

        Args:
            step: counted from 1.
            gradient_of: a tensor's gradient over the whole step, not yet clipped.

        Raises:
            GateFailed: a trained tensor has no, a zero or a non-finite gradient, or a frozen one has any.
        """
        if step > self._first + 2:
            return
        for tensor in self._trained:
            if self._behind_zero(tensor) == (step == self._first + 2):
                self._judge_gradient(tensor, gradient_of(tensor))
        for name, parameter in self._frozen.items():
            if parameter.grad is not None:
                self._faults[name] = "frozen, but it has a gradient"
        self._stop_on_faults("gradients", step)

    def after_update(self, step: int, weight_of: Callable[[TrainedTensor], Tensor], *, last: bool = False) -> bool:
        """Look at the weights if it is time and they have not been looked at.

        Args:
            step: updates so far.
            weight_of: the float32 values that the optimizer updates.
            last: whether no update follows; then it is time.

        Returns:
            Whether the gate has passed by this look.

        Raises:
            GateFailed: a trained tensor is as it started, or a frozen one is not.
        """
        if self._seen_weights or not (last or step == self._last_look):
            return False
        for tensor in self._trained:
            if self._behind_zero(tensor) and step < self._first + 2:
                continue  # its turn would have been the second step
            if not self._moved(tensor, weight_of(tensor).cpu()):
                updates = step - self._first
                self._faults[tensor.name] = f"planned {tensor.method}, but {updates} updates left it as it was"
        self._judge_frozen(self._frozen)
        self._stop_on_faults("weights", step)
        self._seen_weights, self._looked_after = True, step
        self._start.clear()
        return self.verdict is Verdict.PASSED

    def hand_over(self, beginning: Iterable[str], step: int) -> dict[str, str]:
        """End the stretch: what begins to train now must be as it started. Returns the digest of every frozen tensor.

        Raises:
            GateFailed: it is not.
        """
        self._judge_frozen(beginning)
        self._stop_on_faults("weights", step)
        return self._frozen_digests

    @property
    def verdict(self) -> Verdict:
        """The result so far."""
        if self._faults:
            return Verdict.FAILED
        complete = self._seen_weights and len(self._gradient_norms) == len(self._trained)
        return Verdict.PASSED if complete else Verdict.OPEN

    def report(self) -> dict[str, Any]:
        """The numbers behind the verdict: norms of each tensor's first gradient, and of its whole update so far."""
        return {
            "verdict": self.verdict.value,
            "weights_looked_at_after_step": self._looked_after,
            "faults": self._faults,
            "trained": {
                t.name: {
                    "part": t.part.value,
                    "method": t.method.value,
                    "gradient_norm": self._gradient_norms.get(t.name),
                    "update_norm": self._update_norms.get(t.name),
                }
                for t in self._trained
            },
            "frozen": self._frozen_digests,
        }

    def state(self) -> dict[str, Any]:
        """What was seen so far, for a resume point; JSON-able. How the tensors start is not in it: see `restore`."""
        return {
            "gradient_norms": self._gradient_norms,
            "update_norms": self._update_norms,
            "seen_weights": self._seen_weights,
            "looked_after": self._looked_after,
            "went_on": self._went_on,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. The gate was made from the tensors as they start, before any were loaded.

        Raises:
            KeyError, TypeError, ValueError: it is not a state.
        """
        if strange := set(state["gradient_norms"]) - {tensor.name for tensor in self._trained}:
            raise ValueError(f"{min(strange)} does not train")
        self._gradient_norms = {str(name): float(norm) for name, norm in state["gradient_norms"].items()}
        self._update_norms = {str(name): float(norm) for name, norm in state["update_norms"].items()}
        self._seen_weights, self._looked_after = bool(state["seen_weights"]), int(state["looked_after"])
        self._went_on = {str(name): str(start) for name, start in state.get("went_on", {}).items()}
        if self._seen_weights:
            self._start.clear()

    def _behind_zero(self, tensor: TrainedTensor) -> bool:
        """Whether its first gradient of the stretch is zero, and rightly so."""
        return tensor.behind_zero and tensor.start == self._first

    def _moved(self, tensor: TrainedTensor, weight: Tensor) -> bool:
        if tensor.name in self._went_on:
            return digest(weight) != self._went_on[tensor.name]
        change: float = (weight - self._start[tensor.name]).norm().item()
        self._update_norms[tensor.name] = change
        return change > 0

    def _judge_frozen(self, names: Iterable[str]) -> None:
        for name in names:
            if digest(self._frozen[name]) != self._frozen_digests[name]:
                self._faults[name] = "frozen, but its bytes have changed"

    def _judge_gradient(self, tensor: TrainedTensor, gradient: Tensor | None) -> None:
        if gradient is None:
            self._faults[tensor.name] = f"planned {tensor.method}, but it has no gradient"
            return
        norm = gradient.norm().item()
        self._gradient_norms[tensor.name] = norm
        if not math.isfinite(norm):
            self._faults[tensor.name] = f"planned {tensor.method}, but its gradient is not finite"
        elif norm == 0.0:
            self._faults[tensor.name] = f"planned {tensor.method}, but its gradient is zero"

    def _stop_on_faults(self, look: str, step: int) -> None:
        if not self._faults:
            return
        named = [f"  {name}: {fault}" for name, fault in self._faults.items()]
        more = [f"  ... and {len(named) - 20} more, all in the artifact"] if len(named) > 20 else []
        raise GateFailed(
            "\n".join([f"The training gate looked at the {look} of step {step} and found:", *named[:20], *more])
        )
