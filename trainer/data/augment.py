"""Augmentation: a chain of operations over a record's geometry and colours, labels exact; no pixel is touched here.

An operation is a function (view, generator) -> view. Geometry is composed into one matrix on the way and drawn once by
`Warp.render`; labels are moved by the same matrix and cut by the same edges.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Literal

import numpy as np

from trainer.data import colour
from trainer.data.clipping import clip, inside
from trainer.data.colour import Range
from trainer.data.geometry import SAME, Geometry, bounding_box, corners
from trainer.data.records import Object, Record, text_problem
from trainer.data.warp import LARGEST_CANVAS, LARGEST_SIDE, Colour, Matrix, Warp, about, moved
from trainer.errors import DataError
from trainer.seeds import derived_seed


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of labels at the edges of the canvas, and of boxes that are turned.

    Attributes:
        min_coverage: share of an object that must be left; with less its label is dropped.
        completeness_threshold: share below which a label that stays is marked partly visible.
        complete_word: word of a `desc` that `partial_word` takes the place of; None: there is none.
        partial_word: attribute of what is partly visible; empty: nothing is marked.
        turned_boxes: what a box becomes that is no longer upright: its corners, or the upright box around them.
        keep_lost: the fault of the published runs: no label is cut or dropped, points outside are moved to the edge.
    """

    min_coverage: float = 0.3
    completeness_threshold: float = 0.95
    complete_word: str | None = None
    partial_word: str = "partly visible"
    turned_boxes: Literal["quad", "bbox_2d"] = "quad"
    keep_lost: bool = False

    def __post_init__(self) -> None:
        """Refuse a word that would bring into descriptions what no record may bring.

        Raises:
            DataError: it holds a chat token, say.
        """
        if self.partial_word and (problem := text_problem("partial_word", self.partial_word)):
            raise DataError(
                "custom.augmentation.partial_word", problem, "a word of descriptions, or an empty one", "choose another"
            )


@dataclass(frozen=True, slots=True)
class Label:
    """An object on its way through the chain.

    Attributes:
        number: place of the object in its record.
        object: as the record has it.
        points: its outline now (a box is its four corners), a line's points; flat, in the frame of the canvas.
        coverage: share of it that no edge has cut off.
        partial: whether it is to be marked partly visible.
    """

    number: int
    object: Object
    points: tuple[float, ...]
    coverage: float = 1.0
    partial: bool = False

    @property
    def is_line(self) -> bool:
        """Whether it has a length instead of an area."""
        return self.object.geometry.kind == "line"


@dataclass(frozen=True, slots=True)
class View:
    """A record as an operation takes it and gives it back."""

    warp: Warp
    labels: tuple[Label, ...]
    rules: Rules

    def then(self, matrix: Matrix, size: tuple[int, int] | None = None) -> "View":
        """Pixels and labels under one more map, onto a canvas of another size where one is given."""
        labels = tuple(replace(label, points=moved(label.points, matrix)) for label in self.labels)
        return replace(self, warp=self.warp.then(matrix, size), labels=labels)


def hflip(view: View, generator: np.random.Generator) -> View:
    """Left and right exchanged."""
    return view.then((-1, 0, view.warp.size[0], 0, 1, 0))


def vflip(view: View, generator: np.random.Generator) -> View:
    """Top and bottom exchanged."""
    return view.then((1, 0, 0, 0, -1, view.warp.size[1]))


def rotate(view: View, generator: np.random.Generator, *, max_deg: float) -> View:
    """Turned about the middle by up to `max_deg` degrees either way; what leaves the canvas can still be uncovered."""
    angle = math.radians(generator.uniform(-max_deg, max_deg))
    cos, sin = math.cos(angle), math.sin(angle)
    return view.then(about(view.warp.centre, cos, -sin, sin, cos))


