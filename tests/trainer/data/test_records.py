"""Records: what is read, and every fault that is named before training starts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.data.geometry import Geometry
from trainer.data.records import Object, Picture, Record, read_records
from trainer.errors import DataError

BOX = {"bbox_2d": [10, 10, 40, 30], "desc": "seven/red"}
GOOD: dict[str, Any] = {"images": ["a.png"], "objects": [BOX], "width": 96, "height": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one image `a.png` of 96 x 64 pixels."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, *records: Any) -> Path:
    """A JSONL file of these records; texts are written as they are."""
    path = folder / "train.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def one_object(**changes: Any) -> dict[str, Any]:
    """A record whose only object has these keys beside `desc`."""
    return GOOD | {"objects": [{"desc": "seven"} | changes]}


def test_a_good_record_is_read_as_it_stands(folder: Path) -> None:
    """All four shapes, summary, domain; image paths are relative to the JSONL's folder."""
    objects = [
        BOX,
        {"quad": [1, 1, 9, 1, 9, 9, 1, 9], "desc": "b"},
        {"poly": [1, 1, 9.5, 1, 9, 9], "desc": "c"},
        {"line": [1, 1, 9, 9, 20, 3], "line_points": 3, "desc": "d"},
    ]
    path = write(folder, GOOD | {"objects": objects, "summary": "four", "domain": "look one"})
    assert read_records(path).records == (
        Record(
            id="train.jsonl:1",
            images=(Picture(folder / "a.png", 96, 64, "four"),),
            objects=(
                Object(Geometry("bbox_2d", (10, 10, 40, 30)), "seven/red"),
                Object(Geometry("quad", (1, 1, 9, 1, 9, 9, 1, 9)), "b"),
                Object(Geometry("poly", (1, 1, 9.5, 1, 9, 9)), "c"),
                Object(Geometry("line", (1, 1, 9, 9, 20, 3)), "d"),
            ),
            domain="look one",
        ),
    )


def test_null_is_as_left_out(folder: Path) -> None:
    """Tables that pandas or Arrow write have every key in every row."""
    nothing = dict.fromkeys(("domain", "weight", "summary"))
    written = GOOD | nothing | {"objects": [BOX | dict.fromkeys(("image", "line_points", "quad"))]}
    plain = read_records(write(folder, GOOD | {"objects": [BOX]})).records
    assert read_records(write(folder, written)).records == plain
    assert (plain[0].weight, plain[0].objects[0].image) == (1, 0)


def test_absolute_image_paths_several_images_and_the_edge_of_the_image_are_allowed(folder: Path) -> None:
    """A box may end at the very edge; `image` says which image an object is on."""
    edge = {"bbox_2d": [0, 0, 96, 64], "desc": "all", "image": 1}
    record = read_records(write(folder, GOOD | {"images": [str(folder / "a.png"), "a.png"], "objects": [edge]})).records
    assert [picture.path for picture in record[0].images] == [folder / "a.png"] * 2
    assert record[0].objects[0].image == 1


def test_blank_lines_and_a_byte_order_mark_do_no_harm_and_lines_are_counted_as_an_editor_does(folder: Path) -> None:
    """Ids are file name and line, blank lines included."""
    path = write(folder, "\ufeff" + json.dumps(GOOD), "", GOOD)
    assert [record.id for record in read_records(path).records] == ["train.jsonl:1", "train.jsonl:3"]


def test_descriptions_are_kept_in_the_form_that_the_tokenizer_keeps(folder: Path) -> None:
    """NFC: e and a combining accent become one letter, else decoding would not give the answer back."""
    path = write(folder, one_object(bbox_2d=[1, 1, 2, 2], desc="cafe\u0301"))
    assert read_records(path).records[0].objects[0].desc == "caf\u00e9"


