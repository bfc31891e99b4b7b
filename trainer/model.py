"""Loads or builds a Qwen3-VL, applies a parameter plan through PEFT, and proves that the model now is the plan."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.architectures import qwen3_vl_config
from trainer.attention import PACKED_SDPA, attention_implementation
from trainer.errors import ModelError, TrainingStopped
from trainer.seeds import derived_seed
from trainer.strategy import Method, ParameterPlan, Part, part_of

POCKET = Path(__file__).parent / "pocket_base"
_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Tools:
    """What turns text and pixels into a model's inputs."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One tensor that the optimizer updates."""

    name: str
    """Name in the PEFT model."""
    base_name: str
    """Name of the tensor of the base model that it trains."""
    part: Part
    method: Method
    parameter: nn.Parameter
    behind_zero: bool
    """A LoRA A at the start: its gradient is zero until B has left zero."""
    start: int = 0
    """Optimizer steps that are done when it begins to train."""


def folder_of(model: str, *, weights: bool = False) -> Path:
    """The folder that holds configuration, tokenizer and, when asked for, weights of `model.model`.

    A hub id is downloaded into the hub's own cache, the gigabytes of its weights only when they are asked for.

    Raises:
        ModelError: neither a folder nor something the hub's local cache holds.
    """
    if model == "pocket" or model.startswith("random:"):
        return POCKET
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # a hub id needs the network, everything else does not

    try:
        return Path(snapshot_download(model, ignore_patterns=None if weights else ["*.safetensors", "*.bin", "*.pt*"]))
    except Exception as error:  # noqa: BLE001  # the hub raises a dozen kinds, all of which mean: not to be had
        raise ModelError(
            "model.model",
            f"{model!r}, which is no folder, and the hub says: {str(error).splitlines()[0]}",
            "a folder in Hugging Face layout, a hub id, `pocket`, or `random:2b|4b|8b|32b`",
            "check the path, or download the model first",
        ) from None


def read_config(model: str) -> Any:
    """The `Qwen3VLConfig` of a model, without its weights.

    Raises:
        ModelError: it cannot be found or read, or is no Qwen3-VL.
    """
    if model.startswith("random:"):
        return qwen3_vl_config(model.removeprefix("random:"))
    folder = folder_of(model)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            "model.model",
            f"{folder}: {str(error).splitlines()[0]}",
            "a folder in Hugging Face layout with a config.json",
            "check the path",
        ) from None
    if config.model_type != "qwen3_vl":
        raise ModelError("model.model", f"model_type {config.model_type!r}", "qwen3_vl", "use a Qwen3-VL checkpoint")
    return config


def parameter_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every parameter, tied ones once, built on the meta device: no weights are read."""
    with torch.device("meta"):
        empty = Qwen3VLForConditionalGeneration(read_config(model))
    return {name: tuple(p.shape) for name, p in empty.named_parameters()}


def load_tools(model: str) -> Tools:
    """Tokenizer and image processor of a model; a `random:SIZE` borrows those of pocket.

    The image processor is Pillow's variant always: the fast one needs torchvision, and pixels must not depend on what
    happens to be installed.

    Raises:
        ModelError: they cannot be found or read.
    """
    folder = folder_of(model)
    try:
        return Tools(AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder))
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(folder, error) from None


def load_model(
    model: str, tools: Tools, *, dtype: torch.dtype, attn_impl: str, seed: int
) -> Qwen3VLForConditionalGeneration:
    """Load a model's weights, or initialise one at random.

    Args:
        model: `pocket`, `random:SIZE`, a folder in Hugging Face layout, or a hub id.
        tools: of the same model; a random one takes its image and video token ids from the tokenizer.
        dtype: of the weights in memory.
        attn_impl: see `attention_implementation`; under `sdpa`, packs are attended to sample by sample.
        seed: of a random initialisation.

    Raises:
        ModelError: it cannot be found or read.
    """
    attn_impl = attention_implementation(attn_impl, dtype)
    try:
        if model.startswith("random:"):
            loaded = _random(read_config(model), tools, dtype, attn_impl, seed)
        else:
            loaded = _loaded(folder_of(model, weights=True), dtype, attn_impl)
        if attn_impl == "sdpa":
            loaded.set_attn_implementation({"text_config": PACKED_SDPA, "vision_config": "sdpa"})
        return loaded
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            "model.attn_impl",
            f"{attn_impl}: {str(error).splitlines()[0]}",
            "sdpa or eager, or an implementation that is installed",
            "install it, or set model.attn_impl to sdpa",
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder_of(model), error) from None


def _random(
    config: Any, tools: Tools, dtype: torch.dtype, attn_impl: str, seed: int
) -> Qwen3VLForConditionalGeneration:
    for kind in ("image", "video"):
        setattr(config, f"{kind}_token_id", tools.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    torch.manual_seed(seed)
    build: Callable[..., Qwen3VLForConditionalGeneration] = Qwen3VLForConditionalGeneration._from_config
    return build(config, attn_implementation=attn_impl, dtype=dtype)


def _loaded(folder: Path, dtype: torch.dtype, attn_impl: str) -> Qwen3VLForConditionalGeneration:
    load: Callable[..., tuple[Qwen3VLForConditionalGeneration, dict[str, Any]]]
    load = Qwen3VLForConditionalGeneration.from_pretrained  # type: ignore[assignment]  # a pair, as asked for below
    model, info = load(folder, dtype=dtype, attn_implementation=attn_impl, output_loading_info=True)
    # transformers fills what is missing with random numbers and only says so in a log
    if absent := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise ModelError(
            "model.model",
            f"{folder}: {len(absent)} tensors are missing or of another shape: {', '.join(absent[:5])}",
            "a checkpoint with all of the model's weights",
            "merge or download it again",
        )
    return model


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        "model.model",
        f"{folder}: {str(error).splitlines()[0]}",
        "a complete checkpoint in Hugging Face layout (config, safetensors, tokenizer, preprocessor_config.json)",
        "check the folder",
    )


def apply_plan(model: Qwen3VLForConditionalGeneration, plan: ParameterPlan, *, seed: int) -> PeftModel:
    """Wrap a base model with PEFT as the plan says; trainable tensors become float32 whatever the base's dtype.

    PEFT makes LoRA float32 on a bf16 base and leaves full copies in bf16, where small updates vanish; that alone would
    make LoRA look better, so both are made float32 here.
    """
    lora_patterns = dict.fromkeys(t.rule.removesuffix(r"\.weight") for t in plan.trained() if t.method is Method.LORA)
    config = LoraConfig(
        r=plan.lora.rank,
        lora_alpha=plan.lora.alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with any number
        lora_dropout=plan.lora.dropout,
        target_modules="|".join(f"({pattern})" for pattern in lora_patterns) or DUMMY_TARGET_MODULES,
        modules_to_save=list(plan.modules(Method.FULL)) or None,
    )
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)  # noqa: S101  # a mixed model needs mixed=True
    # Every LoRA starts from its own stream, so that arms of one seed share the start of what they both train.
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            torch.manual_seed(derived_seed(seed, "lora", base_name_of(name)))
            module.reset_lora_parameters(_ADAPTER, init_lora_weights=True)  # type: ignore[no-untyped-call]  # PEFT
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    prove(peft_model, plan)
    return peft_model


def trained_tensors(model: nn.Module) -> Iterator[TrainedTensor]:
    """Every tensor of a PEFT model that requires a gradient, with the base tensor it trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            base_name = base_name_of(name)
            is_lora = ".lora_" in name
            method = Method.LORA if is_lora else Method.FULL
            yield TrainedTensor(name, base_name, part_of(base_name), method, parameter, ".lora_A." in name)


