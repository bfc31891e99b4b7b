"""What tests of the fused pass share: both passes on equal models, in float32 and, as the truth, in float64."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen3VLForConditionalGeneration

from tests.conftest import shapes_of
from trainer.build import plan_from
from trainer.config.load import load
from trainer.data.loader import Batch
from trainer.fused import native
from trainer.fused.forward import FusedLoss
from trainer.model import SupervisedLoss, apply_plan, trained_tensors

FILES = (
    "frozen_vision", "last4_lora", "last6_lora", "last6_lora_noisy", "last8_lora", "last6_full", "all_lora", "all_full",
    "progressive_lora",
)  # fmt: skip
"""Every strategy file of `experiments/`; a test holds that."""

Passes = Callable[..., Any]
"""`FusedLoss` or `SupervisedLoss`."""
PASSES: tuple[Passes, Passes] = (SupervisedLoss, FusedLoss)


class Unrounded(TorchFunctionMode):
    """Lets float64 through where transformers rounds to float32: in norms, rotary embedding, and before the loss.

    Thus the plain pass in float64 is the truth, to about 1e-15.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Leave out roundings, run everything else."""
        kwargs = kwargs or {}
        rounds = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args, kwargs.get("dtype")))
        if rounds and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **kwargs)


def arm(
    name: str,
    base: Qwen3VLForConditionalGeneration,
    *,
    dropout: float = 0.0,
    changes: Mapping[str, str] = MappingProxyType({}),
) -> PeftModel:
    """A model wrapped as a file of `experiments/` says; LoRA's B is not zero, so that A has a gradient.

    Args:
        name: of the file.
        base: what it wraps.
        dropout: of the adapters.
        changes: of the file's `strategy` section, such as `llm.layers`.
    """
    overrides = {"tuner.lora_dropout": str(dropout), **{f"strategy.{key}": value for key, value in changes.items()}}
    plan, _ = plan_from(load(name, overrides=overrides), shapes_of(base))
    model = apply_plan(base, plan, seed=1)
    generator = torch.Generator().manual_seed(3)
    for tensor in trained_tensors(model):
        if ".lora_B." in tensor.name:
            tensor.parameter.data.normal_(std=0.02, generator=generator)
    return model


def widened(model: PeftModel) -> PeftModel:
    """The same model with all its weights in float64; tables of angles stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def step(loss: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of a batch, and what the mean's gradient is to every trained tensor; nothing is left on the model."""
    loss.zero_grad()
    nll = loss(supervised=batch.supervised, **batch.model_inputs())
    (nll.sum() / max(1, batch.n_supervised)).backward()
    gradients = {t.name: t.parameter.grad for t in trained_tensors(loss.model) if t.parameter.grad is not None}
    loss.zero_grad()
    return nll.detach(), gradients


def distance(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference, relative."""
    off, size = (float(torch.linalg.vector_norm(t.double())) for t in (got - expected, expected))
    return off / size if size else off


def distances(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of every tensor by name; both must hold the same ones."""
    assert got.keys() == expected.keys() and expected
    return {name: distance(got[name], tensor) for name, tensor in expected.items()}


def altogether(tensors: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations in place of compiled kernels."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(params=["compiled", "fallback"])
def either(request: pytest.FixtureRequest) -> None:
    """Both ways, one after the other."""
    if request.param == "fallback":
        request.getfixturevalue("fallback")
    elif native.library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def compiled() -> None:
    """Only where kernels were compiled."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
