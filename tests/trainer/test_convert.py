"""Conversion of COCO and ms-swift data: what is written, what is left out and told, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.running import trainer
from trainer.convert import Conversion, convert
from trainer.data.records import read_records
from trainer.errors import DataError

WIDTH, HEIGHT = 96, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `img/a.png` and `img/猫.png` of 96 x 64 pixels, and `img/tall.png` of 48 x 80."""
    (tmp_path / "img").mkdir()
    for name, size in {"a.png": (WIDTH, HEIGHT), "猫.png": (WIDTH, HEIGHT), "tall.png": (48, 80)}.items():
        Image.new("RGB", size, "red").save(tmp_path / "img" / name)
    return tmp_path


def coco_image(number: int, file_name: str, **changes: Any) -> dict[str, Any]:
    """An image as COCO's own files describe it."""
    return {
        "license": 3, "file_name": file_name, "coco_url": f"http://images.cocodataset.org/val2017/{file_name}",
        "height": HEIGHT, "width": WIDTH, "date_captured": "2013-11-14 11:18:45", "id": number,
    } | changes  # fmt: skip


def coco_object(number: int, **changes: Any) -> dict[str, Any]:
    """An annotation as COCO's own files write it: a car at x 10.5, y 20 of 30.25 x 8 pixels on image 1."""
    return {
        "segmentation": [[10.5, 20, 40.75, 20, 40.75, 28, 12, 28]], "area": 230.5, "iscrowd": 0, "image_id": 1,
        "bbox": [10.5, 20, 30.25, 8], "category_id": 3, "id": number,
    } | changes  # fmt: skip


def coco(folder: Path, *annotations: dict[str, Any], **changes: Any) -> Path:
    """A COCO file of these annotations, with two images and two categories."""
    tree = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-nd/2.0/", "id": 3, "name": "by-nc-nd"}],
        "images": [coco_image(1, "a.png"), coco_image(2, "猫.png")],
        "annotations": list(annotations),
        "categories": [
            {"supercategory": "vehicle", "id": 3, "name": "car"}, {"supercategory": "动物", "id": 17, "name": "猫"},
        ],
    } | changes  # fmt: skip
    return write(folder / "instances.json", json.dumps({k: v for k, v in tree.items() if v is not None}))


def swift_line(*boxes: list[float], **changes: Any) -> dict[str, Any]:
    """A line as ms-swift documents it: as many dogs as boxes, on a.png."""
    return {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "<image>Find the <ref-object> in the image"},
            {"role": "assistant", "content": "<bbox>" * len(boxes)},
        ],
        "images": ["img/a.png"],
        "objects": {"ref": ["dog"], "bbox": list(boxes)},
    } | changes


