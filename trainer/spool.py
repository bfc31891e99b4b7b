"""The write-ahead spool: all that a run tells the tracker, a checked line each, on disk before it is sent anywhere.

A line is `CRC32 JSON`: its number, its time, what it is. Lines lie in segments named by their first line's number; old
segments are removed when neither the tracker nor a resumed run needs them, so that the spool stays small.
"""

import errno
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer import durable

SEGMENT_BYTES = 2**17
"""A segment that has grown beyond this is closed, and the next line begins another."""
BEGIN, AGAIN, END, ARTIFACT = "begin", "again", "end", "artifact"
"""Kinds of entries: the first one, which says what run it is; those that bring a file."""
REJECTED = "rejected.jsonl"
_FILES = "files"
_POSITION = "delivered"
_KEPT = "kept"
_NAME_BYTES = 200
"""A file system takes 255 for the name of a file, and ours have something before them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was told."""

    number: int
    """Counted from 1 over the life of the run, without gaps."""
    time_ms: int
    """Since 1970, never before the entry before it, whatever the clock does."""
    kind: str
    body: dict[str, Any]

    def line(self) -> bytes:
        """The entry as a line with its checksum."""
        return _checked([self.number, self.time_ms, self.kind, self.body])


@dataclass(frozen=True, slots=True)
class Position:
    """How far delivery has come."""

    number: int = 0
    """The last entry that the tracker has, of all but artifacts."""
    files: int = 0
    """The last one of artifacts, or one after which there was none."""
    run_id: str = ""
    """The MLflow run; empty where it has not been made yet."""

    @property
    def delivered(self) -> int:
        """Up to this entry everything is delivered, artifacts too."""
        return min(self.number, self.files)


def entry_of(line: bytes) -> Entry | None:
    """The entry that a line holds; None where it is torn or damaged."""
    try:
        number, time_ms, kind, body = _content(line)
        return Entry(int(number), int(time_ms), str(kind), dict(body))
    except (ValueError, TypeError, RecursionError):
        return None


