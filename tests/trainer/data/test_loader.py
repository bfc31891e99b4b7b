"""Loading: padding, packing and counts, the batches of a plan for every rank, worker processes, evaluation."""

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
    SampleCache,
    SampleSet,
    check_lengths,
    collate,
    eval_batches,
    train_steps,
)
from trainer.data.packing import StepPlan
from trainer.data.records import RecordSet
from trainer.data.template import Sample
from trainer.errors import DataError

Make = Callable[..., Any]
SIZES = [(64, 64), (32, 96), (96, 96), (32, 32), (128, 64), (64, 32), (96, 32)]


@pytest.fixture
def samples(make_encoder: Make, make_record: Make) -> SampleSet:
    """Seven records of different sizes."""
    return SampleSet([make_record(n, size) for n, size in enumerate(SIZES, 1)], make_encoder())


def plan_of(samples: SampleSet, packed: bool = False, **changes: Any) -> StepPlan:
    """Steps of 2 x 2 with seed 5; where packed, two of the longest are a full pack."""
    fields: dict[str, Any] = {"seed": 5, "micro_batch": 2, "accumulation": 2}
    capacity = 2 * max(samples.lengths(0)) if packed else None
    return StepPlan(samples, **(fields | {"capacity": capacity} | changes))


def indices_of(batch: Batch) -> list[int]:
    """Which of the fixture's samples a batch counts."""
    return [int(name.split(":")[1]) - 1 for name in batch.record_ids]


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
    assert batch.token_counts == tuple(len(s.input_ids) for s in items)
    assert batch.n_supervised == sum(int(s.supervised.sum()) for s in items)
    assert batch.supervised_counts == tuple(int(s.supervised.sum()) for s in items)
    assert batch.attention_mask is not None
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


@given(st.lists(token_samples(), min_size=1, max_size=5))
def test_packed_samples_stand_end_to_end_in_one_row_without_a_mask(items: list[Sample]) -> None:
    """No padding; the place in the text begins at 0 with every sample, M-RoPE's positions are its own."""
    batch = collate(items, pad_id=7, packed=True)
    counts = [len(s.input_ids) for s in items]
    assert batch.attention_mask is None
    assert "attention_mask" not in batch.model_inputs()
    assert batch.n_samples == len(items)
    assert batch.token_counts == tuple(counts)
    assert batch.n_tokens == sum(counts)
    assert batch.supervised_counts == tuple(int(s.supervised.sum()) for s in items)
    assert batch.n_supervised == sum(batch.supervised_counts) == int(batch.supervised.sum())
    assert batch.input_ids.shape == batch.supervised.shape == (1, sum(counts))
    assert batch.position_ids.shape == (4, 1, sum(counts))
    assert batch.input_ids[0].tolist() == [i for s in items for i in s.input_ids.tolist()]
    assert batch.supervised[0].tolist() == [i for s in items for i in s.supervised.tolist()]
    assert batch.position_ids[0, 0].tolist() == [place for count in counts for place in range(count)]
    assert torch.equal(batch.position_ids[1:, 0], torch.cat([s.position_ids for s in items], dim=1))


@pytest.mark.parametrize("packed", [False, True])
def test_images_follow_each_other_as_their_samples_do(samples: SampleSet, packed: bool) -> None:
    """Patches and grids of all samples in the order of the rows, packed or not."""
    chosen = [samples[0, 2], samples[0, 0], samples[0, 4]]
    batch = collate(chosen, 0, packed=packed)
    assert batch.record_ids == tuple(s.record_id for s in chosen)
    assert torch.equal(batch.pixel_values, torch.cat([s.pixel_values for s in chosen]))
    assert torch.equal(batch.image_grid_thw, torch.cat([s.image_grid_thw for s in chosen]))
    assert batch.pixel_values.shape[0] == int(batch.image_grid_thw.prod(dim=1).sum())


@given(st.lists(token_samples(), min_size=1, max_size=5), st.booleans())
def test_what_each_supervised_token_has_is_split_by_sample(items: list[Sample], packed: bool) -> None:
    """Read out row by row, the values come back as one piece a sample, padded or packed."""
    batch = collate(items, pad_id=7, packed=packed)
    pieces = batch.per_record(batch.input_ids[batch.supervised].float())
    assert [piece.tolist() for piece in pieces] == [s.input_ids[s.supervised].tolist() for s in items]


