"""JSONL records of the user: read, checked as a whole before anything starts, every fault named by line and object."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.data.geometry import KINDS, Geometry, Kind, Size, bounding_box, count_problem
from trainer.data.images import image_sizes
from trainer.errors import DataError

__all__ = ["Geometry", "Object", "Record", "RecordSet", "bad_records_error", "read_records"]

OnBadRecord = Literal["error", "skip"]

_LISTED = 20  # faults that one message spells out; the rest is counted
_DOMAIN = re.compile(r"[\w.\- ]{1,100}")
_CHAT_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Object:
    """One thing on an image: its shape in pixels, its description, and the index (from 0) of its image."""

    geometry: Geometry
    desc: str
    image: int = 0


@dataclass(frozen=True)
class Record:
    """One line of a JSONL file.

    Attributes:
        id: file name and line, counted from 1: `train.jsonl:12`.
        images: absolute or working-directory-relative paths, at least one.
        width: pixels of every image after its EXIF orientation is applied.
        height: likewise.
        objects: at least one, in the order of the file.
        summary: text of the summary task; not part of the answer.
        domain: names the group whose loss is reported apart.
    """

    id: str
    images: tuple[Path, ...]
    width: int
    height: int
    objects: tuple[Object, ...]
    summary: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class RecordSet:
    """The good records of a file in its order, and one message for each record that was left out."""

    path: Path
    records: tuple[Record, ...]
    skipped: tuple[str, ...] = ()


def read_records(jsonl: Path, *, on_bad_record: OnBadRecord = "error") -> RecordSet:
    """Read and check a JSONL file with all the images that it names.

    Args:
        jsonl: the file; image paths in it are relative to its folder. Blank lines count but hold no record.
        on_bad_record: `error` reports all bad records at once, `skip` leaves them out.

    Returns:
        The good records, with a message for each one skipped.

    Raises:
        DataError: the file cannot be read, holds no good record, or (`error`) holds a bad one.
    """
    try:
        lines = jsonl.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise _no_file(jsonl, error.strerror or str(error)) from error
    drafts = [(f"{jsonl.name}:{n}", _Draft(line, jsonl.parent)) for n, line in enumerate(lines, 1) if line.strip()]
    if not drafts:
        raise _no_file(jsonl, "no record in the file")
    sizes = image_sizes({image for _, draft in drafts for image in draft.images})
    for _, draft in drafts:
        draft.check_images(sizes)
    problems = [f"{name}{problem}" for name, draft in drafts for problem in draft.problems]
    skipped = tuple(f"{name}{'; '.join(draft.problems)}" for name, draft in drafts if draft.problems)
    if problems and (on_bad_record == "error" or len(skipped) == len(drafts)):
        raise bad_records_error(jsonl, problems, n_bad=len(skipped), n_records=len(drafts))
    return RecordSet(jsonl, tuple(draft.record(name) for name, draft in drafts if not draft.problems), skipped)


def bad_records_error(path: Path, problems: list[str], *, n_bad: int, n_records: int) -> DataError:
    """Put the faults of a file in one message: the first 20 in full, then a count.

    Args:
        path: the JSONL file.
        problems: one line for each fault, beginning with the record's id.
        n_bad: records with a fault.
        n_records: records in all.

    Returns:
        The error to raise.
    """
    listed = [f"\n    {problem}" for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        listed.append(f"\n    ... and {len(problems) - _LISTED} more")
    return DataError(
        where=str(path),
        got=f"{n_bad} bad of {n_records} records:{''.join(listed)}",
        allowed="records whose images can be read and whose objects lie on them and fit the model's length",
        do="correct the lines named above, or leave them out with `custom.on_bad_record: skip`",
    )


class _Draft:
    """One line on its way to a record: what could be read of it, and everything that is wrong with it."""

    def __init__(self, line: bytes, folder: Path) -> None:
        self.problems: list[str] = []
        self.images: tuple[Path, ...] = ()
        self._size: Size | None = None
        self._objects: list[Object] = []
        try:
            self._tree = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self._tree = None
            self.problems.append(f": broken JSON ({error})")
            return
        if not isinstance(self._tree, dict):
            self.problems.append(f": not a JSON object but {_short(self._tree)}")
            return
        self._read_images(self._tree.get("images"), folder)
        self._read_size(self._tree.get("width"), self._tree.get("height"))
        self._read_objects(self._tree.get("objects"))
        self._read_texts(self._tree.get("summary"), self._tree.get("domain"))

    def record(self, name: str) -> Record:
        """The record; only for a draft without problems."""
        width, height = self._size or (0, 0)
        return Record(
            name, self.images, width, height, tuple(self._objects), self._tree.get("summary"), self._tree.get("domain")
        )

    def check_images(self, sizes: Mapping[Path, Size | str]) -> None:
        """Compare with the images as they are: a size (width, height) each, or what hinders reading it."""
        for path in self.images:
            found = sizes[path]
            if isinstance(found, str):
                self.problems.append(f": image {path}: {found}")
            elif self._size is not None and found != self._size:
                self.problems.append(
                    f": image {path} is {found[0]}x{found[1]} pixels (EXIF orientation applied), "
                    f"width and height say {self._size[0]}x{self._size[1]}"
                )

    def _read_images(self, images: Any, folder: Path) -> None:
        if not isinstance(images, list) or not images or not all(isinstance(each, str) and each for each in images):
            self.problems.append(f": `images` must be a list of at least one path, not {_short(images)}")
            return
        self.images = tuple(folder / each for each in images)

    def _read_size(self, width: Any, height: Any) -> None:
        wrong = [
            f": `{key}` must be a whole number of pixels above 0, not {_short(value)}"
            for key, value in (("width", width), ("height", height))
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0
        ]
        self.problems += wrong
        self._size = None if wrong else (width, height)

    def _read_objects(self, objects: Any) -> None:
        if not isinstance(objects, list) or not objects:
            self.problems.append(f": no objects (`objects` is {_short(objects)})")
            return
        for number, tree in enumerate(objects, 1):
            found = _read_object(tree, self._size, max(1, len(self.images)))
            if isinstance(found, Object):
                self._objects.append(found)
            else:
                self.problems += [f", object {number}: {problem}" for problem in found]

    def _read_texts(self, summary: Any, domain: Any) -> None:
        if summary is not None and (problem := _text_problem("summary", summary)):
            self.problems.append(f": {problem}")
        if domain is not None and (
            not isinstance(domain, str) or not _DOMAIN.fullmatch(domain) or domain in (".", "..")
        ):
            self.problems.append(
                f": domain {_short(domain)} cannot name a metric (1 to 100 letters, digits, `_`, `-`, `.`, spaces)"
            )


def _read_object(tree: Any, size: Size | None, n_images: int) -> Object | list[str]:
    """Read one object, or list what is wrong with it; without a `size` nothing is said about the image's edges."""
    if not isinstance(tree, dict):
        return [f"not a JSON object but {_short(tree)}"]
    problems = [problem] if (problem := _text_problem("desc", tree.get("desc"))) else []
    image = tree.get("image", 0)
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < n_images:
        problems.append(f"`image` must be an index from 0 to {n_images - 1}, not {_short(image)}")
    kinds = [kind for kind in KINDS if tree.get(kind) is not None]
    if len(kinds) != 1:
        found = "no geometry" if not kinds else f"{len(kinds)} geometries ({', '.join(kinds)})"
        return [*problems, f"{found}; exactly one of {', '.join(KINDS)} is needed"]
    geometry = _read_geometry(kinds[0], tree[kinds[0]])
    if isinstance(geometry, str):
        return [*problems, geometry]
    if problem := _shape_problem(geometry, tree.get("line_points"), size):
        problems.append(problem)
    return problems or Object(geometry, unicodedata.normalize("NFC", tree["desc"]), image)


