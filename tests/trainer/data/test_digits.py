"""The built-in data: deterministic, complete when it appears, sound records, no original in two sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import digits
from trainer.data.digits import DOMAINS, INKS, WORDS, DigitsPaths, Look, ensure_digits
from trainer.data.prompts import Taxonomy
from trainer.data.records import read_records

COUNTS = {"n_train": 30, "n_val": 12, "n_ood": 8}


@pytest.fixture(scope="module", params=["hand", "printed"])
def look(request: pytest.FixtureRequest) -> Look:
    """Both looks of the task."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, look: Look) -> DigitsPaths:
    """Write a small data set."""
    return ensure_digits(tmp_path_factory.mktemp("digits"), **COUNTS, look=look)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_arguments_give_the_same_bytes_in_another_folder(tmp_path: Path, paths: DigitsPaths, look: Look) -> None:
    """Everything that is drawn comes from the seed."""
    again = ensure_digits(tmp_path, **COUNTS, look=look)
    assert files(again.train.parent) == files(paths.train.parent)


def test_another_seed_gives_other_scenes(tmp_path: Path, paths: DigitsPaths, look: Look) -> None:
    """The seed reaches the pixels."""
    other = ensure_digits(tmp_path, seed=18, **COUNTS, look=look)
    assert files(other.train.parent)["train/00000.png"] != files(paths.train.parent)["train/00000.png"]


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path, paths: DigitsPaths, look: Look) -> None:
    """Record i does not depend on how many records there are."""
    larger = ensure_digits(tmp_path, n_train=35, n_val=12, n_ood=8, look=look)
    small, large = paths.train.read_text().splitlines(), larger.train.read_text().splitlines()
    assert large[:30] == small
    last = "train/00029.png"
    assert (larger.train.parent / last).read_bytes() == (paths.train.parent / last).read_bytes()


def test_second_call_writes_nothing(paths: DigitsPaths, look: Look) -> None:
    """A data set that is there is taken as it is."""
    before = {p: p.stat().st_mtime_ns for p in paths.train.parent.rglob("*")}
    again = ensure_digits(paths.train.parent.parent, **COUNTS, look=look)
    assert again == paths
    assert {p: p.stat().st_mtime_ns for p in paths.train.parent.rglob("*")} == before


def test_an_interrupted_call_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has its name only when it is complete."""
    with monkeypatch.context() as patch:
        patch.setattr(digits, "taxonomy", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ensure_digits(tmp_path, **COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_records_pass_the_checks_of_users_data(paths: DigitsPaths) -> None:
    """Boxes and quads lie on images that are there, sides are multiples of 32, one to three objects each."""
    for path, count in ((paths.train, 30), (paths.val, 12), (paths.ood, 8)):
        records = read_records(path).records
        assert len(records) == count
        assert all(r.size[0] % 32 == 0 and r.size[1] % 32 == 0 for r in records)
        assert all(1 <= len(r.objects) <= 3 for r in records)


def test_fourth_domain_is_shown_in_ood_only(paths: DigitsPaths, look: Look) -> None:
    """Training and validation show three looks, ood the one that is kept out."""
    seen = {path.stem: {r.domain for r in read_records(path).records} for path in (paths.train, paths.val, paths.ood)}
    assert seen["train"] == seen["val"] == set(DOMAINS[look][:3])
    assert seen["ood"] == {DOMAINS[look][3]}


def test_desc_follows_the_taxonomy_and_the_geometry(paths: DigitsPaths) -> None:
    """Type, ink and size come from the taxonomy; rotated objects, and only those, have a quad."""
    taxonomy = Taxonomy.read(paths.taxonomy)
    assert taxonomy.types == WORDS
    kinds = set()
    for record in read_records(paths.train).records:
        for item in record.objects:
            word, attributes, *condition = item.desc.split("/")
            ink, size = attributes.split(",")
            assert (word in WORDS, ink in INKS, size in ("small", "large")) == (True, True, True)
            assert condition == (["rotated"] if item.geometry.kind == "quad" else [])
            kinds.add(item.geometry.kind)
    assert kinds == {"bbox_2d", "quad"}


def test_boxes_hold_all_the_ink(tmp_path: Path) -> None:
    """On a plain ground there is ink inside every box and none outside all of them."""
    paths = ensure_digits(tmp_path, **COUNTS, look="printed")
    for line in paths.val.read_text().splitlines():
        record = json.loads(line)
        pixels = np.asarray(Image.open(paths.val.parent / record["images"][0]), np.int32)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        inked = np.abs(pixels - ground).max(axis=2) > 60
        for item in record["objects"]:
            points = item.get("bbox_2d") or item["quad"]
            xs, ys = points[0::2], points[1::2]
            inside = inked[min(ys) : max(ys), min(xs) : max(xs)]
            assert inside.mean() > 0.1
            inked[min(ys) : max(ys), min(xs) : max(xs)] = False
        assert not inked.any()


def test_no_original_is_in_two_sets() -> None:
    """The blocks of indices cover the 1797 originals once."""
    taken = np.zeros(1797, np.int32)
    for block in digits.ORIGINALS.values():
        taken[block] += 1
    assert (taken == 1).all()
