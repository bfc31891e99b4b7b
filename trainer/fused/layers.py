"""A decoder layer and a vision block as one autograd function each: forward once, gradient by hand.

What a layer keeps for its gradient is little: its input, the outputs of the products, the attention. What is cheap is
computed again (norms, gates). Under gradient checkpointing it keeps its input alone, and the dropout masks; on a GPU
all but its widest rows, while there is room.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from trainer.fused.functions import (
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_weight_gradient,
    rotate,
    swiglu,
    swiglu_backward,
    turn_heads,
    turn_heads_backward,
    wide,
)
from trainer.fused.products import Projection, live
from trainer.fused.segments import Segments
from trainer.fused.shared import Words, attend, attend_backward

# Shapes: T rows of D numbers; h heads, g key heads of d numbers; M numbers of the widest layer.


@dataclass(frozen=True)
class Rows:
    """What layers know of the rows that pass through them."""

    segments: Segments
    cos: Tensor
    """(T, 1, d / 2) of the rotary embedding."""
    sin: Tensor
    words: Words | None = None
    """What all samples begin with, where it is not in every segment."""

    @classmethod
    def of(
        cls, turns: tuple[Tensor, Tensor], lengths: Tensor, dtype: torch.dtype, *, extra: int, causal: bool = False
    ) -> "Rows":
        """Rows of segments, with a segment of nothing at the end.

        Args:
            turns: cosine and sine, (T, d); both halves of a head turn by the same angles.
            lengths: (segments,).
            dtype: of the rows.
            extra: rows of nothing.
            causal: whether a row sees only those before it.
        """
        cos, sin = (pad(t[:, : t.shape[1] // 2], (0, 0, 0, extra)).to(dtype)[:, None].contiguous() for t in turns)
        own = (*lengths.tolist(), extra) if extra else tuple(lengths.tolist())
        return cls(Segments(own, causal, cos.device), cos, sin)


Masks = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Dropout masks of a layer's four projections."""
_NO_MASKS: Masks = (None, None, None, None)

_SPARE = 12
"""So many times the widest rows of a layer stay free on a GPU for what a backward pass needs for a moment."""


class Kept(NamedTuple):
    """What a layer keeps from forward to backward; None where it has no such thing."""

    x: Tensor
    norm1: Tensor
    mean1: Tensor | None
    qkv: Tensor
    attended: Tensor
    sums: Tensor
    middle: Tensor
    norm2: Any
    mean2: Tensor | None
    wide: Any
    """None, as `norm2`, up to the middle, and where it is made again."""
    low1: Tensor | None
    low2: Tensor | None
    low3: Tensor | None
    low4: Tensor | None


