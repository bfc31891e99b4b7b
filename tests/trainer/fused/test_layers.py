"""A decoder layer and a vision block: outputs are those of transformers' modules, gradients those of differences."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLVisionBlock

from tests.trainer.fused.conftest import Unrounded, distance
from trainer.fused.layers import DecoderLayer, Layer, Rows, VisionBlock
from trainer.fused.segments import Segments

D, MLP, LENGTHS = 8, 12, (1, 5, 3)
KINDS = ("decoder", "vision")
METHODS = ("frozen", "lora", "full")
EXACT = 1e-12  # float64, other order of sums


def config() -> Any:
    """Width 8: two heads of four numbers, of one key head in the language model."""
    made: Any = Qwen3VLConfig(
        vision_config={"hidden_size": D, "intermediate_size": MLP, "num_heads": 2, "depth": 1},
        text_config={
            "hidden_size": D, "intermediate_size": MLP, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 4, "num_hidden_layers": 1,
        },
    )  # fmt: skip
    made.text_config._attn_implementation = made.vision_config._attn_implementation = "sdpa"
    return made


def module_of(kind: str, method: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """Transformers' layer, all its numbers random: norms too, or a weight of ones would hide where it belongs."""
    torch.manual_seed(0)
    holder: Any = nn.Module()
    if kind == "decoder":
        holder.layer = Qwen3VLTextDecoderLayer(config().text_config, 0)
    else:
        holder.layer = Qwen3VLVisionBlock(config().vision_config)
    holder.requires_grad_(method == "full")
    if method == "lora":
        names = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|proj|linear_fc1|linear_fc2)"
        holder = inject_adapter_in_model(
            LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=names), holder
        )
    for parameter in holder.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64).mul_(0.5).to(dtype)
    return holder.layer


def wrapped(kind: str, module: nn.Module) -> Layer:
    """The same layer of this package."""
    return DecoderLayer(module) if kind == "decoder" else VisionBlock(module)


