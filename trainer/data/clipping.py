"""Shapes cut at the edges of a canvas: what is left of a polygon or a line, and how much of it that is."""

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

from trainer.data.geometry import SAME, Size, bounding_box

_MANY_CROSSINGS = 300  # resolving them takes time that grows with their square: 0.1 s for so many
_EDGES_AT_ONCE = 256
_NOTHING = 1e-3  # pixels, or square pixels: what only touches an edge has less inside


def clip(points: Sequence[float], size: Size, *, is_line: bool) -> tuple[tuple[float, ...], float]:
    """Cut a shape at the edges of a canvas.

    Where a line or a hollow polygon falls into pieces, the largest piece stands for it.

    Args:
        points: flat, in the frame of the canvas.
        size: (width, height) of the canvas.
        is_line: an open line; else the outline of an area.

    Returns:
        The points that are left, in the direction of the given ones, and the share (0 to 1) of the shape's area, of a
        line's length, that they cover. No points where nothing is left.
    """
    x1, y1, x2, y2 = bounding_box(points)
    width, height = size
    if x1 >= -SAME and y1 >= -SAME and x2 <= width + SAME and y2 <= height + SAME:
        return inside(points, size), 1.0
    if x1 > width or y1 > height or x2 < 0 or y2 < 0:
        return (), 0.0
    pairs = list(zip(points[0::2], points[1::2], strict=True))
    wanted, (shape, left) = ("length", _line(pairs, size)) if is_line else ("area", _area(pairs, size))
    largest = max(shapely.get_parts(left), key=lambda piece: float(getattr(piece, wanted)), default=None)
    if largest is None or getattr(largest, wanted) <= _NOTHING:
        return (), 0.0
    ring = largest.exterior if wanted == "area" else largest
    corners = list(ring.coords)
    if wanted == "area":
        corners = corners[:-1]  # shapely closes rings
        if shapely.is_ccw(ring) != shapely.is_ccw(shapely.linearrings([*pairs, pairs[0]])):
            corners.reverse()
    share = float(getattr(largest, wanted) / getattr(shape, wanted))
    return inside([value for pair in corners for value in pair], size), min(1.0, share)


def _line(pairs: Sequence[tuple[float, float]], size: Size) -> tuple[BaseGeometry, BaseGeometry]:
    """A line as it is, and its pieces inside. An intersection would cut it where it crosses itself, too."""
    line = LineString(pairs)
    return line, shapely.clip_by_rect(line, -SAME, -SAME, size[0] + SAME, size[1] + SAME)  # its edges count


def _area(pairs: Sequence[tuple[float, float]], size: Size) -> tuple[BaseGeometry, BaseGeometry]:
    """An outline with its crossings resolved, and its pieces inside."""
    area: BaseGeometry = Polygon(pairs)
    if not area.is_valid:  # the corners of a quad may just be in another order
        scrawl = len(pairs) == 4 or _crossings(pairs) > _MANY_CROSSINGS
        area = area.convex_hull if scrawl else shapely.make_valid(area)
    return area, shapely.intersection(area, box(0, 0, *size))


def _crossings(pairs: Sequence[tuple[float, float]]) -> int:
    """How often the edges of an outline cross each other; may stop counting where there are too many."""
    begin = np.array(pairs)  # (n, 2)
    along = np.roll(begin, -1, axis=0) - begin
    found = 0
    for start in range(0, len(begin), _EDGES_AT_ONCE):
        here = slice(start, start + _EDGES_AT_ONCE)
        # on which side of each of these edges every corner lies, (edges, n); then the other way round
        side = _cross(along[here, None], begin[None] - begin[here, None])
        other = _cross(along[None], begin[here, None] - begin[None])
        end_of = _cross(along[None], begin[here, None] + along[here, None] - begin[None])
        apart = (side * np.roll(side, -1, axis=1) < 0) & (other * end_of < 0)
        found += int(apart.sum())
        if found > 2 * _MANY_CROSSINGS:
            break
    return found // 2  # each was met from both of its edges


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def inside(points: Sequence[float], size: Size) -> tuple[float, ...]:
    """Points outside a canvas moved to its edge, each coordinate by itself."""
    return tuple(min(max(value, 0.0), float(size[i % 2])) for i, value in enumerate(points))
