"""A decoder layer and a vision block as one autograd function each: forward once, gradient by hand.

What a layer keeps for its gradient is little: its input, the outputs of the products, the attention. What is cheap is
computed again (norms, gates). Under gradient checkpointing it keeps its input alone, and the dropout masks; on a GPU
all but its widest rows, while there is room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from trainer.fused.functions import gelu, gelu_backward, swiglu, swiglu_backward
from trainer.fused.norms import Heads, LayerNorm, Norm, RmsNorm
from trainer.fused.products import Projection, live
from trainer.fused.segments import Segments
from trainer.fused.shared import Words, attend, attend_backward

# Shapes: T rows of D numbers; g key heads of d numbers.


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
    factor1: Tensor
    mean1: Tensor | None
    qkv: Tensor
    attended: Tensor
    sums: Tensor
    middle: Tensor
    low1: Tensor | None
    low2: Tensor | None
    factor2: Any = None
    """None, as all that follows, up to the middle, and `wide` where it is made again."""
    mean2: Tensor | None = None
    wide: Any = None
    low3: Tensor | None = None
    low4: Tensor | None = None


class Gate(NamedTuple):
    """What the MLP does to its widest rows."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """From the gradient of what comes out, and what went in."""


class Layer:
    """Attention and MLP, each behind a norm and beside a residual: a decoder layer or a vision block."""

    checkpointed = False
    """Whether its gradient runs it forward again, instead of keeping what came out."""

    def __init__(self, norms: tuple[Norm, Norm], heads: Heads, projections: Sequence[Projection], gate: Gate) -> None:
        """Of its parts.

        Args:
            norms: before attention, and before the MLP.
            heads: of attention.
            projections: into heads, out of heads, into the MLP and out of it.
            gate: of the MLP.
        """
        self.norm1, self.norm2 = norms
        self.qkv, self.out, self.up, self.down = projections
        self.heads, self.gate = heads, gate
        parts: list[Norm | Heads | Projection] = [*norms, heads, *projections]
        self.trained = [p for part in parts for p in part.trained]
        """What of it trains, in the order of its parts."""
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
            y: Tensor = _LayerFunction.apply(self, rows, training, x, *self.trained)  # type: ignore[no-untyped-call]  # torch
            return y
        return self.forward(x, rows, self.masks(len(x), x.device) if training else _NO_MASKS)[0]

    def masks(self, rows: int, device: torch.device) -> Masks:
        """New dropout masks."""
        if not self.drops:
            return _NO_MASKS
        qkv, out, up, down = (part.mask(rows, device) for part in (self.qkv, self.out, self.up, self.down))
        return qkv, out, up, down

    def forward(self, x: Tensor, rows: Rows, masks: Masks) -> tuple[Tensor, Kept]:
        """(T, D) -> (T, D), and all that `backward` needs."""
        kept = self.until_wide(x, rows, masks)
        y, low4 = self.down.forward(self.gate.forward(kept.wide), masks[3])
        y += kept.middle
        return y, kept._replace(low4=low4)

    def again(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """All that `backward` needs, without the output."""
        kept = self.until_wide(x, rows, masks)
        return kept._replace(low4=self.down.low(self.gate.forward(kept.wide), masks[3]))

    def until_wide(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """Forward, up to what goes into the MLP's gate."""
        return self.widened(self.until_middle(x, rows, masks), masks)

    def until_middle(self, x: Tensor, rows: Rows, masks: Masks) -> Kept:
        """Forward, up to the residual between attention and MLP."""
        normed, scale = self.norm1.forward(x)
        qkv, low1 = self.qkv.forward(normed, masks[0])
        attended, sums = attend(*self.heads.split(qkv, rows.cos, rows.sin), rows.segments, rows.words)
        outer, low2 = self.out.forward(attended.flatten(1), masks[1])
        return Kept(x, *scale, qkv, attended, sums, outer.add_(x), low1, low2)

    def widened(self, kept: Kept, masks: Masks) -> Kept:
        """The same from there to what goes into the MLP's gate."""
        normed, (factor2, mean2) = self.norm2.forward(kept.middle)
        wide, low3 = self.up.forward(normed, masks[2])
        return kept._replace(factor2=factor2, mean2=mean2, wide=wide, low3=low3)

    def with_keys(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Output, (T, D), and its keys and values, (T, g, d), for rows that come later; nothing drops out."""
        y, kept = self.forward(x, rows, _NO_MASKS)
        _, keys, values = self.heads.split(kept.qkv, rows.cos, rows.sin)
        return y, keys, values

    def backward(self, dy: Tensor, kept: Kept, rows: Rows, masks: Masks) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the input, (T, D), and of `trained`."""
        scale1, scale2 = (kept.factor1, kept.mean1), (kept.factor2, kept.mean2)
        # what went into a projection is made again where that one's own gradient asks for it
        gated = self.gate.forward(kept.wide) if self.down.trained else dy
        dgated, of_down = self.down.backward(dy, gated, masks[3], kept.low4)
        dwide = self.gate.backward(dgated, kept.wide)
        normed = self.norm2.again(kept.middle, scale2) if self.up.trained else dy
        dnormed, of_up = self.up.backward(dwide, normed, masks[2], kept.low3)
        dmiddle, of_norm2 = self.norm2.backward(dnormed, kept.middle, scale2, dy)
        dattended, of_out = self.out.backward(dmiddle, kept.attended.flatten(1), masks[1], kept.low2)

        q, k, v = self.heads.split(kept.qkv, rows.cos, rows.sin)
        gradients = attend_backward(
            dattended.view(q.shape), q, k, v, kept.attended, kept.sums, rows.segments, rows.words
        )
        dqkv, of_heads = self.heads.backward(gradients, kept.qkv, rows.cos, rows.sin)
        normed = self.norm1.again(kept.x, scale1) if self.qkv.trained else dy
        dnormed, of_qkv = self.qkv.backward(dqkv, normed, masks[0], kept.low1)
        dx, of_norm1 = self.norm1.backward(dnormed, kept.x, scale1, dmiddle)
        return dx, [*of_norm1, *of_norm2, *of_heads, *of_qkv, *of_out, *of_up, *of_down]


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
        config = attention.config
        qnorm, knorm = RmsNorm(live(attention.q_norm)), RmsNorm(live(attention.k_norm))
        super().__init__(
            (RmsNorm(live(module.input_layernorm)), RmsNorm(live(module.post_attention_layernorm))),
            Heads(config.num_attention_heads, config.num_key_value_heads, qnorm, knorm),
            (
                Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                Projection([attention.o_proj]),
                Projection([mlp.gate_proj, mlp.up_proj]),
                Projection([mlp.down_proj]),
            ),
            Gate(swiglu, swiglu_backward),
        )


class VisionBlock(Layer):
    """A block of the vision tower: layer norms, heads without groups, GELU."""

    def __init__(self, module: Any) -> None:
        """Take over a `Qwen3VLVisionBlock`, PEFT-wrapped or not."""
        module = live(module)
        attention, mlp = live(module.attn), live(module.mlp)
        projections = (attention.qkv, attention.proj, mlp.linear_fc1, mlp.linear_fc2)
        super().__init__(
            (LayerNorm(live(module.norm1)), LayerNorm(live(module.norm2))),
            Heads(attention.num_heads, attention.num_heads),
            [Projection([each]) for each in projections],
            Gate(gelu, gelu_backward),
        )
