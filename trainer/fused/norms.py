"""The norms of a layer and the heads that attention sees, each with its gradient and with what of it trains."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.fused.functions import (
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_weight_gradient,
    rotate,
    turn_heads,
    turn_heads_backward,
    wide,
)

# Shapes: T rows of D numbers; h heads, g key heads of d numbers.

Scale = tuple[Tensor, Tensor | None]
"""What rows were multiplied with, and before that, where it was, their mean: each (T, 1)."""


class Norm(Protocol):
    """A norm of rows."""

    trained: list[nn.Parameter]
    """What of it trains, in the order in which `backward` returns gradients."""

    def forward(self, x: Tensor) -> tuple[Tensor, Scale]:
        """(T, D) -> (T, D), and what `backward` wants to have back."""

    def again(self, x: Tensor, scale: Scale) -> Tensor:
        """What `forward` has made."""

    def backward(self, dy: Tensor, x: Tensor, scale: Scale, plus: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the input, (T, D), added to that of the way around the norm; and of `trained`."""


class RmsNorm:
    """A norm of the language model."""

    def __init__(self, module: Any) -> None:
        """Take over a `Qwen3VLTextRMSNorm`."""
        self.weight: nn.Parameter = module.weight
        self.eps: float = module.variance_epsilon
        self.trained = _training(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Scale]:
        """See `Norm`."""
        normed, factor = rms_norm(x, self.weight, self.eps)
        return normed, (factor, None)

    def again(self, x: Tensor, scale: Scale) -> Tensor:
        """See `Norm`."""
        return (wide(x) * scale[0]).to(x.dtype).mul_(self.weight)

    def backward(self, dy: Tensor, x: Tensor, scale: Scale, plus: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Norm`."""
        dx = rms_norm_backward(dy, x, self.weight, scale[0], plus)
        return dx, [rms_norm_weight_gradient(dy, x, scale[0]).to(weight.dtype) for weight in self.trained]


class LayerNorm:
    """A norm of the vision tower."""

    def __init__(self, module: Any) -> None:
        """Take over an `nn.LayerNorm`."""
        self._weight, self._bias = module.weight, module.bias
        self._eps: float = module.eps
        self.trained = _training(self._weight, self._bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Scale]:
        """See `Norm`."""
        normed, mean, factor = layer_norm(x, self._weight, self._bias, self._eps)
        return normed, (factor, mean)

    def again(self, x: Tensor, scale: Scale) -> Tensor:
        """See `Norm`."""
        return layer_norm(x, self._weight, self._bias, self._eps)[0]

    def backward(self, dy: Tensor, x: Tensor, scale: Scale, plus: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Norm`."""
        factor, mean = scale
        assert mean is not None  # noqa: S101  # `scale` of this norm has both
        dx, *of_both = layer_norm_backward(dy, x, self._weight, self._bias, mean, factor)
        pairs = zip(of_both, (self._weight, self._bias), strict=True)
        return dx.add_(plus), [grad.to(weight.dtype) for grad, weight in pairs if weight.requires_grad]


class Heads:
    """From the rows of a projection, all heads next to each other, to queries, keys and values."""

    def __init__(self, h: int, g: int, qnorm: RmsNorm | None = None, knorm: RmsNorm | None = None) -> None:
        """Of so many heads and key heads; the language model's are normed, each by itself, before they are turned."""
        self._h, self._g, self._qnorm, self._knorm = h, g, qnorm, knorm
        self._eps = qnorm.eps if qnorm else 0.0
        self.trained = [weight for norm in (qnorm, knorm) if norm for weight in norm.trained]
        """What of it trains, in the order in which `backward` returns gradients."""

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (h + 2 g) d) -> queries (T, h, d), keys and values (T, g, d); the tables are (T, 1, d / 2)."""
        heads, n = self._of(qkv), self._h + self._g
        turned = turn_heads(heads[:, :n], self._weights(), cos, sin, self._eps)
        return turned[:, : self._h], turned[:, self._h :], heads[:, n:]

    def backward(
        self, gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """From gradients of queries, keys and values to that of `qkv`, and of `trained`."""
        dq, dk, dv = gradients
        heads, weights, n = self._of(qkv), self._weights(), self._h + self._g
        dheads = torch.empty_like(heads)
        for own, columns in ((dq, slice(self._h)), (dk, slice(self._h, n))):
            of = weights if weights is None else weights[columns]
            turn_heads_backward(own, heads[:, columns], of, cos, sin, self._eps, dheads[:, columns])
        dheads[:, n:] = dv
        if not self.trained or weights is None:
            return dheads.flatten(1), []
        dturned, normed = rotate(torch.cat((dq, dk), 1), cos, -sin), heads[:, :n]
        of_heads = rms_norm_weight_gradient(dturned, normed, rms_norm(normed, weights, self._eps)[1])
        parts = ((self._qnorm, of_heads[: self._h]), (self._knorm, of_heads[self._h :]))
        grads = [part.sum(0).to(weight.dtype) for norm, part in parts if norm for weight in norm.trained]
        return dheads.flatten(1), grads

    def _of(self, qkv: Tensor) -> Tensor:
        """(T, h + 2 g, d)."""
        return qkv.view(len(qkv), self._h + 2 * self._g, -1)

    def _weights(self) -> Tensor | None:
        """(h + g, d)."""
        if self._qnorm is None or self._knorm is None:
            return None
        return torch.cat((self._qnorm.weight.expand(self._h, -1), self._knorm.weight.expand(self._g, -1)))


def _training(*weights: nn.Parameter) -> list[nn.Parameter]:
    return [weight for weight in weights if weight.requires_grad]
