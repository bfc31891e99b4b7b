"""`trainer preview`: the sheet shows what is trained on, where it is, and says what augmentation has done to it."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tests.running import SMALL, flags, trainer
from trainer.config.load import load
from trainer.data.augment import Chain, Rules, Step
from trainer.data.geometry import Geometry
from trainer.data.loader import SampleSet
from trainer.data.records import Object, Picture, Record
from trainer.data.template import END_TOKEN, Encoder
from trainer.data.turns import Mix
from trainer.datasets import make_encoder
from trainer.errors import UserError
from trainer.labels import Label, plates
from trainer.lettering import Lettering
from trainer.model import load_tools
from trainer.preview import rows_of, save_preview, show_preview
from trainer.sheet import Row, draw, style

Make = Callable[..., Record]
FLIP = (Step("hflip", 1.0),)
RULES = Rules()
CROP = {"min_coverage": 0.3, "completeness_threshold": 0.8, "min_objects": 1, "skip_if_line": False}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Of the built-in model: an image token is 32 pixels wide and high."""
    config = load("last6_lora", overrides={"custom.emit_norm": "norm1000", "global_max_length": "4096"}).config
    return make_encoder(config, load_tools("pocket"), None)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A record with images of noise and the objects given, or one box."""

    def record(number: int = 1, *objects: Object, size: tuple[int, int] = (96, 64), n_images: int = 1) -> Record:
        pictures = []
        for image in range(n_images):
            path = tmp_path / f"{number}_{image}.png"
            noise = np.random.default_rng([number, image]).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(path)
            pictures.append(Picture(path, *size))
        return Record(f"train.jsonl:{number}", tuple(pictures), objects or (box(10, 20, 50, 40),))

    return record


def box(*corners: float, desc: str = "car/red", image: int = 0) -> Object:
    """An object with a box, in pixels."""
    return Object(Geometry("bbox_2d", corners), desc, image)


def samples(
    encoder: Encoder, *records: Record, steps: tuple[Step, ...] = (), rules: Rules = RULES, **mix: Any
) -> SampleSet:
    """A training set under a chain of operations."""
    chain = Chain(steps, rules, seed=3) if steps else None
    return SampleSet(records, encoder, Mix(seed=3, chain=chain, **mix))


def unlimited(encoder: Encoder) -> Encoder:
    """The same one with room for any sample."""
    free = copy(encoder)
    free.max_length = 10**6
    return free


def drawn(rows: list[Row]) -> Figure:
    """The sheet of some rows."""
    letters = Lettering(text for row in rows for text in row.texts())
    with mpl.rc_context(style(letters)):
        return draw("a sheet", (), rows, letters)


def shapes(axes: Axes) -> list[list[float]]:
    """Flat points of every shape on a picture, in the order of its answer."""
    return [patch.get_xy()[: -1 if patch.get_closed() else None].ravel().tolist() for patch in axes.patches]


def texts(figure: Figure) -> list[str]:
    """Every line beside the pictures."""
    return [text.get_text() for text in figure.texts]


def test_rows_are_spread_over_the_file_and_columns_are_disk_and_epochs(encoder: Encoder, make: Make) -> None:
    """Three of six records in two epochs: nine pictures, named by file and line, disk and epoch."""
    rows = rows_of(samples(encoder, *map(make, range(1, 7)), steps=FLIP), 3, 2)
    assert [row.title for row in rows] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:5"]
    assert [cell.caption for cell in rows[0].cells] == [
        ("on disk: 96x64, 1 label",), ("epoch 1: 96x64, 1 of 1 label",), ("epoch 2: 96x64, 1 of 1 label",)
    ]  # fmt: skip
    figure = drawn(rows)
    assert len(figure.axes) == 9
    assert {"a sheet", "train.jsonl:5", "epoch 2: 96x64, 1 of 1 label"} <= set(texts(figure))


def test_without_augmentation_there_is_one_column_and_the_sheet_says_so(
    encoder: Encoder, make: Make, tmp_path: Path
) -> None:
    """As every epoch shows it; fewer records than asked for are all of them."""
    of_two = samples(encoder, make(1), make(2))
    assert [len(row.cells) for row in rows_of(of_two, 8, 3)] == [1, 1]
    done = save_preview(of_two, tmp_path / "sheet.png", name="train.jsonl", mode="off", n_records=8, n_variants=3)
    assert done.headline == (
        "2 of 2 training records (train.jsonl), as on disk; augmentation is off (custom.augmentation.mode)"
    )


def test_shapes_are_drawn_where_augmentation_has_moved_them(encoder: Encoder, make: Make) -> None:
    """Mirrored, x becomes 96 - x; a line begins at its leftmost point, as in the answer, and that point is marked."""
    objects = (
        box(10, 20, 50, 40),
        Object(Geometry("line", (5, 50, 40, 60, 90, 45)), "wire"),
        Object(Geometry("poly", (60, 5, 90, 10, 70, 30)), "sign"),
    )
    figure = drawn(rows_of(samples(encoder, make(1, *objects), steps=FLIP), 1, 1))
    disk, mirrored = figure.axes
    assert shapes(disk) == [
        [60, 5, 90, 10, 70, 30],
        [10, 20, 50, 20, 50, 40, 10, 40],
        [5, 50, 40, 60, 90, 45],
    ]
    assert shapes(mirrored) == [
        [26, 30, 6, 10, 36, 5],
        [46, 20, 86, 20, 86, 40, 46, 40],
        [6, 45, 56, 60, 91, 50],
    ]
    assert [line.get_xydata().tolist() for line in mirrored.lines] == [[[26, 30]], [[6, 45]]]  # a box has no mark
    assert [text.get_text() for text in mirrored.texts] == ["1 sign", "2 car/red", "3 wire"]


def test_pixels_are_those_that_are_trained_on(encoder: Encoder, make: Make) -> None:
    """The file's on disk, the warp's in an epoch, in axes whose data are pixels."""
    record = make(1)
    disk, mirrored = drawn(rows_of(samples(encoder, record, steps=FLIP), 1, 1)).axes
    pixels = np.asarray(Image.open(record.images[0].path))
    assert np.array_equal(disk.images[0].get_array(), pixels)
    assert np.array_equal(mirrored.images[0].get_array(), pixels[:, ::-1])
    for axes in (disk, mirrored):
        assert (*axes.get_xlim(), *axes.get_ylim()) == (0, 96, 64, 0)
        assert axes.images[0].get_extent() == [0, 96, 64, 0]


@pytest.mark.parametrize("size", [(96, 64), (1800, 1300), (64, 640)])
def test_versions_of_a_row_have_one_scale(encoder: Encoder, make: Make, size: tuple[int, int]) -> None:
    """Twice the width is drawn twice as wide, whatever the size; large pictures hold no more pixels than are drawn."""
    double = (Step("resize_by_scale", 1.0, {"lo": 2.0, "hi": 2.0, "align_multiple": 1}),)
    wide = unlimited(encoder)
    figure = drawn(rows_of(samples(wide, make(1, size=size), steps=double), 1, 1))
    disk, doubled = (axes.get_window_extent() for axes in figure.axes)
    assert doubled.width == pytest.approx(2 * disk.width) and doubled.height == pytest.approx(2 * disk.height)
    assert disk.width / disk.height == pytest.approx(size[0] / size[1])
    for axes in figure.axes:
        assert axes.images[0].get_array().shape[1] <= max(axes.get_window_extent().width + 1, 192)


def test_a_flat_picture_gets_the_whole_width(encoder: Encoder, make: Make) -> None:
    """Its versions stand below each other, none over another."""
    figure = drawn(rows_of(samples(encoder, make(1, size=(1200, 64)), steps=FLIP), 1, 2))
    places = [axes.get_window_extent() for axes in figure.axes]
    assert all(a.y0 > b.y1 and a.x0 == b.x0 for a, b in pairwise(places))
    assert places[0].width > 0.5 * figure.bbox.width


def test_what_augmentation_does_to_labels_is_noted(encoder: Encoder, make: Make) -> None:
    """The middle quarter of 128x128 is 32 to 96: one label is outside, one is cut below the threshold, one above."""
    crop = (Step("center_crop", 1.0, {"scale": 0.25, **CROP}),)
    objects = (
        box(0, 0, 30, 30, desc="out"),
        box(16, 40, 56, 60, desc="half/blue"),
        box(30, 64, 90, 80, desc="nearly"),
        box(40, 66, 60, 90, desc="whole"),
    )
    (row,) = rows_of(samples(encoder, make(1, *objects, size=(128, 128)), steps=crop), 1, 1)
    disk, cropped = row.cells
    assert disk.notes == ()
    assert cropped.caption == ("epoch 1: 64x64, 3 of 4 labels",)
    assert cropped.notes == ("dropped: out; cut: nearly; cut and marked: half/blue",)
    assert [label.desc for label in cropped.panels[0].labels] == ["half/blue,partly visible", "nearly", "whole"]
    colours = {label.desc.partition("/")[0]: label.colour for label in disk.panels[0].labels}
    assert all(colours[label.desc.partition("/")[0]] == label.colour for label in cropped.panels[0].labels)


def test_labels_of_what_left_the_view_are_noted_in_the_noisy_mode(encoder: Encoder, make: Make) -> None:
    """The fault of the published runs can be seen: the label is still there."""
    zoom = (Step("scale", 1.0, {"lo": 2.0, "hi": 2.0}),)
    record = make(1, box(0, 0, 20, 20, desc="gone"), box(40, 40, 90, 60, desc="here"), size=(128, 128))
    (row,) = rows_of(samples(encoder, record, steps=zoom, rules=Rules(keep_lost=True)), 1, 1)
    assert row.cells[1].caption == ("epoch 1: 128x128, 2 of 2 labels",)
    assert row.cells[1].notes == ("out of view: gone",)


def test_equal_labels_are_told_apart(encoder: Encoder, make: Make) -> None:
    """Of four boxes of one name the one that is dropped is followed by its place, not by its name."""
    crop = (Step("center_crop", 1.0, {"scale": 0.25, **CROP}),)
    objects = (box(0, 0, 30, 30), *(box(40, y, 60, y + 10) for y in (40, 60, 80)))
    (row,) = rows_of(samples(encoder, make(1, *objects, size=(128, 128)), steps=crop), 1, 1)
    assert [label.colour for label in row.cells[1].panels[0].labels] == [1, 2, 3]


def test_the_text_is_decoded_from_the_tokens_with_what_is_learned_set_apart(encoder: Encoder, make: Make) -> None:
    """Prompt with the number of image tokens, answer with its end mark, of the first epoch; labels have its numbers."""
    set_ = samples(encoder, make(1, box(50, 30, 90, 60, desc="汽车/红色"), box(5, 5, 30, 30)), steps=FLIP)
    (row,) = rows_of(set_, 1, 2)
    read, learned = row.passages
    assert (read.learned, learned.learned) == (False, True)
    assert learned.text == encoder.answer(set_.record((0, 0))) + END_TOKEN
    assert "<image x 6>" in read.text and "<|image_pad|>" not in read.text
    assert read.text.startswith("<|im_start|>system") and read.text.endswith("<|im_start|>assistant\n")
    n_read, n_learned = (int(each.heading.split()[-2]) for each in row.passages)
    assert n_read + n_learned == encoder.length(set_.record((0, 0)))
    for label in row.cells[1].panels[0].labels:
        assert f'"object_{label.number}":' in learned.text.partition(label.desc)[0].rpartition("},")[2]
    assert "汽车/红色" in "".join(texts(drawn([row])))


def test_images_of_a_turn_stand_together(encoder: Encoder, make: Make) -> None:
    """Two records of one image and of two: three pictures a cell, each with its own labels and its own line."""
    two = make(2, box(1, 1, 9, 9, desc="first"), box(10, 10, 20, 20, desc="second", image=1), n_images=2)
    set_ = samples(encoder, make(1), two, steps=FLIP, images_per_turn=3)
    (row,) = rows_of(set_, 2, 1)
    assert sorted(row.title.split(", ")) == ["train.jsonl:1", "train.jsonl:2"]
    order = [record.removeprefix("train.jsonl:") for record in row.title.split(", ")]
    expected = {"1": [["car/red"]], "2": [["first"], ["second"]]}
    for cell in row.cells:
        assert [[label.desc for label in panel.labels] for panel in cell.panels] == [
            descs for record in order for descs in expected[record]
        ]
        assert [line[-20:] for line in cell.caption] and len(cell.caption) == 3
    assert len(drawn([row]).axes) == 6
    assert '"image_3"' in row.passages[1].text


def test_objects_of_a_turn_of_summaries_are_told_apart_after_a_crop(encoder: Encoder, make: Make) -> None:
    """The crop is done on one picture, and not on the other, whose truck it would lose; in a dense turn it is lost."""
    middle, corner = box(40, 25, 56, 39), box(0, 0, 8, 8, desc="truck")
    records = [make(1, middle, corner), make(2, middle, box(42, 27, 54, 37))]
    told = [replace(each, images=(replace(each.images[0], summary="two cars"),)) for each in records]
    steps = (Step("center_crop", 1.0, {"scale": 0.25, **CROP}),)
    for ratio, n_labels in ((1.0, [2, 2]), (0.0, [1, 2])):
        (row,) = rows_of(samples(encoder, *told, steps=steps, images_per_turn=2, summary_ratio=ratio), 2, 1)
        assert sorted(len(panel.labels) for panel in row.cells[1].panels) == n_labels


def test_a_record_that_the_first_epoch_leaves_out_is_shown(encoder: Encoder, make: Make) -> None:
    """Its weight of 0.01 is why, and its title says so."""
    (row,) = rows_of(samples(encoder, replace(make(1), weight=0.01), steps=FLIP), 1, 1)
    assert row.title == "train.jsonl:1, weight 0.01"


@pytest.mark.parametrize(("count", "across", "pitch"), [(8, 4, 60), (8, 8, 30), (40, 8, 30), (300, 20, 12)])
def test_texts_of_labels_lie_over_no_other_as_long_as_there_is_room(count: int, across: int, pitch: int) -> None:
    """Texts of a few are cut, not lost; where boxes are close or many, only their numbers stand there, all of them."""
    corners = [(pitch * (n % across), pitch * (n // across)) for n in range(count)]  # pixels, of a picture of 260x210
    labels = [
        Label(Geometry("bbox_2d", (x, y, x + 8, y + 8)), n, "汽车" * 20, n) for n, (x, y) in enumerate(corners, 1)
    ]
    found = plates(labels, (2.3, 1.9), 2.3 / 260, Lettering([]))
    assert [label for label, _, _ in found] == labels
    assert all(0 <= x1 < x2 <= 2.3 and 0 <= y1 < y2 <= 1.9 for _, _, (x1, y1, x2, y2) in found)
    if count <= 40:
        for (_, _, a), (_, _, b) in combinations(found, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    long = [text for label, text, _ in found if text != str(label.number)]
    assert all(text[1:].startswith(" 汽") and text.endswith("…") for text in long)
    assert len(long) == (8 if across == 4 else 0)


@pytest.mark.parametrize("corners", [(0, 0, 40, 20), (60, 80, 100, 100), (0, 40, 100, 60), (30, 0, 60, 100)])
def test_the_text_of_a_label_leaves_its_shape_free_where_it_can(corners: tuple[float, float, float, float]) -> None:
    """At each edge of the picture, and across it."""
    label = Label(Geometry("bbox_2d", corners), 1, "car/red", 0)
    ((_, text, (left, above, right, below)),) = plates([label], (2.0, 2.0), 0.02, Lettering([]))
    x1, y1, x2, y2 = (0.02 * value for value in corners)
    assert text == "1 car/red"
    assert right <= x1 + 1e-9 or x2 <= left + 1e-9 or below <= y1 + 1e-9 or y2 <= above + 1e-9


def test_long_texts_are_cut_where_a_row_has_no_room(encoder: Encoder, make: Make) -> None:
    """What is learned at its end, the prompt in its middle: its images and its request stay."""
    objects = [box(n, n, n + 5, n + 5, desc=f"car/number {n}, with many words that fill lines") for n in range(60)]
    long = unlimited(encoder)
    (row,) = rows_of(samples(long, make(1, *objects)), 1, 1)
    read, learned = row.passages
    row = replace(row, passages=(replace(read, text="head\n" + "\n".join("abc") * 90 + "\ntail"), learned))
    lines = texts(drawn([row]))
    assert [line for line in lines if line.startswith("... (")] != []
    assert {"head", "tail"} <= set(lines)
    assert any('"object_1"' in line for line in lines) and not any('"object_60"' in line for line in lines)


def test_nothing_is_drawn_outside_of_the_sheet_or_over_a_neighbour(encoder: Encoder, make: Make) -> None:
    """Pictures, texts on them and lines beside them, of pictures of every shape."""
    long = "汽车/红色,大型/停放/左侧车门有很长很长的划痕"
    records = [
        make(1, box(0, 0, 96, 64, desc=long), box(90, 50, 96, 64, desc=long)),
        make(2, box(0, 0, 10, 10, desc=long), size=(64, 900)),
        make(3, box(1100, 40, 1200, 64, desc=long), size=(1200, 64)),
    ]
    for record in records:
        (row,) = rows_of(samples(unlimited(encoder), record, steps=FLIP), 1, 2)
        figure = drawn([row])
        figure.canvas.draw()
        boxes = [axes.get_window_extent() for axes in figure.axes]
        cells = [
            [box, *(text.get_window_extent() for text in axes.texts)]
            for box, axes in zip(boxes, figure.axes, strict=True)
        ]
        for extent in [*(b for cell in cells for b in cell), *(text.get_window_extent() for text in figure.texts)]:
            assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, extent
            assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, extent
        for one, other in combinations(cells, 2):
            assert not any(a.overlaps(b) for a in one for b in other)
        beside = [text.get_window_extent() for text in figure.texts]
        assert not any(a.overlaps(b) for cell in cells for a in cell for b in beside)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_equal_samples_give_equal_files(encoder: Encoder, make: Make, tmp_path: Path, ending: str) -> None:
    """In each format, with Chinese labels."""
    set_ = samples(encoder, make(1, box(5, 5, 40, 40, desc="汽车/红色")), steps=FLIP)
    files = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for file in files:
        save_preview(set_, file, name="t.jsonl", mode="clean", n_records=1, n_variants=1)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


def test_a_letter_without_a_font_is_noted(encoder: Encoder, make: Make, tmp_path: Path, recwarn: Any) -> None:
    """On the sheet and in what is returned; matplotlib's own warning is not passed on."""
    set_ = samples(encoder, make(1, box(5, 5, 40, 40, desc="tablet/\U00012000")))
    done = save_preview(set_, tmp_path / "a.png", name="t.jsonl", mode="off", n_records=1, n_variants=1)
    if done.missing:  # some systems have a font for cuneiform
        assert done.notes[0].startswith("no font here has \U00012000, drawn as boxes")
    assert not [warning for warning in recwarn if "missing from font" in str(warning.message)]


