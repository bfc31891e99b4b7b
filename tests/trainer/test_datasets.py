"""Subsets spread over a file, and evaluation sets that are the same packed and padded, whole and shared by ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import PAD_ID, MakeParts, tiny_samples
from trainer.config.schema import Config
from trainer.data.exchange import exchange_images
from trainer.data.records import Record
from trainer.datasets import exchanged_batches, read_data, spread
from trainer.errors import DataError
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


def test_images_outside_a_files_folder_are_read_only_where_the_configuration_allows_it(tmp_path: Path) -> None:
    """`custom.allow_outside_root` reaches every file."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    objects = [{"bbox_2d": [1, 1, 9, 9], "desc": "a"}]
    record = {"images": ["../a.png"], "width": 32, "height": 32, "objects": objects}
    files = {f"{name}_jsonl": tmp_path / "data" / f"{name}.jsonl" for name in ("train", "val", "ood")}
    (tmp_path / "data").mkdir()
    for path in files.values():
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    custom: dict[str, Any] = {name: str(path) for name, path in files.items()}
    with pytest.raises(DataError, match=r"custom\.allow_outside_root: true"):
        read_data(Config.model_validate({"custom": custom}))
    data = read_data(Config.model_validate({"custom": custom | {"allow_outside_root": True}}))
    assert [len(found.records) for found in data.sets().values()] == [1, 1, 1]
