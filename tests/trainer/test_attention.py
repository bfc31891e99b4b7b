"""Packs: samples of one row are blind to each other, and every attention implementation agrees on it."""

import pytest
import torch
from torch import Tensor

from tests.conftest import PAD_ID, tiny_model, tiny_samples
from trainer.attention import GPU_ONLY, PACKED_SDPA, attention_implementation, segment_lengths
from trainer.data.loader import collate
from trainer.data.template import Sample
from trainer.model import load_model, load_tools

LENGTHS = (7, 12, 20, 9)
GRIDS = [(2, 4), (4, 4), (6, 2)]


def logits(model: torch.nn.Module, samples: list[Sample], *, packed: bool) -> list[Tensor]:
    """Logits (L, vocabulary) of each sample, run together."""
    batch = collate(samples, PAD_ID, packed=packed)
    with torch.no_grad():
        out = model.eval()(**batch.model_inputs(), use_cache=False).logits
    if packed:
        return list(torch.split(out[0], batch.token_counts))
    return [row[:count] for row, count in zip(out, batch.token_counts, strict=True)]


@pytest.mark.parametrize("attention", [PACKED_SDPA, "sdpa", "eager"])
def test_packed_logits_are_those_of_each_sample_alone(attention: str) -> None:
    """Images of three sizes in one pack; ours, and transformers' own dense masks from the same positions. To 1e-5."""
    model = tiny_model(attention=attention)
    samples = tiny_samples(LENGTHS, grids=GRIDS)
    together = logits(model, samples, packed=True)
    for sample, packed in zip(samples, together, strict=True):
        (alone,) = logits(model, [sample], packed=False)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)  # float32 sums in other shapes


def test_packed_and_padded_agree_on_the_real_base() -> None:
    """Pocket's 36 layers with trained weights: the same log-probabilities to 1e-5 of their size."""
    model = load_model("pocket", load_tools("pocket"), dtype=torch.float32, attn_impl="sdpa", seed=0)
    image = model.config.image_token_id
    samples = [
        Sample(**(vars(s) | {"input_ids": s.input_ids.masked_fill(s.image_tokens, image)}))
        for s in tiny_samples(LENGTHS, grids=GRIDS)
    ]
    packed, padded = (logits(model, samples, packed=p) for p in (True, False))
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # logits of up to 20, 36 layers of float32 sums


def test_altering_the_second_sample_leaves_the_first_bit_equal() -> None:
    """Text and image of the neighbour change; the first sample's logits do not, by a single bit."""
    model, (first, second, third, _) = tiny_model(), tiny_samples(LENGTHS, grids=GRIDS)
    text = ~second.image_tokens
    altered = Sample(
        **(
            vars(second)
            | {
                "input_ids": torch.where(text, (second.input_ids + 7) % 100 + 10, second.input_ids),
                "pixel_values": second.pixel_values * 3 + 1,
            }
        )
    )
    before = logits(model, [first, second, third], packed=True)
    after = logits(model, [first, altered, third], packed=True)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_a_mask_or_three_position_rows_would_have_turned_packs_off() -> None:
    """Why a packed batch has no mask and four rows: with either, samples see their neighbours and nobody says so."""
    model = tiny_model(attention="sdpa").eval()
    batch = collate(tiny_samples(LENGTHS), PAD_ID, packed=True)
    inputs = batch.model_inputs()
    right, masked, three = (
        model(**inputs | change, use_cache=False).logits
        for change in (
            {},
            {"attention_mask": torch.ones_like(batch.input_ids)},
            {"position_ids": batch.position_ids[1:]},
        )
    )
    assert not torch.allclose(right, masked, atol=1e-3)
    assert not torch.allclose(right, three, atol=1e-3)


def test_segments_begin_where_the_place_in_the_text_is_zero() -> None:
    """Places 0 1 2 0 1 0 are samples of three, two and one token."""
    assert segment_lengths(torch.tensor([0, 1, 2, 0, 1, 0])) == [3, 2, 1]


def test_auto_needs_no_gpu() -> None:
    """Flash-attention where a GPU has it and the base is bf16, else SDPA; any other name is what it says."""
    assert attention_implementation("auto", torch.float32) == "sdpa"
    assert attention_implementation("auto", torch.bfloat16) in ("sdpa", "flash_attention_2")
    assert attention_implementation("eager", torch.bfloat16) == "eager"
    if not torch.cuda.is_available():
        assert {attention_implementation(asked, torch.bfloat16) for asked in GPU_ONLY} == {"sdpa"}