def _checked(content: Any) -> bytes:
    """A line with its checksum. What UTF-8 does not have, such as a stray byte of a file name, no store would take."""
    text = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(line: bytes) -> Any:
    """What `_checked` has made a line of; ValueError where it is torn or damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or int(checksum, 16) != zlib.crc32(text):
        raise ValueError("a damaged line")
    return json.loads(text)


def entries(folder: Path, after: int = 0) -> Iterator[Entry]:
    """The entries on disk after a number, in order, each once, also while others are written or forgotten.

    Damaged lines are left out, and so found by their gap. Whoever only reads needs no `Spool`, which is open for
    writing and is one process's at a time.
    """
    segments = _segments(folder)
    for index, (_, path) in enumerate(segments):
        if index + 1 < len(segments) and segments[index + 1][0] <= after + 1:
            continue
        with suppress(FileNotFoundError), path.open("rb") as lines:  # forgotten in between, so delivered
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # it is being written; what seems to follow is the rest of it
                entry = entry_of(line)
                if entry is not None and entry.number > after:  # an interrupted write may have come twice
                    after = entry.number
                    yield entry


def position_of(folder: Path) -> Position:
    """How far delivery has come; at the beginning where nothing is known of it."""
    try:
        found = _content((folder / _POSITION).read_bytes())
        return Position(int(found["number"]), int(found["files"]), str(found["run_id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Position()


def _segments(folder: Path) -> list[tuple[int, Path]]:
    """(number of its first entry, path) of every segment, in order."""
    return sorted((int(path.stem), path) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


class Spool:
    """The spool of one run, open for writing; one process at a time has it (see `runs`), any of its threads reads."""

    def __init__(self, folder: Path) -> None:
        """Open or make it. What a killed process left half written at the end is cut off.

        Raises:
            OSError: it cannot be made or read.
        """
        self.folder = folder
        (folder / _FILES).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._handle: int | None = None
        self._size = 0
        self.trouble: OSError | None = None
        """Why lines are held in memory at the moment, such as a full disk; None where they are on disk."""
        self.last, self._time_ms = 0, 0
        self._recover()

    def append(self, kind: str, **body: Any) -> Entry:
        """Write an entry down. It survives this process at once, and the machine from the next `sync` on.

        Where the disk takes nothing, the entry is held in memory and written with the next one.

        Raises:
            TypeError: JSON cannot hold it; nothing was written.
        """
        with self._lock:
            entry = Entry(self.last + 1, max(self._time_ms, int(time.time() * 1000)), kind, body)
            self._waiting.append((entry.number, entry.line()))
            self.last, self._time_ms = entry.number, entry.time_ms
            self._write_waiting()
            return entry

    def keep_file(self, path: Path, name: str) -> str:
        """Copy a file into the spool until it is delivered; returns its name there, which ends in `name`.

        Raises:
            OSError: there is no room.
        """
        return self._keep(name, lambda kept: shutil.copyfile(path, kept))

    def keep_text(self, content: str, name: str) -> str:
        """The same for a text that is to become a file.

        Raises:
            OSError: there is no room.
        """
        return self._keep(name, lambda kept: kept.write_text(content, encoding="utf-8", errors="backslashreplace"))

    def _keep(self, name: str, write: Callable[[Path], object]) -> str:
        short = name.encode("utf-8", "replace")[-_NAME_BYTES:].decode("utf-8", "ignore")
        kept = self.folder / _FILES / f"{uuid.uuid4().hex[:8]}-{short}"
        try:
            write(kept)
            for path in (kept, kept.parent):  # else a power cut could leave its entry without it
                durable.sync(path)
        except OSError:
            kept.unlink(missing_ok=True)
            raise
        return kept.name

    def file(self, name: str) -> Path:
        """Where a kept file lies.

        Raises:
            ValueError: the name leaves the folder, which no entry of ours does.
        """
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file in the spool")
        return self.folder / _FILES / name

    def sync(self) -> None:
        """Make what was written survive a machine that loses power."""
        try:
            with self._lock:
                self._write_waiting()
                handle = None if self._handle is None else os.dup(self._handle)
            if handle is not None:  # without the lock: nobody who tells something waits for the disk to spin
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        except OSError as error:
            self.trouble = error

    @property
    def written(self) -> int:
        """Number of the last entry that is on disk."""
        with self._lock:
            return self.last - len(self._waiting)

    def held(self) -> list[Entry]:
        """The entries that the disk has not taken."""
        with self._lock:
            return [entry for _, line in self._waiting if (entry := entry_of(line))]

    def read(self, after: int = 0) -> Iterator[Entry]:
        """The entries on disk after a number; see `entries`."""
        return entries(self.folder, after)

    def forget(self, upto: int) -> None:
        """Remove the segments that hold no entry after `upto`, nor one that is not delivered.

        The one that is written to stays, and the first one, which says what run it is: without it, nothing could be
        delivered any more where the position is lost.
        """
        if (self.folder / _KEPT).exists():
            return
        upto = min(upto, self.position.delivered)
        for (_, path), (following, _) in pairwise(_segments(self.folder)[1:]):
            if following <= upto + 1:
                path.unlink(missing_ok=True)

    def keep_all(self) -> None:
        """Forget nothing from now on, in this process or another: somebody reads the run's rows here."""
        (self.folder / _KEPT).touch()

    @property
    def position(self) -> Position:
        """How far delivery has come; see `position_of`."""
        return position_of(self.folder)

    @property
    def run_id(self) -> str:
        """The MLflow run that entries go to; empty where it has not been made yet."""
        return self.position.run_id

    def set_position(self, position: Position) -> None:
        """Remember how far delivery has come.

        It need not survive a power cut: entries that are sent again change nothing.

        Raises:
            OSError: there is no room; delivery is only repeated then.
        """
        aside = self.folder / (_POSITION + ".writing")
        aside.write_bytes(_checked(asdict(position)))
        aside.replace(self.folder / _POSITION)

    def reject(self, entry: Entry, reason: str) -> None:
        """Set an entry aside that the tracker will never take, with its reason, so that the next ones can go."""
        with (self.folder / REJECTED).open("a", encoding="utf-8") as rejected:
            rejected.write(json.dumps({"reason": reason, "kind": entry.kind, "body": entry.body}) + "\n")

    def close(self) -> None:
        """Write and sync what is left, and let go of the file."""
        self.sync()
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def _write_waiting(self) -> None:
        """Write what waits, entry by entry, so that a full disk leaves half a line at most, at the end."""
        try:
            if self.trouble is not None and self._handle is not None:
                os.ftruncate(self._handle, self._size)
            while self._waiting:
                number, line = self._waiting[0]
                if os.write(self._open_segment(number), line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._size += len(line)
                self._waiting.popleft()
            self.trouble = None
        except OSError as error:
            self.trouble = error

    def _open_segment(self, number: int) -> int:
        if self._handle is not None and self._size > SEGMENT_BYTES:
            full, self._handle = self._handle, None
            try:
                os.fsync(full)
            finally:
                os.close(full)
        if self._handle is None:
            path = self.folder / f"{number:012}.jsonl"
            if self._size <= SEGMENT_BYTES and (segments := _segments(self.folder)):
                path = segments[-1][1]
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            durable.sync(self.folder)
        self._size = os.fstat(self._handle).st_size
        return self._handle

    def _recover(self) -> None:
        """Find the last entry, and cut off what follows it in the last segment: a line that was never whole."""
        segments = _segments(self.folder)
        for first, path in segments[-1:]:
            self.last, self._size = first - 1, 0
            with path.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        entry = entry_of(line)
                        self.last = entry.number if entry else self.last + 1  # a damaged one was an entry too
                        self._size += len(line)
            os.truncate(path, self._size)
        for first, _ in reversed(segments):
            if times := [entry.time_ms for entry in self.read(first - 1)]:
                self._time_ms = times[-1]
                break
        delivered = self.position
        self.last = max(self.last, delivered.number, delivered.files)  # a power cut may have taken delivered lines
