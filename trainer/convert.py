"""Converts data sets of other formats to records: fitted to their image files, written whole, read once as a check."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from trainer.data.annotations import Entry, Findings, fit
from trainer.data.coco import read_coco
from trainer.data.geometry import Size
from trainer.data.images import looked_at, outside
from trainer.data.records import domain_problem, read_records
from trainer.data.swift import read_swift
from trainer.errors import DataError

Format = Literal["coco", "swift"]
Shape = Literal["bbox", "poly"]

_AT_ONCE = 1024  # entries whose image files are looked at together
_CLASSES = 10  # that the table of classes names
_FORMATS = (
    "a COCO detection file (one JSON object with `images`, `annotations`, `categories`), or ms-swift JSONL "
    "(an object a line with `messages`, `images`, `objects`)"
)


@dataclass
class Conversion:
    """What a conversion has written, and what not.

    Attributes:
        out: the new file.
        form: what its source was.
        records: lines in it.
        outside: image files that do not lie below its folder, links followed.
        classes: objects by the first element of their `desc`.
        findings: what was left out, and what was changed.
    """

    out: Path
    form: Format
    records: int = 0
    outside: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)


def convert(
    source: Path,
    out: Path,
    *,
    form: Format | None = None,
    images: Path | None = None,
    shape: Shape | None = None,
    domain: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Conversion:
    """Convert a data set to a JSONL file of records that `read_records` has read without a fault.

    Args:
        source: a COCO detection file or ms-swift JSONL.
        out: the file to write; its folder is made. It appears under its name whole, or not at all.
        form: what `source` is; seen from its content when not given.
        images: folder of the image files; that of `source` when not given.
        shape: what a COCO annotation gives: its box, or its polygon; `bbox` when not given.
        domain: of every record.
        force: replace `out`.
        console: where progress is shown.

    Returns:
        What was written, what was left out, and what was changed.

    Raises:
        DataError: `source` is not what it should be, `out` is in the way or cannot be written, or no record is left.
    """
    _check_arguments(source, out, images, domain, force=force)
    console = console or Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        reading = progress.add_task(f"read {source.name}", total=None)
        content = _load(source, form)
        progress.remove_task(reading)
        if isinstance(content, list) and shape is not None:
            got = f"`--geometry {shape}` for ms-swift data, which has boxes only"
            raise DataError(str(source), got, "`--geometry` for COCO", "leave `--geometry` out")

        done = Conversion(out, "swift" if isinstance(content, list) else "coco")
        folder, findings = images or source.parent, done.findings

        def watch(items: list[Any]) -> Iterable[Any]:
            return progress.track(items, description="convert")

        if isinstance(content, list):
            entries = read_swift(content, source, folder, findings, watch)
        else:
            entries = read_coco(content, source, folder, shape or "bbox", findings, watch)
        del content
        with _put_in_place(out) as draft:
            with draft.open("w", encoding="utf-8", newline="\n") as file:
                _write(entries, file, done, domain)
            if not done.records:
                raise _nothing_left(source, folder, findings)
            progress.add_task("check", total=None)
            n_read = len(read_records(draft, allow_outside_root=True).records)
            assert n_read == done.records, (n_read, done.records)  # noqa: S101  # our own file
    return done


def show(done: Conversion, console: Console | None = None) -> None:
    """Print what was written, the classes, and what was left out or written otherwise, and why."""
    console = console or Console(highlight=False, soft_wrap=True)
    objects = done.classes.total()
    console.print(f"{done.out}: {done.records:,} records, {objects:,} objects", markup=False)
    table = Table("class", title="objects by class", title_justify="left")
    table.add_column("objects", justify="right")
    most = done.classes.most_common(_CLASSES)
    for name, count in most:
        table.add_row(_plain(name), f"{count:,}")
    if len(done.classes) > len(most):
        table.add_row(f"{len(done.classes) - len(most)} more", f"{objects - sum(n for _, n in most):,}")
    console.print(table)
    for title, tally in (("left out", done.findings.left_out), ("written otherwise", done.findings.changed)):
        if tally.counts:
            console.print(Text(f"{title}:", style="bold"))
        for line in tally.lines():
            console.print(_plain(line))
    if done.outside:
        console.print(
            f"images outside the folder of the new file: {done.outside:,}; train with "
            "--custom.allow_outside_root true, or write the file into a folder that holds them",
            markup=False,
        )


def _check_arguments(source: Path, out: Path, images: Path | None, domain: str | None, *, force: bool) -> None:
    """What can be said before anything is read.

    Raises:
        DataError: naming it.
    """
    if domain is not None and (problem := domain_problem(domain)):
        raise DataError("--domain", problem, "1 to 100 letters, digits, `_`, `-`, `.`, spaces", "choose another name")
    if images is not None and not os.path.isdir(images):  # unlike Path's, it does not raise where a name is too long
        raise DataError("--images", f"{images}: no such folder", "the folder of the image files", "correct the path")
    if os.path.realpath(out) == os.path.realpath(source):
        raise DataError("--to", f"{out} is the source itself", "another file", "choose another name")
    if os.path.isdir(out):
        raise DataError("--to", f"{out} is a folder", "a file, like data/train.jsonl", "add a file name")
    if os.path.exists(out) and not force:
        raise DataError("--to", f"{out} exists", "a new file", "choose another name, or replace it with --force")


def _load(source: Path, form: Format | None) -> dict[str, Any] | list[bytes]:
    """The JSON tree of a COCO file, or the lines of ms-swift JSONL.

    Raises:
        DataError: the file cannot be read, or is neither.
    """
    if os.path.exists(source) and not os.path.isfile(source):
        raise _not_a_source(source, "not a regular file")  # a pipe or a device may have no end
    try:
        data = source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise _not_a_source(source, error.strerror or str(error)) from None
    if form == "swift" or (form is None and _begins_like_swift(data)):
        return data.split(b"\n")
    try:
        tree = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_a_source(source, f"not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise _not_a_source(source, f"JSON, but a {type(tree).__name__} instead of an object")
    if form is None and not {"images", "annotations"} <= tree.keys():
        keys = ", ".join(f"`{key}`" for key in list(tree)[:8])
        raise _not_a_source(source, f"a JSON object with {keys or 'no keys'}")
    return tree


def _begins_like_swift(data: bytes) -> bool:
    """Whether the first line that is not blank is an object with `messages`."""
    line = data.lstrip().split(b"\n", 1)[0]
    if b'"messages"' not in line:
        return False
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and "messages" in tree


def _write(entries: Iterator[Entry], file: TextIO, done: Conversion, domain: str | None) -> None:
    """Fit entries to their images and write a line for each record."""
    images: dict[Path, tuple[Size, int] | str] = {}
    written: set[Path] = set()
    while chunk := list(islice(entries, _AT_ONCE)):
        images |= looked_at({path for entry in chunk for path in entry.images} - images.keys())
        for entry in chunk:
            for size, objects in fit(entry, images, done.findings):
                paths = [entry.images[index] for index in objects]
                file.write(
                    json.dumps(_record(paths, size, objects, done.out.parent, domain), ensure_ascii=False) + "\n"
                )
                written.update(paths)
                done.records += 1
                done.classes.update(each["desc"].split("/")[0] for found in objects.values() for each in found)
    done.outside = len(outside(done.out.parent, written))
    file.flush()
    os.fsync(file.fileno())


def _record(
    paths: Sequence[Path], size: Size, objects: dict[int, list[dict[str, Any]]], folder: Path, domain: str | None
) -> dict[str, Any]:
    """A record as the file has it; objects name their image where there are several."""
    several = len(paths) > 1
    listed = [
        each | ({"image": position} if several else {})
        for position, found in enumerate(objects.values())
        for each in found
    ]
    return {
        "images": [_relative(path, folder) for path in paths],
        "width": size[0],
        "height": size[1],
        **({} if domain is None else {"domain": domain}),
        "objects": listed,
    }


def _relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder: down where it lies below, else up from where that folder really is."""
    image, here = path.absolute(), folder.absolute()
    if image.is_relative_to(here):
        return image.relative_to(here).as_posix()
    if ".." in image.parts:
        image = image.parent.resolve() / image.name
    try:
        return Path(os.path.relpath(image, here.resolve())).as_posix()
    except ValueError:  # on another drive
        return image.as_posix()


@contextmanager
def _put_in_place(out: Path) -> Iterator[Path]:
    """A draft beside a file, which takes its place when all has gone well.

    Raises:
        DataError: it cannot be written.
    """
    draft = out.with_name(out.name + ".writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        got = f"{error.filename or out}: {error.strerror or error}"
        raise DataError("--to", got, "a file that can be written", "choose another place") from None


def _nothing_left(source: Path, folder: Path, findings: Findings) -> DataError:
    return DataError(
        where=str(source),
        got="\n  ".join(["nothing that can be a record:", *findings.left_out.lines()]),
        allowed="at least one image with an object",
        do=f"look at the reasons; where images are not found in {folder}, name their folder with --images",
    )


def _not_a_source(source: Path, got: str) -> DataError:
    return DataError(str(source), got, _FORMATS, "correct the path or the file; --format says which it is meant to be")


def _plain(text: str) -> Text:
    """A text of the source as it stands: no markup, and nothing that a terminal cannot be sent."""
    return Text(text.encode("utf-8", "backslashreplace").decode("utf-8"))
