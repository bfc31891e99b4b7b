"""Subsets spread over a file, and evaluation sets that are the same packed and padded, whole and shared by ranks."""

import pytest

from tests.conftest import PAD_ID, MakeParts, tiny_samples
from trainer.data.exchange import exchange_images
from trainer.data.records import Record
from trainer.datasets import exchanged_batches, spread
from trainer.loop import evaluate


def records(count: int) -> tuple[Record, ...]:
    """Records r0, r1 ..., sorted by domain as files of users often are."""
    return tuple(Record(f"r{i}", (), (), domain="ab"[i * 2 // count]) for i in range(count))


@pytest.mark.parametrize(
    ("count", "expected"), [(4, ["r0", "r2", "r5", "r7"]), (1, ["r0"]), (0, []), (99, 10), (None, 10)]
)
def test_a_subset_is_spread_over_the_file(count: int | None, expected: list[str] | int) -> None:
    """Of ten records, so that a file sorted by domain gives of each; null and too many give all."""
    chosen = [record.id for record in spread(records(10), count)]
    assert chosen == (expected if isinstance(expected, list) else [f"r{i}" for i in range(10)])


@pytest.mark.parametrize("capacity", [None, 30])
@pytest.mark.parametrize("ranks", [1, 2])
def test_exchanged_images_cost_the_same_in_any_batches(make_parts: MakeParts, capacity: int | None, ranks: int) -> None:
    """Six records of two grids: each record's loss, whatever shares its batch, its pack or its rank."""
    exchanged = exchange_images(tiny_samples((7, 12, 20, 9, 8, 11), grids=[(2, 4), (4, 4)]))
    engine = make_parts().engine
    single = evaluate(engine, exchanged_batches(exchanged, PAD_ID, batch_size=1, capacity=None))
    batches = exchanged_batches(exchanged, PAD_ID, batch_size=2, capacity=capacity)
    shares = [evaluate(engine, batches[rank::ranks]) for rank in range(ranks)]
    found = {i: loss for share in shares for i, loss in zip(share.record_ids, share.loss_sums, strict=True)}
    assert found == pytest.approx(dict(zip(single.record_ids, single.loss_sums, strict=True)), rel=1e-5)