def scale(view: View, generator: np.random.Generator, *, lo: float, hi: float) -> View:
    """Zoomed about the middle by a factor of `lo` to `hi`, on the same canvas."""
    factor = generator.uniform(lo, hi)
    return view.then(about(view.warp.centre, factor, 0, 0, factor))


def resize_by_scale(view: View, generator: np.random.Generator, *, lo: float, hi: float, align_multiple: int) -> View:
    """Image and canvas times a factor of `lo` to `hi`, the sides rounded to multiples of `align_multiple` pixels."""
    factor = generator.uniform(lo, hi)
    width, height = view.warp.size
    new_width, new_height = (max(1, round(side * factor / align_multiple)) * align_multiple for side in (width, height))
    return view.then((new_width / width, 0, 0, 0, new_height / height, 0), (new_width, new_height))


def expand_to_fit_affine(view: View, generator: np.random.Generator, *, multiple: int) -> View:
    """The canvas enlarged until the whole image lies on it, the sides up to multiples; it never gets smaller."""
    x1, y1, x2, y2 = bounding_box(view.warp.visible)
    left, top = min(0, math.floor(x1 + SAME)), min(0, math.floor(y1 + SAME))
    right, bottom = (max(side, math.ceil(end - SAME)) for side, end in zip(view.warp.size, (x2, y2), strict=True))
    return view.then((1, 0, -left, 0, 1, -top), _up_to((right - left, bottom - top), multiple))


def pad_to_multiple(view: View, generator: np.random.Generator, *, multiple: int) -> View:
    """Fill on the right and below, until the sides are multiples."""
    cut = cut_at_canvas(view)
    return cut.then((1, 0, 0, 0, 1, 0), _up_to(cut.warp.size, multiple))


def random_crop(
    view: View, generator: np.random.Generator, *, scale: Range, aspect_ratio: Range, **labels: Any
) -> View:
    """A part of the canvas: its share of the area, its shape and its place are drawn; see `_crop` for the labels."""
    share, shape = generator.uniform(*scale), generator.uniform(*aspect_ratio)
    size = _part(view.warp.size, math.sqrt(share * shape), math.sqrt(share / shape))
    place = [int(generator.integers(whole - part + 1)) for whole, part in zip(view.warp.size, size, strict=True)]
    return _crop(view, (place[0], place[1]), size, **labels)


