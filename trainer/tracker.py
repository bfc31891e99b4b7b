"""What everything in a run logs to: entries go into the spool beside the run, and from there to MLflow."""

import math
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer import names
from trainer.delivery import Delivery, Door
from trainer.errors import Interrupted, TrainingStopped
from trainer.redact import Redactor
from trainer.spool import ARTIFACT, END, Entry, Spool


class Tracker:
    """What a run tells the outside. This one tells nobody: it is for all ranks but the first, which speaks for them."""

    run_id = ""
    """The MLflow run; empty as long as it has not been made, because its store is away."""
    last = 0
    """Number of the last entry."""

    def at_end(self, log: Callable[[], None]) -> None:
        """Call `log` before the run is closed, however it ends; it never hides the error that ended it."""

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row, all of it at one step and one time."""

    def params(self, values: Mapping[str, str]) -> None:
        """Log params; a key that is already there stays as it is."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def description(self, markdown: str) -> None:
        """Set the run's description, which the MLflow UI renders."""

    def text(self, content: str, artifact: str) -> None:
        """Store a text as an artifact."""

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read; `context` is train, validation or out_of_domain."""

    def sync(self) -> None:
        """Make all that was told so far survive a power cut."""

    def need_from(self, number: int) -> None:
        """Say from which entry on a resumed training would want to compare; older ones may go once delivered."""

    def notices(self) -> list[str]:
        """What there is to say about the delivery since the last call."""
        return []

    @property
    def waiting(self) -> int:
        """Entries that are not delivered yet."""
        return 0

    def __enter__(self) -> Self:
        """The run is open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run as what it was."""


class Diverged(TrainingStopped):
    """A resumed training computes other numbers than it did before it was interrupted."""


_GAP = "gap"
"""Stands for entries of which nothing but their numbers is known: damaged, or forgotten with a later resume point."""


class SpoolTracker(Tracker):
    """The tracker of a run: a spool, and the thread that delivers it."""

    def __init__(
        self,
        spool: Spool,
        door: Door,
        redactor: Redactor,
        *,
        resumed_after: int = 0,
        left_upto: int = 0,
        close_seconds: float,
    ) -> None:
        """Log to a spool whose first entry says which run it is.

        Args:
            spool: open for writing.
            door: to MLflow.
            redactor: takes secrets out of all that is told.
            resumed_after: number of the last entry before the resume point that training goes on from; the rows that
                come after it will be computed again, and must be the same.
            left_upto: number of the last entry of a course that was left, by another layout or configuration: rows up
                to it need not be the same.
            close_seconds: how long the end of the run waits for the delivery.
        """
        self._spool, self._redactor, self._left_upto, self._close_seconds = spool, redactor, left_upto, close_seconds
        self._needed_from = resumed_after + 1
        self._left: deque[Entry] = deque()
        self._expected: deque[Entry] = deque()
        self._measured: set[tuple[int, frozenset[str]]] = set()
        self._expect(spool.read(resumed_after), resumed_after)
        self._last_words: list[Callable[[], None]] = []
        self._left_out: list[str] = []
        self.delivery = Delivery(spool, door, needed_from=lambda: self._needed_from)

    def _expect(self, entries: Iterable[Entry], last: int) -> None:
        """Keep the rows that a resumed training will bring again, and where others may have been."""
        for entry in entries:
            if entry.number > last + 1 > self._left_upto:
                self._expected.append(Entry(last + 1, 0, _GAP, {"last": entry.number - 1}))
            last = entry.number
            if entry.kind == "metrics" and _exact(entry.body["values"]):
                (self._left if entry.number <= self._left_upto else self._expected).append(entry)
            elif entry.kind == "metrics":
                self._measured.add((entry.body["step"], frozenset(entry.body["values"])))

    @property
    def run_id(self) -> str:  # type: ignore[override]  # a plain value elsewhere
        """The MLflow run; empty as long as it has not been made."""
        return self._spool.run_id

    @property
    def last(self) -> int:  # type: ignore[override]  # a plain value elsewhere
        """Number of the last entry; while rows come again, of the last before the next of them.

        A resume point that is written meanwhile must find those that are still to come.
        """
        coming = self._left or self._expected
        return coming[0].number - 1 if coming else self._spool.last

    def need_from(self, number: int) -> None:
        """Say from which entry on a resumed training would want to compare; older ones may go once delivered."""
        self._needed_from = number

    def at_end(self, log: Callable[[], None]) -> None:
        """Call `log` before the run is closed, however it ends; it never hides the error that ended it."""
        self._last_words.append(log)

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row, all of it at one step and one time; one that was logged before the interruption is compared.

        Raises:
            Diverged: it differs in a value that is exact.
        """
        if not _exact(row):
            before = (step, frozenset(row)) in self._measured or self._in_gap()
        else:
            before = self._found(row, step) or self._compared(row, step)
        if not before:
            self._spool.append("metrics", step=step, values=dict(row))

    def _in_gap(self) -> bool:
        """Whether the rows that come now were delivered and are no longer known; others that are known follow them."""
        gap = self._expected[0] if len(self._expected) > 1 and self._expected[0].kind == _GAP else None
        return gap is not None and gap.number <= self._spool.position.number

    def _found(self, row: Mapping[str, float], step: int) -> bool:
        """Whether the course that was left has a row of the same metrics for this step, whatever its values."""
        while self._left and self._left[0].body["step"] < step:
            self._left.popleft()  # under another cadence it does not come again
        found = next((entry for entry in self._left if _fits(entry, row, step)), None)
        if found is not None:
            self._left.remove(found)
        return found is not None

    def _compared(self, row: Mapping[str, float], step: int) -> bool:
        """Whether a row was logged before the interruption, and found the same.

        Raises:
            Diverged: it is not.
        """
        delivered = self._in_gap()
        gap = self._expected.popleft() if self._expected and self._expected[0].kind == _GAP else None
        if not self._expected:
            return False
        before = self._expected[0]
        if not _fits(before, row, step):
            if gap is None:
                raise _diverged(step, f"a row of step {before.body['step']} before, one of step {step} now")
            if gap.number < gap.body["last"]:
                self._expected.appendleft(replace(gap, number=gap.number + 1))
            return delivered
        self._expected.popleft()
        old, new = _exact(before.body["values"]), _exact(row)
        if other := [key for key in new if not _same(old[key], new[key])]:
            raise _diverged(step, ", ".join(f"{key} {old[key]!r} before, {new[key]!r} now" for key in other[:5]))
        return True

    def params(self, values: Mapping[str, str]) -> None:
        """Log params; a key that is already there stays as it is."""
        self._append("params", values=dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._append("tags", values=dict(values))

    def description(self, markdown: str) -> None:
        """Set the run's description, which the MLflow UI renders."""
        self.tags({names.TAG_NOTE: markdown})

    def text(self, content: str, artifact: str) -> None:
        """Store a text as an artifact."""
        name = self._redactor.text(artifact)
        self._artifact(name, None, lambda: self._spool.keep_text(self._redactor.text(content), name))

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""
        name = self._redactor.text(path.name)
        self._artifact(name, folder, lambda: self._spool.keep_file(path, name))

    def _artifact(self, name: str, folder: str | None, keep: Callable[[], str]) -> None:
        """Tell of an artifact; one for which there is no room is left out, and that is said: no run ends of it."""
        try:
            kept = keep()
        except OSError as error:
            self._left_out.append(f"{name} is not in MLflow: {error.strerror or error}")
        else:
            self._append(ARTIFACT, kept=kept, name=name, folder=folder)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read; `context` is train, validation or out_of_domain."""
        self._append("dataset", name=name, digest=digest, source=source, context=context)

    def sync(self) -> None:
        """Make all that was told so far survive a power cut."""
        self._spool.sync()

    def notices(self) -> list[str]:
        """What there is to say about the delivery since the last call."""
        left_out, self._left_out = self._left_out, []
        return [*left_out, *self.delivery.notices()]

    @property
    def waiting(self) -> int:
        """Entries that are not delivered yet."""
        return self.delivery.waiting

    def _append(self, kind: str, **body: Any) -> None:
        self._spool.append(kind, **self._redactor.tree(body))

    def __enter__(self) -> Self:
        """Begin to deliver."""
        self.delivery.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run as what it was: FINISHED, KILLED when interrupted, FAILED (with the traceback) otherwise."""
        status = status_after(error)
        try:
            for log in self._last_words:
                with suppress(Exception) if error else nullcontext():
                    log()
            if status == "FAILED":
                with suppress(OSError):
                    self.text("".join(traceback.format_exception(kind, error, trace)), names.ARTIFACT_TRACEBACK)
        except BaseException as cut:
            status = status_after(cut)
            raise
        finally:  # whatever became of the last words and the artifact
            self._append(END, status=status)
            self._spool.sync()
            try:
                self.delivery.finish(self._close_seconds if error is None else min(self._close_seconds, 10.0))
            except BaseException as cut:  # a signal: nobody waits any longer
                error = error or cut
                raise
            finally:
                self._spool.close()
                self._tell_what_is_left(well=error is None)

    def _tell_what_is_left(self, *, well: bool) -> None:
        for line in self.notices():
            sys.stderr.write(f"{line}\n")
        if not well and self.waiting:  # of a run that went well, its end says it
            home = self._spool.folder.parent
            sys.stderr.write(f"{self.waiting} entries are not delivered: python -m trainer sync {home}\n")


def status_after(error: BaseException | None) -> str:
    """The status of a run that was ended by an error, or by none."""
    if error is None:
        return "FINISHED"
    interrupted = isinstance(error, SystemExit) and error.code in (129, 130, 143)
    return "KILLED" if interrupted or isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED"


def _diverged(step: int, found: str) -> Diverged:
    return Diverged(
        f"The resumed training is not what it was before the interruption, at step {step}: {found}. "
        "Something beside the configuration has changed: code, libraries, machine or data. "
        "Nothing was logged twice. Start a new run (--resume never), or go on all the same (--allow_drift)."
    )


def _fits(before: Entry, row: Mapping[str, float], step: int) -> bool:
    """Whether an entry is a row of the same step with the same exact metrics."""
    return (
        before.kind == "metrics"
        and before.body["step"] == step
        and _exact(before.body["values"]).keys() == _exact(row).keys()
    )


def _exact(row: Mapping[str, float]) -> dict[str, float]:
    """The values of a row that come out the same whenever they are computed."""
    return {key: value for key, value in row.items() if names.metric(key).exact}


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
