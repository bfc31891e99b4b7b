"""Shapes on an image: their reading order, and their way between pixels and the integers of an answer.

Frames: `pixel` coordinates count pixels of the image as the JSONL describes it; `emitted` coordinates are
the integers of an answer, in norm1000, norm100 or (`none`) in pixels of the image as the model is shown it.
Points are flat: x, y, x, y, ...
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["bbox_2d", "quad", "poly", "line"]
EmitNorm = Literal["norm1000", "norm100", "none"]
Box = tuple[float, float, float, float]
Size = tuple[int, int]

KINDS: tuple[Kind, ...] = get_args(Kind)
SAME = 1e-6
"""Pixels within which two coordinates are one: a float product of exact turns and shifts is off by less."""

_MAX_POINTS = 5_000  # of a shape: more than any sample has room for; cutting takes time by their square
_UNITS: dict[EmitNorm, int] = {"norm1000": 1000, "norm100": 100}


@dataclass(frozen=True)
class Geometry:
    """One shape: a box (x1, y1, x2, y2), a quadrilateral, a polygon or an open line."""

    kind: Kind
    points: tuple[float, ...]


def count_problem(kind: Kind, n_numbers: int) -> str | None:
    """Say what is wrong with the number of coordinates of a shape.

    Args:
        kind: the shape.
        n_numbers: how many numbers it holds (two a point).

    Returns:
        None when the number is right, else one phrase.
    """
    if n_numbers % 2:
        return f"{kind} has an odd number of coordinates ({n_numbers})"
    exact = {"bbox_2d": 4, "quad": 8}.get(kind)
    if exact is not None and n_numbers != exact:
        return f"{kind} has {n_numbers} numbers instead of {exact}"
    least = {"line": 2, "poly": 3}.get(kind, 0)
    if n_numbers < 2 * least:
        return f"{kind} has {n_numbers // 2} points, fewer than {least}"
    if n_numbers > 2 * _MAX_POINTS:
        return f"{kind} has {n_numbers // 2} points, more than {_MAX_POINTS}"
    return None


def bounding_box(points: Sequence[float]) -> Box:
    """The smallest upright box (x1, y1, x2, y2) around flat points, in their own frame."""
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def corners(box: Sequence[float]) -> tuple[float, ...]:
    """The corners of a box (x1, y1, x2, y2) as flat points, clockwise from the upper left one."""
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y1, x2, y2, x1, y2)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of one frame, 0 to 1; 0 when either box is empty or inside out."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    area_a, area_b = ((max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])) for box in (a, b))
    if width <= 0 or height <= 0 or area_a <= 0 or area_b <= 0:
        return 0.0
    return width * height / (area_a + area_b - width * height)


def from_left_end(geometry: Geometry) -> Geometry:
    """A line turned so that it starts at its leftmost end (at equal x, the upper one); other shapes as they are."""
    points = geometry.points
    if geometry.kind != "line" or points[:2] <= points[-2:]:
        return geometry
    pairs = list(zip(points[0::2], points[1::2], strict=True))
    return Geometry("line", tuple(value for pair in reversed(pairs) for value in pair))


def reading_key(geometry: Geometry) -> tuple[float, ...]:
    """Sort key: top to bottom, then left to right, by the upper left corner of the bounding box.

    The lower right corner and the points themselves come after it, so that the order does not depend on
    the order in the file.
    """
    x1, y1, x2, y2 = bounding_box(geometry.points)
    return (y1, x1, y2, x2, *geometry.points)


def emit(geometry: Geometry, size: Size, emit_norm: EmitNorm, shown: Size | None = None) -> Geometry:
    """Bring a shape from pixels to the integers of an answer; lines start at their leftmost end.

    Args:
        geometry: in pixels.
        size: (width, height) in pixels of the image that the coordinates belong to.
        emit_norm: frame of the answer.
        shown: (width, height) of the image after resizing; matters for `none` only, `size` when not given.

    Returns:
        The shape in whole numbers: 0 to 1000, 0 to 100, or pixels of `shown`.
    """
    return from_left_end(Geometry(geometry.kind, _scaled(geometry.points, size, _extent(emit_norm, shown or size))))


def to_pixels(geometry: Geometry, size: Size, emit_norm: EmitNorm, shown: Size | None = None) -> Geometry:
    """Bring a shape from the frame of an answer back to pixels; the inverse of `emit` up to half a unit.

    Args:
        geometry: in emitted coordinates, as `parse_answer` gives it.
        size: (width, height) in pixels of the image that the result belongs to.
        emit_norm: frame of the answer.
        shown: as for `emit`.

    Returns:
        The shape in pixels, not clipped to the image: a model may point outside it.
    """
    extent = _extent(emit_norm, shown or size)
    return Geometry(geometry.kind, tuple(v * size[i % 2] / extent[i % 2] for i, v in enumerate(geometry.points)))


def _extent(emit_norm: EmitNorm, shown: Size) -> Size:
    """What the right and the lower edge of the image are called in an emitted frame."""
    unit = _UNITS.get(emit_norm)
    return shown if unit is None else (unit, unit)


def _scaled(points: Sequence[float], size: Size, extent: Size) -> tuple[float, ...]:
    """Whole numbers, halves rounded up: Python's round() goes to even and would let neighbours swap parity."""
    return tuple(
        min(math.floor(value * extent[i % 2] / size[i % 2] + 0.5), extent[i % 2]) for i, value in enumerate(points)
    )
