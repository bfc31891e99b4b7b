"""Draws a contact sheet: pictures with their labels row by row, and beside them what the model reads and learns."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trainer.data.geometry import Size
from trainer.data.images import read_image
from trainer.data.records import Picture
from trainer.data.warp import Pixels
from trainer.labels import Label, draw_labels
from trainer.lettering import Lettering

# Lengths are inches, from the upper left corner of the sheet.
_MARGIN, _GAP, _SEAM = 0.25, 0.2, 0.06
_CELL, _ONLY_CELL, _TEXT = 2.3, 3.4, 4.6
"""Width of a cell, of a cell that is the only one of its row, of the text."""
_TALLEST, _FLATTEST = 2.6, 0.5
"""Height of the pictures in a cell at most; where they would be flatter, each cell gets the width of all."""
_LARGEST_PIXEL = 1 / 30
_HAIR = 0.012
_LINE = 0.122
_TITLE_LINE, _HEAD_LINE = 1.7 * _LINE, 1.8 * _LINE
_POINTS, _TITLE_POINTS, _HEAD_POINTS = 6.5, 8.0, 9.0
_DOTS = 150
"""An inch."""
_LEARNED_LINES, _READ_LINES, _NOTE_LINES = 40, 10, 4
"""Lines of what is learned, is read, is noted on a cell, that a row makes room for."""

_INK, _SOFT, _ALERT, _RULE = "#1A1A1A", "#6B6B6B", "#A63D00", "#D5D5D5"
_LEARNED, _TINT = "#00694D", "#E5F3EE"

Watch = Callable[[list[Any]], Iterable[Any]]
"""Passes on rows while they are drawn, to whoever shows progress."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture and its labels."""

    picture: Picture
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One version of a row: lines that name it and its pictures, lines on what it has lost, the pictures."""

    caption: tuple[str, ...]
    notes: tuple[str, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the text beside a row; what is learned is set apart."""

    heading: str
    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A sample in all its versions, each of as many pictures as the others."""

    title: str
    cells: tuple[Cell, ...]
    passages: tuple[Passage, ...]

    def texts(self) -> Iterable[str]:
        """Everything that is written in it."""
        yield self.title
        for passage in self.passages:
            yield from (passage.heading, passage.text)
        for cell in self.cells:
            yield from (*cell.caption, *cell.notes)
            yield from (label.text for panel in cell.panels for label in panel.labels)


def draw(headline: str, notes: Sequence[str], rows: Sequence[Row], letters: Lettering, watch: Watch = iter) -> Figure:
    """Draw a sheet.

    Args:
        headline: what the sheet shows.
        notes: lines below it.
        rows: at least one, of equally many cells.
        letters: fonts and measures for all texts of the sheet.
        watch: passes on the rows while they are drawn.

    Returns:
        The figure, to be saved under `style`.

    Raises:
        DataError: an image has gone or is broken.
    """
    frames = [_Frame(row, letters) for row in rows]
    width = 2 * _MARGIN + frames[0].width
    top = _MARGIN + _HEAD_LINE + _LINE * len(notes) + _GAP
    height = top + sum(frame.height + _GAP for frame in frames) + _MARGIN - _GAP
    paper = _Paper(Figure(figsize=(width, height), dpi=_DOTS, facecolor="white"), letters)
    paper.write(_MARGIN, _MARGIN, headline, points=_HEAD_POINTS, inches=width - 2 * _MARGIN)
    for n, note in enumerate(notes):
        paper.write(_MARGIN, _MARGIN + _HEAD_LINE + _LINE * n, note, colour=_ALERT, inches=width - 2 * _MARGIN)
    for frame in watch(frames):
        paper.fill(_MARGIN, top - _GAP / 2, width - 2 * _MARGIN, _HAIR, _RULE)
        frame.draw(paper, _MARGIN, top)
        top += frame.height + _GAP
    return paper.figure


def style(letters: Lettering) -> Any:
    """Settings of matplotlib under which a sheet is drawn and saved."""
    return {
        "font.family": letters.families,
        "text.parse_math": False,
        "text.hinting": "none",  # else lines come out wider than they were measured
        "svg.hashsalt": "preview",
        "axes.linewidth": 0.4,
        "axes.edgecolor": "#999999",
    }


class _Paper:
    """A figure that is written on in inches from its upper left corner."""

    def __init__(self, figure: Figure, letters: Lettering) -> None:
        self.figure, self.letters = figure, letters
        self.width, self.height = figure.get_size_inches()

    def write(
        self, x: float, y: float, text: str, *, points: float = _POINTS, colour: str = _INK, inches: float = math.inf
    ) -> None:
        """A line whose upper left corner is (x, y), cut to `inches`."""
        if not math.isinf(inches):
            text = self.letters.shortened(text, inches, points)
        middle = 1 - (y + _LINE / 2) / self.height
        self.figure.text(x / self.width, middle, text, fontsize=points, color=colour, va="center_baseline")

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A rectangle."""
        left, bottom, *size = self._place(x, y, width, height)
        self.figure.add_artist(Rectangle((left, bottom), *size, facecolor=colour, edgecolor="none", zorder=-1))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Room for a picture."""
        axes = self.figure.add_axes(self._place(x, y, width, height))
        axes.set(xticks=[], yticks=[])
        return axes

    def _place(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        """As matplotlib has it: shares of the figure, from its lower left corner."""
        return x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height


class _Frame:
    """Where everything of a row goes: sizes are known before a pixel is read.

    Attributes:
        width: of the row.
        height: of the row.
    """

    def __init__(self, row: Row, letters: Lettering) -> None:
        self._row = row
        n_cells, n_panels = len(row.cells), len(row.cells[0].panels)
        sizes = [panel.picture.size for cell in row.cells for panel in cell.panels]
        slot = max(width for width, _ in sizes), max(height for _, height in sizes)  # pixels; all pictures fit it
        self._cell_width = _CELL if n_cells > 1 else _ONLY_CELL
        cells_width = n_cells * self._cell_width + (n_cells - 1) * _GAP
        # One scale, in inches a pixel, for the whole row: sizes are seen as they are to each other.
        self._columns, self._scale = _arranged(slot, n_panels, self._cell_width)
        self._stacked = n_cells > 1 and self._scale * slot[1] < _FLATTEST
        if self._stacked:
            self._cell_width = cells_width
            self._columns, self._scale = _arranged(slot, n_panels, cells_width)
        self._slot = self._scale * slot[0], max(self._scale * slot[1], _FLATTEST)  # of a flat one, room for texts
        lines = math.ceil(n_panels / self._columns)
        pictures = lines * self._slot[1] + (lines - 1) * _SEAM
        self._captions = [self._caption(cell, letters) for cell in row.cells]
        heights = [len(each) * _LINE + _SEAM for each in self._captions]
        self._captions_height = max(heights)
        self._step = pictures + _GAP  # from the pictures of a cell to the cell below
        cells_height = sum(heights) + n_cells * self._step - _GAP if self._stacked else max(heights) + pictures
        self._passages = _fitted(row.passages, int(cells_height / _LINE), letters)
        n_lines = sum(1 + len(text) for _, text in self._passages)
        self._text_left = cells_width + _GAP
        self.width = self._text_left + _TEXT
        self.height = _TITLE_LINE + max(cells_height, n_lines * _LINE + _SEAM * (len(self._passages) - 1))

    def draw(self, paper: _Paper, x: float, y: float) -> None:
        """Draw the row with its upper left corner at (x, y)."""
        paper.write(x, y, self._row.title, points=_TITLE_POINTS, inches=self.width)
        y += _TITLE_LINE
        self._draw_passages(paper, x + self._text_left, y)
        decoded: dict[Path, Pixels] = {}  # versions of a row share their files
        for cell, caption in zip(self._row.cells, self._captions, strict=True):
            for n, (line, colour) in enumerate(caption):
                paper.write(x, y + n * _LINE, line, colour=colour)
            top = y + (len(caption) * _LINE + _SEAM if self._stacked else self._captions_height)
            for n, panel in enumerate(cell.panels):
                down, across = divmod(n, self._columns)
                left = x + across * (self._slot[0] + _SEAM)
                self._draw_panel(paper, left, top + down * (self._slot[1] + _SEAM), panel, decoded)
            if self._stacked:
                y = top + self._step
            else:
                x += self._cell_width + _GAP

    def _caption(self, cell: Cell, letters: Lettering) -> list[tuple[str, str]]:
        """Lines over a cell, each with its colour."""
        names = [letters.shortened(line, self._cell_width, _POINTS) for line in cell.caption]
        notes = [line for note in cell.notes for line in letters.lines(note, self._cell_width, _POINTS)]
        return [*((line, _INK) for line in names), *((line, _ALERT) for line in _cut(notes, _NOTE_LINES, 0))]

    def _draw_passages(self, paper: _Paper, x: float, y: float) -> None:
        for passage, lines in self._passages:
            height = (1 + len(lines)) * _LINE
            if passage.learned:
                paper.fill(x - 0.05, y, _TEXT + 0.05, height + 0.02, _TINT)
                paper.fill(x - 0.08, y, 0.03, height + 0.02, _LEARNED)
            paper.write(x, y, passage.heading, colour=_LEARNED if passage.learned else _SOFT, inches=_TEXT)
            for n, line in enumerate(lines, 1):
                paper.write(x, y + n * _LINE, line, colour=_INK if passage.learned else _SOFT)
            y += height + _SEAM

    def _draw_panel(self, paper: _Paper, x: float, y: float, panel: Panel, decoded: dict[Path, Pixels]) -> None:
        width, height = panel.picture.size
        axes = paper.axes(x, y, width * self._scale, height * self._scale)
        axes.imshow(_pixels(panel.picture, self._scale, decoded), extent=(0, width, height, 0), aspect="auto")
        room = (self._cell_width, self._slot[1]) if self._columns == 1 else self._slot
        draw_labels(axes, panel.labels, room, self._scale, paper.letters)
        axes.set(xlim=(0, width), ylim=(height, 0))


def _arranged(slot: Size, count: int, width: float) -> tuple[int, float]:
    """Columns of a grid of `count` pictures of a size, and the inches a pixel at which they fill a width best."""

    def scale(columns: int) -> float:
        lines = math.ceil(count / columns)
        across = (width - (columns - 1) * _SEAM) / (columns * slot[0])
        return min(across, (_TALLEST - (lines - 1) * _SEAM) / (lines * slot[1]), _LARGEST_PIXEL)

    best = max(range(1, count + 1), key=scale)
    return best, scale(best)


def _fitted(passages: Sequence[Passage], room: int, letters: Lettering) -> list[tuple[Passage, list[str]]]:
    """Passages in lines; learned text is cut at its end, other text in its middle, where a row has no room for it."""
    broken = [letters.lines(passage.text, _TEXT, _POINTS) for passage in passages]
    learned = sum(min(len(lines), _LEARNED_LINES) for p, lines in zip(passages, broken, strict=True) if p.learned)
    others = sum(not passage.learned for passage in passages)
    left = max(_READ_LINES, (room - learned - len(passages)) // max(1, others))
    return [
        (passage, _cut(lines, _LEARNED_LINES, 0) if passage.learned else _cut(lines, left, 2 * left // 3))
        for passage, lines in zip(passages, broken, strict=True)
    ]


def _cut(lines: list[str], room: int, at_end: int) -> list[str]:
    """At most `room` lines, `at_end` of them from the end, with a line that says how many are left out."""
    if len(lines) <= room:
        return lines
    at_start = room - 1 - at_end
    return [*lines[:at_start], f"... ({len(lines) - room + 1} more lines)", *lines[len(lines) - at_end :]]


def _pixels(picture: Picture, scale: float, decoded: dict[Path, Pixels]) -> Pixels:
    """(height, width, 3): the picture as it is shown, no larger than it is drawn."""
    if picture.path not in decoded:
        decoded[picture.path] = np.asarray(read_image(picture.path))
    pixels = decoded[picture.path]
    if picture.warp is not None:
        pixels = picture.warp.render(pixels)
    width, height = (max(1, round(side * scale * _DOTS)) for side in picture.size)
    if width < picture.size[0]:
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return pixels
