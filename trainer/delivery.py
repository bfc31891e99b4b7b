"""Delivers a spool to the tracker: in order, again after failures, from one background thread or to its end."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Protocol

from trainer.errors import UserError, reason_of
from trainer.spool import ARTIFACT, BEGIN, END, Entry, Spool

_AT_ONCE = 50
"""Entries that are sent together."""
_PAUSE = 2.0
"""Seconds between two deliveries while all goes well: rows are gathered, so that few requests are made."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds until a failed delivery is tried again, doubled each time up to the longest."""


def told_in_a_line(error: Exception) -> str:
    """What went wrong, also where it is a message of four parts."""
    return f"{error.where}: {error.got}" if isinstance(error, UserError) else reason_of(error)


class Door(Protocol):
    """Whoever takes entries; everything it raises means: not delivered, try again."""

    def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
        """Take entries, and return the id of the run that they went to. Taking them twice changes nothing."""


class Courier:
    """Carries entries from a spool to a door, and remembers how far it has come.

    Artifacts go on a way of their own, after the rest: where only they cannot be stored, metrics still arrive.
    """

    def __init__(self, spool: Spool, door: Door) -> None:
        """Go on where the last delivery ended."""
        self._spool, self._door = spool, door
        self._position = spool.position
        self.lost = 0
        """Entries that could not be read back: damaged on disk."""

    @property
    def number(self) -> int:
        """Up to this entry everything is delivered."""
        return self._position.delivered

    def carry_all(self, watch: Callable[[int], None] = lambda _: None) -> None:
        """Deliver everything; `watch` gets how many entries went each time.

        Raises:
            Exception: of whatever kind; what is delivered stays delivered, and the next call tries the rest again.
        """
        written = self._spool.written  # before it is read: what is not found up to here is damaged
        for files in (False, True):
            while some := list(islice(self._spool.read(self._after(files)), _AT_ONCE)):
                watch(self._carry(some, some[-1].number, files))
            if self._after(files) < written:
                self._carry((), written, files)

    def carry_held(self) -> None:
        """Deliver what the disk does not take and a resumed training would not bring again: how the run has ended.

        Raises:
            Exception: as above.
        """
        words = [entry for entry in self._spool.held() if entry.kind in ("params", "tags", END)]
        if words and self._position.run_id:
            self._door.deliver(words, self._spool, self._position.run_id)

    def _after(self, files: bool) -> int:
        return self._position.files if files else self._position.number

    def _carry(self, some: Sequence[Entry], last: int, files: bool) -> int:
        """Deliver those of the next entries, up to `last`, that go one way; returns how many they were."""
        mine, run_id = [e for e in some if (e.kind == ARTIFACT) == files], self._position.run_id
        if mine:
            if not run_id and mine[0].kind != BEGIN:
                raise ValueError("the line of the spool that says which run it is, is damaged; `trainer sync` mends it")
            run_id = self._door.deliver(mine, self._spool, run_id)
        if files:
            self._position = replace(self._position, files=last)
        else:
            self.lost += last - self._position.number - len(some)
            self._position = replace(self._position, number=last, run_id=run_id)
        with suppress(OSError):  # no room to remember it: then it is sent again one day, which changes nothing
            self._spool.set_position(self._position)
        for entry in mine if files else ():
            with suppress(OSError):
                self._spool.file(entry.body["kept"]).unlink(missing_ok=True)
        return len(mine)


class Delivery:
    """The background thread of one run."""

    def __init__(self, spool: Spool, door: Door, *, needed_from: Callable[[], int]) -> None:
        """Not started yet.

        Args:
            spool: what to deliver.
            door: who takes it.
            needed_from: number of the first entry that a resumed run would want to compare; older ones are removed
                once they are delivered.
        """
        self._spool, self._courier = spool, Courier(spool, door)
        self._needed_from = needed_from
        self._hurry, self._done = threading.Event(), threading.Event()
        self._leave, self._too_late = False, False
        self._notices: deque[str] = deque()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self.trouble = ""
        """Why the last try failed; empty where it did not."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def notices(self) -> list[str]:
        """What there is to say since the last call: that the tracker does not answer, that it is back."""
        return [self._notices.popleft() for _ in range(len(self._notices))]

    @property
    def waiting(self) -> int:
        """Entries that are not delivered yet."""
        return self._spool.last - self._courier.number

    def finish(self, seconds: float) -> bool:
        """Deliver what is left, for a bounded time, and stop; whether all of it went.

        The thread may be in the middle of a request that never ends: it is left to itself then.
        """
        self._leave = True
        self._hurry.set()
        if self._thread.ident is not None:
            try:
                self._done.wait(seconds)
            finally:  # also where a signal ends the wait: another process may have the spool soon
                self._too_late = not self._done.is_set()
        return self.waiting == 0

    def _run(self) -> None:
        wait, failing_since = _FIRST_WAIT, 0.0
        while not self._too_late:
            if not (self._leave and not self.trouble):
                self._hurry.wait(wait if self.trouble else _PAUSE)
            self._hurry.clear()
            leave = self._leave  # before the last look: what comes after it is nobody's wish any more
            try:
                self._deliver(leave)
            except Exception as error:  # noqa: BLE001  # whatever it is, training goes on and it is tried again
                wait = min(_LONGEST_WAIT, 2 * wait) if self.trouble and not leave else _FIRST_WAIT
                failing_since = failing_since if self.trouble else time.monotonic()
                self._trouble(told_in_a_line(error))
            else:
                if self.trouble:
                    away = time.monotonic() - failing_since
                    self._notices.append(f"the tracker is back after {away:.0f} s; everything was delivered")
                    self.trouble = ""
                if leave:
                    self._done.set()
                    return

    def _deliver(self, leave: bool) -> None:
        self._spool.sync()
        self._courier.carry_all(self._go_on)
        if self._courier.lost > self._lost:
            self._lost = self._courier.lost
            self._notices.append(f"{self._lost} entries of the spool in {self._spool.folder} are damaged, and lost")
        if leave:
            self._courier.carry_held()
        self._spool.forget(min(self._courier.number, self._needed_from() - 1))

    def _go_on(self, _: int) -> None:
        if self._too_late:
            raise TimeoutError("the run has ended; the rest is left to whoever holds its folder now")

    def _trouble(self, text: str) -> None:
        if not self.trouble:
            self._notices.append(f"the tracker does not take what is sent ({text}); training goes on, it is kept")
        self.trouble = text
