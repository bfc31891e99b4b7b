"""Decides which forward pass a run trains with, and says so: this package's, or transformers' own."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from trainer.fused import native
from trainer.fused.features import NOTHING, Keep
from trainer.fused.forward import FusedLoss
from trainer.fused.products import prefers_onednn
from trainer.gradient_checkpointing import checkpoint_layers
from trainer.model import SupervisedLoss
from trainer.strategy import ParameterPlan, Part

_FLASH_CAPABILITY = (8, 0)
"""Of GPUs that torch's flash-attention runs on: Ampere and newer."""
_OWN_ATTENTION = ("auto", "sdpa")
_LAYERS = ("model.language_model.layers.", "model.language_model.norm.", "model.visual.blocks.")
_ALIGNER = ("model.visual.merger.", "model.visual.deepstack_merger_list.")


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Which forward pass, and why."""

    fused: bool
    line: str
    """For people: what computes, or why it is not the fast one."""
    keep: Keep = NOTHING
    """What of images it keeps."""

    def of(self, model: PeftModel, *, bf16: bool, checkpointed: Collection[Part]) -> nn.Module:
        """A model on its device as a function from inputs to the loss of every supervised token.

        Args:
            model: wrapped by a plan.
            bf16: whether products are made in bfloat16.
            checkpointed: parts whose layers run forward again in the backward pass.
        """
        layers = checkpoint_layers(model, checkpointed)
        if not self.fused:
            return SupervisedLoss(model, bf16=bf16)
        return FusedLoss(model, bf16=bf16, checkpointed=layers, keep=self.keep)


def choose(plan: ParameterPlan, *, asked: bool, attn_impl: str, weights: str, bf16: bool, keep: Keep) -> ForwardPass:
    """The fused pass where it is asked for and knows how.

    Args:
        plan: what trains; the fused pass trains layers, blocks and aligner, in full or by LoRA.
        asked: `model.fused`.
        attn_impl: `model.attn_impl`; an implementation that is asked for by its name is transformers' own.
        weights: `model.torch_dtype`.
        bf16: whether products are made in bfloat16.
        keep: what of images it may keep.
    """
    unknown = [t.name for t in plan.trained() if not t.name.startswith(_LAYERS + _ALIGNER)]
    why = ""
    if not asked:
        why = "model.fused is false"
    elif attn_impl not in _OWN_ATTENTION:
        why = f"model.attn_impl is {attn_impl}"
    elif unknown:
        why = f"{unknown[0]} trains"
    elif bf16 and weights != "bfloat16":
        why = f"training.bf16 is true, and weights are {weights}"
    elif torch.cuda.is_available() and not bf16:
        why = "on a GPU flash-attention computes in bfloat16, and training.bf16 is false"
    elif torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < _FLASH_CAPABILITY:
        why = f"flash-attention needs a GPU of compute capability 8.0, and this one has {found[0]}.{found[1]}"
    if why:
        return ForwardPass(fused=False, line=f"transformers' own, since {why}")
    return ForwardPass(fused=True, line=f"fused, {_parts(bf16=bf16)}", keep=keep)


def _parts(*, bf16: bool) -> str:
    """What computes on this machine."""
    if torch.cuda.is_available():
        return "flash-attention over the samples of a pack"
    if bf16:
        return "torch's operations in bfloat16"
    small = (
        "compiled kernels"
        if native.library() is not None
        else "torch's operations (the kernels are not compiled: no C++ compiler that works, or VTE_NATIVE=0)"
    )
    return f"{small}, products by {'oneDNN' if prefers_onednn() else 'MKL'}"
