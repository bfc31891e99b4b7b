"""Attention of samples that begin with the same words: these are there once, and every sample sees them.

Causal attention makes it exact: what stands before an image is the same in every sample, and sees nothing of what
follows. Its keys and values are computed once a pack where they train, and once a run where they do not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.fused import native, segments
from trainer.fused.segments import Segments, address, sizes

# Shapes: T rows of all samples without the shared words; p shared words; h heads, g key heads, d numbers of a head.


@dataclass(frozen=True)
class Words:
    """The shared words of a pack, for one layer."""

    count: int
    """p."""
    keys: Tensor | None = None
    """(p, g, d) where a layer's keys do not train; None: the words are the first rows of all that pass the layer."""
    values: Tensor | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, samples: Segments, words: Words | None) -> tuple[Tensor, Tensor]:
    """Causal attention within each sample and to the shared words.

    Args:
        q: (T, h, d), or (p + T, h, d) where the words are rows themselves.
        k: (T, g, d), or (p + T, g, d).
        v: likewise.
        samples: of the T rows.
        words: None: there are none.

    Returns:
        Shaped like `q`; and the logarithms of the softmax's sums, (h, rows), for `attend_backward`.
    """
    if words is None:
        return segments.attend(q, k, v, samples)
    if words.keys is not None and words.values is not None:
        return _behind(q, k, v, samples, words.keys, words.values)
    p = words.count
    of_words = segments.attend(q[:p], k[:p], v[:p], _alone(p, samples))
    of_samples = _behind(q[p:], k[p:], v[p:], samples, k[:p], v[:p])
    return torch.cat((of_words[0], of_samples[0])), torch.cat((of_words[1], of_samples[1]), 1)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, samples: Segments, words: Words | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `attend`."""
    if words is None:
        return segments.attend_backward(dout, q, k, v, out, sums, samples)
    if words.keys is not None and words.values is not None:
        return _behind_backward(dout, q, k, v, out, sums, samples, words.keys, words.values, train=False)[:3]
    p = words.count
    dq1, dk1, dv1 = segments.attend_backward(
        dout[:p], q[:p], k[:p], v[:p], out[:p], sums[:, :p].contiguous(), _alone(p, samples)
    )
    dq2, dk2, dv2, dkeys, dvalues = _behind_backward(
        dout[p:], q[p:], k[p:], v[p:], out[p:], sums[:, p:].contiguous(), samples, k[:p], v[:p], train=True
    )
    return torch.cat((dq1, dq2)), torch.cat((dk1 + dkeys, dk2)), torch.cat((dv1 + dvalues, dv2))


def _alone(p: int, like: Segments) -> Segments:
    return Segments((p,), True, like.device)


def _behind(q: Tensor, k: Tensor, v: Tensor, samples: Segments, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Samples that see `keys` before their own."""
    if native.usable(q, k, v, keys, values):
        out, sums = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q))
        shared = (*address(keys), *address(values), len(keys))
        native.call("attend", *address(q), *address(k), *address(v), *shared, out, sums, *sizes(q, k, samples))
        return out, sums
    out1, sums1 = segments.attend(q, k, v, samples)
    out2, sums2 = segments.by_torch(q, keys, values, _all(q), _all(keys))
    sums = torch.logaddexp(sums1, sums2)
    share1, share2 = ((own - sums).exp().T[:, :, None].to(q.dtype) for own in (sums1, sums2))
    return out1 * share1 + out2 * share2, sums


def _behind_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, samples: Segments,
    keys: Tensor, values: Tensor, *, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, where they train, of the shared keys and values."""
    if native.usable(dout, q, k, v, out, keys, values):
        dq, dk, dv, dkeys, dvalues = (t.new_zeros(t.shape) for t in (q, k, v, keys, values))
        native.call(
            "attend_backward", dout.contiguous(), *address(q), *address(k), *address(v),
            *address(keys), *address(values), len(keys), out.contiguous(), sums, dq, dk, dv,
            *((dkeys, dvalues) if train else (None, None)), *sizes(q, k, samples),
        )  # fmt: skip
        return dq, dk, dv, dkeys, dvalues
    # The whole's sums make each part's softmax the whole's share of it, so that the gradients of the parts add up.
    dq1, dk, dv = segments.attend_backward(dout, q, k, v, out, sums, samples)
    dq2, dkeys, dvalues = segments.backward_by_torch(dout, q, keys, values, out, sums, _all(q), _all(keys))
    return dq1 + dq2, dk, dv, dkeys, dvalues


def _all(rows: Tensor) -> Segments:
    """All of them as one segment, in no order."""
    return Segments((len(rows),), False, rows.device)
