"""Encoding: token ids, supervision, positions and patches against the model's own code and processor."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from trainer.data.geometry import Geometry, to_pixels
from trainer.data.loader import collate
from trainer.data.records import Object, Picture, Record
from trainer.data.template import END_TOKEN, IMAGE_TOKEN, Encoder, mrope_positions, parse_answer
from trainer.errors import DataError, ModelError

Make = Callable[..., Any]


@pytest.fixture
def model(tokenizer: Qwen2Tokenizer) -> Qwen3VLModel:
    """Two layers each of width 32, random, with this tokenizer's image token."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    return Qwen3VLModel(config).eval()


@pytest.mark.parametrize("scheme", ["A", "B"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_answer_and_its_end_mark_are_supervised_and_nothing_else(
    make_encoder: Make, make_record: Make, tokenizer: Qwen2Tokenizer, scheme: str, language: str
) -> None:
    """Decoding the supervised tokens gives the answer text and the end mark exactly; nothing follows them."""
    encoder = make_encoder(scheme=scheme, language=language)
    record = make_record(objects=(Object(Geometry("bbox_2d", (1, 2, 33, 44)), '七/ red, café 🔩\\"\n'),))
    sample = encoder.encode(record)
    assert tokenizer.decode(sample.input_ids[sample.supervised]) == encoder.answer(record) + END_TOKEN
    assert sample.supervised[-1]
    assert sample.supervised.int().diff().clamp(min=0).sum() == 1


def test_the_tokens_are_those_of_the_whole_rendered_conversation(
    make_encoder: Make, make_record: Make, tokenizer: Qwen2Tokenizer
) -> None:
    """Prompt and answer are tokenised apart; together they are what the template gives when tokenised at once."""
    encoder, record = make_encoder(), make_record(size=(96, 64))
    messages = [*encoder.messages(record), {"role": "assistant", "content": encoder.answer(record)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    expected = tokenizer(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * 6)).input_ids
    assert encoder.encode(record).input_ids.tolist() == expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(17, 200), st.integers(17, 200)),
    n_images=st.integers(1, 3),
    desc=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    max_pixels=st.sampled_from([None, 64 * 64, 96 * 96]),
    truncation=st.sampled_from(["raise", "right"]),
    max_length=st.sampled_from([300, 420, 4096]),
)
def test_length_is_the_length_of_the_encoded_sample(
    make_encoder: Make, make_record: Make, size: tuple[int, int], n_images: int, desc: str, max_pixels: int | None,
    truncation: str, max_length: int,
) -> None:  # fmt: skip
    """For any size, number of images, limit and text, known without opening the image; else `problem` says why not."""
    encoder = make_encoder(max_pixels=max_pixels, truncation=truncation, max_length=max_length)
    record = make_record(size=size, n_images=n_images, objects=(Object(Geometry("bbox_2d", (1, 2, 9, 9)), desc),))
    if encoder.problem(record) is None:
        assert encoder.length(record) == len(encoder.encode(record).input_ids) <= max_length
    else:
        assert encoder.length(record) > max_length
        with pytest.raises(DataError):
            encoder.encode(record)


@pytest.mark.parametrize("n_images", [1, 2, 3])
@pytest.mark.parametrize("size", [(32, 32), (320, 64), (64, 320), (100, 70)])
def test_positions_equal_the_models_own(
    make_encoder: Make, make_record: Make, model: Qwen3VLModel, n_images: int, size: tuple[int, int]
) -> None:
    """M-RoPE of `Qwen3VLModel.get_rope_index`, for one and several images of any shape."""
    sample = make_encoder().encode(make_record(size=size, n_images=n_images))
    expected, _ = model.get_rope_index(
        sample.input_ids[None], sample.image_tokens[None].int(), image_grid_thw=sample.image_grid_thw
    )
    assert torch.equal(sample.position_ids, expected[:, 0])


def test_positions_of_images_of_different_sizes_and_of_text_alone(model: Qwen3VLModel) -> None:
    """The same function for grids that differ, an image at either end, and no image."""
    image = torch.tensor([1] * 6 + [0] * 3 + [1] * 2 + [0] + [1] * 8).bool()
    grid = torch.tensor([[1, 4, 6], [1, 4, 2], [1, 4, 8]])
    expected, _ = model.get_rope_index(image.long()[None], image.int()[None], image_grid_thw=grid)
    assert torch.equal(mrope_positions(image, grid, 2), expected[:, 0])
    text = torch.zeros(5, dtype=torch.bool)
    assert mrope_positions(text, grid[:0], 2).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_padded_batch_gives_each_sample_what_it_gets_alone(
    make_encoder: Make, make_record: Make, model: Qwen3VLModel
) -> None:
    """Hidden states of real tokens: our positions and padding against the model working everything out itself."""
    encoder = make_encoder()
    samples = [encoder.encode(make_record(n, size)) for n, size in enumerate([(64, 64), (160, 32), (96, 96)])]
    batch = collate(samples, encoder.pad_id)
    with torch.no_grad():
        together = model(**batch.model_inputs()).last_hidden_state
        for row, sample in enumerate(samples):
            alone = model(
                input_ids=sample.input_ids[None],
                mm_token_type_ids=sample.image_tokens[None].int(),
                pixel_values=sample.pixel_values,
                image_grid_thw=sample.image_grid_thw,
            ).last_hidden_state[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_images_keep_their_size_and_their_pixels(make_encoder: Make, make_record: Make) -> None:
    """Sides that are multiples of 32: the patches hold the very pixels, however large or small the image is."""
    record = make_record(size=(64, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(record.images[0].path)
    sample = make_encoder().encode(record)
    # (grid rows / 2, grid columns / 2, 2, 2, colour, time, 16, 16): merged groups of 2 x 2 patches come together
    patches = sample.pixel_values.reshape(1, 2, 2, 2, 3, 2, 16, 16)
    image = patches[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(32, 64, 3)
    assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))
    assert torch.equal(patches[:, :, :, :, :, 0], patches[:, :, :, :, :, 1])


@pytest.mark.parametrize(
    ("size", "max_pixels", "shown"),
    [
        ((2048, 2048), None, (2048, 2048)),
        ((100, 70), None, (96, 64)),
        ((50, 17), None, (64, 32)),
        ((640, 320), 320 * 160, (320, 160)),
        ((640, 320), 640 * 320, (640, 320)),
    ],
)
def test_images_are_resized_only_by_max_pixels_and_to_whole_tokens(
    make_encoder: Make, make_record: Make, size: tuple[int, int], max_pixels: int | None, shown: tuple[int, int]
) -> None:
    """Sides are rounded to multiples of 32, as the processor does; `max_pixels` alone makes an image smaller."""
    encoder, record = make_encoder(max_pixels=max_pixels, max_length=8192), make_record(size=size)
    assert encoder.shown_sizes(record) == [shown]
    assert encoder.encode(record).image_grid_thw.tolist() == [[1, shown[1] // 16, shown[0] // 16]]


def test_pixel_coordinates_follow_the_resized_image_and_normalised_ones_do_not(
    make_encoder: Make, make_record: Make
) -> None:
    """With `none` the answer names pixels of the image that the model sees; norm1000 stays."""
    record = make_record(size=(640, 320), objects=(Object(Geometry("bbox_2d", (64, 32, 640, 320)), "x"),))
    small = 320 * 160
    assert parse_answer(make_encoder(emit_norm="none").answer(record))[0].points == (64, 32, 640, 320)
    encoder = make_encoder(emit_norm="none", max_pixels=small)
    found = parse_answer(encoder.answer(record))[0]
    assert found.points == (32, 16, 320, 160)
    back = to_pixels(Geometry(found.kind, found.points), (640, 320), "none", encoder.shown_sizes(record)[0])
    assert back == record.objects[0].geometry
    assert make_encoder(max_pixels=small).answer(record) == make_encoder().answer(record)


def test_the_exif_orientation_is_applied_and_colour_is_rgb(
    make_encoder: Make, make_record: Make, tmp_path: Path
) -> None:
    """A grey photo stored lying on its side is encoded like the same picture stored upright."""
    pixels = np.random.default_rng(1).integers(0, 256, (64, 32), dtype=np.uint8)
    upright, lying = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    lying.save(tmp_path / "lying.png", exif=exif)
    record = make_record(size=(32, 64))
    pictures = [Picture(tmp_path / f"{name}.png", *record.size) for name in ("upright", "lying")]
    samples = [make_encoder().encode(replace(record, images=(picture,))) for picture in pictures]
    assert torch.equal(samples[0].pixel_values, samples[1].pixel_values)


def test_truncation_right_cuts_the_answer_at_the_limit(
    make_encoder: Make, make_record: Make, tokenizer: Qwen2Tokenizer
) -> None:
    """The sample is the beginning of the uncut one; the end mark goes with the rest."""
    record = make_record()
    whole = make_encoder().encode(record)
    cut = make_encoder(truncation="right", max_length=len(whole.input_ids) - 5).encode(record)
    assert torch.equal(cut.input_ids, whole.input_ids[:-5])
    assert torch.equal(cut.supervised, whole.supervised[:-5])
    assert torch.equal(cut.position_ids, whole.position_ids[:, :-5])
    assert torch.equal(cut.pixel_values, whole.pixel_values)


def test_a_record_that_does_not_fit_is_an_error_that_names_it(make_encoder: Make, make_record: Make) -> None:
    """Under `raise` one token too many; in either mode a prompt that leaves no room for an answer."""
    record = make_record(7)
    length = make_encoder().length(record)
    n_prompt = len(make_encoder().prompt(record).input_ids)
    assert make_encoder(max_length=length).problem(record) is None
    with pytest.raises(DataError, match=f"train.jsonl:7\n.*{length} tokens, more than {length - 1}"):
        make_encoder(max_length=length - 1).encode(record)
    assert make_encoder(max_length=n_prompt + 1, truncation="right").encode(record).supervised.sum() == 1
    for truncation in ("raise", "right"):
        with pytest.raises(DataError, match=f"prompt and image alone take {n_prompt} tokens"):
            make_encoder(max_length=n_prompt, truncation=truncation).encode(record)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (17 * 201, 17)])
def test_an_image_too_thin_for_a_token_is_refused(make_encoder: Make, make_record: Make, size: tuple[int, int]) -> None:
    """The processor would blow up, or shrink, what rounds to no token at all, and refuses sides of 200 to 1."""
    assert "too thin" in str(make_encoder().problem(make_record(size=size)))


def test_a_prompt_is_the_sample_up_to_its_answer(make_encoder: Make, make_record: Make) -> None:
    """For generation: the same tokens and pixels, nothing supervised."""
    record, encoder = make_record(), make_encoder()
    sample, prompt = encoder.encode(record), encoder.prompt(record)
    assert torch.equal(prompt.input_ids, sample.input_ids[~sample.supervised])
    assert torch.equal(prompt.position_ids, sample.position_ids[:, ~sample.supervised])
    assert torch.equal(prompt.pixel_values, sample.pixel_values)
    assert not prompt.supervised.any()


@pytest.mark.parametrize(
    "template", [None, "{{ messages[1].content[1].text }}", "{{ fail() }}", "<|image_pad|>{{ messages|length }}"]
)
def test_a_tokenizer_of_another_model_is_refused(
    tokenizer: Qwen2Tokenizer,
    image_processor: Qwen2VLImageProcessorPil,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
) -> None:
    """No chat template, none with images, one that fails, one whose answer does not follow the prompt."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ModelError, match="chat template"):
        Encoder(
            tokenizer,
            image_processor,
            scheme="A",
            language="en",
            emit_norm="norm1000",
            taxonomy=None,
            max_length=100,
            truncation="raise",
            max_pixels=None,
        )


def test_a_tokenizer_without_image_tokens_is_refused(make_encoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is named."""
    monkeypatch.setattr("trainer.data.template.IMAGE_TOKEN", "<|picture|>")
    with pytest.raises(ModelError, match=r"no token <\|picture\|>"):
        make_encoder()


def test_records_keep_their_name_and_domain(make_encoder: Make, make_record: Make) -> None:
    """Losses are reported by them."""
    record: Record = make_record(3, domain="night")
    sample = make_encoder().encode(record)
    assert (sample.record_id, sample.domain) == ("train.jsonl:3", "night")