def rows_of(kind: str, dtype: torch.dtype = torch.float64, lengths: Sequence[int] = LENGTHS) -> Rows:
    """Segments under random angles."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(sum(lengths), 1, 2, generator=generator, dtype=torch.float64)
    of = Segments(tuple(lengths), kind == "decoder", torch.device("cpu"))
    return Rows(of, angles.cos().to(dtype), angles.sin().to(dtype))


def some(rows: int = sum(LENGTHS), dtype: torch.dtype = torch.float64) -> Tensor:
    """(rows, D)."""
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def reference(kind: str, module: Any, x: Tensor, rows: Rows) -> Tensor:
    """What transformers' module makes of each segment alone."""
    outs = []
    for start, end in rows.segments.bounds:
        cos, sin = (torch.cat((t[start:end, 0],) * 2, -1) for t in (rows.cos, rows.sin))
        if kind == "decoder":
            mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()[None, None]
            outs.append(module(x[None, start:end], (cos[None], sin[None]), attention_mask=mask)[0])
        else:
            bounds = torch.tensor([0, end - start], dtype=torch.int32)
            outs.append(module(x[start:end], cu_seqlens=bounds, max_seqlen=end - start, position_embeddings=(cos, sin)))
    return torch.cat(outs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_transformers_module(kind: str, method: str) -> None:
    """In float64: rows, and whatever trains, PEFT's adapters among it."""
    module, rows = module_of(kind, method), rows_of(kind)
    layer, x, dy = wrapped(kind, module), some().requires_grad_(), some() * 2 - 1
    y = layer(x, rows, training=True)
    with Unrounded():
        truth = reference(kind, module, x, rows)
    assert distance(y.detach(), truth.detach()) < EXACT
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert {id(p) for p in layer.trained} == {id(p) for p in trained[1:]}
    got, expected = (torch.autograd.grad(out, trained, dy) for out in (y, truth))
    assert [distance(one, right) < EXACT for one, right in zip(got, expected, strict=True)] == [True] * len(trained)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, method: str, checkpointed: bool) -> None:
    """Of every number that goes in, rows and weights alike; nothing of transformers is asked."""
    module, rows = module_of(kind, method), rows_of(kind)
    layer = wrapped(kind, module)
    layer.checkpointed = checkpointed

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, rows, training=True)

    inputs = [some().requires_grad_(), *layer.trained]
    # the fast mode looks along random directions: all of the slow one's columns take half a minute
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_of_a_jacobian_in_full(kind: str) -> None:
    """Of rows through a layer with adapters, number by number."""
    layer, rows = wrapped(kind, module_of(kind, "lora")), rows_of(kind)
    assert torch.autograd.gradcheck(lambda x: layer(x, rows, training=True), some().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_segment_have_no_gradient(kind: str) -> None:
    """Nor do later rows, in the language model."""
    layer, x = wrapped(kind, module_of(kind, "full")), some().requires_grad_()
    y = layer(x, rows_of(kind), training=True)
    (dx,) = torch.autograd.grad(y[3].sum(), x)  # the third row of the second segment
    touched = dx.abs().sum(1) > 0
    assert touched.tolist() == [1 <= i <= (3 if kind == "decoder" else 5) for i in range(9)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_layer_may_train(kind: str) -> None:
    """Adapters on one projection of several, or a bias and a norm alone: gradients go to their owners."""
    module = module_of(kind, "frozen")
    if kind == "decoder":
        alone = [module.self_attn.k_norm.weight, module.mlp.up_proj.weight]
    else:
        alone = [module.attn.qkv.bias, module.norm2.bias]
    for parameter in alone:
        parameter.requires_grad_()
    layer, rows, x = wrapped(kind, module), rows_of(kind), some()
    y = layer(x, rows, training=True)
    with Unrounded():
        truth = reference(kind, module, x, rows)
    got, expected = (torch.autograd.grad(out.square().sum(), alone) for out in (y, truth))
    assert max(distance(one, right) for one, right in zip(got, expected, strict=True)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_train_keeps_nothing(kind: str) -> None:
    """A frozen layer of rows without a gradient stays outside the graph; so does any under no_grad."""
    assert not wrapped(kind, module_of(kind, "frozen"))(some(), rows_of(kind), training=True).requires_grad
    with torch.no_grad():
        assert not wrapped(kind, module_of(kind, "full"))(some(), rows_of(kind), training=True).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64_to_rounding(kind: str, either: None) -> None:
    """A layer under compiled kernels and under torch's operations: to 1e-5 of what float64 says."""
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        layer = wrapped(kind, module_of(kind, "full", dtype=dtype))
        x = some(dtype=dtype).requires_grad_()
        y = layer(x, rows_of(kind, dtype), training=True)
        outcomes.append([y.detach(), *torch.autograd.grad(y, [x, *layer.trained], some(dtype=dtype))])
    assert max(distance(one, right) for one, right in zip(*outcomes, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_weights_are_left_as_they_were(kind: str, either: None) -> None:
    """Much is computed in place; what belongs to others is not."""
    module = module_of(kind, "lora", dtype=torch.float32)
    layer, x, dy = wrapped(kind, module), some(dtype=torch.float32).requires_grad_(), some(dtype=torch.float32)
    watched = [x, dy, *module.state_dict().values()]
    before = [t.detach().clone() for t in watched]
    y = layer(x, rows_of(kind, torch.float32), training=True)
    first = torch.autograd.grad(y, [x, *layer.trained], dy, retain_graph=True)
    again = torch.autograd.grad(y, [x, *layer.trained], dy)
    assert all(torch.equal(one, two) for one, two in zip(watched, before, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


# --- dropout -----------------------------------------------------------------------------------------------------


def outcome(
    kind: str, *, seed: int, dropout: float = 0.5, checkpointed: bool = False, training: bool = True
) -> list[Tensor]:
    """Output and gradients of one pass whose masks are drawn from a seed."""
    layer = wrapped(kind, module_of(kind, "lora", dropout=dropout))
    layer.checkpointed = checkpointed
    torch.manual_seed(seed)
    x = some().requires_grad_()
    y = layer(x, rows_of(kind), training=training)
    torch.manual_seed(99)  # whatever is drawn between the passes
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.trained], some())]


def equal(one: list[Tensor], two: list[Tensor]) -> list[bool]:
    """Tensor by tensor, to the bit."""
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_the_seed_and_outlive_checkpointing(kind: str) -> None:
    """The same seed the same bits, run again or not; another seed another output and other gradients."""
    first = outcome(kind, seed=1)
    assert all(equal(first, outcome(kind, seed=1, checkpointed=True)))
    assert not any(equal(first, outcome(kind, seed=2)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_in_an_evaluation(kind: str) -> None:
    """The numbers of dropout 0, to the bit."""
    assert all(equal(outcome(kind, seed=1, training=False), outcome(kind, seed=1, dropout=0.0)))
    assert not any(equal(outcome(kind, seed=1), outcome(kind, seed=1, dropout=0.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_dropout_are_those_of_finite_differences(kind: str) -> None:
    """With one and the same mask in every pass."""
    layer, rows = wrapped(kind, module_of(kind, "lora", dropout=0.3)), rows_of(kind)

    def output(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(4)
        return layer(x, rows, training=True)

    inputs = [some().requires_grad_(), *layer.trained]
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-5)