MISTAKES = {
    "another format": ("sheet.gif", ["sheet.gif", ".png, .svg, .pdf"]),
    "no ending": ("sheet", ["sheet", ".png, .svg, .pdf"]),
    "a folder that is not there": ("no/sheet.png", ["no: no such folder"]),
    "a folder": ("taken.png", ["taken.png is a folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are no records at all, and nobody has noticed."""
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").write_text("no record")
    (tmp_path / "taken.png").mkdir()
    out, words = MISTAKES[mistake]
    resolved = load("last6_lora", overrides={"train_jsonl": "none.jsonl", "val_jsonl": "none.jsonl"})
    with pytest.raises(UserError) as refused:
        show_preview(resolved, Path(out), n_records=1, n_variants=1)
    assert refused.value.where == "--out"
    assert all(word in str(refused.value) for word in words)


def test_the_command_writes_the_sheet_and_says_what_it_shows(tmp_path: Path) -> None:
    """One line; a mistake in its options is told with status 2."""
    command = ["preview", "last6_lora", *flags({k: v for k, v in SMALL.items() if k.startswith("custom.")})]
    command += ["--custom.augmentation.mode", "published_noisy", "--prompts.language", "zh", "--out", "sheet.svg"]
    done = trainer(*command, "--records", "2", "--variants", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shows = "2 of 32 training records (train.jsonl), as on disk and in 1 epoch with augmentation published_noisy"
    assert done.stdout == f"sheet.svg: {shows}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.svg"]
    for wrong in (["--records", "0"], ["--variants", "x"], ["--custom.augmentation.mode", "wild"]):
        refused = trainer(*command, *wrong, cwd=tmp_path)
        assert refused.returncode == 2 and wrong[1] in refused.stderr and refused.stdout == ""
