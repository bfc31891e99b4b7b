"""Draws labels on a picture: shapes in colours that any picture leaves visible, their texts where there is room."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from trainer.data.augment import outline
from trainer.data.geometry import Box, Geometry, bounding_box
from trainer.lettering import Lettering

# Lengths are inches from the upper left corner of the picture, but for those in its pixels.
_POINTS, _HEIGHT, _PAD = 5.5, 0.105, 0.03
_LENGTHS = (1.2, 0.6, 0.3, 0.0)
"""Widths of a plate, tried in turn until all texts have room; at 0 only numbers are left."""
_FEW = 10
"""Labels of a picture up to which their texts stand on it; where there are more, only their numbers do."""

# Okabe and Ito (2008), told apart by the colour-blind, without the yellow that white swallows. With each the colour
# that stands out from it: of the text on it, and of a rim that keeps it visible on any picture.
_COLOURS = (
    ("#0072B2", "white"),
    ("#E69F00", "black"),
    ("#009E73", "black"),
    ("#D55E00", "black"),
    ("#56B4E9", "black"),
    ("#CC79A7", "black"),
)


@dataclass(frozen=True, slots=True)
class Label:
    """A shape on a picture.

    Attributes:
        geometry: in pixels of the picture as it is shown; its first point is marked, but that of a box.
        number: its place in the answer, from 1; None: it is in none.
        desc: what it is called.
        colour: any number; equal ones are drawn alike.
    """

    geometry: Geometry
    number: int | None
    desc: str
    colour: int

    @property
    def text(self) -> str:
        """`3 nine/red`."""
        return self.desc if self.number is None else f"{self.number} {self.desc}"


def draw_labels(
    axes: Axes, labels: Sequence[Label], room: tuple[float, float], scale: float, letters: Lettering
) -> None:
    """Draw labels on axes whose data are the pixels of the picture.

    Args:
        axes: with the picture.
        labels: all of the picture.
        room: width and height in inches, from the picture's upper left corner, that texts may cover.
        scale: inches a pixel.
        letters: measures of text.
    """
    for label in labels:
        _draw_shape(axes, label)
    for label, text, (left, above, _, _) in plates(labels, room, scale, letters):
        colour, ink = _COLOURS[label.colour % len(_COLOURS)]
        plate = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        x, y = (left + _PAD) / scale, (above + _HEIGHT / 2) / scale
        axes.text(x, y, text, fontsize=_POINTS, color=ink, va="center", bbox=plate, zorder=5)


def plates(
    labels: Sequence[Label], room: tuple[float, float], scale: float, letters: Lettering
) -> list[tuple[Label, str, Box]]:
    """Where the texts of labels go: at their shapes, inside the room, over no other text as far as that can be.

    Args:
        labels: of one picture.
        room: as for `draw_labels`.
        scale: inches a pixel.
        letters: measures of text.

    Returns:
        Each label with its text, or as much of it as there is room for, and the plate (x1, y1, x2, y2) under it.
    """
    placed: list[tuple[Label, str, Box]] = []
    for longest in _LENGTHS if len(labels) <= _FEW else _LENGTHS[-1:]:
        placed, all_free = _placed(labels, room, scale, letters, min(longest, room[0]))
        if all_free:
            break
    return placed


def _placed(
    labels: Sequence[Label], room: tuple[float, float], scale: float, letters: Lettering, longest: float
) -> tuple[list[tuple[Label, str, Box]], bool]:
    """Plates as `plates` gives them, of texts up to `longest` inches, and whether each has found a free place."""
    boxes = [_anchor(label.geometry, scale) for label in labels]
    shapes = np.reshape(boxes, (-1, 4))
    taken = np.zeros((len(labels), 4))
    placed: list[tuple[Label, str, Box]] = []
    all_free = True
    for n, label in enumerate(labels):
        for text in _spellings(label, longest, letters):
            found = list(_places(boxes[n], letters.width(text, _POINTS) + 2 * _PAD, room))
            free = [plate for plate in found if not _covered(plate, taken[:n])]
            plate = min(free or found, key=lambda each: _covered(each, shapes))
            if free:
                break
        else:
            all_free = False
        taken[n] = plate
        placed.append((label, text, plate))
    return placed, all_free


def _anchor(geometry: Geometry, scale: float) -> Box:
    """What a text stands at, in inches: the box around a shape; of a line, its first point."""
    x1, y1, x2, y2 = bounding_box(geometry.points[:2] if geometry.kind == "line" else geometry.points)
    rim = _PAD if geometry.kind == "line" else 0.0
    return x1 * scale - rim, y1 * scale - rim, x2 * scale + rim, y2 * scale + rim


def _draw_shape(axes: Axes, label: Label) -> None:
    colour, rim = _COLOURS[label.colour % len(_COLOURS)]
    corners = np.reshape(outline(label.geometry), (-1, 2))  # (points, 2)
    shape = Polygon(
        corners,
        closed=label.geometry.kind != "line",
        fill=False,
        edgecolor=colour,
        linewidth=0.8,
        clip_on=False,
        path_effects=[withStroke(linewidth=1.6, foreground=rim, alpha=0.7)],
    )
    axes.add_patch(shape)
    if label.geometry.kind != "bbox_2d":
        axes.plot(*corners[0], "o", ms=3.2, color=colour, mec=rim, mew=0.5, clip_on=False)


def _spellings(label: Label, longest: float, letters: Lettering) -> Iterator[str]:
    """A label's text, a shorter one, its number: the first one that finds room is taken."""
    for inches in (longest, longest / 2):
        if inches >= _LENGTHS[-2] or label.number is None:
            yield letters.shortened(label.text, max(inches, _LENGTHS[-2]) - 2 * _PAD, _POINTS)
    if label.number is not None:
        yield str(label.number)


def _places(box: Box, width: float, room: tuple[float, float]) -> Iterable[Box]:
    """Plates above and below a box, inside it, beside it, in its middle; each moved into the room."""
    x1, y1, x2, y2 = box
    right, over = x2 - width, y1 - _HEIGHT
    corners = [(x1, over), (x1, y2), (right, over), (right, y2), (x1, y1), (x1, y2 - _HEIGHT), (x2, y1)]
    for x, y in [*corners, ((x1 + right) / 2, (over + y2) / 2)]:
        left, above = max(0.0, min(x, room[0] - width)), max(0.0, min(y, room[1] - _HEIGHT))
        yield (left, above, left + width, above + _HEIGHT)


def _covered(plate: Box, others: NDArray[np.float64]) -> float:
    """How much of others, (n, 4), a plate lies over: the sum of areas, in square inches."""
    x1, y1, x2, y2 = plate
    width = np.minimum(others[:, 2], x2) - np.maximum(others[:, 0], x1)
    height = np.minimum(others[:, 3], y2) - np.maximum(others[:, 1], y1)
    return float((width.clip(0) * height.clip(0)).sum())
