"""What is kept of images: bit-equal to computing, bounded, shared, and never in the way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import PAD_ID, tiny_model, tiny_samples
from tests.trainer.fused.conftest import arm
from trainer.cache import cache_folder
from trainer.data.augment import Chain, Rules, Step
from trainer.data.geometry import Geometry
from trainer.data.loader import collate
from trainer.data.records import Object, Picture, Record
from trainer.fused import features
from trainer.fused.features import FeatureStore, Keep, content_digest
from trainer.fused.forward import FusedLoss

ROWS = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
IMAGE = torch.rand(3, 8), torch.tensor([[1, 1, 3]])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def counting(rows: Tensor = ROWS) -> tuple[Callable[[], Tensor], list[int]]:
    """A function that makes rows, and a list with an entry for each time it did."""
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return rows

    return compute, calls


def kept() -> list[Path]:
    """All files of all stores."""
    return sorted((cache_folder() / "features").glob("*/*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_computed_once_for_all_runs(dtype: torch.dtype) -> None:
    """Another store of the same name, as another run opens it, reads what the first has written, bit by bit."""
    compute, calls = counting(ROWS.to(dtype))
    for _ in range(3):
        rows = FeatureStore("base-18", 10**6).get(IMAGE, compute)
        assert rows.dtype is dtype and torch.equal(rows, ROWS.to(dtype))
    assert len(calls) == 1


@pytest.mark.parametrize("other", ["pixels", "grid", "name"])
def test_another_image_or_base_is_computed_anew(other: str) -> None:
    """Pixels, their grid and the store's name say together what rows are of."""
    FeatureStore("base-18", 10**6).get(IMAGE, counting()[0])
    compute, calls = counting()
    pixels = IMAGE[0] + (other == "pixels")
    grid = torch.tensor([[1, 3, 1]]) if other == "grid" else IMAGE[1]
    FeatureStore("base-20" if other == "name" else "base-18", 10**6).get((pixels, grid), compute)
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [b"", b"nothing of numpy's", None])
def test_a_damaged_file_is_computed_and_written_again(damage: bytes | None) -> None:
    """Empty, foreign, or cut in the middle."""
    FeatureStore("base", 10**6).get(IMAGE, counting()[0])
    (path,) = kept()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    compute, calls = counting()
    assert torch.equal(FeatureStore("base", 10**6).get(IMAGE, compute), ROWS)
    assert torch.equal(FeatureStore("base", 10**6).get(IMAGE, compute), ROWS)
    assert len(calls) == 1


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    """The bound is over all stores; what a run wrote first is the first to be removed when the next opens."""
    bound = 10 * ROWS.nbytes
    store = FeatureStore("one", bound)
    for index in range(20):
        store.get((IMAGE[0] + index, IMAGE[1]), counting()[0])
    header = 128  # bytes before the numbers of a file of numpy's
    assert sum(path.stat().st_size - header for path in kept()) <= bound
    written = {path: path.stat().st_mtime_ns for path in kept()}
    FeatureStore("two", bound // 2)
    assert 0 < len(kept()) < len(written)
    assert min(written[path] for path in kept()) >= max(t for path, t in written.items() if path not in kept())


def test_nothing_is_kept_where_nothing_may_be() -> None:
    """0 bytes."""
    compute, calls = counting()
    for _ in range(2):
        FeatureStore("base", 0).get(IMAGE, compute)
    assert len(calls) == 2 and kept() == []


def test_a_folder_that_cannot_be_written_is_told_once() -> None:
    """Training goes on."""
    said: list[str] = []
    store = FeatureStore("base", 10**6, said.append)
    cache_folder().mkdir(parents=True)
    (cache_folder() / "features").write_text("a file", encoding="utf-8")
    for index in range(3):
        assert torch.equal(store.get((IMAGE[0] + index, IMAGE[1]), counting()[0]), ROWS)
    assert len(said) == 1 and "no more are kept" in said[0]


def test_a_store_that_loses_time_is_switched_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where computing is faster than reading, it computes from then on."""
    clock = iter(range(10**6))
    said: list[str] = []
    store = FeatureStore("base", 10**9, said.append)
    ticks = {"read": 0.0}
    read = features._read

    def slow_read(path: Path) -> Tensor | None:
        if (rows := read(path)) is not None:
            ticks["read"] += 10.0
        return rows

    monkeypatch.setattr(features, "_read", slow_read)
    monkeypatch.setattr(features.time, "perf_counter", lambda: next(clock) * 1e-3 + ticks["read"])
    images = [(IMAGE[0] + index, IMAGE[1]) for index in range(40)]
    for image in images * 2:
        store.get(image, counting()[0])
    compute, calls = counting()
    store.get(images[0], compute)
    assert calls == [1]
    assert len(said) == 1 and "not read any more" in said[0]


def test_digest_is_of_values_shape_and_format() -> None:
    """Two tensors of the same bytes in another shape are other content."""
    base = torch.zeros(2, 3)
    assert content_digest([base]) == content_digest([torch.zeros(2, 3)])
    assert len({content_digest([t]) for t in (base, base.T, base.int(), base + 1)}) == 4


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_are_bit_equal_cold_warm_and_without_reading(training: bool) -> None:
    """A cold store, a warm one, and one that is switched off: rows are computed an image at a time in all of them."""
    samples = tiny_samples([12, 15, 9], seed=5)
    batch = collate(samples, PAD_ID, packed=True)
    results = []
    for store_on in (True, True, False):
        model = arm("last6_lora", tiny_model())
        loss = FusedLoss(model, keep=Keep(10**9, in_training=True)).train(training)
        assert loss._tower._store is not None
        loss._tower._store._on = store_on
        torch.manual_seed(1)
        nll = loss(supervised=batch.supervised, **batch.model_inputs())
        nll.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([nll.detach(), *gradients])
    assert kept()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_training_images_are_not_kept_where_they_never_come_again() -> None:
    """Augmented without a bank; an evaluation keeps them all the same."""
    batch = collate(tiny_samples([12], seed=5), PAD_ID, packed=True)
    loss = FusedLoss(arm("last6_lora", tiny_model()), keep=Keep(10**9, in_training=False))
    loss.train()(supervised=batch.supervised, **batch.model_inputs())
    assert kept() == []
    loss.eval()(supervised=batch.supervised, **batch.model_inputs())
    assert len(kept()) == 1


def test_a_bank_repeats_its_changes_after_so_many_epochs() -> None:
    """`custom.augmentation.bank: 3`: epoch 3 shows what epoch 0 has shown, and epochs 0 to 2 differ."""
    picture = Picture(Path("a.png"), 64, 64)
    box = Object(Geometry("bbox_2d", (10.0, 10.0, 50.0, 50.0)), "a digit")
    record = Record("a:1", (picture,), (box,))
    steps = (Step("rotate", 1.0, {"max_deg": 30}),)
    shown = [
        Chain(steps, Rules(min_coverage=0.0, partial_word=""), 17, 0.0, 3).change(record, epoch=epoch)
        for epoch in range(6)
    ]
    assert shown[:3] == shown[3:]
    assert len(set(map(repr, shown[:3]))) == 3
    endless = [
        Chain(steps, Rules(min_coverage=0.0, partial_word=""), 17).change(record, epoch=epoch) for epoch in range(6)
    ]
    assert endless[:3] == shown[:3] and endless[3:] != shown[3:]
