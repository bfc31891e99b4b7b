"""Loading: padding and counts, the seeded order, entering it at any step, worker processes, evaluation."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.data.loader import (
    Batch,
    SampleSet,
    check_lengths,
    collate,
    epoch_order,
    eval_batches,
    step_indices,
    steps_per_epoch,
    train_steps,
)
from trainer.data.records import RecordSet
from trainer.data.template import Sample
from trainer.errors import DataError

Make = Callable[..., Any]
SIZES = [(64, 64), (32, 96), (96, 96), (32, 32), (128, 64), (64, 32), (96, 32)]


@pytest.fixture
def samples(make_encoder: Make, make_record: Make) -> SampleSet:
    """Seven records of different sizes."""
    return SampleSet([make_record(n, size) for n, size in enumerate(SIZES, 1)], make_encoder())


def same(a: Batch, b: Batch) -> bool:
    """Equal in every field, bit by bit."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@st.composite
def token_samples(draw: st.DrawFn) -> Sample:
    """A sample with tokens only."""
    n, answer = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ids = torch.arange(n + answer) + 10
    empty = torch.zeros(0, 1536), torch.zeros(0, 3, dtype=torch.long)
    return Sample("r:1", ids, ids >= n + 10, ids < 0, ids.expand(3, -1) * 2, *empty, None)


@given(st.lists(token_samples(), min_size=1, max_size=5))
def test_collate_pads_on_the_right_and_counts_only_real_tokens(items: list[Sample]) -> None:
    """Ids, mask, supervision and positions of each row are the sample's, then padding that nothing counts."""
    batch = collate(items, pad_id=7)
    assert batch.n_samples == len(items)
    assert batch.n_tokens == sum(len(s.input_ids) for s in items)
    assert batch.n_supervised == sum(int(s.supervised.sum()) for s in items)
    assert batch.input_ids.shape[1] == max(len(s.input_ids) for s in items)
    for row, sample in enumerate(items):
        n = len(sample.input_ids)
        assert torch.equal(batch.input_ids[row, :n], sample.input_ids)
        assert torch.equal(batch.supervised[row, :n], sample.supervised)
        assert torch.equal(batch.position_ids[0, row, :n], torch.arange(n))
        assert torch.equal(batch.position_ids[1:, row, :n], sample.position_ids)
        assert (batch.input_ids[row, n:] == 7).all()
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert not batch.supervised[row, n:].any()
        assert not batch.position_ids[:, row, n:].any()


def test_a_batch_moves_as_a_whole(samples: SampleSet) -> None:
    """All tensors, also those that the model is given; names stay."""
    batch = collate([samples[0], samples[1]], 0)
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, Tensor)} == {"meta"}
    assert moved.record_ids == batch.record_ids
    assert set(batch.model_inputs()) == {
        *("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw"),
    }


@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    skip=st.integers(0, 60),
)
def test_no_sample_is_lost_or_doubled_and_any_step_can_be_entered(
    n: int, seed: int, micro_batch: int, accumulation: int, skip: int
) -> None:
    """Each epoch is a permutation in steps of full size but the last; entering at k is leaving k out."""
    settings = {"seed": seed, "micro_batch": micro_batch, "accumulation": accumulation}
    per_epoch = steps_per_epoch(n, micro_batch, accumulation)
    steps = list(islice(step_indices(n, **settings), skip + 2 * per_epoch))
    for epoch in range(2):
        of_epoch = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in of_epoch for micro in step for i in micro) == list(range(n))
        assert all([len(m) for m in step] == [micro_batch] * accumulation for step in of_epoch[:-1])
    assert list(islice(step_indices(n, **settings, first_step=skip), 2 * per_epoch)) == steps[skip:]


def test_the_order_follows_seed_and_epoch_and_nothing_else() -> None:
    """Same seed and epoch: same order, wherever torch's and numpy's own streams stand; else another order."""
    order = epoch_order(50, seed=17, epoch=0)
    torch.manual_seed(3)
    assert epoch_order(50, seed=17, epoch=0) == order
    assert epoch_order(50, seed=17, epoch=1) != order != epoch_order(50, seed=18, epoch=0)
    assert epoch_order(50, seed=1, epoch=2) != epoch_order(50, seed=2, epoch=1)