FAULTS: list[tuple[Any, str]] = [
    ("{", "train.jsonl:1: broken JSON"),
    ("[" * 100_000, "train.jsonl:1: broken JSON"),
    ([1], "train.jsonl:1: not a JSON object"),
    (GOOD | {"images": []}, "train.jsonl:1: `images` must be a list"),
    (GOOD | {"images": "a.png"}, "train.jsonl:1: `images` must be a list"),
    (GOOD | {"images": ["no.png"]}, "no.png: no such file"),
    (GOOD | {"images": ["."]}, "is not a regular file"),
    (GOOD | {"images": ["a\0.png"]}, 'train.jsonl:1: no file can have the name "a\\u0000.png"'),
    (GOOD | {"images": ["\udcff.png"]}, 'train.jsonl:1: no file can have the name "\\udcff.png"'),
    (GOOD | {"width": 95}, "a.png is 96x64 pixels (EXIF orientation applied), width and height say 95x64"),
    (GOOD | {"width": 64, "height": 96}, "a.png is 96x64 pixels"),
    (GOOD | {"height": 0}, "train.jsonl:1: `height` must be a whole number of pixels above 0, not 0"),
    (GOOD | {"width": 96.0}, "train.jsonl:1: `width` must be"),
    (GOOD | {"width": True}, "train.jsonl:1: `width` must be"),
    (GOOD | {"width": None}, "train.jsonl:1: `width` must be a whole number of pixels above 0, not nothing"),
    (GOOD | {"objects": []}, "train.jsonl:1: no objects"),
    (GOOD | {"objects": None}, "train.jsonl:1: no objects"),
    (GOOD | {"objects": ["x"]}, 'train.jsonl:1, object 1: not a JSON object but "x"'),
    (GOOD | {"objects": [BOX, {"desc": "x"}]}, "train.jsonl:1, object 2: no geometry"),
    (one_object(bbox_2d=[1, 1, 2, 2], line=[1, 1, 2, 2]), "object 1: 2 geometries (bbox_2d, line)"),
    (one_object(bbox_2d=[1, 1, 2]), "object 1: bbox_2d has an odd number of coordinates (3)"),
    (one_object(bbox_2d=[1, 1, 2, 2, 3, 3]), "object 1: bbox_2d has 6 numbers instead of 4"),
    (one_object(quad=[1, 1, 2, 2]), "object 1: quad has 4 numbers instead of 8"),
    (one_object(line=[1, 1]), "object 1: line has 1 points, fewer than 2"),
    (one_object(poly=[1, 1, 2, 2]), "object 1: poly has 2 points, fewer than 3"),
    (one_object(bbox_2d=[1, 1, "2", 2]), 'object 1: bbox_2d holds "2" where a finite number is needed'),
    (one_object(bbox_2d=[1, 1, None, 2]), "object 1: bbox_2d holds nothing where"),
    (one_object(bbox_2d=[1, 1, True, 2]), "object 1: bbox_2d holds true where"),
    (one_object(bbox_2d=[1, 1, float("nan"), 2]), "object 1: bbox_2d holds NaN where"),
    (one_object(bbox_2d=[1, 1, float("inf"), 2]), "object 1: bbox_2d holds Infinity where"),
    (one_object(bbox_2d=[1, 1, 10**400, 2]), "object 1: bbox_2d holds 1000"),
    (one_object(bbox_2d=[[1, 1], [2, 2]]), "object 1: bbox_2d holds [1, 1] where"),
    (one_object(bbox_2d="1 1 2 2"), "object 1: bbox_2d must be a flat list of numbers"),
    (one_object(bbox_2d=[5, 1, 5, 2]), "object 1: bbox_2d [5, 1, 5, 2] is empty"),
    (one_object(bbox_2d=[6, 1, 5, 2]), "object 1: bbox_2d [6, 1, 5, 2] is empty"),
    (one_object(quad=[1, 1, 1, 2, 1, 3, 1, 4]), "object 1: quad [1, 1, 1, 2, 1, 3, 1, 4] is empty"),
    (one_object(line=[1, 1, 1, 1]), "object 1: line [1, 1, 1, 1] is empty"),
    (one_object(bbox_2d=[-1, 1, 5, 2]), "object 1: bbox_2d [-1, 1, 5, 2] is outside the image of 96x64"),
    (one_object(bbox_2d=[1, 1, 96.5, 2]), "object 1: bbox_2d [1, 1, 96.5, 2] is outside the image of 96x64"),
    (one_object(line=[1, 1, 5, 65]), "object 1: line [1, 1, 5, 65] is outside"),
    (one_object(line=[1, 1, 5, 5], line_points=3), "object 1: line_points is 3, the line has 2 points"),
    (one_object(bbox_2d=[1, 1, 2, 2], desc=None), "object 1: `desc` must be a text"),
    (one_object(bbox_2d=[1, 1, 2, 2], desc=" "), "object 1: `desc` must be a text"),
    (one_object(bbox_2d=[1, 1, 2, 2], desc="a<|im_end|>"), "object 1: `desc` holds the chat token <|im_end|>"),
    (one_object(bbox_2d=[1, 1, 2, 2], desc="\ud800"), "object 1: `desc` holds half a surrogate pair"),
    (one_object(bbox_2d=[1, 1, 2, 2], image=1), "object 1: `image` must be an index from 0 to 0, not 1"),
    (GOOD | {"domain": "day/night"}, 'train.jsonl:1: domain "day/night" cannot name a metric'),
    (GOOD | {"domain": ".."}, 'train.jsonl:1: domain ".." cannot name a metric'),
    (GOOD | {"domain": 3}, "train.jsonl:1: domain 3 cannot name a metric"),
    (GOOD | {"summary": 3}, "train.jsonl:1: `summary` must be a text"),
]


