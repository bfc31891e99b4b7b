"""Annotations of other formats on their way to records: held against the image files, clipped to them or left out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.data.geometry import Geometry, Size, bounding_box, count_problem
from trainer.data.images import SIDEWAYS
from trainer.data.records import MAX_IMAGES, MAX_OBJECTS, text_problem

What = Literal["record", "object"]
Watch = Callable[[list[Any]], Iterable[Any]]
"""Hands out a list one by one, and may show how far that has come."""

_LONGEST_NAME = 300  # letters of a path that are shown
_DIGITS = 10
_EXAMPLES = 3  # places that are kept for each reason
_DECIMALS = 3  # of a pixel: x + width, or a fraction times the size, must not bring the noise of float sums
_TOO_LARGE = 1e9  # pixels
_ROUNDING = 1.0  # pixels by which a shape may stick out of its image: what rounding and 0- or 1-based pixels do


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object as its source has it: where it stands there, its shape, its description, the index of its image."""

    id: str
    geometry: Geometry
    desc: str
    image: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One image, or several that belong together, with what is annotated on them.

    Attributes:
        id: where it stands in its source: `image 7 (a.jpg)`, `train.jsonl:12`.
        images: at least one file.
        annotations: those that could be read.
        width: pixels of the images as the source says; None where it says nothing.
        height: likewise.
        fractions: coordinates are fractions of the image's width and height, not pixels.
        as_stored: coordinates lie on the image as its file stores it, before EXIF turns it.
    """

    id: str
    images: tuple[Path, ...]
    annotations: tuple[Annotation, ...]
    width: Any = None
    height: Any = None
    fractions: bool = False
    as_stored: bool = False


class Tally:
    """How often something happened, by what it happened to and why, with the first few places."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.counts: Counter[tuple[What, str]] = Counter()
        self.places: defaultdict[tuple[What, str], list[str]] = defaultdict(list)

    def add(self, what: What, reason: str, place: str, count: int = 1) -> None:
        """Count `count` records or objects at one place of the source."""
        self.counts[what, reason] += count
        if len(self.places[what, reason]) < _EXAMPLES:
            self.places[what, reason].append(place)

    def total(self, what: What) -> int:
        """All records, or all objects, whatever the reason."""
        return sum(count for (kind, _), count in self.counts.items() if kind == what)

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first, and below it a line for each of its first places."""
        lines = []
        for (what, reason), count in self.counts.most_common():
            lines.append(f"{count:>9,} {what if count == 1 else what + 's'}: {reason}")
            lines += [f"{'':>12}{place}" for place in self.places[what, reason]]
        return lines


@dataclass(frozen=True)
class Findings:
    """What was left out of a conversion, and what was written otherwise than it stood."""

    left_out: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)

    def leave_out_record(self, reason: str, place: str, n_objects: int = 0) -> None:
        """Count a record, and the objects that go with it."""
        self.left_out.add("record", reason, place)
        if n_objects:
            self.left_out.add("object", "its record was left out", place, n_objects)


def are_numbers(values: list[Any]) -> bool:
    """Whether all can be coordinates; a truth value, NaN and infinity cannot."""
    return all(type(value) in (int, float) and abs(value) < _TOO_LARGE for value in values)


def fit(
    entry: Entry, images: Mapping[Path, tuple[Size, int] | str], findings: Findings
) -> Iterator[tuple[Size, dict[int, Any]]]:
    """Hold an entry against its image files.

    Args:
        entry: as its reader gives it.
        images: for each of its images the size (width, height) in pixels and the EXIF orientation, or what hinders
            reading it; as `looked_at` gives it.
        findings: gets what is left out, what is clipped, and what is turned.

    Yields:
        A size, and the objects of each image of that size by its index: one pair where all images are of one size, else
        a pair for each image that has objects, because a record has one size. Nothing where no object is left.
    """
    found = [images[path] for path in entry.images]
    if problem := _images_problem(entry, found):
        findings.leave_out_record(*problem, n_objects=len(entry.annotations))
        return
    own = [image[0] for image in found if not isinstance(image, str)]
    turns = [image[1] for image in found if not isinstance(image, str)]
    objects: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(own))}
    for annotation in entry.annotations:
        turn = turns[annotation.image] if entry.as_stored else 1
        if fitted := _fit_annotation(annotation, own[annotation.image], turn, entry.fractions, findings):
            objects[annotation.image].append(fitted)
    if not any(objects.values()):
        findings.leave_out_record("no object of it could be written", entry.id)
        return
    if any(turn != 1 and objects[index] for index, turn in enumerate(turns)):
        done = "its shapes were turned with it" if entry.as_stored else "its shapes were taken to lie on the turned one"
        findings.changed.add("record", f"EXIF turns its image: {done}", entry.id)
    if len(set(own)) == 1:
        yield own[0], objects
    else:
        findings.changed.add("record", "a record for each image, because their sizes differ", entry.id)
        for index, size in enumerate(own):
            if objects[index]:
                yield size, {index: objects[index]}
            else:
                findings.leave_out_record("an image without objects", f"{entry.id}: {entry.images[index].name}")


def _images_problem(entry: Entry, found: list[tuple[Size, int] | str]) -> tuple[str, str] | None:
    """The reason why images cannot be used, with the place."""
    if len(entry.annotations) > MAX_OBJECTS:
        return f"it has more than {MAX_OBJECTS:,} objects", f"{entry.id}: {len(entry.annotations):,}"
    if len(entry.images) > MAX_IMAGES:
        return f"it has more than {MAX_IMAGES:,} images", f"{entry.id}: {len(entry.images):,}"
    for path, image in zip(entry.images, found, strict=True):
        name = str(path)
        shown = name if len(name) <= _LONGEST_NAME else "..." + name[-_LONGEST_NAME:]
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            return "its image has a name that is no text", f"{entry.id}: {shown}"
        if isinstance(image, str):
            return "its image cannot be read", f"{entry.id}: {shown}: {image}"
        size, _ = image
        said = tuple(
            own if side is None else _number(side) for own, side in zip(size, (entry.width, entry.height), strict=True)
        )
        if said != size:
            # Shapes were drawn on an image of the said size. Where EXIF turns it, they may lie either way round.
            place = f"{entry.id}: {size[0]}x{size[1]} (EXIF orientation applied), said to be {said[0]}x{said[1]}"
            return "its image is of another size than the source says", place
    return None


def _number(side: Any) -> Any:
    """A width or height that is a number, or one written as a text; else as it is."""
    return int(side) if isinstance(side, str) and side.isdecimal() and len(side) < _DIGITS else side


def _fit_annotation(
    annotation: Annotation, size: Size, turn: int, fractions: bool, findings: Findings
) -> dict[str, Any] | None:
    """One object of a record; None, and counted, where it cannot be one."""
    if problem := text_problem("desc", annotation.desc):
        findings.left_out.add("object", "its description cannot be used", f"{annotation.id}: {problem}")
        return None
    geometry = annotation.geometry
    if problem := count_problem(geometry.kind, len(geometry.points)):
        findings.left_out.add("object", "its shape cannot be used", f"{annotation.id}: {problem}")
        return None
    stored = size if turn not in SIDEWAYS else size[::-1]
    scale = stored if fractions else (1, 1)
    scaled = [value * scale[i % 2] for i, value in enumerate(geometry.points)]
    points = [round(value, _DECIMALS) for value in _turned(Geometry(geometry.kind, tuple(scaled)), stored, turn)]
    x1, y1, x2, y2 = bounding_box(points)
    if max(-x1, -y1, x2 - size[0], y2 - size[1]) >= _ROUNDING:
        place = f"{annotation.id}: {[x1, y1, x2, y2]} on {size[0]}x{size[1]}"
        findings.left_out.add("object", "it lies outside its image by a pixel or more", place)
        return None
    clipped = [min(max(value, 0.0), float(size[i % 2])) for i, value in enumerate(points)]
    x1, y1, x2, y2 = bounding_box(clipped)
    if x1 == x2 or y1 == y2:
        findings.left_out.add("object", "it has no area", f"{annotation.id}: {[x1, y1, x2, y2]}")
        return None
    if clipped != points:
        findings.changed.add("object", "clipped: it stuck out of its image by less than a pixel", annotation.id)
    numbers = [int(value) if value.is_integer() else value for value in clipped]
    return {geometry.kind: numbers, "desc": annotation.desc}


def _turned(geometry: Geometry, stored: Size, turn: int) -> Sequence[float]:
    """The points of a shape on an image of the size `stored`, after an EXIF orientation has turned the image."""
    if turn == 1:
        return geometry.points
    width, height = stored
    points: list[float] = []
    for x, y in zip(geometry.points[0::2], geometry.points[1::2], strict=True):
        x, y = (width - x if turn in (2, 3, 7, 8) else x), (height - y if turn in (3, 4, 6, 7) else y)
        points += (y, x) if turn in SIDEWAYS else (x, y)
    return bounding_box(points) if geometry.kind == "bbox_2d" else points
