"""Every small operation and its gradient: torch's own autograd in float64 is the truth, for fallback and kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.fused import functions, head
from trainer.fused.head import supervised_loss

EPS = 1e-6
ROWS = (1, 2, 17, 65)
WIDTHS = (8, 20, 24, 32, 64, 72, 128)  # 20, 24 and 72 are no multiples of a vector's 16 numbers
EXACT = 1e-12  # float64: sums of up to 128 terms in another order
KERNELS = 2e-6  # float32, relative to the largest number: spacing 1.2e-7, sums of up to 128 terms, e^x to 2 ulp

generator = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in a test, whichever ran before."""
    generator.manual_seed(0)


def some(*shape: int) -> Tensor:
    """Numbers of size 1, in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def angles(rows: int, d: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (rows, 1, d / 2)."""
    turns = some(rows, 1, d // 2) * 3
    return turns.cos(), turns.sin()


def assert_close(got: Tensor, truth: Tensor, bound: float) -> None:
    """To `bound`, of the largest number's size."""
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    assert (got - truth).abs().max() <= bound * max(1.0, truth.abs().max().item())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """The norm as it is written."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as complex numbers."""
    one, two = x.chunk(2, -1)
    z = torch.complex(one, two) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


def gradients(operation: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of an operation's inputs, by autograd."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(operation(*leaves), leaves, dy)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fallback in float64", "kernels in float32"])
def form(request: pytest.FixtureRequest) -> tuple[Callable[..., list[Tensor]], float]:
    """How inputs are given, and how close the outcome is: float64 takes torch's operations, float32 the kernels."""
    dtype: torch.dtype = request.param
    if dtype is torch.float32:
        request.getfixturevalue("compiled")
    return (lambda *tensors: [t.to(dtype) for t in tensors]), EXACT if dtype is torch.float64 else KERNELS


Form = tuple[Callable[..., list[Tensor]], float]


@pytest.mark.parametrize("width", [*WIDTHS, 96, 13])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows: int, width: int, form: Form) -> None:
    """Output, gradient of rows with and without the way around it, gradient of the weight."""
    given, bound = form
    x, weight, dy, plus = some(rows, width), some(width), some(rows, width), some(rows, width)
    dx, dweight = gradients(rms, dy, x, weight)
    x_, weight_, dy_, plus_ = given(x, weight, dy, plus)
    y, factor = functions.rms_norm(x_, weight_, EPS)
    assert_close(y, rms(x, weight), bound)
    assert factor.shape == (rows, 1)
    assert_close(functions.rms_norm_backward(dy_, x_, weight_, factor, plus_), dx + plus, bound)
    assert_close(functions.rms_norm_backward(dy_, x_, weight_, factor), dx, bound)
    assert_close(functions.rms_norm_weight_gradient(dy_, x_, factor), dweight, bound * 4)  # sums over rows


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "only turned"])
def test_heads_are_normed_and_turned(normed: bool, width: int, heads: int, form: Form) -> None:
    """As slices of wider rows too, which are read and written where they are, and nothing beside them."""
    given, bound = form
    for rows in ROWS:
        x, dy, weight = some(rows, heads, width), some(rows, heads, width), some(heads, width)
        cos, sin = angles(rows, width)

        def plain(x: Tensor, weight: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return turned(rms(x, weight) if normed else x + 0 * weight, cos, sin)

        dx, _ = gradients(plain, dy, x, weight)
        wide_x, wide_dy, out = (given(some(rows, heads + 3, width))[0] for _ in range(3))
        own = slice(2, 2 + heads)
        wide_x[:, own], wide_dy[:, own] = given(x, dy)
        weight_, cos_, sin_ = given(weight, cos, sin)
        w = weight_ if normed else None
        assert_close(functions.turn_heads(wide_x[:, own], w, cos_, sin_, EPS), plain(x, weight), bound)
        before = out.clone()
        functions.turn_heads_backward(wide_dy[:, own], wide_x[:, own], w, cos_, sin_, EPS, out[:, own])
        assert_close(out[:, own], dx, bound)
        assert torch.equal(out[:, :2], before[:, :2]) and torch.equal(out[:, 2 + heads :], before[:, 2 + heads :])


def test_turning_back_undoes_turning() -> None:
    """Which is why the gradient of a turn is the turn by the opposite angles."""
    x, (cos, sin) = some(5, 2, 8), angles(5, 8)
    assert_close(functions.rotate(functions.rotate(x, cos, sin), cos, -sin), x, EXACT)


@pytest.mark.parametrize("width", [*WIDTHS, 1, 19])
def test_swiglu(width: int, form: Form) -> None:
    """Also at gates that saturate: far below zero nothing passes, far above all."""
    given, bound = form
    for rows in ROWS:
        x, dy = some(rows, 2 * width) * 4, some(rows, width)
        x[0, :2] = torch.tensor([-300.0, 300.0])[: x.shape[1]]

        def plain(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, -1)
            return gate * torch.sigmoid(gate) * up

        (dx,) = gradients(plain, dy, x)
        x_, dy_ = given(x, dy)
        assert_close(functions.swiglu(x_), plain(x), bound)
        assert_close(functions.swiglu_backward(dy_, x_), dx, bound)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, form: Form) -> None:
    """Output, and gradients of rows, weight and bias."""
    given, bound = form
    for rows in ROWS:
        x, weight, bias, dy = some(rows, width), some(width), some(width), some(rows, width)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias

        x_, weight_, bias_, dy_ = given(x, weight, bias, dy)
        y, mean, factor = functions.layer_norm(x_, weight_, bias_, EPS)
        assert_close(y, plain(x, weight, bias), bound)
        got = functions.layer_norm_backward(dy_, x_, weight_, bias_, mean, factor)
        for one, truth in zip(got, gradients(plain, dy, x, weight, bias), strict=True):
            assert_close(one, truth, bound * 4)