@pytest.mark.parametrize("packed", [False, True])
def test_a_silent_batch_runs_the_same_forward_and_counts_nothing(samples: SampleSet, packed: bool) -> None:
    """The model is given the same tensors; no sample, no token, no loss."""
    batch = collate([samples[0, 0], samples[0, 1]], 0, packed=packed)
    silent = batch.silent()
    assert silent.model_inputs().keys() == batch.model_inputs().keys()
    assert all(torch.equal(value, batch.model_inputs()[name]) for name, value in silent.model_inputs().items())
    assert (silent.n_samples, silent.n_tokens, silent.n_supervised) == (0, 0, 0)
    assert not any((silent.record_ids, silent.domains, silent.token_counts, silent.supervised_counts))
    assert silent.supervised.shape == batch.supervised.shape
    assert not silent.supervised.any()
    assert silent.per_record(torch.zeros(0)) == ()
    assert batch.n_supervised > 0  # the batch itself is left as it was
    assert batch.supervised.any()


def test_a_batch_moves_as_a_whole(samples: SampleSet) -> None:
    """All tensors, also those that the model is given; names stay, and a mask that is not there."""
    batch = collate([samples[0, 0], samples[0, 1]], 0)
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, Tensor)} == {"meta"}
    assert moved.record_ids == batch.record_ids
    assert collate([samples[0, 0]], 0, packed=True).to("meta").attention_mask is None
    assert set(batch.model_inputs()) == {
        *("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw"),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_training_batches_are_those_of_the_plan(samples: SampleSet, packed: bool) -> None:
    """One rank runs the plan's micro-batches, in its order."""
    plan = plan_of(samples, packed)
    steps = list(islice(train_steps(samples, plan), 4))
    expected = [[indices for (indices,) in step] for step in islice(plan.steps(), 4)]
    assert [[indices_of(batch) for batch in step] for step in steps] == expected
    assert all((batch.attention_mask is None) == packed for step in steps for batch in step)


def test_an_epoch_of_seven_samples_has_a_short_last_step(samples: SampleSet) -> None:
    """7 samples in steps of 2 x 2: an epoch of two steps, the second one short."""
    steps = list(islice(train_steps(samples, plan_of(samples)), 4))
    assert [[batch.n_samples for batch in step] for step in steps] == [[2, 2], [2, 1]] * 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ranks", "micro_batch", "accumulation"), [(2, 1, 1), (3, 1, 1), (3, 1, 2), (2, 2, 2)])
def test_ranks_cover_an_epoch_once_and_run_a_silent_batch_where_no_pack_is_left(
    samples: SampleSet, packed: bool, ranks: int, micro_batch: int, accumulation: int
) -> None:
    """All ranks have as many micro-batches in every step; who has no pack runs tokens, and counts nothing."""
    plan = plan_of(samples, packed, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation)
    planned = list(islice(plan.steps(), plan.steps_in_epoch(0)))
    seen: list[int] = []
    for rank in range(ranks):
        steps = list(islice(train_steps(samples, plan, rank=rank), len(planned)))
        assert [len(step) for step in steps] == [len(step) for step in planned]
        for batch, of_ranks in zip(
            (batch for step in steps for batch in step), (m for step in planned for m in step), strict=True
        ):
            assert indices_of(batch) == of_ranks[rank]
            assert (batch.n_supervised > 0) == bool(of_ranks[rank])
            assert batch.supervised.any() == bool(of_ranks[rank])
            assert batch.input_ids.numel() > 0
            seen += indices_of(batch)
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("packed", [False, True])
def test_the_rank_without_a_pack_runs_the_shortest_sample_in_silence(samples: SampleSet, packed: bool) -> None:
    """7 samples, or 4 packs of them, one each: the last rank has none in the epoch's last step, and no time to lose."""
    ranks = 3 if packed else 2
    plan = plan_of(samples, packed, ranks=ranks, micro_batch=1, accumulation=1)
    last = plan.steps_in_epoch(0) - 1
    assert len(plan.packs(0)) == (4 if packed else 7)
    (batch,) = next(train_steps(samples, plan, rank=ranks - 1, first_step=last))
    assert batch.record_ids == ()
    assert batch.n_supervised == 0
    assert not batch.supervised.any()
    assert batch.input_ids.shape == (1, min(samples.lengths(0)))
    assert (batch.attention_mask is None) == packed
    (other,) = next(train_steps(samples, plan, rank=0, first_step=last))
    assert other.n_samples > 0


@pytest.mark.parametrize("changes", [{}, {"packed": True}, {"packed": True, "ranks": 2, "micro_batch": 1}])
def test_worker_processes_change_nothing(samples: SampleSet, changes: dict[str, Any]) -> None:
    """Two workers give the batches of none, bit by bit, and leave torch's stream where it was."""
    plan = plan_of(samples, **changes)
    settings: dict[str, Any] = {"rank": plan.ranks - 1, "first_step": 1}
    state = torch.get_rng_state()
    alone = list(islice(train_steps(samples, plan, **settings), 3))
    shared = list(islice(train_steps(samples, plan, **settings, workers=2), 3))
    assert [len(step) for step in shared] == [len(step) for step in alone]
    assert all(same(a, b) for x, y in zip(alone, shared, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("skip", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_training_can_be_entered_at_any_step(samples: SampleSet, packed: bool, skip: int) -> None:
    """Entering at k gives the batches of leaving k out, bit by bit, on every rank."""
    plan = plan_of(samples, packed, ranks=2, micro_batch=1)
    for rank in range(2):
        entered = list(islice(train_steps(samples, plan, rank=rank, first_step=skip), 3))
        through = list(islice(train_steps(samples, plan, rank=rank), skip, skip + 3))
        assert all(same(a, b) for x, y in zip(entered, through, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("changes", [{}, {"packed": True, "micro_batch": 1}])
def test_skipped_steps_are_not_decoded(samples: SampleSet, changes: dict[str, Any]) -> None:
    """Entering at the second step opens no image of the first one."""
    plan = plan_of(samples, **changes)
    assert plan.steps_in_epoch(0) > 1
    for index in (i for micro_batch in next(plan.steps()) for indices in micro_batch for i in indices):
        samples.records[index].images[0].path.unlink()
    assert next(train_steps(samples, plan, first_step=1))
    with pytest.raises(DataError):
        next(train_steps(samples, plan))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_evaluation_sees_every_sample_once_sorted_by_length(samples: SampleSet, batch_size: int) -> None:
    """Always the same batches, short ones first."""
    batches = list(eval_batches(samples, batch_size=batch_size))
    ids = [i for batch in batches for i in batch.record_ids]
    assert sorted(ids) == [record.id for record in samples.records]
    masks = [mask for batch in batches if batch.attention_mask is not None for mask in batch.attention_mask]
    assert [int(mask.sum()) for mask in masks] == sorted(samples.lengths(0))
    assert [count for batch in batches for count in batch.token_counts] == sorted(samples.lengths(0))
    assert [batch.n_samples for batch in batches[:-1]] == [min(batch_size, 7)] * (len(batches) - 1)
    assert all(same(a, b) for a, b in zip(batches, eval_batches(samples, batch_size=batch_size), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 20])
def test_packed_evaluation_sees_every_sample_once_over_all_ranks(
    samples: SampleSet, batch_size: int, ranks: int
) -> None:
    """No batch holds more than its packs do, samples are packed at all, and the batches are always the same."""
    capacity = 2 * max(samples.lengths(0))
    settings: dict[str, Any] = {"batch_size": batch_size, "capacity": capacity, "ranks": ranks}
    batches = [batch for rank in range(ranks) for batch in eval_batches(samples, **settings, rank=rank)]
    assert sorted(i for batch in batches for i in batch.record_ids) == [record.id for record in samples.records]
    assert all(batch.attention_mask is None for batch in batches)
    assert all(batch.n_tokens <= batch_size * capacity for batch in batches)
    assert all(batch.input_ids.shape == (1, batch.n_tokens) for batch in batches)
    assert max(batch.n_samples for batch in batches) > 1
    again = [batch for rank in range(ranks) for batch in eval_batches(samples, **settings, rank=rank)]
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_share_the_batches_of_one(samples: SampleSet, packed: bool) -> None:
    """Evaluated by two ranks, the batches are those of a single one, bit by bit, taken in turn."""
    settings: dict[str, Any] = {"batch_size": 1, "capacity": 2 * max(samples.lengths(0)) if packed else None}
    alone = list(eval_batches(samples, **settings))
    for rank in range(2):
        share = list(eval_batches(samples, **settings, rank=rank, ranks=2))
        assert all(same(a, b) for a, b in zip(share, alone[rank::2], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_has_gone_is_told_as_what_it_is(samples: SampleSet, workers: int) -> None:
    """The same message from whichever process meets it."""
    samples.records[3].images[0].path.unlink()
    with pytest.raises(DataError, match=r"4_0\.png"):
        list(islice(train_steps(samples, plan_of(samples), workers=workers), 4))


def test_samples_are_kept_in_memory_up_to_the_bound(make_encoder: Make, make_record: Make) -> None:
    """What was kept is there without its image; what did not fit is read again."""
    records = [make_record(n) for n in range(3)]
    one = sum(v.nbytes for v in vars(make_encoder().encode(records[0])).values() if isinstance(v, Tensor))
    samples = SampleSet(records, make_encoder(), cache=SampleCache(2 * one))
    assert samples.count(0) == 3
    first = [samples[0, place] for place in range(3)]
    for record in records:
        record.images[0].path.unlink()
    assert samples[0, 0].pixel_values is first[0].pixel_values
    assert samples[7, 1].pixel_values is first[1].pixel_values
    with pytest.raises(DataError):
        samples[0, 2]


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
