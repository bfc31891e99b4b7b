"""Shapes cut at the edges of a canvas: what is left of a polygon or a line, and how much of it that is."""

from collections.abc import Sequence

import shapely
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

from trainer.data.geometry import Size, bounding_box

_SAME = 1e-6  # pixels; a float product of exact turns and shifts is off by less


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
    if x1 >= -_SAME and y1 >= -_SAME and x2 <= width + _SAME and y2 <= height + _SAME:
        return inside(points, size), 1.0
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return (), 0.0
    pairs = list(zip(points[0::2], points[1::2], strict=True))
    shape: BaseGeometry = LineString(pairs) if is_line else shapely.make_valid(Polygon(pairs))
    pieces = shapely.get_parts(shapely.intersection(shape, box(0, 0, width, height)))
    wanted = "area" if shape.area > 0 else "length"
    largest = max(pieces, key=lambda piece: float(getattr(piece, wanted)), default=None)
    if largest is None or not getattr(largest, wanted):
        return (), 0.0
    ring = largest.exterior if wanted == "area" else largest
    left = list(ring.coords)
    if wanted == "area":
        left = left[:-1]  # shapely closes rings
        if shapely.is_ccw(ring) != shapely.is_ccw(shapely.linearrings([*pairs, pairs[0]])):
            left.reverse()
    share = float(getattr(largest, wanted) / getattr(shape, wanted))
    return inside([value for pair in left for value in pair], size), min(1.0, share)


def inside(points: Sequence[float], size: Size) -> tuple[float, ...]:
    """Points outside a canvas moved to its edge, each coordinate by itself."""
    return tuple(min(max(value, 0.0), float(size[i % 2])) for i, value in enumerate(points))
