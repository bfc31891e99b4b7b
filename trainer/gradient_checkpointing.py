"""Gradient checkpointing where it saves something: never re-entrant, and not where nothing trains at or before a layer.

A checkpointed layer keeps its input alone and runs forward again in the backward pass (Chen et al. 2016,
arXiv:1604.06174). A frozen layer that stands before everything trained keeps nothing anyway, so it is left alone: the
frozen prefix of the vision tower runs once a step, whatever is checkpointed behind it.
"""

import re
from collections.abc import Collection
from typing import Any

from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.model import trained_tensors
from trainer.strategy import Part

_LAYER = re.compile(r"model\.(?:visual\.blocks|language_model\.layers)\.(\d+)\.")


def checkpoint_layers(model: PeftModel, parts: Collection[Part]) -> list[str]:
    """Turn gradient checkpointing on for the vision blocks or the LLM layers that have a gradient to pass on.

    Args:
        model: wrapped by a plan.
        parts: `VISION` for the vision blocks, `LLM` for the language model's layers.

    Returns:
        Names of the checkpointed layers in the base model, in the order of the forward pass.
    """
    if not parts:
        return []
    first = _first_layers(model)
    base: Any = model.get_base_model()
    layers = {Part.VISION: base.model.visual.blocks, Part.LLM: base.model.language_model.layers}
    stems = {Part.VISION: "model.visual.blocks", Part.LLM: "model.language_model.layers"}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # the re-entrant form needs them; here they would give frozen layers a graph
    checkpointed = []
    for part, of_part in layers.items():
        for index, layer in enumerate(of_part):
            on = part in parts and index >= first.get(part, len(of_part))
            for module in layer.modules():  # a layer that trains in full is PEFT's wrapper around its copies
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = on
            if on:
                checkpointed.append(f"{stems[part]}.{index}")
    return checkpointed


def _first_layers(model: PeftModel) -> dict[Part, int]:
    """Part -> its first layer that receives or makes a gradient; a part that has none is absent."""
    first: dict[Part, int] = {}
    for tensor in trained_tensors(model):
        match = _LAYER.match(tensor.base_name)
        behind_all = tensor.part is Part.LLM and ".embed_tokens." not in tensor.base_name
        index = int(match.group(1)) if match else 10**9 if behind_all else 0
        if tensor.part is not Part.ALIGNER:
            first[tensor.part] = min(index, first.get(tensor.part, index))
        if tensor.part is not Part.LLM:  # image features enter the language model before its first layer
            first[Part.LLM] = 0
    return first
