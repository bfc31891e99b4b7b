"""Where the launchers of all hosts meet: before every start of the ranks, and to hear when a host is gone.

All launchers hold a connection to the first host's. A start of all ranks is a *round*: it begins when every host has
asked for it. Whoever ends says so and with which status; whoever falls silent, or closes without a word, is gone.
"""

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError
from trainer.hosts.link import Link, Message

_LOOK_SECONDS, _CONNECT_SECONDS, _HELLO_SECONDS = 0.5, 5.0, 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Which host this is, of which, and how long it is waited for others."""

    names: Sequence[str]
    """Of all hosts."""
    rank: int
    """Of this one."""
    ranks: int
    """On all hosts."""
    port: int
    """On which the first listens."""
    join_seconds: float
    silence_seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """One start of all ranks."""

    store_port: int
    """On the first host: of the store for the launchers."""
    ranks_port: int
    """On the first host: of the store for the ranks."""


@dataclass(frozen=True, slots=True)
class Over:
    """How it has ended on another host."""

    status: int
    """Exit status there; 0: well."""
    reason: str


class NoMeeting(Exception):
    """The hosts have not come together in time."""


class Meeting(ABC):
    """What this host knows of the others."""

    def __init__(self, place: Place) -> None:
        """Nobody was heard of yet."""
        self.place = place
        self.over: Over | None = None
        """Where a host has ended badly, how."""
        self.changed = ""
        """Why the ranks must be started anew; empty while all is well."""
        self.done = False
        """Whether a host has ended well: then nothing is started any more."""
        self._news = threading.Condition()

    @abstractmethod
    def next_round(self, make_store: Callable[[], int]) -> Round:
        """Wait until every host wants to start.

        Args:
            make_store: makes the store of the launchers, on the first host, and says its port.

        Raises:
            NoMeeting: a host has not come in time, or has ended.
        """

    @abstractmethod
    def end(self, status: int, reason: str) -> None:
        """Tell the others that this host has ended, and leave."""

    def _change(self, reason: str) -> None:
        with self._news:
            self.changed = self.changed or reason
            self._news.notify_all()

    def _hear_of_end(self, name: str, message: Message) -> None:
        status, reason = int(message.get("over", 1)), str(message.get("reason", ""))
        self.done = self.done or not status
        if status:
            with self._news:
                self.over = self.over or Over(status, reason or f"{name} has ended with status {status}")
            self._change(self.over.reason)

    def wait_for_end(self, seconds: float) -> None:
        """Give the others a moment to say how it has ended there."""
        with self._news:
            self._news.wait_for(lambda: self.over is not None, seconds)


class First(Meeting):
    """On the first host: listens for the others."""

    def __init__(self, place: Place) -> None:
        """Listen.

        Raises:
            ConfigError: the port cannot be listened on.
        """
        super().__init__(place)
        self._links: dict[int, Link] = {}
        self._ready: set[int] = set()
        self._ended: set[int] = set()
        self._begun = False
        self._kept: socket.socket | None = None
        try:
            # a host that is alone is not to be reached from outside
            listens = "" if len(place.names) > 1 else "127.0.0.1"
            self._door = socket.create_server((listens, place.port), backlog=128)
        except OSError as error:
            raise ConfigError(
                "launch.port", f"{place.port}: {error.strerror}", "a port that nothing else listens on here",
                "choose another, the same on all hosts",
            ) from None  # fmt: skip
        threading.Thread(target=self._let_in, name="meeting", daemon=True).start()

    def next_round(self, make_store: Callable[[], int]) -> Round:
        """Wait for the others and tell them the round; see `Meeting.next_round`."""
        everybody = set(range(1, len(self.place.names)))
        with self._news:
            self._begun = False
            for link in self._links.values():
                link.send({"again": self.changed or f"{self.place.names[0]} starts its ranks anew"})
            come = self._news.wait_for(lambda: self.over or self._ready >= everybody, self.place.join_seconds)
            if self.over:
                raise NoMeeting(self.over.reason)
            if not come:
                missing = ", ".join(self.place.names[rank] for rank in sorted(everybody - self._ready))
                raise NoMeeting(f"waited {self.place.join_seconds:g} s for {missing}")
            begun = Round(make_store(), self._keep_port())
            self._ready.clear()
            self.changed, self._begun = "", True
            for link in self._links.values():
                link.send({"store": begun.store_port, "ranks": begun.ranks_port})
        return begun

    def _keep_port(self) -> int:
        """A port that nobody else is given until the next round; the first rank listens on it."""
        if self._kept is not None:
            self._kept.close()
        self._kept = socket.socket()
        self._kept.bind(("", 0))
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before, see `launch`
        return int(self._kept.getsockname()[1])

    def end(self, status: int, reason: str) -> None:
        """Tell all; see `Meeting.end`."""
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there: only then is the port free
        self._door.close()
        with self._news:
            links = list(self._links.values())
        for link in links:
            link.send({"over": status, "reason": reason})
            link.close()

    def _let_in(self) -> None:
        while True:
            try:
                connection, _ = self._door.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(connection,), name="greet", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        link = Link(connection, silence=self.place.silence_seconds)
        try:
            connection.settimeout(_HELLO_SECONDS)
            hello = link.receive()
            connection.settimeout(self.place.silence_seconds)
            rank, theirs = int(hello["host"]), (list(hello["names"]), int(hello["ranks"]))
        except (OSError, ValueError, KeyError, TypeError):
            link.close()
            return
        if theirs != (list(self.place.names), self.place.ranks) or not 0 < rank < len(self.place.names):
            link.send({"over": 2, "reason": f"{self.place.names[0]} was started with another file of hosts"})
            link.close()
            return
        with self._news:
            if rank in self._links:  # started twice; or its machine was, and is not known to have gone yet
                link.send({"later": f"{self.place.names[rank]} is there already"})
                link.close()
                return
            self._links[rank] = link
            self._ended.discard(rank)
        link.listen(lambda message: self._hear(rank, message), lambda reason: self._lose(rank, link, reason))

    def _hear(self, rank: int, message: Message) -> None:
        name = self.place.names[rank]
        if "ready" in message:
            with self._news:
                self._ready.add(rank)
                begun = self._begun
                self._news.notify_all()
            if begun:
                self._anew(f"{name} starts its ranks anew")
        elif "over" in message:
            with self._news:
                self._ended.add(rank)
            self._hear_of_end(name, message)

    def _lose(self, rank: int, link: Link, reason: str) -> None:
        link.close()
        with self._news:
            self._links.pop(rank, None)
            self._ready.discard(rank)
            begun, ended = self._begun, rank in self._ended
        if begun and not ended:
            self._anew(f"{self.place.names[rank]} is gone: {reason}")

    def _anew(self, reason: str) -> None:
        self._change(reason)
        with self._news:
            links = list(self._links.values())
        for link in links:
            link.send({"again": reason})


class Other(Meeting):
    """On every other host: goes to the first."""

    def __init__(self, place: Place) -> None:
        """Go there when a round is asked for."""
        super().__init__(place)
        self._link: Link | None = None
        self._round: Round | None = None
        self._told: str = ""

    def next_round(self, make_store: Callable[[], int]) -> Round:
        """Ask for a round until it begins; see `Meeting.next_round`."""
        until = time.monotonic() + self.place.join_seconds
        self._round, asked = None, None
        while time.monotonic() < until:
            with self._news:
                if self.over:
                    raise NoMeeting(self.over.reason)
                if self._round is not None:
                    self.changed = ""
                    return self._round
                link = self._link
            if link is None and (link := self._connected()) is None:
                time.sleep(_LOOK_SECONDS)
                continue
            if asked is not link:
                link.send({"ready": True})
                asked = link
            with self._news:
                self._news.wait(_LOOK_SECONDS)
        first = f"{self.place.names[0]}, port {self.place.port}"
        raise NoMeeting(f"waited {self.place.join_seconds:g} s for {first}{f': {self._told}' if self._told else ''}")

    def _connected(self) -> Link | None:
        """A connection to the first host; None where there is nobody yet."""
        try:
            connection = socket.create_connection((self.place.names[0], self.place.port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            self._told = error.strerror or str(error)
            return None
        link = Link(connection, silence=self.place.silence_seconds)
        hello: dict[str, Any] = {"host": self.place.rank, "names": self.place.names, "ranks": self.place.ranks}
        link.send(hello)
        with self._news:
            self._link = link
        link.listen(self._hear, lambda reason: self._lose(link, reason))
        return link

    def _hear(self, message: Message) -> None:
        if "store" in message:
            with self._news:
                self._round = Round(int(message["store"]), int(message["ranks"]))
                self._news.notify_all()
        elif "over" in message:
            self._hear_of_end(self.place.names[0], message)
        elif "later" in message:
            self._told = str(message["later"])
        elif self._round is not None:
            self._change(str(message.get("again", "")) or "asked for")

    def _lose(self, link: Link, reason: str) -> None:
        link.close()
        with self._news:
            if self._link is link:
                self._link = None
            self._news.notify_all()
        if not self.done:
            self._change(f"{self.place.names[0]} is gone: {reason}")

    def end(self, status: int, reason: str) -> None:
        """Tell the first; see `Meeting.end`."""
        if (link := self._link) is not None:  # the thread that reads may lose it meanwhile
            link.send({"over": status, "reason": reason})
            link.close()


def meeting_of(place: Place) -> Meeting:
    """What this host has of a meeting.

    Raises:
        ConfigError: it is the first, and cannot listen.
    """
    return First(place) if place.rank == 0 else Other(place)
