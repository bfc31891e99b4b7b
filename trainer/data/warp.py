"""How a changed image is made from the one on disk: one matrix, one canvas, colour changes, pixels moved once.

Frames: coordinates are continuous, in pixels; the pixel in column i covers i to i + 1, an image of width w ends at w.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.data.geometry import SAME, Size, corners

Pixels = NDArray[np.uint8]
Colour = Callable[[Pixels], Pixels]
Matrix = tuple[float, float, float, float, float, float]
"""x' = a x + b y + c and y' = d x + e y + f, written (a, b, c, d, e, f)."""

# Loader processes are forked, and threads that OpenCV has started do not come along: it would wait for them for ever.
cv2.setNumThreads(0)

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
FILL = 128
"""What lies outside the image, in every channel: the grey that Qwen3-VL's normalisation takes to zero."""

LARGEST_SIDE = 2**15 - 2
"""Pixels; OpenCV counts them in 16 bits."""

LARGEST_CANVAS = 2**27
"""Pixels in all: as many as an image on disk may have."""

_ROWS = 256


def compose(outer: Matrix, inner: Matrix) -> Matrix:
    """The matrix that does `inner` first, then `outer`."""
    a, b, c, d, e, f = outer
    g, h, i, j, k, m = inner
    return (a * g + b * j, a * h + b * k, a * i + b * m + c, d * g + e * j, d * h + e * k, d * i + e * m + f)


def moved(points: Sequence[float], matrix: Matrix) -> tuple[float, ...]:
    """Flat points under a matrix."""
    a, b, c, d, e, f = matrix
    return tuple(
        value
        for x, y in zip(points[0::2], points[1::2], strict=True)
        for value in (a * x + b * y + c, d * x + e * y + f)
    )


def about(centre: tuple[float, float], a: float, b: float, d: float, e: float) -> Matrix:
    """The linear map ((a, b), (d, e)) with `centre` kept where it is."""
    x, y = centre
    return (a, b, x - a * x - b * y, d, e, y - d * x - e * y)


@dataclass(frozen=True)
class Warp:
    """What happens to the pixels of an image; nothing is drawn before `render`.

    Attributes:
        source: (width, height) of the image on disk.
        size: (width, height) of the canvas.
        matrix: from the image on disk to the canvas.
        visible: flat points of the convex polygon of the canvas frame in which the image shows; the rest is filled. It
            may reach beyond the canvas: what lies there is hidden, and can be uncovered by a larger canvas.
        colours: changes of pixels in their order, applied to the image on disk, so that the fill has no part in them.
    """

    source: Size
    size: Size
    matrix: Matrix
    visible: tuple[float, ...]
    colours: tuple[Colour, ...] = ()

    @classmethod
    def of(cls, size: Size) -> "Warp":
        """An image of (width, height) as it is."""
        return cls(size, size, IDENTITY, corners((0, 0, *size)))

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the canvas."""
        return self.size[0] / 2, self.size[1] / 2

    @property
    def mirrored(self) -> bool:
        """Whether the image shows its mirror image."""
        a, b, _, d, e, _ = self.matrix
        return a * e - b * d < 0

    def then(self, matrix: Matrix, size: Size | None = None) -> "Warp":
        """The same with one more map of the canvas frame, onto a canvas of another size where one is given."""
        return replace(
            self,
            matrix=compose(matrix, self.matrix),
            visible=moved(self.visible, matrix),
            size=size or self.size,
        )

    def coloured(self, colour: Colour) -> "Warp":
        """The same with one more change of colours."""
        return replace(self, colours=(*self.colours, colour))

    def render(self, pixels: Pixels) -> Pixels:
        """Draw the canvas.

        Args:
            pixels: (height, width, 3) uint8, RGB, of `source` size.

        Returns:
            (height, width, 3) uint8 of `size`. Whole-pixel shifts and flips copy pixels exactly, everything else is
            interpolated bilinearly, once.
        """
        for colour in self.colours:
            pixels = colour(pixels)
        if self.matrix == IDENTITY and self.size == self.source and not self._cutting_edges():
            return pixels
        # OpenCV counts from the middle of the first pixel, half a pixel in
        a, b, c, d, e, f = compose((1, 0, -0.5, 0, 1, -0.5), compose(self.matrix, (1, 0, 0.5, 0, 1, 0.5)))
        drawn: Pixels = cv2.warpAffine(  # type: ignore[assignment]  # of the pixels' own type
            pixels,
            np.array([[a, b, c], [d, e, f]]),
            self.size,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,  # so that the rim is not blended with the fill; the mask below cuts it
        )
        self._fill_outside(drawn)
        return drawn

    def _fill_outside(self, drawn: Pixels) -> None:
        """Overwrite pixels whose middle lies outside the polygon, edge by edge; edges that cut nothing cost nothing."""
        x, y = (np.arange(side) + 0.5 for side in self.size)
        for a, b, c in self._cutting_edges():
            for top in range(0, len(y), _ROWS):  # in strips: the depths of all pixels would take eight bytes each
                rows = slice(top, top + _ROWS)
                drawn[rows][(a * x)[None, :] + (b * y[rows] + c)[:, None] < -SAME] = FILL

    def _cutting_edges(self) -> list[tuple[float, float, float]]:
        """Edges of the polygon that leave a part of the canvas outside; a x + b y + c is the depth inside in pixels."""
        xs, ys = self.visible[0::2], self.visible[1::2]
        turn = -1.0 if _area(self.visible) < 0 else 1.0
        canvas = corners((0, 0, *self.size))
        edges = []
        for i in range(len(xs)):
            x, y, across, down = xs[i - 1], ys[i - 1], xs[i] - xs[i - 1], ys[i] - ys[i - 1]
            length = turn * math.hypot(across, down)
            if abs(length) > SAME:
                a, b, c = -down / length, across / length, (down * x - across * y) / length
                if any(a * x + b * y + c < -SAME for x, y in zip(canvas[0::2], canvas[1::2], strict=True)):
                    edges.append((a, b, c))
        return edges


def _area(points: Sequence[float]) -> float:
    """Area of a polygon, positive where its points go clockwise as one sees them (y points down)."""
    xs, ys = points[0::2], points[1::2]
    return sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))) / 2