def swift(folder: Path, *lines: Any) -> Path:
    """A JSONL file of these lines; texts are written as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    return write(folder / "swift.jsonl", "\n".join(texts) + "\n")


def write(path: Path, text: str) -> Path:
    """A text file."""
    path.write_text(text, encoding="utf-8")
    return path


def converted(source: Path, **options: Any) -> tuple[list[dict[str, Any]], Conversion]:
    """The records that `source` becomes, as JSON, and what the conversion says."""
    if source.suffix == ".json":
        options.setdefault("images", source.parent / "img")
    out = source.with_name("out.jsonl")
    done = convert(source, out, **options)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == done.records
    return records, done


def told(done: Conversion) -> dict[str, list[str]]:
    """Reason -> its first places, of all that was left out or changed."""
    both = (done.findings.left_out, done.findings.changed)
    return {reason: places for tally in both for (_, reason), places in tally.places.items()}


# --- COCO ---------------------------------------------------------------------------------------------------------


def test_a_coco_file_becomes_a_record_an_image(folder: Path) -> None:
    """Boxes as two corners, names of the categories, paths relative to the new file, in the order of the images."""
    source = coco(
        folder,
        coco_object(901, image_id=2, category_id=17, bbox=[0, 0, WIDTH, HEIGHT]),
        coco_object(902),
        coco_object(903, category_id=17, bbox=[0.1, 0.2, 0.2, 0.1]),
    )
    records, done = converted(source, domain="street")
    size = {"width": WIDTH, "height": HEIGHT, "domain": "street"}
    car, cat = {"bbox_2d": [10.5, 20, 40.75, 28], "desc": "car"}, {"bbox_2d": [0.1, 0.2, 0.3, 0.3], "desc": "猫"}
    assert records == [
        {"images": ["img/a.png"], **size, "objects": [car, cat]},
        {"images": ["img/猫.png"], **size, "objects": [{"bbox_2d": [0, 0, WIDTH, HEIGHT], "desc": "猫"}]},
    ]
    assert (done.form, done.classes, told(done)) == ("coco", {"car": 1, "猫": 2}, {})


def test_a_polygon_is_taken_where_there_is_exactly_one(folder: Path) -> None:
    """The parts of a hidden thing, a mask and no polygon give the box, which is of the whole thing; each is told."""
    triangle = [1, 2, 9, 2, 5, 8.5]
    source = coco(
        folder,
        coco_object(1, segmentation=[triangle]),
        coco_object(2, segmentation=[triangle, [20, 20, 30, 20, 25, 28]]),
        coco_object(3, segmentation={"counts": [5, 20, 5], "size": [HEIGHT, WIDTH]}),
        coco_object(4, segmentation=[]),
        coco_object(5, segmentation=[[1, 2, 9, 2]]),
        coco_object(6, segmentation=[triangle], bbox=[]),
    )
    (record,), done = converted(source, shape="poly")
    box = {"bbox_2d": [10.5, 20, 40.75, 28], "desc": "car"}
    polygon = {"poly": triangle, "desc": "car"}
    assert record["objects"] == [polygon, box, box, box, box, polygon]
    instead = "its box instead of a polygon: "
    assert told(done) == {
        instead + "it is in several parts": ["annotation 2: 2 polygons"],
        instead + "it is given as a mask (RLE)": ["annotation 3"],
        instead + "it has none": ["annotation 4"],
        instead + "it is not three points or more with an area": ["annotation 5"],
        "an image without annotations": ["image 2 (猫.png)"],
    }


LEFT_OUT: dict[str, dict[str, Any]] = {
    "a crowd, not one object (iscrowd)": {"iscrowd": 1, "segmentation": {"counts": [9, 3], "size": [HEIGHT, WIDTH]}},
    "its image_id is not in `images`": {"image_id": 9},
    "its category_id is not in `categories`": {"category_id": 4},
    "its bbox is not four numbers x, y, width, height": {"bbox": [1, 2, 3, None]},
    "it has no area": {"bbox": [10, 10, 0, 5]},
    "it lies outside its image by a pixel or more": {"bbox": [90, 10, 7, 5]},
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_an_annotation_that_cannot_be_an_object_is_left_out_counted_and_named(folder: Path, reason: str) -> None:
    """The others of its image are written."""
    records, done = converted(coco(folder, coco_object(1), coco_object(77, **LEFT_OUT[reason])))
    assert [len(record["objects"]) for record in records] == [1]
    assert done.findings.left_out.counts["object", reason] == 1
    assert told(done)[reason][0].startswith("annotation 77")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, True, "7"])
def test_what_is_no_number_of_pixels_is_left_out(folder: Path, number: Any) -> None:
    """JSON of Python holds NaN and Infinity too."""
    _, done = converted(coco(folder, coco_object(1), coco_object(2, bbox=[1, 2, 3, number])))
    assert told(done)["its bbox is not four numbers x, y, width, height"] == ["annotation 2"]


@pytest.mark.parametrize(
    ("bbox", "written"),
    [
        ([-0.99, 0, 10, 10], [0, 0, 9.01, 10]),
        ([90, 60, 6.5, 4.999], [90, 60, WIDTH, HEIGHT]),
        ([90, 60, 6.0000001, 4], [90, 60, WIDTH, HEIGHT]),
        ([-1, 0, 10, 10], None),
        ([90, 60, 7, 4], None),
        ([-0.9, 0, 0.8, 10], None),
    ],
)
def test_what_sticks_out_by_less_than_a_pixel_is_clipped(
    folder: Path, bbox: list[float], written: list[float] | None
) -> None:
    """At a pixel it is another thing than rounding; clipped to nothing it is nothing."""
    records, done = converted(coco(folder, coco_object(1, image_id=2), coco_object(2, bbox=bbox)))
    assert [o["bbox_2d"] for r in records if r["images"] == ["img/a.png"] for o in r["objects"]] == (
        [written] if written else []
    )
    clipped = "clipped: it stuck out of its image by less than a pixel"
    assert (clipped in told(done)) == (written is not None and bbox[2] != 6.0000001)


def test_images_are_held_against_their_files(folder: Path) -> None:
    """Missing, broken, of another size than said, turned by EXIF, without annotations or without a name: told apart."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "img" / "turned.jpg", exif=exif)
    write(folder / "img" / "broken.png", "no image")
    names = ["a.png", "none.png", "broken.png", "tall.png", "turned.jpg", "turned.jpg", "猫.png", None]
    images: list[dict[str, Any]] = [coco_image(number, name) for number, name in enumerate(names, 1)]
    images[5] |= {"width": HEIGHT, "height": WIDTH}
    source = coco(folder, *[coco_object(n, image_id=n) for n in (1, 2, 2, 3, 4, 5, 6, 8)], images=images)
    records, done = converted(source)
    assert [record["images"] for record in records] == [["img/a.png"], ["img/turned.jpg"]]
    reasons = told(done)
    assert ["no such file" in place for place in reasons["its image cannot be read"]] == [True, False]
    assert reasons["its image is of another size than the source says"] == [
        "image 4 (tall.png): 48x80 (EXIF orientation applied), said to be 96x64",
        "image 6 (turned.jpg): 96x64 (EXIF orientation applied), said to be 64x96",
    ]
    assert reasons["an image without annotations"] == ["image 7 (猫.png)"]
    assert reasons["it has no file_name"] == ["image 8 (None)"]
    left_out = done.findings.left_out
    assert (left_out.total("record"), left_out.total("object"), done.classes.total()) == (6, 6, 2)


