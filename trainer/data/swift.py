"""Reads ms-swift's grounding data: conversations in which placeholders stand for descriptions and boxes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.data.annotations import Annotation, Entry, Findings, Watch, are_numbers
from trainer.data.geometry import Geometry
from trainer.data.placeholders import Message, Name, name_boxes

_LONGEST_PATH = 4096  # letters: what is longer is an image in base64


def read_swift(lines: Sequence[bytes], source: Path, images: Path, findings: Findings, watch: Watch) -> Iterator[Entry]:
    """Read the lines of a JSONL file of `messages`, `images` and `objects` (`ref`, `bbox`, `bbox_type`, `image_id`).

    Args:
        lines: the file, line by line; blank ones hold nothing.
        source: the file; ids name it with the line, from 1.
        images: folder that relative paths are looked for in.
        findings: gets what cannot be a record or an object.
        watch: is handed the lines to go over, and may show how far that has come.

    Yields:
        The entries in the order of the lines.
    """
    for number, line in watch([(number, line) for number, line in enumerate(lines, 1) if line.strip()]):
        place = f"{source.name}:{number}"
        try:
            tree = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            findings.leave_out_record("its line is not JSON", f"{place}: {error}")
            continue
        if entry := _entry(tree, place, images, findings):
            yield entry


def _entry(tree: Any, place: str, folder: Path, findings: Findings) -> Entry | None:
    objects = tree.get("objects") if isinstance(tree, dict) else None
    if isinstance(objects, str | list):
        findings.leave_out_record("its `objects` has the form of ms-swift 2 (caption, bbox, image)", place)
        return None
    boxes = objects.get("bbox") if isinstance(objects, dict) else None
    if not isinstance(objects, dict) or not isinstance(boxes, list) or not boxes:
        findings.leave_out_record("it has no boxes (`objects` with `bbox`)", place)
        return None
    try:
        messages = _messages(tree.get("messages"))
        paths = _image_paths(tree.get("images", tree.get("image")), folder)
        refs = _list(objects, "ref")
        given = _list(objects, "image_id")
        fractions = _fractions(objects.get("bbox_type"))
    except _NotReadableError as reason:
        findings.leave_out_record(str(reason), place, len(boxes))
        return None
    # For norm1 the format gives image_id no meaning, and so none to its absence where there are several images.
    unknown = fractions and not given and len(paths) > 1
    which = [None] * len(boxes) if unknown else [*given, *[0] * (len(boxes) - len(given))]
    names = name_boxes(messages, refs, len(boxes))
    found = []
    for index, box in enumerate(boxes):
        here = f"{place}, box {index + 1}"
        try:
            found.append(_annotation(box, names.get(index), _image(which[index], len(paths)), here))
        except _NotReadableError as reason:
            findings.left_out.add("object", str(reason), here)
        else:
            if names[index].from_text:
                findings.changed.add("object", "described by the text beside its box, for want of a <ref-object>", here)
    # ms-swift decodes with Pillow and leaves the EXIF orientation alone
    return Entry(place, paths, tuple(found), fractions=fractions, as_stored=True)


class _NotReadableError(Exception):
    """Why a line, or a box of it, is left out."""


def _annotation(box: Any, name: Name | None, image: int, place: str) -> Annotation:
    if not isinstance(box, list) or not are_numbers(box) or len(box) not in (2, 4):
        raise _NotReadableError("its box is not four numbers x1, y1, x2, y2")
    if len(box) == 2:
        raise _NotReadableError("it is a point, which a record cannot hold")
    if name is None:
        raise _NotReadableError("no <bbox> in the messages stands for its box")
    if name.problem is not None:
        raise _NotReadableError(name.problem)
    # ms-swift takes the corners in either order too
    (x1, x2), (y1, y2) = sorted((float(box[0]), float(box[2]))), sorted((float(box[1]), float(box[3])))
    return Annotation(place, Geometry("bbox_2d", (x1, y1, x2, y2)), name.desc, image)


def _image(given: Any, n_images: int) -> int:
    if given is None:
        raise _NotReadableError("nothing says on which of several images its norm1 box is (image_id)")
    if type(given) is not int or not 0 <= given < n_images:
        raise _NotReadableError("its image_id is not one of the images")
    return given


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _NotReadableError("it has no `messages`")
    contents = ["" if each.get("content") is None else each["content"] for each in messages]
    if not all(isinstance(content, str) for content in contents):
        raise _NotReadableError("the content of a message is not a text")
    return [Message(str(each.get("role")), content) for each, content in zip(messages, contents, strict=True)]


def _image_paths(images: Any, folder: Path) -> tuple[Path, ...]:
    """One path or several, each plain or as {"path": ...}."""
    listed = images if isinstance(images, list) else [images]
    paths: list[Any] = [each.get("path") if isinstance(each, dict) else each for each in listed]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise _NotReadableError("its images are not given by their paths")
    if any(path.startswith("data:") or "://" in path or len(path) > _LONGEST_PATH for path in paths):
        raise _NotReadableError("its image is not a file but an address, or lies in the line itself")
    return tuple(folder / path for path in paths)


def _list(objects: dict[str, Any], key: str) -> list[Any]:
    found = objects.get(key) or []
    if not isinstance(found, list):
        raise _NotReadableError(f"its `{key}` is not a list")
    return found


def _fractions(bbox_type: Any) -> bool:
    if bbox_type not in (None, "", "real", "norm1"):
        raise _NotReadableError("its bbox_type is neither real nor norm1")
    return bool(bbox_type == "norm1")
