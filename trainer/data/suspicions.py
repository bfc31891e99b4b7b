"""What is legal in records and probably not meant: one function a check, each names the places."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import dist
from pathlib import Path

import shapely

from trainer.data.answer import parse_answer
from trainer.data.geometry import Geometry, Size, bounding_box, emit
from trainer.data.records import Record, object_type
from trainer.data.statistics import Measured
from trainer.data.template import Encoder
from trainer.data.turns import possible

_ENOUGH = 1.0  # pixels of the image as the model is shown it: width and height, area, a line's length


@dataclass(frozen=True, slots=True)
class Suspicion:
    """One thing noticed.

    Attributes:
        check: its name, a key of `CHECKS`.
        text: what it is, with the number of places.
        places: every place, beginning with the record's id where there is one.
    """

    check: str
    text: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A data set as the checks take it.

    Attributes:
        sets: `train`, `val` and, where there is one, `ood`, with the records that can be read.
        encoder: of the run.
        first_equal: image file -> the first of those with equal content, as `equal_files` gives it.
        summary_ratio: share of the records that have a summary whose answer is the summary.
    """

    sets: Mapping[str, Sequence[Measured]]
    encoder: Encoder
    first_equal: Mapping[Path, Path] = field(default_factory=dict)
    summary_ratio: float = 0.0

    def records(self, name: str) -> Iterator[Record]:
        """Of one set; none where there is no such set."""
        return (measured.record for measured in self.sets.get(name, ()))

    def content(self, path: Path) -> Path:
        """One name for all files of equal content."""
        return self.first_equal.get(path, path)


