"""What one writes without this project: transformers' `generate` under a PEFT adapter, greedily, in batches.

    python benchmarks/plain_generate.py BASE ADAPTER MESSAGES.json MAX_NEW_TOKENS IMAGE...     # an answer a line

The baseline of predicting.py; it imports nothing of ours. Prompts are what Qwen3-VL's processor makes of messages and
images (that class itself needs torchvision): the chat template, one token a merged patch, padding on the left.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE = "<|image_pad|>"


class Plain:
    """A model that answers one request about each image."""

    def __init__(self, model: Any, tools: str | Path, messages: list[dict[str, Any]], *, max_new_tokens: int) -> None:
        """Take a loaded model.

        Args:
            model: PEFT-wrapped, on its device.
            tools: folder of its tokenizer and image processor.
            messages: system and user message, with one image.
            max_new_tokens: tokens after which an answer is cut.
        """
        self.model, self._max_new_tokens = model, max_new_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tools, padding_side="left")
        self._images = Qwen2VLImageProcessorPil.from_pretrained(tools)
        self._prompt = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def answers(self, paths: Sequence[Path], *, batch_size: int) -> list[str]:
        """The answer about each image, in their order."""
        texts = []
        for first in range(0, len(paths), batch_size):
            inputs = self._inputs(paths[first : first + batch_size]).to(self.model.device)
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _inputs(self, paths: Sequence[Path]) -> Any:
        seen = self._images(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // self._images.merge_size**2).tolist()
        prompts = [self._prompt.replace(IMAGE, IMAGE * count) for count in counts]
        inputs = self.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        kinds = (inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)).int()
        inputs.update({"mm_token_type_ids": kinds, **seen})
        return inputs


def load(
    base: str | Path, adapter: str | Path, messages: list[dict[str, Any]], *, dtype: str, max_new_tokens: int
) -> Plain:
    """Base and adapter, on the CPU, as the two libraries load them."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=dtype)
    return Plain(PeftModel.from_pretrained(model, adapter).eval(), base, messages, max_new_tokens=max_new_tokens)


if __name__ == "__main__":
    where, trained, request, longest, *images = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    torch.set_grad_enabled(False)
    plain = load(where, trained, asked, dtype="float32", max_new_tokens=int(longest))
    for answer in plain.answers([Path(each) for each in images], batch_size=1):
        print(answer)