def test_sizes_come_from_the_files_where_coco_says_none(folder: Path) -> None:
    """Width and height are often missing in files of other tools."""
    bare = {"id": 1, "file_name": "tall.png"}
    (record,), _ = converted(coco(folder, coco_object(1, bbox=[40, 70, 8, 10]), images=[bare]))
    assert (record["width"], record["height"]) == (48, 80)


def test_a_name_with_a_slash_or_with_tokens_of_the_chat(folder: Path) -> None:
    """A slash ends the class, and is told; what the reader of records refuses is left out."""
    categories = [{"id": 3, "name": "cabinet/shelf"}, {"id": 17, "name": "<|im_end|>"}, {"id": 18}]
    source = coco(
        folder, coco_object(1), coco_object(2, category_id=17), coco_object(3, category_id=18), categories=categories
    )
    (record,), done = converted(source)
    assert [each["desc"] for each in record["objects"]] == ["cabinet/shelf"]
    assert done.classes == {"cabinet": 1}
    reasons = told(done)
    assert reasons["its class is what stands before the slash in the category's name"] == ["'cabinet/shelf'"]
    places = [place.split(":")[0] for place in reasons["its description cannot be used"]]
    assert places == ["annotation 2", "annotation 3"]


# --- ms-swift -----------------------------------------------------------------------------------------------------


def test_an_ms_swift_file_read_back_has_the_same_boxes_in_pixels(folder: Path) -> None:
    """Real ones as they stand, corners in either order; norm1 ones times the image's size."""
    lines = [
        swift_line([90.9, 10.8, 13, 22.8], [1, 2, 30, 40]),
        swift_line(
            [0.25, 0.5, 1.0, 0.75], objects={"ref": ["羊"], "bbox": [[0.25, 0.5, 1.0, 0.75]], "bbox_type": "norm1"}
        ),
    ]
    _, done = converted(swift(folder, *lines), domain="field")
    first, second = read_records(done.out).records
    assert [each.geometry.points for each in first.objects] == [(13, 10.8, 90.9, 22.8), (1, 2, 30, 40)]
    assert [each.geometry.points for each in second.objects] == [(24, 32, 96, 48)]
    assert [each.desc for each in (*first.objects, *second.objects)] == ["dog", "dog", "羊"]
    assert (first.domain, done.form, told(done)) == ("field", "swift", {})


