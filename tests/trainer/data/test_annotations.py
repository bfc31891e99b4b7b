"""Annotations of other formats held against their images: boxes of pictures that EXIF turns, and what images may be."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageDraw, ImageOps

from trainer.convert import Conversion, convert

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


def converted(source: Path) -> tuple[list[dict[str, Any]], Conversion]:
    """The records of a file, as JSON, and what the conversion says."""
    done = convert(source, source.with_name("out.jsonl"), force=True)
    return [json.loads(line) for line in done.out.read_text(encoding="utf-8").splitlines()], done


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("fractions", [False, True])
def test_boxes_of_ms_swift_are_turned_with_their_pictures(tmp_path: Path, ending: str, fractions: bool) -> None:
    """They lie on the stored pixels; Pillow itself turns a TIFF as it decodes it, for ms-swift too."""
    paths = [photo(tmp_path / f"{turn}.{ending}", turn) for turn in TURNS]
    lines = []
    for path in paths:
        box, size = white(picture := decoded(path)), picture.size
        given = [value / size[i % 2] for i, value in enumerate(box)] if fractions else [*box]
        objects = {"ref": ["dog"], "bbox": [given], "bbox_type": "norm1" if fractions else "real"}
        messages = [{"role": "assistant", "content": "<ref-object><bbox>"}]
        lines.append(json.dumps({"messages": messages, "images": [path.name], "objects": objects}))
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
    image = {"id": 1, "file_name": "a.jpg", "width": HEIGHT, "height": WIDTH}
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    tree = {"images": [image], "annotations": [thing], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "coco.json").write_text(json.dumps(tree), encoding="utf-8")
    (record,), done = converted(tmp_path / "coco.json")
    assert record["objects"] == [{"bbox_2d": [1, 2, 4, 6], "desc": "dog"}]
    reason = "EXIF turns its image: its shapes were taken to lie on the turned one"
    assert done.findings.changed.counts == {("record", reason): 1}
