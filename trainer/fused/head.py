"""The language model's head and its loss, a few supervised positions at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from trainer.fused.functions import wide
from trainer.fused.products import product, rounding

# Shapes: S supervised positions of D numbers; a vocabulary of V tokens.

_LOGITS_AT_ONCE = 2**25
"""Numbers of one piece of the (S, V) logits: 128 MB in float32; four times that on a GPU, whose products are wider."""


def supervised_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target; logits are never held whole (as Liger kernel does, arXiv:2410.10989).

    A frozen head's gradient is of its input alone, and is made in the forward pass, while a piece of logits is there.

    Args:
        hidden: (S, D).
        weight: (V, D) of a frozen head.
        targets: (S,) int64.

    Returns:
        (S,) float32, nats.
    """
    extra = rounding(hidden)
    hidden, targets = pad(hidden, (0, 0, 0, extra)), pad(targets, (0, extra))
    losses: Tensor = _SupervisedLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]  # torch's
    return losses[: len(losses) - extra]


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = wide(hidden.new_empty(len(hidden)))
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        at_once = max(1, _LOGITS_AT_ONCE * (4 if weight.is_cuda else 1) // len(weight))
        for start in range(0, len(hidden), at_once):
            piece = slice(start, start + at_once)
            logits = wide(product(hidden[piece], weight))
            log_probs = torch.log_softmax(logits, -1)
            losses[piece] = -log_probs.gather(1, targets[piece, None])[:, 0]
            if dhidden is not None:
                dlogits = log_probs.exp_()
                dlogits[torch.arange(len(dlogits), device=dlogits.device), targets[piece]] -= 1
                dhidden[piece] = product(dlogits.to(hidden.dtype), weight.T)
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * dlosses[:, None].to(dhidden.dtype), None, None