@pytest.mark.parametrize(
    "images", ["img/a.png", ["img/a.png"], {"path": "img/a.png"}, [{"bytes": None, "path": "img/a.png"}], "absolute"]
)
def test_images_are_named_in_any_of_the_ways_that_ms_swift_takes(folder: Path, images: Any) -> None:
    """Alone or in a list, plain or with a path; absolute paths become relative ones."""
    given = str(folder / "img" / "a.png") if images == "absolute" else images
    (record,), _ = converted(swift(folder, swift_line([1, 2, 3, 4], images=given)))
    assert record["images"] == ["img/a.png"]
    line = swift_line([1, 2, 3, 4])
    line["image"] = line.pop("images")[0]
    assert converted(swift(folder, line), force=True)[0][0]["images"] == ["img/a.png"]


def two_images(second: str, image_ids: list[int] | None, **changes: Any) -> dict[str, Any]:
    """A line with two images and a box for each."""
    objects = {"ref": ["dog"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "image_id": image_ids} | changes
    return swift_line([1, 2, 3, 4], [5, 6, 7, 8], images=["img/a.png", second], objects=objects)


def test_several_images_of_one_size_stay_together(folder: Path) -> None:
    """Each object says on which it is; a box without an image_id is on the first."""
    records, _ = converted(swift(folder, two_images("img/猫.png", [1, 0]), two_images("img/猫.png", [1])))
    for record, where in zip(records, ([0, 1], [0, 1]), strict=True):
        assert record["images"] == ["img/a.png", "img/猫.png"]
        assert [each["image"] for each in record["objects"]] == where
    assert [each["bbox_2d"] for each in records[0]["objects"]] == [[5, 6, 7, 8], [1, 2, 3, 4]]


def test_images_of_different_sizes_become_a_record_each(folder: Path) -> None:
    """A record has one size; an image without objects is left out."""
    source = swift(folder, two_images("img/tall.png", [1, 0]), two_images("img/tall.png", None))
    records, done = converted(source)
    assert [(record["images"], record["width"], len(record["objects"])) for record in records] == [
        (["img/a.png"], 96, 1), (["img/tall.png"], 48, 1), (["img/a.png"], 96, 2),
    ]  # fmt: skip
    assert not any("image" in each for record in records for each in record["objects"])
    assert told(done) == {
        "a record for each image, because their sizes differ": ["swift.jsonl:1", "swift.jsonl:2"],
        "an image without objects": ["swift.jsonl:2: tall.png"],
    }


BOX = [1, 2, 3, 4]
BAD_BOXES: dict[str, dict[str, Any]] = {
    "it is a point, which a record cannot hold": swift_line([615, 226]),
    "its box is not four numbers x1, y1, x2, y2": swift_line([1, 1, 9, 1, 9, 9, 1, 9]),
    "it has no area": swift_line([5, 5, 5, 9]),
    "it lies outside its image by a pixel or more": swift_line([5, 5, 500, 9]),
    "its image_id is not one of the images": swift_line(BOX, objects={"ref": ["dog"], "bbox": [BOX], "image_id": [1]}),
    "nothing says on which of several images its norm1 box is (image_id)": two_images(
        "img/猫.png", None, bbox_type="norm1"
    ),
    "no <bbox> in the messages stands for its box": swift_line(objects={"ref": ["dog"], "bbox": [BOX]}),
    "its <ref-object> stands for nothing in `ref`": swift_line(BOX, objects={"ref": [], "bbox": [BOX]}),
}
BAD_LINES: dict[str, Any] = {
    "its line is not JSON": '{"messages": [',
    "it has no boxes (`objects` with `bbox`)": swift_line(objects=None),
    "its `objects` has the form of ms-swift 2 (caption, bbox, image)": swift_line(
        objects='[{"caption": "guy in red", "bbox": [138, 136, 235, 359], "bbox_type": "real", "image": 0}]'
    ),
    "it has no `messages`": swift_line(BOX, messages=None),
    "the content of a message is not a text": swift_line(BOX, messages=[{"role": "user", "content": [1]}]),
    "its images are not given by their paths": swift_line(BOX, images=[{"bytes": "iVBORw0K"}]),
    "its image is not a file but an address, or lies in the line itself": swift_line(BOX, images=["http://a/b.png"]),
    "its `ref` is not a list": swift_line(BOX, objects={"ref": "dog", "bbox": [BOX]}),
    "its bbox_type is neither real nor norm1": swift_line(BOX, objects={"bbox": [BOX], "bbox_type": "norm1000"}),
    "its image cannot be read": swift_line(BOX, images=["img/none.png"]),
}


@pytest.mark.parametrize("reason", [*BAD_BOXES, *BAD_LINES])
def test_a_line_or_a_box_that_cannot_be_converted_is_left_out_counted_and_named(folder: Path, reason: str) -> None:
    """By the line of the file; the other lines are written. A byte order mark before them does no harm."""
    bad = (BAD_BOXES | BAD_LINES)[reason]
    records, done = converted(swift(folder, "\ufeff" + json.dumps(swift_line(BOX)), "", bad))
    assert len(records) == 1
    what = "record" if reason in BAD_LINES else "object"
    assert done.findings.left_out.counts[what, reason] >= 1
    assert told(done)[reason][0].startswith("swift.jsonl:3")


def test_a_description_read_from_text_is_told(folder: Path) -> None:
    """The user should look at them."""
    line = swift_line(BOX, messages=[{"role": "assistant", "content": "a dog <bbox>"}], objects={"bbox": [BOX]})
    (record,), done = converted(swift(folder, line))
    assert record["objects"] == [{"bbox_2d": BOX, "desc": "a dog"}]
    assert list(told(done)) == ["described by the text beside its box, for want of a <ref-object>"]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [coco, swift])