def center_crop(view: View, generator: np.random.Generator, *, scale: float, **labels: Any) -> View:
    """The middle of the canvas, `scale` of its area."""
    size = _part(view.warp.size, math.sqrt(scale), math.sqrt(scale))
    place = [(whole - part) // 2 for whole, part in zip(view.warp.size, size, strict=True)]
    return _crop(view, (place[0], place[1]), size, **labels)


def _part(size: tuple[int, int], across: float, down: float) -> tuple[int, int]:
    width, height = (max(1, min(side, round(side * by))) for side, by in zip(size, (across, down), strict=True))
    return width, height


def _up_to(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return math.ceil(size[0] / multiple) * multiple, math.ceil(size[1] / multiple) * multiple


def _crop(
    view: View,
    place: tuple[int, int],
    size: tuple[int, int],
    *,
    min_coverage: float,
    completeness_threshold: float,
    min_objects: int,
    skip_if_line: bool,
) -> View:
    """Cut out (width, height) pixels from `place` on, or leave all as it is.

    Labels with less than `min_coverage` left are dropped, those under `completeness_threshold` marked. Nothing is done
    where fewer than `min_objects` labels would be left, or (`skip_if_line`) where a line would be cut.
    """
    before = cut_at_canvas(view)
    after = cut_at_canvas(before.then((1, 0, -place[0], 0, 1, -place[1]), size), min_coverage, completeness_threshold)
    left = {label.number: label for label in after.labels}
    lines = [label for label in before.labels if label.is_line]
    if skip_if_line and any(_is_cut(label, left.get(label.number), place, size) for label in lines):
        return view
    return view if len(after.labels) < min_objects else after


def _is_cut(before: Label, after: Label | None, place: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether an edge of the crop goes through a line; one that lies outside as a whole is not cut."""
    if after is not None:
        return after.coverage < before.coverage
    return clip(moved(before.points, (1, 0, -place[0], 0, 1, -place[1])), size, is_line=True)[1] > 0


def _recolour(change: Callable[..., list[Colour]], view: View, generator: np.random.Generator, **params: Any) -> View:
    return replace(view, warp=reduce(Warp.coloured, change(generator, **params), view.warp))


OPERATIONS: Mapping[str, Callable[..., View]] = {
    "hflip": hflip,
    "vflip": vflip,
    "rotate": rotate,
    "scale": scale,
    "resize_by_scale": resize_by_scale,
    "pad_to_multiple": pad_to_multiple,
    "expand_to_fit_affine": expand_to_fit_affine,
    "random_crop": random_crop,
    "center_crop": center_crop,
    **{name: partial(_recolour, change) for name, change in colour.CHANGES.items()},
}
"""Every operation by its name in a configuration: (view, generator, its parameters) -> view."""

_AFTER_THE_FIX = ("expand_to_fit_affine", "random_crop", "center_crop")
"""What the published runs did not have yet."""


def cut_at_canvas(view: View, min_coverage: float | None = None, completeness_threshold: float | None = None) -> View:
    """Labels cut at the edges of the canvas, and what the image shows too: later operations cannot bring it back."""
    rules = view.rules
    at_least = rules.min_coverage if min_coverage is None else min_coverage
    complete = rules.completeness_threshold if completeness_threshold is None else completeness_threshold
    size = view.warp.size
    visible, _ = clip(view.warp.visible, size, is_line=False)
    warp = replace(view.warp, visible=visible or view.warp.visible)
    if rules.keep_lost:
        return replace(view, warp=warp, labels=tuple(_to_the_edge(label, size) for label in view.labels))
    labels = []
    for label in view.labels:
        points, share = clip(label.points, size, is_line=label.is_line)
        coverage = label.coverage * share
        if share == 1.0:
            labels.append(replace(label, points=points))
        elif share > 0 and coverage >= at_least:
            labels.append(
                replace(label, points=points, coverage=coverage, partial=label.partial or coverage < complete)
            )
    return replace(view, warp=warp, labels=tuple(labels))


def _to_the_edge(label: Label, size: tuple[int, int]) -> Label:
    return replace(label, points=inside(label.points, size))


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a chain."""

    name: str
    prob: float
    """Share of records that it changes."""
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chain:
    """All operations in order. The same (seed, epoch, record) always gives the same change, whoever asks and when."""

    steps: tuple[Step, ...]
    rules: Rules
    seed: int
    bypass_prob: float = 0.0
    """Share of records left as they are."""
    bank: int | None = None
    """Different changes of each record; epochs take turns with them. None: every epoch has its own."""

    def change(self, record: Record, *, epoch: int, copy: int = 0) -> Record:
        """The record as it is shown in an epoch; no pixel is read.

        Every operation has a generator of its own, by its place in the chain, so that one that is not done leaves what
        the others draw as it was: a clean and a noisy run of one seed turn and zoom alike.

        Args:
            record: as it was read.
            epoch: from 0.
            copy: which showing of the record in this epoch, from 0.

        Returns:
            Another record of the same id; this one where it is left as it is, where no label would be left (for a
            summary: where one would be lost), or where the canvas would be larger than can be drawn.
        """
        labels = tuple(Label(n, each, outline(each.geometry)) for n, each in enumerate(record.objects))
        start = Warp.of(record.size)
        view = View(start, labels, self.rules)
        turn = epoch % self.bank if self.bank else epoch
        for place, step in enumerate((Step("bypass", self.bypass_prob), *self.steps)):
            own = derived_seed(self.seed, "augmentation", turn, copy, record.id, place)
            if own >= step.prob * 2**63:  # a generator of its own costs ten times as much as this
                continue
            if step.name == "bypass":
                return record
            if not (self.rules.keep_lost and step.name in _AFTER_THE_FIX):
                view = OPERATIONS[step.name](view, np.random.default_rng(own), **step.params)
        size = view.warp.size
        if view.warp == start or max(*start.size, *size) > LARGEST_SIDE or size[0] * size[1] > LARGEST_CANVAS:
            return record
        cut = cut_at_canvas(view)
        objects = tuple(_object(label, cut) for label in cut.labels)
        if record.task == "summary" and len(objects) < len(record.objects):  # which it may speak of
            return record
        pictures = tuple(replace(picture, warp=cut.warp) for picture in record.images)
        return replace(record, images=pictures, objects=objects) if objects else record


def outline(geometry: Geometry) -> tuple[float, ...]:
    """Flat points of a shape: a box has four corners, clockwise from the upper left."""
    if geometry.kind != "bbox_2d":
        return geometry.points
    return corners(geometry.points)


def _object(label: Label, view: View) -> Object:
    """The object that a label has become."""
    old, points = label.object, label.points
    if view.warp.mirrored and not label.is_line:  # outlines go on the same way round as before
        points = tuple(value for x, y in zip(points[-2::-2], points[::-2], strict=True) for value in (x, y))
    kind = old.geometry.kind
    if kind == "bbox_2d":
        around = bounding_box(points)
        upright = _is_upright(points, around)
        geometry = (
            Geometry("bbox_2d", around) if upright or view.rules.turned_boxes == "bbox_2d" else _as_outline(old, points)
        )
    else:
        geometry = Geometry(kind, points) if kind in ("line", "poly") else _as_outline(old, points)
    return replace(old, geometry=geometry, desc=marked(old.desc, view.rules) if label.partial else old.desc)


def _is_upright(points: Sequence[float], around: Sequence[float]) -> bool:
    """Whether every point lies in a corner of the box around them."""
    ends = (around[0::2], around[1::2])
    return all(min(abs(value - end) for end in ends[i % 2]) <= SAME for i, value in enumerate(points))


def _as_outline(old: Object, points: tuple[float, ...]) -> Geometry:
    """A quad where there are four corners, the first of them where the first one lay before; else a polygon."""
    if len(points) != 8:
        return Geometry("poly", points)
    before = _in_their_box(outline(old.geometry))
    shifts = [points[2 * n :] + points[: 2 * n] for n in range(4)]
    return Geometry("quad", min(shifts, key=lambda shifted: math.dist(_in_their_box(shifted), before)))


def _in_their_box(points: Sequence[float]) -> tuple[float, ...]:
    """Points with the box around them taken to -1 to 1."""
    x1, y1, x2, y2 = bounding_box(points)
    middle, half = ((x1 + x2) / 2, (y1 + y2) / 2), (max(x2 - x1, SAME) / 2, max(y2 - y1, SAME) / 2)
    return tuple((value - middle[i % 2]) / half[i % 2] for i, value in enumerate(points))


def marked(desc: str, rules: Rules) -> str:
    """A description with the word for partly visible: in place of the word for whole, else as one more attribute."""
    if not rules.partial_word:
        return desc
    words = re.split(r"(\s*[/,，]\s*)", desc.strip())
    if rules.partial_word in words:
        return desc
    if rules.complete_word in words:
        return "".join(rules.partial_word if word == rules.complete_word else word for word in words)
    kind, slash, rest = desc.partition("/")
    attributes, more, others = rest.partition("/")
    last = attributes.rstrip()
    listed = f"{last},{rules.partial_word}{attributes[len(last) :]}" if last else rules.partial_word
    return f"{kind}/{listed}{more}{others}" if slash else f"{kind}/{rules.partial_word}"