def test_norms_of_bfloat16_rows_are_computed_in_float32() -> None:
    """Rounded to the row's format before the weight, to the bit as transformers does; never computed in bfloat16."""
    x, weight = some(9, 64).bfloat16(), some(64).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    assert torch.equal(functions.rms_norm(x, weight, EPS)[0], expected)
    expected = F.layer_norm(wide, (64,), weight.float(), weight.float(), EPS).bfloat16()
    assert torch.equal(functions.layer_norm(x, weight, weight, EPS)[0], expected)


# --- the head and its loss ---------------------------------------------------------------------------------------


@pytest.fixture
def positions() -> tuple[Tensor, Tensor, Tensor]:
    """Seven positions of eight numbers over a vocabulary of eleven: hidden, weight, targets."""
    return some(7, 8), some(11, 8), torch.tensor([0, 10, 3, 3, 7, 1, 0])


def test_the_losses_gradient_is_that_of_finite_differences(positions: tuple[Tensor, Tensor, Tensor]) -> None:
    """It was made in the forward pass, and each loss has its own factor."""
    hidden, weight, targets = positions
    assert torch.autograd.gradcheck(lambda h: supervised_loss(h, weight, targets), hidden.requires_grad_())


@pytest.mark.parametrize("numbers", [1, 22, 33, 77, 78])
def test_the_loss_does_not_depend_on_the_pieces_it_is_made_in(
    numbers: int, positions: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position at once, two, three, all: cross-entropy's values and gradient."""
    hidden, weight, targets = positions
    monkeypatch.setattr(head, "_LOGITS_AT_ONCE", numbers)
    hidden.requires_grad_()
    factors = some(7)
    losses = supervised_loss(hidden, weight, targets)
    (got,) = torch.autograd.grad(losses, hidden, factors)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert_close(losses, expected.detach(), EXACT)
    assert_close(got, torch.autograd.grad(expected, hidden, factors)[0], EXACT)


def test_losses_are_float32_of_whatever_rows(positions: tuple[Tensor, Tensor, Tensor]) -> None:
    """Sums over a vocabulary do not fit into bfloat16; no position at all is no loss, with a gradient."""
    hidden, weight, targets = positions
    bf16 = supervised_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert bf16.dtype is torch.float32
    leaf = hidden[:0].float().requires_grad_()
    none = supervised_loss(leaf, weight.float(), targets[:0])
    assert none.shape == (0,) and none.requires_grad
    (gradient,) = torch.autograd.grad(none.sum(), leaf)
    assert gradient.shape == (0, 8)
