"""The fused pass is the plain one: losses and every gradient, for every strategy, however samples are laid out."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import PAD_ID, tiny_model, tiny_samples
from tests.trainer.fused.conftest import (
    FILES,
    PASSES,
    Unrounded,
    altogether,
    arm,
    distance,
    distances,
    step,
    widened,
)
from trainer.build import load_base, prepare
from trainer.config.load import load
from trainer.data.loader import Batch, collate
from trainer.data.template import Sample, mrope_positions
from trainer.fused.choice import ForwardPass
from trainer.fused.forward import FusedLoss
from trainer.fused.layers import DecoderLayer, VisionBlock
from trainer.model import SupervisedLoss, load_tools, trained_tensors
from trainer.strategy import Part

GRIDS = [(2, 4), (4, 4), (6, 2)]
EXACT = 1e-12  # float64, other order of sums


def two_images(seed: int) -> Sample:
    """A sample of two images with words before, between and behind them."""
    one, two = tiny_samples([9, 12], seed=seed, grids=GRIDS)
    ids, images = torch.cat([one.input_ids, two.input_ids]), torch.cat([one.image_tokens, two.image_tokens])
    grids = torch.cat([one.image_grid_thw, two.image_grid_thw])
    return replace(
        one,
        input_ids=ids,
        image_tokens=images,
        supervised=torch.arange(len(ids)) >= len(ids) - 4,
        position_ids=mrope_positions(images, grids, 2),
        pixel_values=torch.cat([one.pixel_values, two.pixel_values]),
        image_grid_thw=grids,
    )


def after(words: int, samples: list[Sample]) -> list[Sample]:
    """The samples behind so many words that all of them begin with."""
    first = torch.randint(10, 128, (words,), generator=torch.Generator().manual_seed(8))

    def longer(sample: Sample) -> Sample:
        images = torch.cat([torch.zeros(words, dtype=torch.bool), sample.image_tokens])
        return replace(
            sample,
            input_ids=torch.cat([first, sample.input_ids]),
            image_tokens=images,
            supervised=torch.cat([torch.zeros(words, dtype=torch.bool), sample.supervised]),
            position_ids=mrope_positions(images, sample.image_grid_thw, 2),
        )

    return [longer(sample) for sample in samples]


SAMPLES = tiny_samples((7, 12, 20, 9), grids=GRIDS)
BATCHES: dict[str, Batch] = {
    "packed": collate(SAMPLES, PAD_ID, packed=True),
    "padded": collate(SAMPLES, PAD_ID, packed=False),
    "one sample": collate(SAMPLES[:1], PAD_ID, packed=True),
    "two images in a sample": collate([two_images(1), SAMPLES[2], two_images(2)], PAD_ID, packed=True),
    "a common beginning, packed": collate(after(13, SAMPLES), PAD_ID, packed=True),
    "a common beginning, padded": collate(after(13, SAMPLES), PAD_ID, packed=False),
    "a silent pack": collate(SAMPLES[:2], PAD_ID, packed=True).silent(),
}


@functools.cache
def passes(name: str, dtype: torch.dtype) -> tuple[SupervisedLoss, FusedLoss]:
    """Both over one and the same model: where the fused pass lays weights end to end, the plain one reads them."""
    model = arm(name, tiny_model())
    plain, fused = (of(widened(model) if dtype is torch.float64 else model).train() for of in PASSES)
    return plain, fused


def test_every_strategy_file_is_compared() -> None:
    """A new one must be entered in the table."""
    folder = Path(__file__).parents[3] / "experiments"
    assert {path.stem for path in folder.glob("*.yaml")} - {"base"} == set(FILES)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", FILES)
def test_in_float64_both_passes_are_one_function(name: str, batch: str) -> None:
    """Losses and every gradient, to 1e-12."""
    with Unrounded():
        (plain, expected), (fused, got) = (step(of, BATCHES[batch]) for of in passes(name, torch.float64))
    assert fused.dtype is torch.float64 and fused.shape == plain.shape
    assert distance(fused, plain) < EXACT
    assert max(distances(got, expected).values()) < EXACT


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["last6_lora", "all_lora", "all_full"])
def test_in_float32_they_differ_by_rounding(name: str, batch: str) -> None:
    """Each loss to 1e-6, every gradient to 1e-5."""
    (plain, expected), (fused, got) = (step(of, BATCHES[batch]) for of in passes(name, torch.float32))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    assert max(distances(got, expected).values()) < 1e-5


@pytest.mark.parametrize("name", ["last6_lora", "all_full"])
def test_without_compiled_kernels_too(name: str, fallback: None) -> None:
    """Torch's operations are the same function, to the same bounds."""
    test_in_float32_they_differ_by_rounding(name, "packed")