def _read_geometry(kind: Kind, values: Any) -> Geometry | str:
    if not isinstance(values, list):
        return f"{kind} must be a flat list of numbers, not {_short(values)}"
    numbers = []
    for value in values:
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            return f"{kind} holds {_short(value)} where a finite number is needed"
        numbers.append(number)
    return count_problem(kind, len(numbers)) or Geometry(kind, tuple(numbers))


def _shape_problem(geometry: Geometry, line_points: Any, size: Size | None) -> str | None:
    """What is wrong with a shape of the right number of coordinates."""
    kind, points = geometry.kind, geometry.points
    if kind == "line" and line_points is not None and line_points != len(points) // 2:
        return f"line_points is {_short(line_points)}, the line has {len(points) // 2} points"
    x1, y1, x2, y2 = bounding_box(points)
    shown = f"{kind} {_short([int(v) if v.is_integer() else v for v in points])}"
    if kind == "bbox_2d" and not (points[0] < points[2] and points[1] < points[3]):
        return f"{shown} is empty (x1 < x2 and y1 < y2 are needed)"
    if (x1 == x2 and y1 == y2) if kind == "line" else (x1 == x2 or y1 == y2):
        return f"{shown} is empty (all its points fall together)"
    if size is not None and (x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]):
        return f"{shown} is outside the image of {size[0]}x{size[1]} pixels"
    return None


def _text_problem(key: str, text: Any) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return f"`{key}` must be a text that is not empty, not {_short(text)}"
    if token := _CHAT_TOKEN.search(text):
        return f"`{key}` holds the chat token {token.group()}"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return f"`{key}` holds half a surrogate pair: {_short(text)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _no_file(jsonl: Path, got: str) -> DataError:
    return DataError(
        where=str(jsonl),
        got=got,
        allowed="a JSONL file, one record a line",
        do="correct the path (`custom.train_jsonl`, `custom.val_jsonl`) or the file",
    )
