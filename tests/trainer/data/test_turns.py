"""Turns: several records in one sample, repeats by weight, the summary task, and epochs that depend on nothing else."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.data.answer import parse_answer
from trainer.data.augment import Chain, Rules, Step
from trainer.data.geometry import Geometry
from trainer.data.loader import SampleSet, check_lengths, train_steps
from trainer.data.packing import StepPlan
from trainer.data.records import Object, Picture, Record, RecordSet
from trainer.data.turns import Mix, Showing, joined, shown, turns

Make = Callable[..., Any]


def record(
    number: int, *, images: int = 1, weight: float = 1.0, summary: str | None = None, domain: str = "a"
) -> Record:
    """A record that nobody encodes."""
    pictures = (Picture("x.png", 10, 10, summary), *[Picture("y.png", 10, 10)] * (images - 1))
    return Record(f"r.jsonl:{number}", pictures, (), domain=domain, weight=weight)


def of(records: list[Record], mix: Mix, epoch: int = 0, *, length: int = 10, limit: int = 1000) -> list[list[int]]:
    """Places of the records in each turn."""
    made = turns(records, [length] * len(records), mix, epoch=epoch, max_length=limit)
    return [[showing.record for showing in turn] for turn in made]


def test_by_default_every_record_is_a_turn_of_its_own() -> None:
    """In the order of the file; packing does the shuffling."""
    assert of([record(n) for n in range(4)], Mix(seed=17)) == [[0], [1], [2], [3]]


@given(
    images=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    per_turn=st.integers(2, 5),
    limit=st.integers(10, 60),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_turns_hold_every_record_once_and_no_more_than_fits(
    images: list[int], per_turn: int, limit: int, seed: int | None
) -> None:
    """At most so many images and tokens; a record with more images than that is alone."""
    records = [record(n, images=count) for n, count in enumerate(images)]
    made = of(records, Mix(per_turn, seed=seed), limit=limit)
    assert sorted(place for turn in made for place in turn) == list(range(len(records)))
    for turn in made:
        assert len(turn) == 1 or (sum(images[place] for place in turn) <= per_turn and 10 * len(turn) <= limit)


def test_in_training_records_meet_others_in_every_epoch() -> None:
    """The same seed and epoch give the same turns."""
    records = [record(n) for n in range(20)]
    mix = Mix(2, seed=17)
    epochs = [of(records, mix, epoch) for epoch in range(3)]
    assert epochs[0] == of(records, mix, 0)
    assert len({str(sorted(map(sorted, made))) for made in epochs}) == 3
    assert all(len(made) == 10 for made in epochs)


def test_an_evaluation_has_the_same_turns_of_one_domain_in_the_order_of_the_file() -> None:
    """So that the loss by domain misses no record, and every evaluation sees the same."""
    records = [record(n, domain="ab"[n % 2], weight=3) for n in range(6)]
    assert of(records, Mix(2), 0) == of(records, Mix(2), 5) == [[0, 2], [1, 3], [4], [5]]


def test_a_record_comes_as_often_as_its_weight_says() -> None:
    """2.3: two or three times an epoch, 2.3 on average over 1,000 epochs within three standard errors."""
    records = [record(0, weight=2.3), record(1), record(2, weight=0.25)]
    seen = [Counter(turn[0] for turn in of(records, Mix(seed=17), epoch)) for epoch in range(1000)]
    assert {count[0] for count in seen} == {2, 3}
    assert {count[1] for count in seen} == {1}
    assert sum(count[0] for count in seen) / 1000 == pytest.approx(2.3, abs=0.044)
    assert sum(count[2] for count in seen) / 1000 == pytest.approx(0.25, abs=0.041)
    assert of(records, Mix(), 0) == [[0], [1], [2]]


@pytest.mark.parametrize("seed", [None, 17])
def test_the_share_of_summaries(seed: int | None) -> None:
    """Of the records that have one; in training drawn anew in every epoch, in an evaluation always the same ones."""
    records = [record(n, summary="s" if n % 2 else None) for n in range(2000)]
    lengths = [10] * len(records)

    def summarized(ratio: float, epoch: int) -> set[int]:
        made = turns(records, lengths, Mix(1, ratio, seed), epoch=epoch, max_length=100)
        return {turn[0].record for turn in made if turn[0].task == "summary"}

    first, second = summarized(0.3, 0), summarized(0.3, 1)
    assert all(place % 2 for place in first)
    assert len(first) / 1000 == pytest.approx(0.3, abs=0.044)
    assert (first == second) is (seed is None)
    assert summarized(0, 0) == set()
    assert len(summarized(1, 0)) == 1000


def test_a_turn_has_one_task() -> None:
    """Records with the summary as their answer meet only their like."""
    records = [record(n, summary="s") for n in range(40)]
    made = turns(records, [10] * 40, Mix(2, 0.5, 17), epoch=0, max_length=100)
    assert all(len({showing.task for showing in turn}) == 1 for turn in made)
    assert len(made) in (20, 21)


def test_a_record_that_comes_twice_does_not_meet_itself() -> None:
    """One picture twice in a turn would teach to copy the answer."""
    records = [record(0, weight=4), record(1), record(2)]
    for epoch in range(20):
        made = of(records, Mix(3, seed=17), epoch)
        assert sorted(place for turn in made for place in turn) == [0, 0, 0, 0, 1, 2]
        assert all(len(set(turn)) == len(turn) for turn in made)


@pytest.mark.parametrize("keep_lost", [False, True])
def test_a_summary_stays_true(keep_lost: bool) -> None:
    """Where a change would take an object out of the picture, a record answered by its summary stays as it is."""
    objects = [Object(Geometry("bbox_2d", box), "x") for box in ((40, 40, 60, 60), (0, 0, 10, 10))]
    one = replace(record(1, summary="two things"), images=(Picture(Path("x.png"), 100, 100, "two things"),))
    for zoom, loses in ((2.0, True), (0.5, False)):
        chain = Chain((Step("scale", 1.0, {"lo": zoom, "hi": zoom}),), Rules(keep_lost=keep_lost), 1)
        for task in ("dense", "summary"):
            both = [replace(one, objects=tuple(objects))]
            after = shown((Showing(0, task=task),), both, Mix(chain=chain), epoch=0)
            stays = task == "summary" and loses and not keep_lost
            assert (after == replace(both[0], task=task)) is stays


def test_joined_records_keep_their_objects_with_their_images() -> None:
    """Two records of two and one images: groups image_1 to image_3, each in the frame of its own image."""
    box = Geometry("bbox_2d", (0, 0, 50, 100))
    two = Record("r:1", (Picture("a", 100, 100), Picture("b", 100, 100)), (Object(box, "x", 1),), domain="street")
    one = Record("r:2", (Picture("c", 200, 400),), (Object(box, "y"),), domain="street")
    turn = joined([two, one])
    assert (turn.id, turn.domain, len(turn.images)) == ("r:1+r:2", "street", 3)
    assert [(each.desc, each.image) for each in turn.objects] == [("x", 1), ("y", 2)]
    assert joined([two, replace(one, domain="field")]).domain is None
    assert joined([one]) is one


def test_the_model_sees_every_image_of_a_turn_and_answers_by_image(make_encoder: Make, make_record: Make) -> None:
    """Images of different sizes, one prompt, one answer with a group an image; coordinates relative to each image."""
    encoder = make_encoder()
    records = [make_record(1, (64, 64)), make_record(2, (96, 32))]
    samples = SampleSet(records, encoder, Mix(2))
    sample = samples[0, 0]
    assert samples.count(0) == 1
    assert sample.record_id == "train.jsonl:1+train.jsonl:2"
    assert sample.image_grid_thw.tolist() == [[1, 4, 4], [1, 2, 6]]
    assert int(sample.image_tokens.sum()) == 4 + 3
    text = encoder.tokenizer.decode(sample.input_ids[sample.supervised])
    assert [(found.image, found.points) for found in parse_answer(text)] == [
        (0, (250, 250, 500, 500)),
        (1, (250, 250, 500, 500)),
    ]
    assert samples.lengths(0) == (len(sample.input_ids),)


def test_the_summary_of_each_image_is_the_answer(make_encoder: Make, make_record: Make) -> None:
    """With a prompt that asks for it, in the language of the run."""
    encoder = make_encoder()
    pictures = [replace(make_record(n).images[0], summary=text) for n, text in ((1, "一只红色的七"), (2, "two"))]
    records = [replace(make_record(n), images=(picture,)) for n, picture in enumerate(pictures, 1)]
    sample = SampleSet(records, encoder, Mix(2, 1.0))[0, 0]
    answer = encoder.tokenizer.decode(sample.input_ids[sample.supervised], skip_special_tokens=True)
    assert json.loads(answer) == {"image_1": "一只红色的七", "image_2": "two"}
    prompt = encoder.tokenizer.decode(sample.input_ids[~sample.supervised])
    assert "bbox_2d" not in prompt


@pytest.mark.parametrize(("ratio", "bad"), [(0.0, 0), (0.5, 1), (1.0, 1)])
def test_a_summary_that_would_be_too_long_is_named_before_training(
    make_encoder: Make, make_record: Make, ratio: float, bad: int
) -> None:
    """Every task that a record can be drawn with must fit, also in a turn with others."""
    long = make_record(1)
    long = replace(long, images=(replace(long.images[0], summary="a seven " * 200),))
    limit = 2 * make_encoder().length(make_record(2)) + 10
    encoder = make_encoder(max_length=limit)
    record_set = RecordSet(Path("train.jsonl"), (long, make_record(2)))
    checked = check_lengths(record_set, encoder, on_bad_record="skip", summary_ratio=ratio)
    assert len(checked.skipped) == bad
    fitting = replace(long.images[0], summary="a seven " * 8)
    mixed = [replace(long, images=(fitting,), id=f"train.jsonl:{n}") for n in range(8)]
    samples = SampleSet(mixed, encoder, Mix(4, ratio, seed=3))
    assert max(samples.lengths(0)) <= limit


def augmented(make_encoder: Make, make_record: Make, **mix: Any) -> SampleSet:
    """Seven records under a chain that changes sizes, so that lengths differ from epoch to epoch."""
    steps = (
        Step("resize_by_scale", 0.7, {"lo": 0.5, "hi": 3.0, "align_multiple": 32}),
        Step("rotate", 0.7, {"max_deg": 20}),
        Step("expand_to_fit_affine", 1.0, {"multiple": 32}),
        Step("gamma", 0.5, {"gamma": (0.5, 1.5)}),
    )
    records = [make_record(n, (64, 32 * n)) for n in range(1, 8)]
    return SampleSet(records, make_encoder(), Mix(seed=17, chain=Chain(steps, Rules(), 17), **mix))


@pytest.mark.parametrize("per_turn", [1, 2])
def test_lengths_are_known_before_a_pixel_is_read(make_encoder: Make, make_record: Make, per_turn: int) -> None:
    """Exactly, epoch by epoch: packs are planned with them."""
    samples = augmented(make_encoder, make_record, images_per_turn=per_turn)
    lengths = [samples.lengths(epoch) for epoch in range(3)]
    assert len(set(lengths)) == 3
    for epoch, known in enumerate(lengths):
        assert known == tuple(len(samples[epoch, place].input_ids) for place in range(samples.count(epoch)))


@pytest.mark.parametrize("capacity", [None, 1500])
@pytest.mark.parametrize("per_turn", [1, 2])
def test_the_same_bytes_whatever_the_number_of_workers(
    make_encoder: Make, make_record: Make, capacity: int | None, per_turn: int
) -> None:
    """Three epochs of augmented samples, from this process and from one and two others."""
    runs = []
    for workers in (0, 1, 2):
        samples = augmented(make_encoder, make_record, images_per_turn=per_turn)
        plan = StepPlan(samples, seed=17, micro_batch=1, accumulation=2, capacity=capacity)
        steps = sum(plan.steps_in_epoch(epoch) for epoch in range(3))
        runs.append([batch for step in islice(train_steps(samples, plan, workers=workers), steps) for batch in step])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a.record_ids == b.record_ids
            for name, value in vars(a).items():
                assert not isinstance(value, Tensor) or torch.equal(value, getattr(b, name)), name


def test_a_sample_that_augmentation_would_make_too_long_stays_as_it_is(make_encoder: Make, make_record: Make) -> None:
    """Nothing is cut and nothing fails in the middle of a run."""
    plain = [make_record(n, (64, 64)) for n in range(1, 5)]
    steps = (Step("resize_by_scale", 0.5, {"lo": 8.0, "hi": 8.0, "align_multiple": 32}),)
    limit = max(make_encoder().length(each) for each in plain)
    samples = SampleSet(plain, make_encoder(max_length=limit), Mix(seed=1, chain=Chain(steps, Rules(), 1)))
    for epoch in range(4):
        assert max(samples.lengths(epoch)) <= limit
        assert [samples.record((epoch, place)) for place in range(4)] == plain


def test_an_answer_that_augmentation_would_push_over_the_limit_is_not_cut(
    make_encoder: Make, make_record: Make
) -> None:
    """With `truncation_strategy: right` too: the sample stays as it is; what is too long on disk stays so as well."""
    steps = (Step("resize_by_scale", 1.0, {"lo": 2.0, "hi": 2.0, "align_multiple": 32}),)
    whole = make_encoder().token_counts(make_record(1, (64, 64)))
    for limit in (whole.whole, whole.whole - 2):
        encoder = make_encoder(max_length=limit, truncation="right")
        samples = SampleSet([make_record(1, (64, 64))], encoder, Mix(seed=1, chain=Chain(steps, Rules(), 1)))
        assert int(samples[0, 0].supervised.sum()) == whole.answer - whole.whole + limit


def test_evaluation_never_augments(make_encoder: Make, make_record: Make) -> None:
    """A set without a mix shows the records as they are, in any epoch."""
    records = [make_record(n) for n in range(3)]
    samples = SampleSet(records, make_encoder())
    assert [samples.record((epoch, place)) for epoch in (0, 5) for place in range(3)] == records * 2


def test_sets_share_what_they_encoded(make_encoder: Make, make_record: Make) -> None:
    """By content: the probe's records are those of training under other names, and are encoded once."""
    encoder = make_encoder()
    training = SampleSet([make_record(1)], encoder)
    probe = SampleSet([replace(make_record(1), id="probe.jsonl:9")], encoder, cache=training.cache)
    first = training[0, 0]
    assert probe[0, 0].pixel_values is first.pixel_values
    assert probe[0, 0].record_id == "probe.jsonl:9"