def test_every_object_of_a_source_is_written_or_counted(folder: Path, make: Callable[..., Path]) -> None:
    """Nothing disappears: on images that are left out too."""
    boxes = [[1, 1, 5, 5], [0, 0, 0, 9], [50, 50, 90, 90], [-0.5, 2, 8, 9], [3, 3]]
    if make is coco:
        source = coco(
            folder, *[coco_object(n, image_id=n % 4, bbox=boxes[n % 5], iscrowd=n % 7 == 0) for n in range(40)]
        )
    else:
        names = ["img/a.png", "img/none.png", "img/tall.png"]
        lines = [swift_line(*boxes[: n % 6], images=names[n % 3]) for n in range(1, 16)]
        source = swift(folder, *lines)
    n_objects = 40 if make is coco else sum(n % 6 for n in range(1, 16))
    records, done = converted(source)
    assert sum(len(record["objects"]) for record in records) == done.classes.total() > 0
    assert done.classes.total() + done.findings.left_out.total("object") == n_objects


PLACES = {"deep/er": "../../img/a.png", "img": "a.png", "link": "../../img/a.png", "self": "img/a.png"}


@pytest.mark.parametrize("place", PLACES)
def test_image_paths_are_relative_to_the_new_file(folder: Path, place: str) -> None:
    """Wherever it lies, behind a link too: the file is found by those paths, and its folder is made."""
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "far" / "away")
    (folder / "self").symlink_to(folder)
    images = folder / "self" if place == "self" else None
    done = convert(swift(folder, swift_line(BOX)), folder / place / "out.jsonl", images=images)
    (image,) = json.loads(done.out.read_text())["images"]
    assert image == PLACES[place] and done.outside == (".." in image)
    assert (done.out.parent / image).samefile(folder / "img" / "a.png")


