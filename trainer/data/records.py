"""JSONL records of the user: read, checked as a whole before anything starts, every fault named by line and object."""

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.data.geometry import KINDS, Geometry, Kind, Size, bounding_box, count_problem
from trainer.data.images import image_sizes, outside
from trainer.data.lines import lines_of, no_collection, no_file
from trainer.data.warp import Warp
from trainer.errors import DataError

__all__ = [
    "Geometry", "Object", "Picture", "Reading", "Record", "RecordSet", "bad_records_error", "check_records",
    "domain_problem", "object_type", "read_records", "text_problem",
]  # fmt: skip

OnBadRecord = Literal["error", "skip"]

MAX_WEIGHT = 100
"""Times that a record may be trained on in an epoch."""

MAX_OBJECTS = 5_000
"""Objects of a record at most: above what a sample has room for, and below what takes minutes to cut and to draw."""

MAX_IMAGES, _MAX_TEXT, _MAX_SUMMARY = 1_000, 4_000, 100_000  # of a record, characters; likewise
_LISTED = 20  # faults that one message spells out; the rest is counted
_DOMAIN = re.compile(r"[\w.\- ]{1,100}")
_HALF_A_LETTER = re.compile("[\ud800-\udfff]")
_CHAT_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Object:
    """One thing on an image: its shape in pixels, its description, and the index (from 0) of its image."""

    geometry: Geometry
    desc: str
    image: int = 0


def object_type(desc: str) -> str:
    """The type of an object: the first element of its slash-separated `desc`."""
    return desc.split("/", 1)[0].strip()


@dataclass(frozen=True)
class Picture:
    """One image of a record.

    Attributes:
        path: absolute, or relative to the working directory.
        width: pixels of the image on disk after its EXIF orientation is applied.
        height: likewise.
        summary: text of the summary task; it stands with the first image of its record.
        warp: how the image is changed before it is shown; None: not at all.
    """

    path: Path
    width: int
    height: int
    summary: str | None = None
    warp: Warp | None = None

    @property
    def size(self) -> Size:
        """(width, height) in pixels as it is shown, before the model's own resizing; objects lie in this frame."""
        return (self.width, self.height) if self.warp is None else self.warp.size


Task = Literal["dense", "summary"]
"""What the answer holds: all objects, or a summary of each image."""

TASKS: tuple[Task, ...] = get_args(Task)

OPTIONAL_KEYS = ("domain", "weight", "summary", "image", "line_points")
"""Keys of records and of objects that may be left out: one that is misspelt is no fault, and has no effect."""

_KEYS = {"images", "width", "height", "objects", "domain", "weight", "summary"}
_KEYS_OF_OBJECTS = {*KINDS, "desc", "image", "line_points"}


@dataclass(frozen=True)
class Record:
    """One line of a JSONL file, or several of them that share a turn.

    Attributes:
        id: file name and line, counted from 1: `train.jsonl:12`; of several joined by `+`.
        images: at least one; those of one line have equal sizes.
        objects: at least one, in the order of the file.
        domain: names the group whose loss is reported apart.
        weight: how often the record is trained on in an epoch, on average.
        task: what its answer holds.
    """

    id: str
    images: tuple[Picture, ...]
    objects: tuple[Object, ...]
    domain: str | None = None
    weight: float = 1.0
    task: Task = "dense"

    @property
    def size(self) -> Size:
        """(width, height) in pixels of its images as they are shown; of the first, where several lines are joined."""
        return self.images[0].size