def test_a_silent_pack_gives_every_gradient_as_zero() -> None:
    """Ranks wait for it: none may be missing."""
    fused = passes("all_full", torch.float32)[1]
    losses, gradients = step(fused, BATCHES["a silent pack"])
    assert losses.shape == (0,)
    assert gradients.keys() == {tensor.name for tensor in trained_tensors(fused.model)}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("batch", ["packed", "a common beginning, packed"])
def test_altering_a_neighbour_leaves_a_sample_as_it_was(batch: str, either: None) -> None:
    """Its losses, to the bit, in the whole pass."""
    fused = passes("last6_lora", torch.float32)[1]
    samples = SAMPLES if batch == "packed" else after(13, SAMPLES)
    other = replace(samples[1], pixel_values=samples[1].pixel_values * 3 + 1)
    with torch.no_grad():
        before, changed = (
            torch.split(fused(supervised=b.supervised, **b.model_inputs()), list(b.supervised_counts))
            for b in (collate([samples[0], s, *samples[2:]], PAD_ID, packed=True) for s in (samples[1], other))
        )
    assert [torch.equal(a, b) for a, b in zip(before, changed, strict=True)] == [True, False, True, True]


def test_an_evaluation_gives_the_losses_of_training() -> None:
    """Under no_grad nothing is kept, and at dropout 0 nothing else changes."""
    fused = passes("all_lora", torch.float32)[1]
    training, _ = step(fused, BATCHES["packed"])
    with torch.no_grad():
        losses = fused.eval()(supervised=BATCHES["packed"].supervised, **BATCHES["packed"].model_inputs())
    fused.train()
    assert torch.equal(losses, training) and not losses.requires_grad


OTHERS: dict[str, Mapping[str, str]] = {
    "no layer of the language model": {"llm.layers": "none", "llm.method": "frozen"},
    "all of its layers": {"llm.layers": "all"},
    "the first two, in full": {"llm.layers": "0-1", "llm.method": "full"},
    "one in the middle, under a frozen aligner": {"llm.layers": "2", "aligner.method": "frozen"},
    "blocks in the middle": {"vision.blocks": "4-6", "vision.method": "lora"},
}


@pytest.mark.parametrize("changes", OTHERS)
def test_whatever_else_trains(changes: str) -> None:
    """Also behind words that all samples share, which then train or do not."""
    model = widened(arm("last6_full", tiny_model(), changes=OTHERS[changes]))
    with Unrounded():
        (plain, expected), (fused, got) = (step(of(model), BATCHES["a common beginning, packed"]) for of in PASSES)
    assert distance(fused, plain) < EXACT
    assert max(distances(got, expected).values()) < EXACT


# --- checkpointing and dropout -----------------------------------------------------------------------------------