def shared_images(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """An image of validation, or out of domain, is trained on: what is measured there was learned by heart."""
    trained = {subject.content(p.path): (r.id, p.path) for r in subject.records("train") for p in r.images}
    for name in [name for name in subject.sets if name != "train"]:
        found = {
            picture.path: f"{record.id}: {picture.path} is that of {trained[content][0]}"
            + ("" if trained[content][1] == picture.path else f", {trained[content][1]}")
            for record in subject.records(name)
            for picture in record.images
            if (content := subject.content(picture.path)) in trained
        }
        yield f"images of {name} that are in train too", [*found.values()]


def duplicate_records(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Records of one set with equal images, objects and summaries."""
    for name in subject.sets:
        first: dict[object, str] = {}
        places = []
        for record in subject.records(name):
            content = (
                tuple((subject.content(picture.path), picture.summary) for picture in record.images),
                frozenset(Counter(record.objects).items()),
            )
            if (before := first.setdefault(content, record.id)) != record.id:
                places.append(f"{record.id}: equal to {before}")
        yield f"records of {name} that are equal to one before them", places


def contradictions(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """One image with other objects in another record of its set: the model is taught two answers."""
    for name in subject.sets:
        first: dict[Path, tuple[str, object]] = {}
        places: dict[Path, str] = {}
        for record in subject.records(name):
            for index, picture in enumerate(record.images):
                own = Counter((each.geometry, each.desc) for each in record.objects if each.image == index)
                content = subject.content(picture.path)
                before, theirs = first.setdefault(content, (record.id, own))
                if own != theirs:
                    places.setdefault(content, f"{record.id}: {picture.path} has other objects than in {before}")
        yield f"images of {name} with different objects in different records", [*places.values()]


def unseen_types(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Types of validation that training never shows."""
    known = {object_type(each.desc) for record in subject.records("train") for each in record.objects}
    found: Counter[str] = Counter()
    where: dict[str, str] = {}
    for record in subject.records("val"):
        for each in record.objects:
            if known and (name := object_type(each.desc)) not in known:
                found[name] += 1
                where.setdefault(name, record.id)
    places = [f"{where[name]}: {name!r}, {count:,} in val" for name, count in found.most_common()]
    yield "types of val that are in no training record", places


def unseen_domains(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Domains of validation that training never shows."""
    known = {record.domain for record in subject.records("train")}
    found: dict[str, str] = {}
    for record in subject.records("val"):
        if known and record.domain is not None and record.domain not in known:
            found.setdefault(record.domain, f"{record.id}: {record.domain!r}")
    yield "domains of val that are in no training record", [*found.values()]


def spellings(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """One type written in several ways, which the model must tell apart: letter case, spaces, full-width letters."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name in subject.sets:
        for record in subject.records(name):
            for each in record.objects:
                written = each.desc.split("/", 1)[0]
                found[_plain_spelling(written)][written] += 1
    places = [
        ", ".join(f"{written!r} ({count:,})" for written, count in forms.most_common())
        for forms in found.values()
        if len(forms) > 1
    ]
    yield "types that are written in several ways", places


def _plain_spelling(written: str) -> str:
    text = unicodedata.normalize("NFKC", written).split("/", 1)[0]  # a full-width slash does not end a type
    return "".join(text.casefold().split())


def no_area(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Objects that the model can hardly see, or whose answer says that there is nothing."""
    encoder = subject.encoder
    for name in subject.sets:
        places = []
        for record in subject.records(name):
            shown = encoder.shown_sizes(record)
            for number, each in enumerate(record.objects, 1):
                size, after = record.images[each.image].size, shown[each.image]
                if _is_tiny(each.geometry, size, after):
                    what = "less than a pixel as the model is shown it"
                elif _is_flat(emit(each.geometry, size, encoder.emit_norm, after)):
                    what = f"flat in the coordinates of the answer (custom.emit_norm: {encoder.emit_norm})"
                else:
                    continue
                places.append(f"{record.id}, object {number}: {each.desc!r} is {what}")
        yield f"objects of {name} with nearly no area", places


def _is_tiny(geometry: Geometry, size: Size, shown: Size) -> bool:
    """Whether a shape in pixels is less than a pixel wide, high or large, a line less than a pixel long, as shown."""
    points = [value * shown[i % 2] / size[i % 2] for i, value in enumerate(geometry.points)]
    pairs = list(zip(points[0::2], points[1::2], strict=True))
    if geometry.kind == "line":
        return sum(dist(a, b) for a, b in pairwise(pairs)) < _ENOUGH
    x1, y1, x2, y2 = bounding_box(points)
    if min(x2 - x1, y2 - y1) < _ENOUGH:
        return True
    # the hull: an outline that crosses itself can be seen, and its own area may come out as none
    return geometry.kind != "bbox_2d" and float(shapely.MultiPoint(pairs).convex_hull.area) < _ENOUGH


def _is_flat(geometry: Geometry) -> bool:
    x1, y1, x2, y2 = bounding_box(geometry.points)
    return (x1 == x2 and y1 == y2) if geometry.kind == "line" else (x1 == x2 or y1 == y2)


def empty_images(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """An image of a record with several on which there is no object."""
    for name in subject.sets:
        places = [
            f"{record.id}: image {index + 1}, {picture.path}"
            for record in subject.records(name)
            for index, picture in enumerate(record.images)
            if all(each.image != index for each in record.objects)
        ]
        yield f"images of {name} in a record of several that have no object", places


def cut_answers(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Answers that are cut at the limit, and what of them is left."""
    encoder = subject.encoder
    if encoder.truncation != "right":
        return
    for name, measured in subject.sets.items():
        places = []
        long = [each.record for each in measured if each.tokens.whole > encoder.max_length]
        for record in (drawn for each in long for drawn in possible(each, subject.summary_ratio)):
            tokens = encoder.token_counts(record)
            if tokens.prompt + tokens.image < encoder.max_length < tokens.whole:
                left = f"whole objects left: {len(parse_answer(encoder.kept_answer(record)))} of {len(record.objects)}"
                what = "the summary is cut" if record.task == "summary" else left
                places.append(f"{record.id}: {tokens.whole} tokens; {what}")
        yield f"answers of {name} that are cut at {encoder.max_length} tokens", places


CHECKS: Mapping[str, Callable[[Subject], Iterator[tuple[str, list[str]]]]] = {
    check.__name__: check
    for check in (
        shared_images, duplicate_records, contradictions, unseen_types, unseen_domains, spellings, no_area,
        empty_images, cut_answers,
    )
}  # fmt: skip
"""Every check by its name: subject -> what is noticed, with its places; where there is no place, nothing is."""


def suspicions(subject: Subject) -> list[Suspicion]:
    """What all checks notice."""
    return [
        Suspicion(name, f"{text}: {len(places):,}", tuple(places))
        for name, check in CHECKS.items()
        for text, places in check(subject)
        if places
    ]