@dataclass(frozen=True)
class RecordSet:
    """The good records of a file in its order, and one message for each record that was left out."""

    path: Path
    records: tuple[Record, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """A file with nothing decided yet: its good records in order, and everything that is wrong with each bad one."""

    records: tuple[Record, ...]
    faults: Mapping[str, tuple[str, ...]]
    """By the id of the record; each begins with `:` or `, object 3:`."""
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Key of records or objects that nothing reads -> ids of the records that have it."""

    @property
    def n_records(self) -> int:
        """Good and bad ones."""
        return len(self.records) + len(self.faults)


def read_records(jsonl: Path, *, on_bad_record: OnBadRecord = "error", allow_outside_root: bool = False) -> RecordSet:
    """Read and check a JSONL file with all the images that it names.

    Args:
        jsonl: the file; image paths in it are relative to its folder. Blank lines count but hold no record.
        on_bad_record: `error` reports all bad records at once, `skip` leaves them out.
        allow_outside_root: whether image paths may leave the file's folder: absolute, by `..`, or through a link.

    Returns:
        The good records, with a message for each one skipped.

    Raises:
        DataError: the file cannot be read, holds no good record, or (`error`) holds a bad one.
    """
    found = check_records(jsonl, allow_outside_root=allow_outside_root)
    if found.faults and (on_bad_record == "error" or not found.records):
        problems = [f"{name}{problem}" for name, of_record in found.faults.items() for problem in of_record]
        raise bad_records_error(jsonl, problems, n_bad=len(found.faults), n_records=found.n_records)
    skipped = tuple(f"{name}{'; '.join(of_record)}" for name, of_record in found.faults.items())
    return RecordSet(jsonl, found.records, skipped)


def check_records(jsonl: Path, *, allow_outside_root: bool = False) -> Reading:
    """Read and check a JSONL file as `read_records` does, and say what is wrong with it instead of refusing it.

    Raises:
        DataError: the file cannot be read, or holds no record at all.
    """
    path_of = cache(jsonl.parent.joinpath)  # many records may show one image
    lines = enumerate(lines_of(jsonl), 1)
    with no_collection():
        drafts = [(f"{jsonl.name}:{n}", _Draft(line, path_of)) for n, line in lines if line.strip()]
    if not drafts:
        raise no_file(jsonl, "no record in the file")
    images = {image for _, draft in drafts for image in draft.images}
    astray = {} if allow_outside_root else outside(jsonl.parent, images)
    sizes: dict[Path, Size | str] = image_sizes(images - astray.keys())
    for image, real in astray.items():
        sizes[image] = f"leads out of the data root to {real}; `custom.allow_outside_root: true` allows that"
    unread: defaultdict[str, list[str]] = defaultdict(list)
    for name, draft in drafts:
        draft.check_images(sizes)
        for key in draft.unread:
            unread[key].append(name)
    sound = tuple(draft.record(name) for name, draft in drafts if not draft.problems)
    return Reading(sound, {name: tuple(draft.problems) for name, draft in drafts if draft.problems}, unread)


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

    __slots__ = ("_domain", "_objects", "_size", "_summary", "_weight", "images", "problems", "unread")

    def __init__(self, line: bytes, path_of: Callable[[str], Path]) -> None:
        self.problems: list[str] = []
        self.images: tuple[Path, ...] = ()
        self.unread: set[str] = set()
        self._size: Size | None = None
        self._objects: tuple[Object, ...] = ()
        try:
            tree = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self.problems.append(f": broken JSON ({error})")
            return
        if not isinstance(tree, dict):
            self.problems.append(f": not a JSON object but {_short(tree)}")
            return
        self.unread |= tree.keys() - _KEYS
        self._summary, self._domain = tree.get("summary"), tree.get("domain")
        self._read_images(tree.get("images"), path_of)
        self._read_size(tree.get("width"), tree.get("height"))
        self._read_objects(tree.get("objects"))
        self._read_texts()
        self._read_weight(tree.get("weight"))

    def record(self, name: str) -> Record:
        """The record; only for a draft without problems."""
        width, height = self._size or (0, 0)
        summaries = chain([self._summary], repeat(None))
        pictures = tuple(Picture(path, width, height, text) for path, text in zip(self.images, summaries, strict=False))
        return Record(name, pictures, self._objects, self._domain, float(self._weight))

    def check_images(self, sizes: Mapping[Path, Size | str]) -> None:
        """Compare with the images as they are: a size (width, height) each, or what hinders reading it."""
        for path in self.images:
            found = sizes[path]
            if isinstance(found, str):
                self.problems.append(f": image {_printable(path)}: {found}")
            elif self._size is not None and found != self._size:
                self.problems.append(
                    f": image {_printable(path)} is {found[0]}x{found[1]} pixels (EXIF orientation applied), "
                    f"width and height say {self._size[0]}x{self._size[1]}"
                )

    def _read_images(self, images: Any, path_of: Callable[[str], Path]) -> None:
        if not isinstance(images, list) or not images or not all(isinstance(each, str) and each for each in images):
            self.problems.append(f": `images` must be a list of at least one path, not {_short(images)}")
            return
        if len(images) > MAX_IMAGES:
            self.problems.append(f": {len(images)} images, more than {MAX_IMAGES}")
            return
        if unusable := [each for each in images if "\0" in each or _has_half_a_letter(each)]:
            self.problems.append(f": no file can have the name {_short(unusable[0])}")
            return
        self.images = tuple(map(path_of, images))

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
        if len(objects) > MAX_OBJECTS:
            self.problems.append(f": {len(objects)} objects, more than {MAX_OBJECTS}")
            return
        sound = []
        n_images = max(1, len(self.images))
        for number, tree in enumerate(objects, 1):
            found = _read_object(tree, self._size, n_images)
            if isinstance(found, Object):
                self.unread |= tree.keys() - _KEYS_OF_OBJECTS
                sound.append(found)
            else:
                self.problems += [f", object {number}: {problem}" for problem in found]
        self._objects = tuple(sound)

    def _read_texts(self) -> None:
        if self._summary is not None and (problem := text_problem("summary", self._summary)):
            self.problems.append(f": {problem}")
        if self._domain is not None and (problem := domain_problem(self._domain)):
            self.problems.append(f": {problem}")

    def _read_weight(self, given: Any) -> None:
        weight = self._weight = 1 if given is None else given
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight <= MAX_WEIGHT:
            self.problems.append(f": `weight` must be a number above 0 and at most {MAX_WEIGHT}, not {_short(weight)}")


def _read_object(tree: Any, size: Size | None, n_images: int) -> Object | list[str]:
    """Read one object, or list what is wrong with it; without a `size` nothing is said about the image's edges."""
    if not isinstance(tree, dict):
        return [f"not a JSON object but {_short(tree)}"]
    problems = [problem] if (problem := text_problem("desc", tree.get("desc"))) else []
    image = 0 if tree.get("image") is None else tree["image"]
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

    def shown() -> str:
        return f"{kind} {_short([int(v) if v.is_integer() else v for v in points])}"

    if kind == "bbox_2d" and not (points[0] < points[2] and points[1] < points[3]):
        return f"{shown()} is empty (x1 < x2 and y1 < y2 are needed)"
    if (x1 == x2 and y1 == y2) if kind == "line" else (x1 == x2 or y1 == y2):
        return f"{shown()} is empty (all its points fall together)"
    if size is not None and (x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]):
        return f"{shown()} is outside the image of {size[0]}x{size[1]} pixels"
    return None