PARTS: list[Collection[Part]] = [(), (Part.VISION,), (Part.LLM,), (Part.VISION, Part.LLM)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The class of every layer that runs, one after the other."""
    found: list[type] = []

    def watched(kind: type, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append(kind)
            return plain(*args)

        return run

    for kind in (VisionBlock, DecoderLayer):
        monkeypatch.setattr(kind, "until_wide", watched(kind, kind.until_wide))
    return found


@pytest.mark.parametrize(("name", "passing"), [("last6_lora", 6), ("all_full", 24)])
def test_checkpointing_changes_no_bit(name: str, passing: int, runs: list[type], either: None) -> None:
    """Of vision, language model, both: layers run again under the masks that they had, and only those asked for."""
    outcomes = []
    for parts in PARTS:
        model = arm(name, tiny_model(), dropout=0.3)
        fused = ForwardPass(fused=True, line="").of(model, bf16=False, checkpointed=parts).train()
        torch.manual_seed(5)
        runs.clear()
        outcomes.append(step(fused, BATCHES["packed"]))
        assert runs.count(VisionBlock) == 24 + passing * (Part.VISION in parts)
        assert runs.count(DecoderLayer) == 4 + 4 * (Part.LLM in parts)
    (losses, gradients), *others = outcomes
    for other_losses, other in others:
        assert torch.equal(other_losses, losses)
        assert [key for key in gradients if not torch.equal(gradients[key], other[key])] == []


def test_dropout_follows_torchs_seed_and_rests_in_evaluations() -> None:
    """The same seed the same losses, another seed others; in eval mode those of dropout 0."""
    fused = FusedLoss(arm("all_lora", tiny_model(), dropout=0.3))
    batch = BATCHES["packed"]

    def losses(seed: int, *, training: bool) -> Tensor:
        torch.manual_seed(seed)
        fused.train(training)
        return step(fused, batch)[0]

    assert torch.equal(losses(1, training=True), losses(1, training=True))
    assert not torch.equal(losses(1, training=True), losses(2, training=True))
    without = step(passes("all_lora", torch.float32)[1], batch)[0]
    assert torch.equal(losses(1, training=False), without)
    assert not torch.equal(losses(1, training=True), without)


# --- bfloat16 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last6_lora", "all_full", "frozen_vision"])
def test_on_a_bfloat16_base_it_is_as_near_to_float64_as_the_plain_pass(name: str) -> None:
    """Both round to three digits, in different places: the fused one must not be off by more than 1.5 times as much."""
    model = arm(name, tiny_model(dtype=torch.bfloat16))
    batch = BATCHES["padded"]
    (plain, of_plain), (fused, of_fused) = (step(of(model, bf16=True), batch) for of in PASSES)
    assert fused.dtype is torch.float32 and {g.dtype for g in of_fused.values()} == {torch.float32}
    with Unrounded():
        truth, of_truth = step(SupervisedLoss(widened(model)), batch)
    assert distance(fused, plain) < 1e-2  # spacing of bfloat16 at 1: 8e-3
    assert distance(fused, truth) < 1.5 * distance(plain, truth)
    all_fused, all_plain, all_truth = map(altogether, (of_fused, of_plain, of_truth))
    assert distance(all_fused, all_truth) < 1.5 * distance(all_plain, all_truth)


# --- pocket ------------------------------------------------------------------------------------------------------


@functools.cache
def real_batch() -> Batch:
    """Two real samples in a pack; their prompt is one."""
    prepared = prepare(load("last6_lora"))
    samples = [prepared.samples[0, place] for place in (0, 3)]
    pad = prepared.tools.tokenizer.pad_token_id
    return collate(samples, int(pad), packed=True)


@pytest.mark.parametrize("name", ["last6_lora", "all_full", "all_lora"])
def test_on_the_real_base_it_is_as_near_to_float64_as_the_plain_pass(name: str) -> None:
    """In 60 layers of trained weights float32 itself is off by 1e-4 in the worst tensor, more than 1e-5: what counts is
    the distance to the truth. Both passes have the same roundings in another order, so the whole gradient's distances
    are alike; those of one tensor are two random numbers of one size.
    """
    model = arm(name, load_base(load(name).config, load_tools("pocket")))
    (plain, of_plain), (fused, of_fused) = (step(of(model), real_batch()) for of in PASSES)
    assert float(fused.mean()) == pytest.approx(float(plain.mean()), rel=1e-6)
    widened(model)
    with Unrounded():
        (truth, of_truth), (exact, of_exact) = (step(of(model), real_batch()) for of in PASSES)
    assert distance(exact, truth) < EXACT
    assert max(distances(of_exact, of_truth).values()) < 1e-11  # the same amplification, of 1e-16
    assert distance(fused, truth) < 1.5 * distance(plain, truth)
    all_fused, all_plain, all_truth = map(altogether, (of_fused, of_plain, of_truth))
    assert distance(all_fused, all_truth) < 1.5 * distance(all_plain, all_truth)
    ours, theirs = distances(of_fused, of_truth), distances(of_plain, of_truth)
    assert max(ours[key] / theirs[key] for key in ours) < 4
    assert sorted(ours[key] / theirs[key] for key in ours)[len(ours) // 2] < 1.2
