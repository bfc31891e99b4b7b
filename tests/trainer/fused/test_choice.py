"""Which forward pass a run gets: the fused one where it knows how, and a line that says why not where it does not."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.conftest import shapes_of, strategy, tiny_model
from tests.trainer.fused.conftest import arm
from trainer.fused import choice, native
from trainer.fused.choice import ForwardPass, choose
from trainer.fused.features import NOTHING
from trainer.fused.forward import FusedLoss
from trainer.model import SupervisedLoss
from trainer.strategy import ParameterPlan, Part, make_plan

GOOD = {"asked": True, "attn_impl": "auto", "weights": "float32", "bf16": False, "keep": NOTHING}
BF16 = {"weights": "bfloat16", "bf16": True}


@pytest.fixture
def plan() -> ParameterPlan:
    """Blocks and aligner in full, layers of the language model by LoRA."""
    return make_plan(strategy("all_full"), shapes_of(tiny_model()))


def chosen(plan: ParameterPlan, **changes: Any) -> ForwardPass:
    """With everything as the fused pass likes it, but for the changes."""
    return choose(plan, **{**GOOD, **changes})


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_it_is_the_fused_one_where_nothing_speaks_against_it(plan: ParameterPlan, attention: str) -> None:
    """Under the attention that is its own."""
    assert chosen(plan, attn_impl=attention).fused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"asked": False}, "model.fused is false"),
        ({"attn_impl": "eager"}, "model.attn_impl is eager"),
        ({"attn_impl": "flash_attention_2"}, "model.attn_impl is flash_attention_2"),
        ({"bf16": True}, "training.bf16 is true, and weights are float32"),
        ({"bf16": True, "weights": "float16"}, "training.bf16 is true, and weights are float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_know_is_left_to_transformers(plan: ParameterPlan, changes: Any, why: str) -> None:
    """And the line names the setting."""
    assert chosen(plan, **changes) == ForwardPass(fused=False, line=f"transformers' own, since {why}")


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.pos_embed.weight",
    ],
)
def test_so_is_what_trains_outside_layers_and_aligner(plan: ParameterPlan, name: str) -> None:
    """Embeddings are read, not trained."""
    (first, *others) = plan.tensors
    trained = next(t for t in plan.trained())
    other = dataclasses.replace(plan, tensors=(dataclasses.replace(trained, name=name), first, *others))
    assert chosen(other).line == f"transformers' own, since {name} trains"


def test_on_a_gpu_it_computes_in_bfloat16_or_not_at_all(plan: ParameterPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash-attention knows no float32."""
    on_a_gpu(monkeypatch)
    assert not chosen(plan).fused and "flash-attention computes in bfloat16" in chosen(plan).line
    assert chosen(plan, **BF16).line == "fused, flash-attention over the samples of a pack"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not chosen(plan, **BF16).fused and "this one has 7.5" in chosen(plan, **BF16).line


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "MKL"])
@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "no compiler"])
def test_the_line_says_what_computes(
    plan: ParameterPlan, kernels: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small operations and of products, each; in bfloat16 both are torch's."""
    monkeypatch.setattr(native, "library", lambda: object() if kernels else None)
    monkeypatch.setattr(choice, "prefers_onednn", lambda: onednn)
    line = chosen(plan).line
    assert line.startswith("fused, compiled kernels" if kernels else "fused, torch's operations (the kernels are not")
    assert line.endswith(f", products by {'oneDNN' if onednn else 'MKL'}")
    assert chosen(plan, **BF16).line == "fused, torch's operations in bfloat16"


@pytest.mark.parametrize(("fused", "kind"), [(True, FusedLoss), (False, SupervisedLoss)])
def test_the_loss_that_is_made_is_the_one_that_was_chosen(fused: bool, kind: type) -> None:
    """Over the model that was given; what is checkpointed, `test_forward` counts."""
    model = arm("last6_lora", tiny_model())
    loss = ForwardPass(fused=fused, line="").of(model, bf16=False, checkpointed=[Part.VISION])
    assert type(loss) is kind and loss.model is model
