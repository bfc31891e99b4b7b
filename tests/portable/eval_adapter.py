"""Eval loss of an adapter with plain transformers and PEFT; imports nothing of this project and runs without it.

usage: python eval_adapter.py BASE ADAPTER CONVERSATIONS     prints nats per supervised token

CONVERSATIONS is a JSON list of {"image": path, "messages": [system, user], "answer": text}.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

base, adapter, conversations = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
processor = Qwen2VLImageProcessorPil.from_pretrained(base)
model = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

total, count = 0.0, 0
for item in json.loads(Path(conversations).read_text(encoding="utf-8")):
    pixels = processor(images=[Image.open(item["image"]).convert("RGB")], return_tensors="pt")
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    prompt = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)).input_ids
    answer_ids = tokenizer(item["answer"] + "<|im_end|>").input_ids
    input_ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        logits = model(
            input_ids=input_ids, mm_token_type_ids=(input_ids == image_id).int(), **pixels, use_cache=False
        ).logits[0, len(prompt_ids) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids), reduction="none")
    total, count = total + nll.double().sum().item(), count + len(answer_ids)
print(total / count)