@pytest.mark.parametrize(("record", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_each_fault_is_named_by_line_and_object(folder: Path, record: Any, message: str) -> None:
    """One bad record beside a good one: the message says where and what, and how to go on."""
    with pytest.raises(DataError) as caught:
        read_records(write(folder, record, GOOD))
    assert message in str(caught.value)
    assert "1 bad of 2 records" in caught.value.got
    assert caught.value.where == str(folder / "train.jsonl")
    assert "custom.on_bad_record: skip" in caught.value.do


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.bmp", "d.webp", "e.tiff"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_image_is_found_whatever_its_format(tmp_path: Path, name: str, damage: str) -> None:
    """Cut in the middle of its pixels, not an image at all, or empty."""
    whole, broken = tmp_path / name, tmp_path / f"broken_{name}"
    Image.effect_noise((96, 64), 90).convert("RGB").save(whole)
    data = whole.read_bytes()
    broken.write_bytes({"cut": data[: len(data) * 2 // 3], "text": b"not an image", "empty": b""}[damage])
    good = GOOD | {"images": [name]}
    assert len(read_records(write(tmp_path, good)).records) == 1
    with pytest.raises(DataError, match="cannot be read"):
        read_records(write(tmp_path, good, good | {"images": [broken.name]}))


def test_sizes_are_those_after_the_exif_orientation(tmp_path: Path) -> None:
    """A photo taken upright is stored lying; width and height are those of the picture as it is seen."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (64, 96) if orientation >= 5 else (96, 64)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    path = write(tmp_path, *[GOOD | {"images": [f"{orientation}.jpg"]} for orientation in range(1, 9)])
    assert len(read_records(path).records) == 8


def test_all_faults_come_in_one_message_and_after_twenty_they_are_counted(folder: Path) -> None:
    """25 records of one fault each: 20 in full, then the number of the others."""
    bad = one_object(bbox_2d=[1, 1, 2])
    with pytest.raises(DataError) as caught:
        read_records(write(folder, GOOD, *[bad] * 25))
    assert [f"train.jsonl:{n}," in str(caught.value) for n in range(2, 27)] == [True] * 20 + [False] * 5
    assert "25 bad of 26 records" in caught.value.got
    assert "... and 5 more" in caught.value.got


def test_every_object_of_a_record_is_looked_at(folder: Path) -> None:
    """Two bad objects and a missing image of one record are three faults of one bad record."""
    bad = GOOD | {"images": ["no.png"], "objects": [{"desc": "x"}, BOX, {"bbox_2d": [1], "desc": "x"}]}
    with pytest.raises(DataError) as caught:
        read_records(write(folder, GOOD, bad))
    assert "1 bad of 2 records" in caught.value.got
    assert all(text in caught.value.got for text in ("object 1:", "object 3:", "no such file"))


def test_skip_leaves_bad_records_out_and_keeps_a_message_for_each(folder: Path) -> None:
    """The good ones keep their ids; each message names its record."""
    bad = GOOD | {"objects": [{"desc": "x"}, {"desc": "y"}]}
    result = read_records(write(folder, GOOD, bad, "{", GOOD), on_bad_record="skip")
    assert [record.id for record in result.records] == ["train.jsonl:1", "train.jsonl:4"]
    assert [message.split(":")[1][:1] for message in result.skipped] == ["2", "3"]
    assert "object 1" in result.skipped[0]
    assert "object 2" in result.skipped[0]


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_file_without_a_good_record_is_an_error_either_way(folder: Path, on_bad_record: Any) -> None:
    """Missing, empty, blank, or bad throughout."""
    for text in ("", "\n\n", "{"):
        with pytest.raises(DataError):
            read_records(write(folder, text), on_bad_record=on_bad_record)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_records(folder / "none.jsonl", on_bad_record=on_bad_record)


def test_text_that_is_not_utf8_is_a_fault_of_its_line(folder: Path) -> None:
    """One line in another encoding does not spoil the others."""
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"images": ["\xff"]}\n')
    assert [m.split(": ")[0] for m in read_records(path, on_bad_record="skip").skipped] == ["train.jsonl:2"]


@pytest.mark.parametrize(
    "image", ["{other}/a.png", "../other/a.png", "link/a.png", "link.png", "sub/../../other/a.png"]
)
def test_an_image_outside_the_files_folder_needs_leave(folder: Path, image: str) -> None:
    """Absolute, by `..`, through a link of a folder or of the file itself; the message says which key gives leave."""
    (folder / "other").mkdir()
    (folder / "a.png").rename(folder / "other" / "a.png")
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to("../other")
    (root / "link.png").symlink_to("../other/a.png")
    path = write(root, GOOD | {"images": [image.format(other=folder / "other")]})
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert f"leads out of the data root to {(folder / 'other' / 'a.png').resolve()}" in caught.value.got
    assert "train.jsonl:1: image " in caught.value.got
    assert "`custom.allow_outside_root: true`" in caught.value.got
    assert len(read_records(path, allow_outside_root=True).records) == 1


def test_an_image_outside_is_not_opened_and_can_be_skipped(folder: Path) -> None:
    """What lies there is nobody's business: the reason is the path, whatever the file is; other records stay."""
    secret, opened = folder / "passwd.png", []
    secret.write_text("no image")
    sys.addaudithook(lambda event, given: opened.append(event) if event == "open" and given[0] == str(secret) else None)
    root = folder / "root"
    root.mkdir()
    (folder / "a.png").rename(root / "a.png")
    path = write(root, GOOD, GOOD | {"images": ["a.png", str(secret)]})
    result = read_records(path, on_bad_record="skip")
    assert opened == []
    assert [record.id for record in result.records] == ["train.jsonl:1"]
    assert "leads out of the data root" in result.skipped[0]
    read_records(path, on_bad_record="skip", allow_outside_root=True)
    assert opened == ["open"]


def test_links_within_the_folder_and_a_folder_that_is_a_link_need_no_leave(folder: Path) -> None:
    """Both sides are followed before they are compared."""
    (folder / "root").mkdir()
    (folder / "a.png").rename(folder / "root" / "b.png")
    (folder / "root" / "a.png").symlink_to("b.png")
    write(folder / "root", GOOD)
    (folder / "way_in").symlink_to("root")
    assert len(read_records(folder / "way_in" / "train.jsonl").records) == 1