def domain_problem(domain: Any) -> str | None:
    """What keeps a value from being a record's `domain`, as a phrase; None where nothing does."""
    if isinstance(domain, str) and _DOMAIN.fullmatch(domain) and domain not in (".", ".."):
        return None
    return f"domain {_short(domain)} cannot name a metric (1 to 100 letters, digits, `_`, `-`, `.`, spaces)"


def text_problem(key: str, text: Any) -> str | None:
    """What keeps a value from being the text of `key` (`desc`, `summary`), as a phrase; None where nothing does."""
    if not isinstance(text, str) or not text.strip():
        return f"`{key}` must be a text that is not empty, not {_short(text)}"
    if len(text) > (most := _MAX_SUMMARY if key == "summary" else _MAX_TEXT):
        return f"`{key}` has {len(text)} characters, more than {most}"
    if token := _CHAT_TOKEN.search(text):
        return f"`{key}` holds the chat token {token.group()}"
    if _has_half_a_letter(text):
        return f"`{key}` holds half a surrogate pair: {_short(text)}"
    return None


def _has_half_a_letter(text: str) -> bool:
    return not text.isascii() and _HALF_A_LETTER.search(text) is not None


def _printable(path: Path) -> str:
    """A path with line breaks, and what moves a terminal's cursor, written out."""
    text = str(path)
    return text if text.isprintable() else json.dumps(text)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:  # reading it took a few levels less
        return "something nested too deeply"
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."
