"""Captions generated with the built-in base: batches do not matter, and the base really sees."""

import pytest
import torch

from trainer.config.load import load
from trainer.data.digits import ensure_digits
from trainer.data.records import Record, read_records
from trainer.data.template import Encoder
from trainer.datasets import make_encoder
from trainer.generation import Caption, answer_lengths, caption
from trainer.model import Tools, load_model, load_tools
from trainer.scoring import Score


@pytest.fixture(scope="module")
def tools() -> Tools:
    """Tokenizer and image processor of the built-in base."""
    return load_tools("pocket")


@pytest.fixture(scope="module")
def encoder(tools: Tools) -> Encoder:
    """As the pocket profile sets it."""
    return make_encoder(load("last6_lora").config, tools, None)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, ...]:
    """Printed digits that the base has not been trained on: another seed."""
    paths = ensure_digits(tmp_path_factory.mktemp("digits"), seed=99, n_train=1, n_val=24, n_ood=0, look="printed")
    return read_records(paths.val).records


def say(tools: Tools, encoder: Encoder, records: tuple[Record, ...], **options: int) -> list[Caption]:
    """Captions by the base as it is shipped."""
    model = load_model("pocket", tools, dtype=torch.float32, attn_impl="sdpa", seed=0)
    limits = {"batch_size": 24, "max_new_tokens": max(answer_lengths(encoder, records))} | options
    return list(caption(model, encoder, records, **limits))


def test_the_base_sees_printed_digits_it_has_never_met(
    tools: Tools, encoder: Encoder, printed: tuple[Record, ...]
) -> None:
    """F1 well above what guessing could reach: boxes where the digits are, and mostly the right class."""
    total = sum((c.score for c in say(tools, encoder, printed)), Score())
    assert total.f1 > 0.3
    assert total.class_accuracy > 0.6


def test_a_caption_does_not_depend_on_its_batch(tools: Tools, encoder: Encoder, printed: tuple[Record, ...]) -> None:
    """Alone, or beside prompts of other lengths, padded on the left."""
    few = printed[:4]
    together, alone = say(tools, encoder, few), say(tools, encoder, few, batch_size=1)
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.record_id for c in together] == [r.id for r in few]


def test_generation_stops_at_the_limit_and_a_cut_answer_is_scored(
    tools: Tools, encoder: Encoder, printed: tuple[Record, ...]
) -> None:
    """Three tokens are no whole object: nothing predicted, no error."""
    (cut,) = say(tools, encoder, printed[:1], max_new_tokens=3)
    assert (cut.score.predicted, cut.score.f1) == (0, 0)
    assert cut.score.true == len(printed[0].objects)


def test_answers_are_measured_in_tokens(tools: Tools, encoder: Encoder, printed: tuple[Record, ...]) -> None:
    """Of the true answers, as the encoder writes them."""
    lengths = [len(tools.tokenizer(encoder.answer(record)).input_ids) for record in printed]
    assert answer_lengths(encoder, printed) == lengths
