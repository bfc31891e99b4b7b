"""Lets the model caption images: batched greedy generation from prompts, and the score of what it said."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from trainer.data.answer import parse_answer
from trainer.data.records import Record
from trainer.data.template import END_TOKEN, Encoder, Sample
from trainer.scoring import Score, score_image


@dataclass(frozen=True, slots=True)
class Caption:
    """What the model said of one record, beside what is true."""

    record_id: str
    text: str
    truth: str
    score: Score


def caption(
    model: Any, encoder: Encoder, records: Sequence[Record], *, batch_size: int, max_new_tokens: int
) -> Iterator[Caption]:
    """Generate the answer of each record, greedily, and score it.

    Args:
        model: a (PEFT-wrapped) `Qwen3VLForConditionalGeneration`.
        encoder: makes the prompts, in the frame that the answers are in.
        records: what to caption; yielded in this order.
        batch_size: records a forward pass.
        max_new_tokens: tokens after which an answer is cut.
    """
    prompts = map(encoder.prompt, records)
    answers = generate(model, encoder, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    for record, text in zip(records, answers, strict=True):
        truth = encoder.answer(record)
        yield Caption(record.id, text, truth, score_image(parse_answer(text), parse_answer(truth)))


def generate(
    model: Any,
    encoder: Encoder,
    prompts: Iterable[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: Callable[[], StoppingCriteria] | None = None,
) -> Iterator[str]:
    """The answer to each prompt, greedily: the most probable token each time.

    Args:
        model: a (PEFT-wrapped) `Qwen3VLForConditionalGeneration`.
        encoder: that has made the prompts.
        prompts: taken as they are needed, answered in this order.
        batch_size: prompts a forward pass.
        max_new_tokens: tokens after which an answer is cut.
        stop: makes what ends answers before their end mark, anew for each batch.
    """
    model.eval()
    tokenizer: Any = encoder.tokenizer
    # float32 copies of trained modules meet bf16 activations where the base is bf16
    mixed = model.get_input_embeddings().weight.dtype is torch.bfloat16
    waiting = iter(prompts)
    while chunk := list(islice(waiting, batch_size)):
        inputs = _left_padded(chunk, tokenizer.pad_token_id, model.device)
        # not no_grad: where a token is mostly overhead it takes 7 % less time; nothing is trained on what this makes
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.convert_tokens_to_ids(END_TOKEN),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([stop()] if stop else []),
            )
        yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_lengths(encoder: Encoder, records: Iterable[Record]) -> list[int]:
    """Tokens of each record's true answer: generation need not go on much further than the longest."""
    return [len(encoder.tokenizer(encoder.answer(record)).input_ids) for record in records]


def _left_padded(samples: Sequence[Sample], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of `generate` for prompts of different lengths (B, L), padded on the left so that all end together."""

    def pad(rows: Sequence[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), True, value, padding_side="left").to(device)

    return {
        "input_ids": pad([s.input_ids for s in samples], pad_id),
        "attention_mask": pad([torch.ones_like(s.input_ids) for s in samples], 0),
        "mm_token_type_ids": pad([s.image_tokens.int() for s in samples], 0),
        "pixel_values": torch.cat([s.pixel_values for s in samples]).to(device),
        "image_grid_thw": torch.cat([s.image_grid_thw for s in samples]).to(device),
    }
