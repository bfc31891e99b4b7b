"""Attention of samples that lie end to end, blind to each other, with its gradient."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from trainer.fused import native

# Shapes: T rows of all segments; h heads, g key heads (h a multiple of g), d numbers of a head.

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NOTHING_SHARED = (None, 0, None, 0, 0)


@dataclass(frozen=True)
class Segments:
    """Which rows belong together."""

    lengths: tuple[int, ...]
    """Rows of each segment, end to end."""
    causal: bool
    """Whether a row sees itself and those before it, or its whole segment."""
    device: torch.device

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row behind the last) of each."""
        return list(pairwise(self.row_bounds.tolist()))

    @cached_property
    def cumulative(self) -> Tensor:
        """(segments + 1,) int32 on the device, as flash-attention takes it."""
        return self.row_bounds.to(self.device, torch.int32)

    @cached_property
    def row_bounds(self) -> Tensor:
        """(segments + 1,) int64 on the CPU."""
        return torch.tensor([0, *self.lengths]).cumsum(0)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v within each segment.

    Args:
        q: (T, h, d).
        k: (T, g, d).
        v: likewise.
        segments: of the T rows.

    Returns:
        (T, h, d), and the logarithms of the softmax's sums, (h, T) float32, for `attend_backward`.
    """
    if native.usable(q, k, v):
        out, sums = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q))
        native.call(
            "attend", *address(q), *address(k), *address(v), *_NOTHING_SHARED, out, sums, *sizes(q, k, segments)
        )
        return out, sums
    return by_torch(q, k, v, segments, segments)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `attend`."""
    if native.usable(dout, q, k, v, out):
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        native.call(
            "attend_backward", dout.contiguous(), *address(q), *address(k), *address(v), *_NOTHING_SHARED, out, sums,
            dq, dk, dv, None, None, *sizes(q, k, segments),
        )  # fmt: skip
        return dq, dk, dv
    return backward_by_torch(dout, q, k, v, out, sums, segments, segments)


def by_torch(q: Tensor, k: Tensor, v: Tensor, rows: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
    """`attend` by torch's flash-attention, where each segment of rows may have keys of another number.

    Args:
        q: (T, h, d).
        k: (K, g, d).
        v: likewise.
        rows: of the T rows; they say whether it is causal.
        keys: as many, of the K keys.

    Returns:
        As `attend`.
    """
    if q.is_cuda:
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, rows.cumulative, keys.cumulative, max(rows.lengths), max(keys.lengths), 0.0, rows.causal, False
        )
        return out, sums
    outs = []
    for (start, end), (first, last) in zip(rows.bounds, keys.bounds, strict=True):
        piece = (heads_first(t, q.shape[1]) for t in (q[start:end], k[first:last], v[first:last]))
        outs.append(_FORWARD(*piece, 0.0, rows.causal))
    return torch.cat([out[0].transpose(0, 1) for out, _ in outs]), torch.cat([sums[0] for _, sums in outs], 1)


def backward_by_torch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, rows: Segments, keys: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `by_torch`."""
    if q.is_cuda:
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, sums, rows.cumulative, keys.cumulative, max(rows.lengths), max(keys.lengths),
            0.0, rows.causal, nothing, nothing,
        )  # fmt: skip
        return dq, dk, dv
    gradients = []
    for (start, end), (first, last) in zip(rows.bounds, keys.bounds, strict=True):
        own, its = slice(start, end), slice(first, last)
        piece = [heads_first(t, q.shape[1]) for t in (dout[own], q[own], k[its], v[its], out[own])]
        of_piece = sums[:, own].T.contiguous().T[None]  # the layout in which torch made them
        gradients.append(_BACKWARD(*piece, of_piece, 0.0, rows.causal))
    dq, dk, dv = (torch.cat([g[0].transpose(0, 1) for g in of_all]) for of_all in zip(*gradients, strict=True))
    return dq, of_group(dk, k), of_group(dv, v)


def address(rows: Tensor) -> tuple[Tensor, int]:
    """Where rows lie whose heads are next to each other, and how far apart."""
    return rows, rows.stride(0)


def sizes(q: Tensor, k: Tensor, segments: Segments) -> tuple[Tensor | int | float, ...]:
    """What the compiled kernels want to know beside addresses."""
    n, h, d = len(segments.lengths), q.shape[1], q.shape[2]
    return segments.row_bounds, n, h, k.shape[1], d, int(segments.causal), d**-0.5


def heads_first(rows: Tensor, heads: int) -> Tensor:
    """(L, g, d) -> (1, heads, L, d); each key head once for all the heads that share it."""
    if heads != rows.shape[1]:
        rows = rows.repeat_interleave(heads // rows.shape[1], 1)
    return rows.transpose(0, 1)[None]


def of_group(gradient: Tensor, like: Tensor) -> Tensor:
    """(L, h, d) -> (L, g, d): a key head's gradient is the sum over the heads that share it."""
    return gradient.reshape(len(like), like.shape[1], -1, like.shape[2]).sum(2)
