"""Products by oneDNN or MKL are one to rounding; projections of several modules; frozen weights that lie end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import PAD_ID, shapes_of, tiny_model, tiny_samples
from tests.trainer.fused.conftest import arm, distance, step
from trainer.data.loader import collate
from trainer.fused import products
from trainer.fused.forward import FusedLoss
from trainer.fused.products import Projection, prefers_onednn, product
from trainer.gate import digest
from trainer.model import SupervisedLoss, trained_tensors

EXACT = 1e-12
BATCH = collate(tiny_samples((7, 12)), PAD_ID, packed=True)


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this processor prefers, both are tried."""
    if request.param and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (17, 20, 24), (65, 72, 33), (0, 8, 4)], ids=str)
def test_a_product_is_rows_times_a_weight(rows: int, inputs: int, outputs: int, library: None) -> None:
    """With a bias, without, and by a weight that is given transposed, as gradients need it; to float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    across = weight.T.contiguous().T
    for w in (weight, across):
        torch.testing.assert_close(
            product(x, w, bias), (x.double() @ w.double().T + bias).float(), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(product(x, w), (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5)


def test_a_pass_is_the_same_by_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients differ by rounding alone, and by that they do."""
    outcomes = []
    for onednn in (True, False):
        monkeypatch.setattr(products, "prefers_onednn", lambda onednn=onednn: onednn)
        outcomes.append(step(FusedLoss(arm("all_lora", tiny_model())), BATCH))
    (losses, one), (others, two) = outcomes
    torch.testing.assert_close(losses, others, rtol=1e-6, atol=0)
    assert max(distance(one[name], two[name]) for name in one) < 1e-5


