"""A plan applied through PEFT: exactly the planned tensors train, in float32, and the loss is the model's own."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

from tests.conftest import ARMS, shapes_of, strategy, tiny_batch, tiny_model
from trainer.attention import PACKED_SDPA
from trainer.errors import ModelError, TrainingStopped
from trainer.model import (
    POCKET,
    SupervisedLoss,
    apply_plan,
    base_name_of,
    load_model,
    load_tools,
    prove,
    read_config,
    trained_tensors,
)
from trainer.strategy import Lora, Method, ParameterPlan, Strategy, Target, make_plan


def planned(arm: str, model: torch.nn.Module) -> ParameterPlan:
    """The plan of an arm for a model."""
    return make_plan(strategy(arm), shapes_of(model))


@pytest.mark.parametrize("arm", ARMS)
def test_what_trains_is_the_plan(arm: str) -> None:
    """Counts of the plan, made from names and shapes alone, are those of the real PEFT model."""
    model = tiny_model()
    plan = planned(arm, model)
    wrapped = apply_plan(model, plan, seed=1)
    trained = list(trained_tensors(wrapped))
    assert {t.base_name for t in trained} == {t.name for t in plan.trained()}
    counts = plan.trainable_parameters()
    assert sum(t.parameter.numel() for t in trained) == counts["total"]
    for part in ("vision", "aligner", "llm"):
        assert sum(t.parameter.numel() for t in trained if t.part == part) == counts[part]


@pytest.mark.parametrize("arm", ARMS)
def test_trained_tensors_are_float32_on_a_bf16_base(arm: str) -> None:
    """LoRA and full copies alike, or bf16 rounding would decide the comparison; what is frozen stays bf16."""
    model = tiny_model(dtype=torch.bfloat16)
    wrapped = apply_plan(model, planned(arm, model), seed=1)
    assert {t.parameter.dtype for t in trained_tensors(wrapped)} == {torch.float32}
    assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_an_update_of_1e_5_is_not_lost_on_a_bf16_base() -> None:
    """1 + 1e-5 is 1 in bf16; in a float32 copy it is not."""
    model = tiny_model(dtype=torch.bfloat16)
    wrapped = apply_plan(model, planned("last6_full", model), seed=1)
    for tensor in trained_tensors(wrapped):
        with torch.no_grad():
            before = tensor.parameter.clone()
            tensor.parameter.add_(1e-5)
        assert (tensor.parameter != before).all(), tensor.name


def test_modules_to_save_are_wrapped_by_their_full_name() -> None:
    """PEFT matches by suffix: `blocks.1` must not take `blocks.11` along, nor the LLM's layers."""
    model = tiny_model()
    only_one = Strategy(
        Target("1", Method.FULL), Target("all", Method.FROZEN), Target("none", Method.FROZEN), Lora(4, 8, 0.0)
    )
    wrapped = apply_plan(model, make_plan(only_one, shapes_of(model)), seed=1)
    names = [name for name, module in wrapped.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert names == ["base_model.model.model.visual.blocks.1"]


def test_a_model_that_is_not_the_plan_is_refused() -> None:
    """The proof fails loudly when PEFT wrapped something else than planned."""
    model = tiny_model()
    plan = planned("last6_lora", model)
    broken = ParameterPlan(
        tuple(t for t in plan.tensors if t.name != "model.visual.blocks.20.attn.qkv.weight"),
        plan.lora,
        plan.vision_blocks,
    )
    with pytest.raises(TrainingStopped, match=r"unplanned.*blocks\.20\.attn\.qkv"):
        apply_plan(model, broken, seed=1)


def test_base_names_are_found_again_behind_every_wrapping() -> None:
    """Of LoRA pairs, of full copies, of their frozen originals, and behind a data-parallel wrapper."""
    name = "model.visual.blocks.18.attn.qkv"
    assert base_name_of(f"base_model.model.{name}.lora_A.default.weight") == f"{name}.weight"
    assert base_name_of(f"base_model.model.{name}.base_layer.bias") == f"{name}.bias"
    block = "base_model.model.model.visual.blocks.18"
    assert base_name_of(f"{block}.modules_to_save.default.attn.qkv.weight") == f"{name}.weight"
    assert base_name_of(f"module.{block}.original_module.attn.qkv.weight") == f"{name}.weight"


def test_creating_lora_weights_depends_on_the_seed_alone() -> None:
    """Whatever was drawn from torch's generator before, the same seed gives the same A."""
    first = apply_plan(m := tiny_model(), planned("all_lora", m), seed=3)
    torch.rand(17)
    second = apply_plan(m := tiny_model(), planned("all_lora", m), seed=3)
    other = apply_plan(m := tiny_model(), planned("all_lora", m), seed=4)
    a, b, c = ([t.parameter for t in trained_tensors(m) if t.behind_zero] for m in (first, second, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_the_loss_is_the_models_own_token_by_token() -> None:
    """Logits at supervised positions only give the sum that transformers computes from labels over all positions."""
    model, batch = tiny_model(), tiny_batch([9, 14, 6])
    labels = batch.input_ids.masked_fill(~batch.supervised, -100)
    with torch.no_grad():
        nll = SupervisedLoss(model)(supervised=batch.supervised, **batch.model_inputs())
        reference = model(**batch.model_inputs(), labels=labels).loss
    assert nll.shape == (batch.n_supervised,)
    # float32 sums of about fifteen terms in another order
    torch.testing.assert_close(nll.mean(), reference, rtol=1e-6, atol=0)


def test_padding_changes_no_samples_loss() -> None:
    """A short sample has the same losses beside a long one as alone."""
    model = SupervisedLoss(tiny_model())
    short, both = tiny_batch([8], seed=5), tiny_batch([8, 30], seed=5)
    with torch.no_grad():
        alone = model(supervised=short.supervised, **short.model_inputs())
        padded = model(supervised=both.supervised, **both.model_inputs())[: short.n_supervised]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)  # other matrix shapes, other order of sums


def test_a_model_that_is_not_there_is_named(tmp_path: object) -> None:
    """A folder without a checkpoint and another model family are the user's mistakes."""
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(str(tmp_path))
    with pytest.raises(ModelError, match="random:2b, random:4b, random:8b, random:32b"):
        read_config("random:7b")


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """Transformers would fill the gap with random numbers, and every figure after that would be wrong."""
    shutil.copytree(POCKET, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.visual.blocks.20.mlp.linear_fc1.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tools = load_tools("pocket")
    with pytest.raises(ModelError, match=r"1 tensors are missing.*blocks\.20\.mlp\.linear_fc1\.weight"):
        load_model(str(tmp_path / "base"), tools, dtype=torch.float32, attn_impl="sdpa", seed=0)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="complete checkpoint"):
        load_model(str(tmp_path / "base"), tools, dtype=torch.float32, attn_impl="sdpa", seed=0)


def test_an_attention_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the model's folder, which is in order; with a GPU, so that nothing may take its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=r"(?s)model\.attn_impl.*flash_attention_2"):
        load_model("pocket", load_tools("pocket"), dtype=torch.float32, attn_impl="flash_attention_2", seed=0)


def test_without_a_gpu_sdpa_takes_the_place_of_flash_attention() -> None:
    """Existing files name it, and are to run here too; samples of a pack stay blind to each other."""
    model = load_model("pocket", load_tools("pocket"), dtype=torch.float32, attn_impl="flash_attention_2", seed=0)
    assert model.config.text_config._attn_implementation == PACKED_SDPA


def test_a_plan_that_counts_other_parameters_than_the_model_is_refused() -> None:
    """Half of a LoRA pair frozen leaves all names in place and trains half of it."""
    model = tiny_model()
    plan = planned("last6_lora", model)
    wrapped = apply_plan(model, plan, seed=1)
    next(t for t in trained_tensors(wrapped) if t.behind_zero).parameter.requires_grad_(False)
    with pytest.raises(TrainingStopped, match="PEFT trains"):
        prove(wrapped, plan)


def test_a_random_model_borrows_pockets_tokenizer() -> None:
    """It has none of its own, and needs no download."""
    tools = load_tools("random:4b")
    assert tools.tokenizer.convert_tokens_to_ids("<|image_pad|>") is not None
    assert type(tools.image_processor).__name__ == "Qwen2VLImageProcessorPil"


def test_arms_of_one_seed_start_what_they_share_alike() -> None:
    """Each LoRA A has its own stream: the LLM's starts do not depend on how many vision blocks drew before."""
    starts = []
    for arm in ("frozen_vision", "last6_lora", "all_lora"):
        model = tiny_model()
        wrapped = apply_plan(model, planned(arm, model), seed=1)
        starts.append({t.name: t.parameter for t in trained_tensors(wrapped) if ".lora_A." in t.name})
    assert starts[0].keys() < starts[1].keys() < starts[2].keys()
    for fewer, more in itertools.pairwise(starts):
        assert all(torch.equal(tensor, more[name]) for name, tensor in fewer.items())
    first, second = list(starts[2].values())[:2]
    assert not torch.equal(first.flatten()[:32], second.flatten()[:32])
