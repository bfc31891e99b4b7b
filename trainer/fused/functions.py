"""The small operations between matrix products, each with its gradient: norms, rotary embedding, gates."""

import torch
from torch import Tensor

from trainer.fused import native
from trainer.fused.on_gpu import compiled_on_gpu

# Shapes: T rows; D numbers of a row; h heads of d numbers, so that rotary tables are (T, 1, d / 2).
# Norms are computed in float32 and rounded to the row's own format before the weight, as transformers does; in float64
# where rows are that wide.


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already."""
    return x if x.dtype is torch.float64 else x.float()


@compiled_on_gpu
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., D).
        weight: (D,) or, for heads, (h, D).
        eps: added to the mean square.

    Returns:
        (..., D) in the format of `x`, and the float32 factor (..., 1) that the rows were multiplied with.
    """
    if x.ndim == 2 and native.usable(x, weight) and x.is_contiguous():
        y, scale = torch.empty_like(x), x.new_empty(len(x), 1)
        native.call("rms_norm", x, weight, y, scale, *x.shape, eps)
        return y, scale
    rows = wide(x)
    factor = rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (rows * factor).to(x.dtype).mul_(weight), factor


@compiled_on_gpu
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor, plus: Tensor | None = None) -> Tensor:
    """Gradient of `x`, added to `plus`, that of the way around the norm; all shapes as in `rms_norm`."""
    if plus is not None and native.usable(dy, x, weight, plus) and all(t.is_contiguous() for t in (dy, x, plus)):
        dx = torch.empty_like(x)
        native.call("rms_norm_backward", dy, x, weight, factor, plus, dx, *x.shape)
        return dx
    normed = wide(x) * factor
    dnormed = wide(dy) * weight
    mean = (dnormed * normed).mean(-1, keepdim=True)
    own = torch.addcmul(dnormed, normed, mean, value=-1).mul_(factor).to(x.dtype)
    return own if plus is None else own.add_(plus)


@compiled_on_gpu
def rms_norm_weight_gradient(dy: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the weight, summed over rows: (D,) or (h, D), float32."""
    return (wide(dy) * (wide(x) * factor)).sum(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired (Su et al. 2021, arXiv:2104.09864); the gradient is that with `-sin`.

    Args:
        x: (T, h, d).
        cos: (T, 1, d / 2).
        sin: likewise.

    Returns:
        (T, h, d).
    """
    first, second = x.chunk(2, -1)
    return torch.cat((torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), -1)


@compiled_on_gpu
def turn_heads(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm each head by its weights, where there are any, and turn it.

    Args:
        x: (T, h, d), heads next to each other.
        weight: (h, d).
        cos: (T, 1, d / 2).
        sin: likewise.
        eps: of the norm.

    Returns:
        (T, h, d).
    """
    if native.usable(x):
        y = x.new_empty(x.shape)
        native.call("turn_heads", x, x.stride(0), weight, cos, sin, y, *x.shape, eps)
        return y
    return rotate(x if weight is None else rms_norm(x, weight, eps)[0], cos, sin)


@compiled_on_gpu
def turn_heads_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, dx: Tensor
) -> None:
    """Write the gradient of `x` into `dx`; shapes as in `turn_heads`."""
    if native.usable(dy, x, dx):
        native.call(
            "turn_heads_backward", dy, dy.stride(0), x, x.stride(0), weight, cos, sin, dx, dx.stride(0), *x.shape, eps
        )
        return
    dturned = rotate(dy, cos, -sin)
    if weight is not None:
        factor = wide(x).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        dturned = rms_norm_backward(dturned, x, weight, factor)
    dx.copy_(dturned)


@compiled_on_gpu
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); (T, 2 M), gate first -> (T, M)."""
    gate, up = gate_up.chunk(2, -1)
    if native.usable(gate_up):
        gated = gate_up.new_empty(gate.shape)
        native.call("swiglu", gate_up, gated, *gate.shape)
        return gated
    return torch.nn.functional.silu(gate).mul_(up)


@compiled_on_gpu
def swiglu_backward(da: Tensor, gate_up: Tensor) -> Tensor:
    """(T, M) -> gradient of `gate_up`, (T, 2 M)."""
    if native.usable(da, gate_up):
        dgate_up = torch.empty_like(gate_up)
        native.call("swiglu_backward", da, gate_up, dgate_up, *da.shape)
        return dgate_up
    gate, up = gate_up.chunk(2, -1)
    dgate = torch.ops.aten.silu_backward(da * up, gate)
    return torch.cat((dgate, torch.nn.functional.silu(gate).mul_(da)), -1)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tangent (Hendrycks & Gimpel 2016, arXiv:1606.08415); (T, M)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """(T, M) -> gradient of `x`, (T, M)."""
    dx: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    return dx


@compiled_on_gpu
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last dimension: (T, D) in the format of `x`, and mean and factor, (T, 1) float32."""
    y, mean, factor = torch.native_layer_norm(wide(x), x.shape[-1:], wide(weight), wide(bias), eps)
    return y.to(x.dtype), mean, factor


@compiled_on_gpu
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the last two float32."""
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        wide(dy), wide(x), x.shape[-1:], mean, factor, wide(weight), wide(bias), [True, True, True]
    )
    return dx.to(x.dtype), dweight, dbias