@pytest.mark.parametrize(
    ("built", "capability", "vendor", "expected"),
    [
        (True, "AVX512", "AuthenticAMD", True),
        (True, "AVX512", "GenuineIntel", False),
        (True, "AVX2", "AuthenticAMD", False),
        (False, "AVX512", "AuthenticAMD", False),
    ],
)
def test_the_processor_decides_who_multiplies(
    built: bool, capability: str, vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OneDNN where there are 512 bits that MKL leaves unused: not on Intel's."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(products, "Path", lambda _: info)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert prefers_onednn.__wrapped__() is expected


# --- projections -------------------------------------------------------------------------------------------------


def three(method: str, *, dropout: float = 0.0, bias: bool = True) -> Any:
    """Three linear maps of one input of eight numbers, in float64; `some`: only two of them have adapters."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({name: nn.Linear(8, n, bias=bias) for name, n in (("a", 6), ("b", 4), ("c", 2))})
    holder.requires_grad_(method == "full")
    if method in ("lora", "some"):
        names = ["a", "b", "c"] if method == "lora" else ["a", "c"]
        made: Any = LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=names)
        holder = inject_adapter_in_model(made, holder)  # type: ignore[assignment]
    for parameter in holder.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return holder


def some(*shape: int) -> Tensor:
    """Numbers of size 1, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("method", ["frozen", "lora", "some", "full"])
def test_a_projection_is_its_modules_side_by_side(method: str, bias: bool) -> None:
    """Output, gradient of the input and of what trains: in the order that it names."""
    holder, x, dy = three(method, bias=bias), some(5, 8).requires_grad_(), some(5, 12)
    modules = list(holder.values())
    expected = torch.cat([module(x) for module in modules], 1)
    projection = Projection(modules)
    with torch.no_grad():
        y, low = projection.forward(x, None)
        dx, gradients = projection.backward(dy, x, None, low)
    assert distance(y, expected.detach()) < EXACT
    truth = torch.autograd.grad(expected, [x, *projection.trained], dy)
    assert {id(p) for p in projection.trained} == {id(p) for p in holder.parameters() if p.requires_grad}
    assert [distance(a, b) < EXACT for a, b in zip([dx, *gradients], truth, strict=True)] == [True] * len(truth)


def test_dropout_keeps_the_expectation() -> None:
    """The mean over many masks is the output without any; a mask drops the share that was asked for."""
    holder, x = three("lora", dropout=0.25), some(3, 8)
    projection = Projection(list(holder.values()))
    torch.manual_seed(0)
    rows = x.repeat(40_000, 1)
    mask = projection.mask(len(rows), rows.device)
    assert mask is not None and mask.dtype is torch.bool
    assert mask.double().mean().item() == pytest.approx(0.75, abs=2e-3)
    dropped = projection.forward(rows, mask)[0].view(-1, 3, 12)
    standard_error = dropped.std(0) / len(dropped) ** 0.5
    without = projection.forward(x, None)[0]
    assert ((dropped.mean(0) - without).abs() < 5 * standard_error).all()
    assert Projection(list(three("lora").values())).mask(3, x.device) is None


# --- frozen weights end to end -----------------------------------------------------------------------------------


def storages(model: nn.Module) -> int:
    """Bytes of all memory that a model's parameters lie in, shared memory once."""
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(held.values())


@pytest.mark.parametrize("name", ["last6_lora", "all_full"])
def test_frozen_weights_become_views_and_take_no_more_memory(name: str) -> None:
    """Of one tensor for each group that reads the same input; values, names and shapes stay."""
    model = arm(name, tiny_model())
    before, bytes_before = {k: v.clone() for k, v in model.state_dict().items()}, storages(model)
    shapes, digests = shapes_of(model), {n: digest(p) for n, p in model.named_parameters()}
    fused = FusedLoss(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert (shapes_of(model), storages(model)) == (shapes, bytes_before)
    assert {n: digest(p) for n, p in model.named_parameters()} == digests
    base: Any = model.get_base_model()
    layer = base.model.language_model.layers[0]
    q, k, v = (p.weight.data_ptr() for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
    assert layer.self_attn.q_proj.weight.untyped_storage().data_ptr() == q < k < v
    assert fused._layers[0].qkv._frozen["weight"].data_ptr() == q  # type: ignore[union-attr]


def test_what_is_written_into_a_frozen_weight_is_seen_by_both_passes() -> None:
    """The weight is a view of what the fused pass multiplies by, not a copy beside it."""
    model = arm("last6_lora", tiny_model())
    fused, plain = FusedLoss(model), SupervisedLoss(model)
    base: Any = model.get_base_model()
    weight = base.model.language_model.layers[1].mlp.gate_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    torch.testing.assert_close(step(fused, BATCH)[0], step(plain, BATCH)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["last6_lora", "all_full"])
def test_what_a_fused_run_saves_is_what_a_plain_one_saves_and_peft_loads_it(name: str, tmp_path: Path) -> None:
    """The same file, byte for byte, before the first step; after one, PEFT's own reader gives the same losses."""
    models = [arm(name, tiny_model()) for _ in range(2)]
    fused = FusedLoss(models[0])
    for which, model in zip(("fused", "plain"), models, strict=True):
        model.save_pretrained(str(tmp_path / which))
    one, two = ((tmp_path / which / "adapter_model.safetensors").read_bytes() for which in ("fused", "plain"))
    assert one == two
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([t.parameter for t in trained_tensors(models[0])], lr=1e-2)
    fused.train()
    fused(supervised=BATCH.supervised, **BATCH.model_inputs()).sum().backward()
    optimizer.step()
    models[0].save_pretrained(str(tmp_path / "trained"))
    assert load_file(tmp_path / "trained" / "adapter_model.safetensors").keys()
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "trained"), is_trainable=True)
    expected = step(fused, BATCH)[0]
    assert not torch.allclose(step(SupervisedLoss(models[1]), BATCH)[0], expected, rtol=1e-4)
    for of in (SupervisedLoss, FusedLoss):
        torch.testing.assert_close(step(of(loaded), BATCH)[0], expected, rtol=1e-6, atol=0)
