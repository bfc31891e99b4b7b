"""Attention in segments: a dense softmax under a mask, in float64, is the truth; segments never see each other."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainer.fused.segments import Segments, attend, attend_backward

WIDTHS = (8, 20, 24, 32, 64, 72, 128)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200)  # around a vector's 16 numbers and a block's 64 rows
HEADS = [(2, 2), (4, 2), (4, 1)]  # a key head for one, two and four heads
EXACT = 1e-12  # float64, sums of up to 200 terms in another order
KERNELS = 3e-6  # float32, relative to the largest number: spacing 1.2e-7, sums of 200, e^x to 2 ulp of scores of size 5

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""dout (T, h, d), q (T, h, d), k (T, g, d), v (T, g, d)."""


def segments(*lengths: int, causal: bool = True) -> Segments:
    """On the CPU."""
    return Segments(tuple(lengths), causal, torch.device("cpu"))


def some(rows: int, heads: tuple[int, int], d: int, seed: int = 0) -> Rows:
    """Rows in float64, cut out of wider ones as a layer cuts them."""
    generator = torch.Generator().manual_seed(seed)
    h, g = heads
    both, qkv = (torch.randn(rows, n, d, generator=generator, dtype=torch.float64) for n in (h + 1, h + 2 * g))
    return both[:, 1:], qkv[:, :h], qkv[:, h : h + g], qkv[:, h + g :]


def narrow(rows: Rows) -> Rows:
    """The same cuts, in float32."""
    dout, q, k, v = rows
    h, g = q.shape[1], k.shape[1]
    qkv = torch.cat((q, k, v), 1).float()
    wide = torch.cat((dout[:, :1], dout), 1).float()
    return wide[:, 1:], qkv[:, :h], qkv[:, h : h + g], qkv[:, h + g :]


def dense(rows: Rows, of: Segments) -> list[Tensor]:
    """Output, logarithms of sums and gradients of q, k and v: one softmax under a mask, by autograd."""
    dout, *leaves = (t.clone() for t in rows)
    q, k, v = (t.requires_grad_() for t in leaves)
    group = q.shape[1] // k.shape[1]
    which = torch.repeat_interleave(torch.arange(len(of.lengths)), torch.tensor(of.lengths))
    sees = which[:, None] == which
    if of.causal:
        sees &= torch.ones_like(sees).tril()
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / q.shape[2] ** 0.5
    scores = scores.masked_fill(~sees, -torch.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1))
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def ours(rows: Rows, of: Segments) -> list[Tensor]:
    """The same five, of this package."""
    dout, q, k, v = rows
    out, sums = attend(q, k, v, of)
    return [out, sums, *attend_backward(dout, q, k, v, out, sums, of)]


def assert_close(got: list[Tensor], truth: list[Tensor], bound: float) -> None:
    """To `bound`, of each tensor's largest number."""
    for name, one, right in zip(("out", "sums", "dq", "dk", "dv"), got, truth, strict=True):
        assert one.shape == right.shape, name
        assert (one - right).abs().max() <= bound * max(1.0, right.abs().max().item()), name


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fallback in float64", "kernels in float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Float64 takes torch's operations, float32 the kernels."""
    if request.param is torch.float32:
        request.getfixturevalue("compiled")
    return request.param  # type: ignore[no-any-return]


def check(rows: Rows, of: Segments, dtype: torch.dtype) -> None:
    """Against the dense softmax."""
    given, bound = (rows, EXACT) if dtype is torch.float64 else (narrow(rows), KERNELS)
    assert_close(ours(given, of), dense(rows, of), bound)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_many_segments_of_awkward_sizes(d: int, heads: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    """All lengths in one pack, of strided rows."""
    check(some(sum(LENGTHS), heads, d), segments(*LENGTHS, causal=causal), dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("length", LENGTHS)
def test_one_segment_alone(length: int, causal: bool, dtype: torch.dtype) -> None:
    """No neighbour's rows are there to be read by mistake."""
    for d in (20, 32):
        check(some(length, (4, 2), d, length), segments(length, causal=causal), dtype)


def test_hundreds_of_segments_of_one_and_two_rows(dtype: torch.dtype) -> None:
    """A row that sees itself alone gives its own value."""
    rows = some(300, (4, 2), 24)
    check(rows, segments(*[1, 2] * 100), dtype)
    _, q, k, v = rows if dtype is torch.float64 else narrow(rows)
    out, _ = attend(q, k, v, segments(*[1] * 300))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [30.0, 1e3])
def test_scores_that_would_overflow(size: float, dtype: torch.dtype) -> None:
    """e^x is taken of what is left below the row's largest score: nothing overflows, one key takes all."""
    dout, q, k, v = some(sum(LENGTHS), (4, 2), 32)
    rows = narrow((dout, q * size, k, v))
    wide: Rows = tuple(t.double() for t in rows)  # type: ignore[assignment]  # four
    of = segments(*LENGTHS)
    got = ours(rows if dtype is torch.float32 else wide, of)
    # a score of 5 * size is rounded to that times 6e-8, and so is the exponent
    bound = EXACT * size if dtype is torch.float64 else KERNELS * size
    assert_close(got, dense(wide, of), bound)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize("place", range(4))
def test_altering_one_segment_leaves_the_others_bit_equal(place: int, causal: bool, either: None) -> None:
    """Outputs and gradients, whatever happens next door: other numbers, even infinite ones."""
    lengths = (17, 64, 3, 70)
    of = segments(*lengths, causal=causal)
    before = some(sum(lengths), (4, 2), 24)
    bounds = list(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    start, end = bounds[place]
    outcomes = []
    for change in (1.0, -7.0, torch.inf):
        rows = narrow(before)
        for tensor in rows:
            tensor[start:end] *= change
        out, sums, dq, dk, dv = ours(rows, of)
        outcomes.append([out, sums.T, dq, dk, dv])
    first, *others = outcomes
    for other in others:
        for name, one, two in zip(("out", "sums", "dq", "dk", "dv"), first, other, strict=True):
            assert not torch.equal(one[start:end], two[start:end]), name
            for a, b in (pair for pair in bounds if pair != (start, end)):
                assert torch.equal(one[a:b], two[a:b]), name


def test_a_segment_gives_the_same_bits_wherever_it_stands(either: None) -> None:
    """Alone, first or last in a pack: whom a sample shares a pack with changes nothing of it."""
    lengths = (65, 16, 33)
    rows = narrow(some(sum(lengths), (4, 2), 32))
    together = ours(rows, segments(*lengths))
    start = 0
    for length in lengths:
        piece: Rows = tuple(t[start : start + length] for t in rows)  # type: ignore[assignment]  # four
        for one, whole in zip(ours(piece, segments(length)), together, strict=True):
            own = whole[:, start : start + length] if whole.ndim == 2 else whole[start : start + length]
            assert torch.equal(one, own)
        start += length


def test_bounds_are_running_sums() -> None:
    """Of three, two and one row."""
    of = segments(3, 2, 1)
    assert of.bounds == [(0, 3), (3, 5), (5, 6)]
    assert of.cumulative.tolist() == of.row_bounds.tolist() == [0, 3, 5, 6]
    assert (of.cumulative.dtype, of.row_bounds.dtype) == (torch.int32, torch.int64)
