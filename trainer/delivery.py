"""Delivers a spool to the tracker: in order, again after failures, from one background thread or to its end."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

from trainer.errors import reason_of
from trainer.spool import ARTIFACT, Entry, Spool

_AT_ONCE = 50
"""Entries that are sent together."""
_PAUSE = 2.0
"""Seconds between two deliveries while all goes well: rows are gathered, so that few requests are made."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds until a failed delivery is tried again, doubled each time up to the longest."""


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
        return min(self._position.number, self._position.files)

    def carry_all(self, watch: Callable[[int], None] = lambda _: None) -> None:
        """Deliver everything; `watch` gets how many entries went each time.

        Raises:
            Exception: of whatever kind; what is delivered stays delivered, and the next call tries the rest again.
        """
        for files in (False, True):
            while some := list(islice(self._spool.read(self._after(files)), _AT_ONCE)):
                watch(self._carry(some, files))

    def _after(self, files: bool) -> int:
        return self._position.files if files else self._position.number

    def _carry(self, some: Sequence[Entry], files: bool) -> int:
        """Deliver those of the next entries that go one way; returns how many they were."""
        mine, last, run_id = [e for e in some if (e.kind == ARTIFACT) == files], some[-1].number, self._position.run_id
        if mine:
            run_id = self._door.deliver(mine, self._spool, run_id)
        if files:
            self._position = replace(self._position, files=last)
        else:
            self.lost += last - self._position.number - len(some)
            self._position = replace(self._position, number=last, run_id=run_id)
        self._spool.set_position(self._position)
        for entry in mine if files else ():
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
        self._hurry, self._done, self._leave = threading.Event(), threading.Event(), False
        self._notices: list[str] = []
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self.trouble = ""
        """Why the last try failed; empty where it did not."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def notices(self) -> list[str]:
        """What there is to say since the last call: that the tracker does not answer, that it is back."""
        said, self._notices = self._notices, []
        return said

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
            self._done.wait(seconds)
        return self.waiting == 0

    def flush(self, seconds: float) -> bool:
        """Wait until everything so far is delivered, for a bounded time; whether it is."""
        wanted, until = self._spool.last, time.monotonic() + seconds
        self._hurry.set()
        while self._courier.number < wanted and time.monotonic() < until:
            time.sleep(0.01)
        return self._courier.number >= wanted

    def _run(self) -> None:
        wait, failures_since = _FIRST_WAIT, 0.0
        while True:
            if not (self._leave and not self.trouble):
                self._hurry.wait(wait if self.trouble else _PAUSE)
            self._hurry.clear()
            leave = self._leave  # before the last look: what comes after it is nobody's wish any more
            try:
                self._spool.sync()
                self._courier.carry_all()
                self._spool.forget(min(self._courier.number, self._needed_from() - 1))
            except Exception as error:  # noqa: BLE001  # whatever it is, training goes on and it is tried again
                wait = min(_LONGEST_WAIT, 2 * wait) if self.trouble and not leave else _FIRST_WAIT
                failures_since = failures_since if self.trouble else time.monotonic()
                self._trouble(error)
            else:
                if self.trouble:
                    away = time.monotonic() - failures_since
                    self._notices.append(f"the tracker is back after {away:.0f} s; everything was delivered")
                    self.trouble = ""
                if leave:
                    self._done.set()
                    return

    def _trouble(self, error: Exception) -> None:
        text = reason_of(error)
        if not self.trouble:
            self._notices.append(f"the tracker does not take what is sent ({text}); training goes on, it is kept")
        self.trouble = text