class Layer(ABC):
    """Attention and MLP, each behind a norm and beside a residual: what a decoder layer and a vision block share."""

    checkpointed = False
    """Whether its gradient runs it forward again, instead of keeping what came out."""

    def __init__(
        self, qkv: Projection, out: Projection, up: Projection, down: Projection, norms: Sequence[nn.Parameter]
    ) -> None:
        """Of its projections, into heads, out of heads, into the MLP and out of it, and the weights of its norms."""
        self.qkv, self.out, self.up, self.down, self.norms = qkv, out, up, down, norms
        projections = (qkv, out, up, down)
        self.trained = [weight for weight in norms if weight.requires_grad]
        """What of it trains: norms, then projections."""
        self.trained += [p for projection in projections for p in projection.trained]
        self.drops = any(projection.dropout for projection in projections)
        """Whether its adapters drop anything."""

    def __call__(self, x: Tensor, rows: Rows, *, training: bool) -> Tensor:
        """Run it.

        Args:
            x: (T, D).
            rows: of these T.
            training: whether the adapters drop out.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.trained):
            y: Tensor = _LayerFunction.apply(self, rows, training, x, *self.trained)  # type: ignore[no-untyped-call]
            return y
        return self.forward(x, rows, self.masks(len(x), x.device) if training else _NO_MASKS)[0]

    def masks(self, rows: int, device: torch.device) -> Masks:
        """New dropout masks."""
        if not self.drops:
            return _NO_MASKS
        return (
            self.qkv.mask(rows, device),
            self.out.mask(rows, device),
            self.up.mask(rows, device),
            (self.down.mask(rows, device)),
        )

    def forward(self, x: Tensor, rows: Rows, masks: Masks) -> tuple[Tensor, Kept]:
        """(T, D) -> (T, D), and all that `backward` needs."""
        kept = self.until_wide(x, rows, masks)
        y, low4 = self.down.forward(self.gate(kept.wide), masks[3])
        y += kept.middle
        return y, kept._replace(low4=low4)

    def again(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """All that `backward` needs, without the output."""
        kept = self.until_wide(x, rows, masks)
        return kept._replace(low4=self.down.low(self.gate(kept.wide), masks[3]))

    def until_wide(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """Forward, up to what goes into the MLP's gate."""
        return self.widened(self.until_middle(x, rows, masks), masks)

    @abstractmethod
    def until_middle(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """Forward, up to the residual between attention and MLP."""

    @abstractmethod
    def widened(self, kept: Kept, masks: Masks) -> Kept:
        """The same from there to what goes into the MLP's gate."""

    @abstractmethod
    def gate(self, wide: Tensor) -> Tensor:
        """What the MLP does to its widest rows."""

    @abstractmethod
    def backward(self, dy: Tensor, kept: Kept, rows: Rows, masks: Masks) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the input, (T, D), and of `trained`."""


class _LayerFunction(torch.autograd.Function):
    """A layer as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, rows: Rows, training: bool, x: Tensor, *_: Tensor) -> Tensor:
        masks = layer.masks(len(x), x.device) if training else _NO_MASKS
        y, kept = layer.forward(x, rows, masks)
        ctx.layer, ctx.rows = layer, rows
        ctx.whole = not layer.checkpointed or _has_room(kept.wide)
        if layer.checkpointed and ctx.whole:
            kept = kept._replace(wide=None)
        ctx.save_for_backward(*masks, *(kept if ctx.whole else (x,)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        masks, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        kept = Kept(*saved) if ctx.whole else layer.again(saved[0], ctx.rows, masks)
        if kept.wide is None:
            kept = layer.widened(kept, masks)
        dx, grads = layer.backward(dy, kept, ctx.rows, masks)
        return None, None, None, dx, *grads


def _has_room(wide: Tensor) -> bool:
    """Whether a checkpointed layer may keep more than its input: on a GPU most of which is free."""
    if not wide.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(wide.device)
    free += torch.cuda.memory_reserved(wide.device) - torch.cuda.memory_allocated(wide.device)
    return free > _SPARE * wide.nbytes


class DecoderLayer(Layer):
    """A layer of the language model: RMS norms, grouped keys with norms of their own, SwiGLU."""

    def __init__(self, module: Any) -> None:
        """Take over a `Qwen3VLTextDecoderLayer`, PEFT-wrapped or not."""
        module = live(module)
        attention, mlp = live(module.self_attn), live(module.mlp)
        norms = (module.input_layernorm, module.post_attention_layernorm, attention.q_norm, attention.k_norm)
        self._norm1, self._norm2, self._qnorm, self._knorm = (live(norm).weight for norm in norms)
        super().__init__(
            Projection([attention.q_proj, attention.k_proj, attention.v_proj]), Projection([attention.o_proj]),
            Projection([mlp.gate_proj, mlp.up_proj]), Projection([mlp.down_proj]),
            (self._norm1, self._norm2, self._qnorm, self._knorm),
        )  # fmt: skip
        self._eps: float = live(module.input_layernorm).variance_epsilon
        self._d: int = attention.head_dim
        self._h, self._g = (attention.config.num_attention_heads, attention.config.num_key_value_heads)

    def until_middle(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """See `Layer`."""
        normed, norm1 = rms_norm(x, self._norm1, self._eps)
        qkv, low1 = self.qkv.forward(normed, masks[0])
        q, k, v = self._heads(qkv, rows)
        attended, sums = attend(q, k, v, rows.segments, rows.words)
        outer, low2 = self.out.forward(attended.flatten(1), masks[1])
        middle = outer.add_(x)
        return Kept(x, norm1, None, qkv, attended, sums, middle, None, None, None, low1, low2, None, None)

    def widened(self, kept: Kept, masks: Masks) -> Kept:
        """See `Layer`."""
        normed, norm2 = rms_norm(kept.middle, self._norm2, self._eps)
        wide, low3 = self.up.forward(normed, masks[2])
        return kept._replace(norm2=norm2, wide=wide, low3=low3)

    def gate(self, wide: Tensor) -> Tensor:
        """See `Layer`."""
        return swiglu(wide)

    def with_keys(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Output, (T, D), and its keys and values, (T, g, d), for rows that come later; nothing drops out."""
        y, kept = self.forward(x, rows, _NO_MASKS)
        _, keys, values = self._heads(kept.qkv, rows)
        return y, keys, values

    def _heads(self, qkv: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values."""
        heads = qkv.view(len(qkv), -1, self._d)
        n = self._h + self._g
        turned = turn_heads(heads[:, :n], self._head_weights(), rows.cos, rows.sin, self._eps)
        return turned[:, : self._h], turned[:, self._h :], heads[:, n:]

    def _head_weights(self) -> Tensor:
        """(h + g, d)."""
        return torch.cat((self._qnorm.expand(self._h, -1), self._knorm.expand(self._g, -1)))

    def backward(self, dy: Tensor, kept: Kept, rows: Rows, masks: Masks) -> tuple[Tensor, list[Tensor]]:
        """See `Layer`."""
        dgated, of_down = self.down.backward(dy, swiglu(kept.wide) if self.down.trained else dy, masks[3], kept.low4)
        dwide = swiglu_backward(dgated, kept.wide)
        normed = self._again(kept.middle, self._norm2, kept.norm2, self.up)
        dnormed, of_up = self.up.backward(dwide, normed, masks[2], kept.low3)
        dmiddle = rms_norm_backward(dnormed, kept.middle, self._norm2, kept.norm2, dy)
        dattended, of_out = self.out.backward(dmiddle, kept.attended.flatten(1), masks[1], kept.low2)

        q, k, v = self._heads(kept.qkv, rows)
        dq, dk, dv = attend_backward(
            dattended.view(len(dy), -1, self._d), q, k, v, kept.attended, kept.sums, rows.segments, rows.words
        )
        heads, weights, n = kept.qkv.view(len(dy), -1, self._d), self._head_weights(), self._h + self._g
        dheads = torch.empty_like(heads)
        for own, columns in ((dq, slice(self._h)), (dk, slice(self._h, n))):
            turn_heads_backward(
                own, heads[:, columns], weights[columns], rows.cos, rows.sin, self._eps, dheads[:, columns]
            )
        dheads[:, n:] = dv
        dqkv = dheads.flatten(1)
        normed = self._again(kept.x, self._norm1, kept.norm1, self.qkv)
        dnormed1, of_qkv = self.qkv.backward(dqkv, normed, masks[0], kept.low1)
        dx = rms_norm_backward(dnormed1, kept.x, self._norm1, kept.norm1, dmiddle)

        of_norms: list[Tensor] = []
        if any(weight.requires_grad for weight in self.norms):
            dturned, normed = rotate(torch.cat((dq, dk), 1), rows.cos, -rows.sin), heads[:, :n]
            of_heads = rms_norm_weight_gradient(dturned, normed, rms_norm(normed, weights, self._eps)[1])
            of_norms = [
                rms_norm_weight_gradient(dnormed1, kept.x, kept.norm1),
                rms_norm_weight_gradient(dnormed, kept.middle, kept.norm2),
                of_heads[: self._h].sum(0),
                of_heads[self._h :].sum(0),
            ]
            of_norms = [g.to(w.dtype) for g, w in zip(of_norms, self.norms, strict=True) if w.requires_grad]
        return dx, [*of_norms, *of_qkv, *of_out, *of_up, *of_down]

    @staticmethod
    def _again(x: Tensor, weight: Tensor, factor: Tensor, reader: Projection) -> Tensor:
        """What a norm has given to a projection, where that one's gradient asks for it."""
        return (wide(x) * factor).to(x.dtype).mul_(weight) if reader.trained else x


class VisionBlock(Layer):
    """A block of the vision tower: layer norms, heads without groups, GELU."""

    def __init__(self, module: Any) -> None:
        """Take over a `Qwen3VLVisionBlock`, PEFT-wrapped or not."""
        module = live(module)
        attention, mlp = live(module.attn), live(module.mlp)
        self._norm1, self._norm2 = live(module.norm1), live(module.norm2)
        super().__init__(
            Projection([attention.qkv]), Projection([attention.proj]),
            Projection([mlp.linear_fc1]), Projection([mlp.linear_fc2]),
            [p for norm in (self._norm1, self._norm2) for p in (norm.weight, norm.bias)],
        )  # fmt: skip
        self._eps: float = self._norm1.eps
        self._h: int = attention.num_heads

    def until_middle(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """See `Layer`."""
        normed, mean1, norm1 = layer_norm(x, self._norm1.weight, self._norm1.bias, self._eps)
        qkv, low1 = self.qkv.forward(normed, masks[0])
        q, k, v = self._heads(qkv, rows)
        attended, sums = attend(q, k, v, rows.segments, rows.words)
        outer, low2 = self.out.forward(attended.flatten(1), masks[1])
        middle = outer.add_(x)
        return Kept(x, norm1, mean1, qkv, attended, sums, middle, None, None, None, low1, low2, None, None)

    def widened(self, kept: Kept, masks: Masks) -> Kept:
        """See `Layer`."""
        normed, mean2, norm2 = layer_norm(kept.middle, self._norm2.weight, self._norm2.bias, self._eps)
        wide, low3 = self.up.forward(normed, masks[2])
        return kept._replace(norm2=norm2, mean2=mean2, wide=wide, low3=low3)

    def gate(self, wide: Tensor) -> Tensor:
        """See `Layer`."""
        return nn.functional.gelu(wide, approximate="tanh")

    def _heads(self, qkv: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(len(qkv), 3 * self._h, -1)
        turned = turn_heads(heads[:, : 2 * self._h], None, rows.cos, rows.sin, 0.0)
        return turned[:, : self._h], turned[:, self._h :], heads[:, 2 * self._h :]

    def backward(self, dy: Tensor, kept: Kept, rows: Rows, masks: Masks) -> tuple[Tensor, list[Tensor]]:
        """See `Layer`."""
        gated = self.gate(kept.wide) if self.down.trained else dy
        dgated, of_down = self.down.backward(dy, gated, masks[3], kept.low4)
        dwide = torch.ops.aten.gelu_backward(dgated, kept.wide, approximate="tanh")
        first, second = self._norm1, self._norm2
        normed = layer_norm(kept.middle, second.weight, second.bias, self._eps)[0] if self.up.trained else dy
        dnormed, of_up = self.up.backward(dwide, normed, masks[2], kept.low3)
        assert kept.mean1 is not None and kept.mean2 is not None  # noqa: S101
        dmiddle, *of_norm2 = layer_norm_backward(
            dnormed, kept.middle, second.weight, second.bias, kept.mean2, kept.norm2
        )
        dmiddle += dy
        dattended, of_out = self.out.backward(dmiddle, kept.attended.flatten(1), masks[1], kept.low2)

        q, k, v = self._heads(kept.qkv, rows)
        dq, dk, dv = attend_backward(
            dattended.view(len(dy), self._h, -1), q, k, v, kept.attended, kept.sums, rows.segments, rows.words
        )
        heads = kept.qkv.view(len(dy), 3 * self._h, -1)
        dheads = torch.empty_like(heads)
        for own, columns in ((dq, slice(self._h)), (dk, slice(self._h, 2 * self._h))):
            turn_heads_backward(own, heads[:, columns], None, rows.cos, rows.sin, 0.0, dheads[:, columns])
        dheads[:, 2 * self._h :] = dv
        dqkv = dheads.flatten(1)
        normed = layer_norm(kept.x, first.weight, first.bias, self._eps)[0] if self.qkv.trained else dy
        dnormed, of_qkv = self.qkv.backward(dqkv, normed, masks[0], kept.low1)
        dx, *of_norm1 = layer_norm_backward(dnormed, kept.x, first.weight, first.bias, kept.mean1, kept.norm1)
        dx += dmiddle
        pairs = zip((*of_norm1, *of_norm2), self.norms, strict=True)
        of_norms = [grad.to(weight.dtype) for grad, weight in pairs if weight.requires_grad]
        return dx, [*of_norms, *of_qkv, *of_out, *of_up, *of_down]
