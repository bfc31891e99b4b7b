"""Makes objects in pixels of what a model has said; damaged answers are mended where they can be, and counted."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.data.answer import ParsedObject, parse_answer
from trainer.data.clipping import inside
from trainer.data.geometry import SAME, EmitNorm, Geometry, Size, bounding_box, to_pixels
from trainer.data.records import Object

State = Literal["sound", "repaired", "unreadable"]
"""Of an answer: as it was learned; something mended or left out; nothing in it could be read."""

CUT, TWICE, TURNED, CLIPPED, OUTSIDE, EMPTY, BROKEN = (
    "the answer is cut or no JSON: its whole objects are kept",
    "an object is given twice: kept once",
    "a box has its corners exchanged: put in order",
    "a shape leaves the image: moved to its edge",
    "a shape lies outside the image: left out",
    "a shape has no area: left out",
    "an object is broken: left out",
)
"""What can be wrong with an answer, and what is done about it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says about one image.

    Attributes:
        objects: in pixels of the image, in the order of the answer.
        state: of the answer.
        repairs: what was done, and how often.
    """

    objects: tuple[Object, ...]
    state: State
    repairs: Counter[str] = field(default_factory=Counter)


NOTHING = Reading((), "unreadable")


def read_answer(text: str, size: Size, emit_norm: EmitNorm, shown: Size) -> Reading:
    """The objects of an answer about one image.

    Args:
        text: as it was generated; anything.
        size: (width, height) of the image in pixels.
        emit_norm: frame of the answer's coordinates.
        shown: (width, height) of the image as the model has seen it.

    Returns:
        Shapes that lie on the image and have an area (a line: a length). Never raises.
    """
    repairs: Counter[str] = Counter()
    found = parse_answer(text)
    leaves = _leaves(text)
    if leaves is None:
        repairs[CUT] += 1
    elif (lost := leaves - len(found)) > 0:
        repairs[BROKEN] += lost
    objects: list[Object] = []
    for parsed in dict.fromkeys(found):
        if mended := _mended(parsed, size, emit_norm, shown, repairs):
            objects.append(mended)
    if twice := len(found) - len(set(found)):
        repairs[TWICE] += twice
    state: State = "sound" if not repairs else "repaired" if found else "unreadable"
    return Reading(tuple(objects), state, repairs)


def _leaves(text: str) -> int | None:
    """How many objects a whole answer gives; None where it is not of the form that was learned."""
    try:
        return sum(len(_pairs(group)) for _, group in _pairs(json.loads(text, object_pairs_hook=_Pairs)))
    except (ValueError, RecursionError):
        return None


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, in which a key may come twice."""


def _pairs(tree: Any) -> _Pairs:
    if not isinstance(tree, _Pairs):
        raise ValueError
    return tree


def _mended(parsed: ParsedObject, size: Size, emit_norm: EmitNorm, shown: Size, repairs: Counter[str]) -> Object | None:
    """One object in pixels, on its image; None, and counted, where nothing of it is left."""
    if parsed.image:
        repairs[BROKEN] += 1  # of an image that was not shown
        return None
    points = to_pixels(Geometry(parsed.kind, parsed.points), size, emit_norm, shown).points
    if parsed.kind == "bbox_2d":
        ordered = bounding_box(points)
        if ordered != points:
            repairs[TURNED] += 1
        points = ordered
    x1, y1, x2, y2 = bounding_box(points)
    if x2 < 0 or y2 < 0 or x1 > size[0] or y1 > size[1]:
        repairs[OUTSIDE] += 1
        return None
    clipped = inside(points, size)
    if any(abs(before - after) > SAME for before, after in zip(points, clipped, strict=True)):
        repairs[CLIPPED] += 1
    x1, y1, x2, y2 = bounding_box(clipped)
    flat = (x1 == x2 and y1 == y2) if parsed.kind == "line" else (x1 == x2 or y1 == y2)
    if flat:
        repairs[EMPTY] += 1
        return None
    return Object(Geometry(parsed.kind, clipped), parsed.desc)
