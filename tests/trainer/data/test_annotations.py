"""Annotations of other formats held against their images: boxes of pictures that EXIF turns, and what images may be."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps

from trainer.convert import Conversion, convert
from trainer.errors import DataError

WIDTH, HEIGHT = 20, 12
BOX = (3, 2, 9, 4)
"""On the picture as it is stored, in no symmetric place."""
TURNS = range(1, 9)


def photo(path: Path, turn: int) -> Path:
    """A black picture with the box in white, as a camera stores it that was held in some way."""
    picture, exif = Image.new("L", (WIDTH, HEIGHT)), Image.Exif()
    ImageDraw.Draw(picture).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=255)
    exif[ExifTags.Base.Orientation] = turn
    picture.save(path, exif=exif, quality=95)
    return path


def seen(path: Path) -> tuple[tuple[int, int], Any]:
    """Size of a picture as Pillow turns it, and the box of its white pixels."""
    picture = decoded(path)
    picture.load()  # turns a TIFF
    turned = ImageOps.exif_transpose(picture)
    return turned.size, white(turned)


def decoded(path: Path) -> Image.Image:
    """Opened as ms-swift does, from memory: Pillow 13 maps a plain TIFF's file, and then gets one on its side wrong."""
    return Image.open(BytesIO(path.read_bytes()))


def white(picture: Image.Image) -> Any:
    """The box of the white pixels, which a JPEG leaves nearly white."""
    return picture.point(lambda value: 255 * (value > 127)).getbbox()


def converted(source: Path, **options: Any) -> tuple[list[dict[str, Any]], Conversion]:
    """The records of a file, as JSON, and what the conversion says."""
    done = convert(source, source.with_name("out.jsonl"), force=True, **options)
    return [json.loads(line) for line in done.out.read_text(encoding="utf-8").splitlines()], done


def swift_line(images: list[str], **changes: Any) -> str:
    """A line of ms-swift's with a dog on the first image."""
    objects = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]} | changes
    messages = [{"role": "assistant", "content": "<ref-object><bbox>"}]
    return json.dumps({"messages": messages, "images": images, "objects": objects})


def coco(folder: Path, image: dict[str, Any], *things: dict[str, Any]) -> Path:
    """A COCO file of annotations on one image."""
    first = {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT} | image
    listed = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | each for n, each in enumerate(things, 1)
    ]
    tree = {"images": [first], "annotations": listed, "categories": [{"id": 1, "name": "dog"}]}
    (folder / "coco.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder / "coco.json"


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("fractions", [False, True])
def test_boxes_of_ms_swift_are_turned_with_their_pictures(tmp_path: Path, ending: str, fractions: bool) -> None:
    """They lie on the stored pixels; Pillow itself turns a TIFF as it decodes it, for ms-swift too."""
    paths = [photo(tmp_path / f"{turn}.{ending}", turn) for turn in TURNS]
    lines = []
    for path in paths:
        box, size = white(picture := decoded(path)), picture.size
        given = [value / size[i % 2] for i, value in enumerate(box)] if fractions else [*box]
        lines.append(swift_line([path.name], bbox=[given], bbox_type="norm1" if fractions else "real"))
    (tmp_path / "swift.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records, done = converted(tmp_path / "swift.jsonl")
    for record, path in zip(records, paths, strict=True):
        size, box = seen(path)
        assert (record["width"], record["height"]) == size
        assert record["objects"][0]["bbox_2d"] == [*box]
    told = {("record", "EXIF turns its image: its shapes were turned with it"): 7}
    assert done.findings.changed.counts == ({} if ending == "tif" else told)


def test_annotations_of_coco_lie_on_the_turned_picture_and_that_is_told(tmp_path: Path) -> None:
    """Tools that draw them show it so; where only the stored size is said, the image is left out."""
    photo(tmp_path / "a.jpg", 6)
    source = coco(tmp_path, {"file_name": "a.jpg", "width": HEIGHT, "height": WIDTH}, {})
    (record,), done = converted(source)
    assert record["objects"] == [{"bbox_2d": [1, 2, 4, 6], "desc": "dog"}]
    reason = "EXIF turns its image: its shapes were taken to lie on the turned one"
    assert done.findings.changed.counts == {("record", reason): 1}


def test_numbers_that_coco_has_as_texts_are_read(tmp_path: Path) -> None:
    """Width and height, and what is a crowd; another size as a text is told as one."""
    photo(tmp_path / "a.png", 1)
    things = [{"iscrowd": crowd} for crowd in ("0", "1", 0, 1, False, True, None)]
    (record,), done = converted(coco(tmp_path, {"width": str(WIDTH), "height": str(HEIGHT)}, *things))
    assert (record["width"], record["height"], len(record["objects"])) == (WIDTH, HEIGHT, 4)
    assert done.findings.left_out.counts == {("object", "a crowd, not one object (iscrowd)"): 3}
    with pytest.raises(DataError, match=r"20x12 .*, said to be 21x12"):
        converted(coco(tmp_path, {"width": "21", "height": "12"}, {}))


def test_a_polygon_without_the_list_around_it_is_one(tmp_path: Path) -> None:
    """Two numbers less are no polygon, and no polygon in parts either."""
    photo(tmp_path / "a.png", 1)
    source = coco(tmp_path, {}, {"segmentation": [1, 2, 9, 2, 5, 8.5]}, {"segmentation": [1, 2, 9, 2]})
    (record,), done = converted(source, shape="poly")
    assert [each.keys() - {"desc"} for each in record["objects"]] == [{"poly"}, {"bbox_2d"}]
    reason = "its box instead of a polygon: it is not three points or more with an area"
    assert done.findings.changed.counts == {("object", reason): 1}


def test_a_line_with_too_many_images_or_with_one_inside_is_left_out(tmp_path: Path) -> None:
    """And the others are written. A place names no more of a path than can be read."""
    photo(tmp_path / "a.png", 1)
    letters = "iVBORw0K" * 600
    lines = [
        swift_line(["a.png"]), swift_line(["a.png"] * 1_001), swift_line([letters]), swift_line([letters[:4_000]])
    ]  # fmt: skip
    (tmp_path / "swift.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (record,), done = converted(tmp_path / "swift.jsonl")
    assert record["images"] == ["a.png"]
    left_out = done.findings.left_out
    assert left_out.places["record", "it has more than 1,000 images"] == ["swift.jsonl:2: 1,001"]
    inside = "its image is not a file but an address, or lies in the line itself"
    assert left_out.places["record", inside] == ["swift.jsonl:3"]
    (place,) = left_out.places["record", "its image cannot be read"]
    assert place.startswith("swift.jsonl:4: ...") and len(place) < 500