WRONG: dict[str, tuple[str | None, list[str]]] = {
    "no file": (None, ["No such file"]),
    "not JSON": ("<annotation><size/></annotation>", ["not JSON", "line 1 column 1"]),
    "not UTF-8": ("\udcff", ["not JSON", "utf-8"]),
    "a list": ("[]", ["a list"]),
    "an object that is neither": ('{"shapes": [], "version": "5"}', ["`shapes`, `version`", "`annotations`"]),
    "no categories": ('{"images": [], "annotations": []}', ["no list `categories`"]),
    "captions": ('{"images": [], "annotations": [{"caption": "a dog"}], "info": {}}', ["no list `categories`"]),
    "an id twice": (
        '{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}',
        ["`images`, item 2", "id 1 for the second time"],
    ),
    "an image without id": ('{"images": [7], "annotations": [], "categories": []}', ["`images`, item 1", "no id"]),
    "nothing in it": ('{"images": [], "annotations": [], "categories": []}', ["nothing that can be a record"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_neither_is_refused(folder: Path, kind: str) -> None:
    """The message says what was found and what it may be; nothing is written."""
    text, words = WRONG[kind]
    source = folder / "source.json"
    if text is not None:
        source.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as refusal:
        convert(source, folder / "out.jsonl")
    for word in (str(source), *words):
        assert word in str(refusal.value)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["source.json"] * (text is not None)


def test_images_that_are_not_where_they_are_looked_for_are_told_with_the_option_that_helps(folder: Path) -> None:
    """The usual mistake: the annotations lie in another folder than the images."""
    source = coco(folder, coco_object(1), coco_object(2, image_id=2))
    with pytest.raises(DataError, match=r"2 records: its image cannot be read") as refusal:
        convert(source, folder / "out.jsonl")
    assert f"{folder / 'a.png'}: no such file" in str(refusal.value) and "--images" in refusal.value.do


def test_a_file_that_is_there_is_replaced_only_by_force_and_only_by_a_whole_one(folder: Path) -> None:
    """A conversion that fails leaves it as it was, and nothing beside it."""
    good, out = swift(folder, swift_line(BOX)), write(folder / "out.jsonl", "mine")
    with pytest.raises(DataError, match="--force"):
        convert(good, out)
    bad = write(folder / "bad.jsonl", json.dumps(swift_line(BOX, images=["none.png"])))
    with pytest.raises(DataError, match="nothing that can be a record"):
        convert(bad, out, force=True)
    assert out.read_text() == "mine"
    convert(good, out, force=True)
    assert read_records(out).records
    assert sorted(path.name for path in folder.iterdir()) == ["bad.jsonl", "img", "out.jsonl", "swift.jsonl"]


@pytest.mark.parametrize(
    ("out", "options", "where", "got"),
    [
        ("swift.jsonl", {"force": True}, "--to", "the source itself"),
        ("img", {"force": True}, "--to", "a folder"),
        ("img/a.png/out.jsonl", {}, "--to", "a.png: File exists"),
        ("out.jsonl", {"images": Path("nowhere")}, "--images", "no such folder"),
        ("out.jsonl", {"domain": "a/b"}, "--domain", "a/b"),
        ("out.jsonl", {"shape": "poly"}, "swift.jsonl", "--geometry poly"),
        ("out.jsonl", {"form": "coco"}, "swift.jsonl", "not JSON"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    folder: Path, out: str, options: dict[str, Any], where: str, got: str
) -> None:
    """And the source is never touched."""
    source = swift(folder, swift_line(BOX), swift_line(BOX))
    before = source.read_bytes()
    with pytest.raises(DataError) as refusal:
        convert(source, folder / out, **options)
    assert where in refusal.value.where and got in refusal.value.got
    assert source.read_bytes() == before and not (folder / "out.jsonl").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_and_tells_what_it_wrote_and_what_not(folder: Path) -> None:
    """Status 0; the result goes to standard output, and training can read the file."""
    source = coco(folder, coco_object(1), coco_object(2, iscrowd=1), coco_object(3, image_id=2, category_id=17))
    done = trainer("convert", source.name, "--images", "img", "--to", "data/train.jsonl", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("data/train.jsonl: 2 records, 2 objects", "car", "猫", "1 object: a crowd", "annotation 2"):
        assert words in done.stdout
    assert (
        "images outside the folder of the new file: 2;" in done.stdout
        and "--custom.allow_outside_root true" in done.stdout
    )
    assert len(read_records(folder / "data" / "train.jsonl", allow_outside_root=True).records) == 2


@pytest.mark.parametrize(
    "arguments", [["none.json", "--to", "out.jsonl"], ["instances.json", "--to", "instances.json"]]
)
def test_the_command_ends_a_mistake_with_one_message_and_status_2(folder: Path, arguments: list[str]) -> None:
    """Where, what was got, what is allowed, what to do."""
    coco(folder, coco_object(1))
    done = trainer("convert", *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for part in ("got:", "allowed:", "do:"):
        assert part in done.stderr


def test_the_help_of_the_command_shows_it_at_work(tmp_path: Path) -> None:
    """An example for each of the two formats, on a line of its own."""
    done = trainer("convert", "--help", cwd=tmp_path)
    assert done.returncode == 0
    examples = [line.strip() for line in done.stdout.splitlines() if line.startswith("  python -m trainer convert ")]
    assert ["instances_val2017.json" in line for line in examples] == [True, False]