def test_the_order_is_the_same_on_every_machine() -> None:
    """A run of yesterday is continued today: the order of seed 17 is written down."""
    assert epoch_order(8, seed=17, epoch=0) == [6, 4, 0, 5, 1, 3, 2, 7]


def test_training_batches_are_those_of_the_plan(samples: SampleSet) -> None:
    """7 samples in steps of 2 x 2: an epoch of two steps, the second one short."""
    steps = list(islice(train_steps(samples, seed=5, micro_batch=2, accumulation=2), 4))
    ids = [[[int(i.split(":")[1]) - 1 for i in batch.record_ids] for batch in step] for step in steps]
    assert ids == list(islice(step_indices(7, seed=5, micro_batch=2, accumulation=2), 4))
    assert [[len(micro) for micro in step] for step in ids] == [[2, 2], [2, 1]] * 2


def test_worker_processes_change_nothing(samples: SampleSet) -> None:
    """Two workers give the batches of none, bit by bit, and leave torch's stream where it was."""
    settings: dict[str, Any] = {"seed": 5, "micro_batch": 2, "accumulation": 2, "first_step": 1}
    state = torch.get_rng_state()
    alone = list(islice(train_steps(samples, **settings), 3))
    shared = list(islice(train_steps(samples, **settings, workers=2), 3))
    assert [len(step) for step in shared] == [len(step) for step in alone]
    assert all(same(a, b) for x, y in zip(alone, shared, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_skipped_steps_are_not_decoded(samples: SampleSet) -> None:
    """Entering at the second step opens no image of the first one."""
    first = next(step_indices(7, seed=5, micro_batch=2, accumulation=2))
    for index in (i for micro in first for i in micro):
        samples.records[index].images[0].unlink()
    assert next(train_steps(samples, seed=5, micro_batch=2, accumulation=2, first_step=1))
    with pytest.raises(OSError):
        next(train_steps(samples, seed=5, micro_batch=2, accumulation=2))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_evaluation_sees_every_sample_once_sorted_by_length(samples: SampleSet, batch_size: int) -> None:
    """Always the same batches, short ones first."""
    batches = list(eval_batches(samples, batch_size=batch_size))
    ids = [i for batch in batches for i in batch.record_ids]
    assert sorted(ids) == [record.id for record in samples.records]
    lengths = [int(mask.sum()) for batch in batches for mask in batch.attention_mask]
    assert lengths == sorted(samples.lengths)
    assert all(same(a, b) for a, b in zip(batches, eval_batches(samples, batch_size=batch_size), strict=True))


def test_samples_are_kept_in_memory_up_to_the_bound(make_encoder: Make, make_record: Make) -> None:
    """What was kept is there without its image; what did not fit is read again."""
    records = [make_record(n) for n in range(3)]
    one = sum(v.nbytes for v in vars(make_encoder().encode(records[0])).values() if isinstance(v, Tensor))
    samples = SampleSet(records, make_encoder(), cache_bytes=2 * one)
    assert len(samples) == 3
    first = [samples[index] for index in range(3)]
    for record in records:
        record.images[0].unlink()
    assert samples[0] is first[0]
    assert samples[1] is first[1]
    with pytest.raises(FileNotFoundError):
        samples[2]


def test_records_that_do_not_fit_are_named_all_at_once_or_left_out(make_encoder: Make, make_record: Make) -> None:
    """`error` names each one with its tokens; `skip` keeps the others and a message for each."""
    records = tuple(make_record(n, size) for n, size in enumerate([(32, 32), (320, 320), (32, 32), (640, 320)], 1))
    encoder = make_encoder(max_length=make_encoder().length(records[0]))
    record_set = RecordSet(Path("train.jsonl"), records, ("train.jsonl:9: broken JSON",))
    with pytest.raises(DataError) as caught:
        check_lengths(record_set, encoder)
    assert "2 bad of 5 records" in caught.value.got
    assert "train.jsonl:2: " in caught.value.got
    assert "train.jsonl:4: " in caught.value.got
    kept = check_lengths(record_set, encoder, on_bad_record="skip")
    assert [record.id for record in kept.records] == ["train.jsonl:1", "train.jsonl:3"]
    assert [message.split(": ")[0] for message in kept.skipped] == ["train.jsonl:9", "train.jsonl:2", "train.jsonl:4"]
    with pytest.raises(DataError):
        check_lengths(record_set, make_encoder(max_length=5), on_bad_record="skip")