def dtypes(model: nn.Module) -> dict[str, str]:
    """Part -> number format of what trains of it, or of the whole part where nothing does."""
    found = {part_of(base_name_of(name)).value: p.dtype for name, p in model.named_parameters()}
    found |= {tensor.part.value: tensor.parameter.dtype for tensor in trained_tensors(model)}
    return {part: str(dtype).removeprefix("torch.") for part, dtype in found.items()}


def base_name_of(name: str) -> str:
    """The base model's name of a tensor of the PEFT model (or of the base model itself)."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    name = name.replace(f".modules_to_save.{_ADAPTER}", "").replace(".original_module", "").replace(".base_layer", "")
    return re.sub(rf"\.lora_[AB]\.{_ADAPTER}\.weight$", ".weight", name)


def prove(model: PeftModel, plan: ParameterPlan) -> None:
    """What PEFT wrapped and what requires a gradient must be the plan, tensor by tensor.

    Raises:
        TrainingStopped: it is not; this is our bug or a change in PEFT, never the user's mistake.
    """
    wrapped = {
        Method.LORA: {base_name_of(n) for n, m in model.named_modules() if isinstance(m, LoraLayer)},
        Method.FULL: {base_name_of(n) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)},
    }
    trained = {t.base_name for t in trained_tensors(model)}
    pairs: Mapping[str, tuple[set[str], set[str]]] = {
        "LoRA modules": (wrapped[Method.LORA], set(plan.modules(Method.LORA))),
        "full copies": (wrapped[Method.FULL], set(plan.modules(Method.FULL))),
        "trained tensors": (trained, {t.name for t in plan.trained()}),
    }
    for what, (got, planned) in pairs.items():
        if got != planned:
            raise TrainingStopped(
                f"PEFT did not do what the plan says: {what}: "
                f"missing {sorted(planned - got)[:5]}, unplanned {sorted(got - planned)[:5]}"
            )
    counts = {"total": 0, **{part.value: 0 for part in Part}}
    for tensor in trained_tensors(model):
        for key in ("total", tensor.part.value):
            counts[key] += tensor.parameter.numel()
    if counts != plan.trainable_parameters():
        raise TrainingStopped(f"PEFT trains {counts} parameters, the plan {plan.trainable_parameters()}")


class SupervisedLoss(nn.Module):
    """A captioning model as one function from inputs to the loss of every supervised token.

    The language model head is applied at supervised positions only: logits of prompt, image and padding tokens are
    never made (at Qwen's vocabulary of 151,936 they would dominate memory).
    """

    def __init__(self, model: nn.Module, *, bf16: bool = False) -> None:
        """Wrap a (PEFT-wrapped) `Qwen3VLForConditionalGeneration`; with `bf16` it computes under autocast."""
        super().__init__()
        self.model, self._bf16 = model, bf16

    def forward(self, supervised: Tensor, **inputs: Tensor) -> Tensor:
        """Negative log-likelihood of each supervised token.

        Args:
            supervised: (B, L) bool; the first token of a sample is never supervised.
            inputs: what `Qwen3VLForConditionalGeneration.forward` takes; `input_ids` is (B, L).

        Returns:
            (number of supervised tokens,) float32, nats, row by row.
        """
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # Here and not around the call: DeepSpeed's engine switches an autocast of its callers off.
        with torch.autocast(supervised.device.type, torch.bfloat16, enabled=self._bf16):
            hidden = base.model(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
            targets = inputs["input_ids"][:, 1:][supervised[:, 1:]]  # (T,)
            logits = base.lm_head(hidden[:, :-1][supervised[:, 1:]])  # (T, vocabulary)
            return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
