"""The answer as text: written from a record for the model to learn, read back from what a model generates."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.geometry import KINDS, EmitNorm, Geometry, Kind, Size, count_problem, emit, reading_key
from trainer.data.records import Record

_STRING = r'"(?:[^"\\]|\\.)*"'
_LEAF_OR_IMAGE = re.compile(rf'(?P<leaf>\{{(?:[^{{}}"]|{_STRING})*\}})|"image_(?P<image>\d{{1,4}})"\s*:', re.DOTALL)


@dataclass(frozen=True)
class ParsedObject:
    """One object read out of an answer: points in emitted coordinates, index (from 0) of its image."""

    kind: Kind
    points: tuple[float, ...]
    desc: str
    image: int = 0


def answer_text(record: Record, emit_norm: EmitNorm, shown: Sequence[Size] | None = None) -> str:
    """The answer that the model learns: compact JSON, a group per image, objects in reading order, or its summary.

    Args:
        record: with at least one object; for the summary task, with summaries.
        emit_norm: frame of the coordinates.
        shown: (width, height) of each image after resizing, see `geometry.emit`.

    Returns:
        For instance `{"image_1":{"object_1":{"bbox_2d":[12,34,56,78],"desc":"seven/red"}}}`, or
        `{"image_1":"a red seven"}`.
    """
    groups: dict[str, object] = {}
    for index, picture in enumerate(record.images):
        if record.task == "summary":
            if picture.summary is not None:
                groups[f"image_{index + 1}"] = picture.summary
            continue
        emitted = in_order(record, index, emit_norm, shown[index] if shown else None)
        groups[f"image_{index + 1}"] = {
            f"object_{number}": _leaf(geometry, record.objects[place].desc)
            for number, (place, geometry) in enumerate(emitted, 1)
        }
    return json.dumps(groups, ensure_ascii=False, separators=(",", ":"))


def in_order(record: Record, image: int, emit_norm: EmitNorm, shown: Size | None = None) -> list[tuple[int, Geometry]]:
    """The objects of one image as the answer numbers them.

    Args:
        record: what the answer is about.
        image: index of the image, from 0.
        emit_norm: frame of the coordinates.
        shown: (width, height) of the image after resizing, see `geometry.emit`.

    Returns:
        (place among the record's objects, geometry as emitted), that of `object_1` first.
    """
    size = record.images[image].size
    emitted = [(n, emit(o.geometry, size, emit_norm, shown)) for n, o in enumerate(record.objects) if o.image == image]
    # Sorted by what is emitted, so that the order can be seen in the answer itself.
    return sorted(emitted, key=lambda pair: (reading_key(pair[1]), pair[1].kind, record.objects[pair[0]].desc))


def parse_answer(text: str) -> list[ParsedObject]:
    """Read the objects out of generated text; whatever is not a whole, sound object is left out.

    Args:
        text: anything; a cut or damaged answer gives the objects that are complete.

    Returns:
        The objects in the order of the text. Never raises.
    """
    objects: list[ParsedObject] = []
    image = 0
    for match in _LEAF_OR_IMAGE.finditer(text):
        if match["image"] is not None:
            image = max(0, int(match["image"]) - 1)
        elif (parsed := _parse_leaf(match["leaf"], image)) is not None:
            objects.append(parsed)
    return objects


def _leaf(geometry: Geometry, desc: str) -> dict[str, object]:
    leaf: dict[str, object] = {geometry.kind: list(geometry.points)}
    if geometry.kind == "line":
        leaf["line_points"] = len(geometry.points) // 2
    return {**leaf, "desc": desc}


def _parse_leaf(text: str, image: int) -> ParsedObject | None:
    try:
        leaf = json.loads(text, strict=False)
        kinds = [kind for kind in KINDS if kind in leaf]
        points = tuple(float(value) for value in leaf[kinds[0]])
        desc = leaf["desc"]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        return None
    if len(kinds) != 1 or not isinstance(desc, str) or count_problem(kinds[0], len(points)):
        return None
    if not all(map(math.isfinite, points)):
        return None
    # an escape may name half a letter, which no file takes
    return ParsedObject(kinds[0], points, desc.encode("utf-8", "replace").decode("utf-8"), image)
