"""Rounds of a meeting as torch's elastic agent takes them: a rendezvous of its own kind, with a fresh store each time.

torch's own kinds do not fit: `c10d` gives the first rank to whichever host sorts first, and this project's first rank
holds the run's folder; `static` keeps its store over a restart, with the keys of the start before; and both wait for
ever on a line that was cut.
"""

import os
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from trainer import launch
from trainer.hosts.meeting import Meeting, NoMeeting

BACKEND = "hosts"


class Rounds(RendezvousHandler):
    """Asked by the agent for a round before every start, and several times a second whether all hosts are there."""

    def __init__(self, meeting: Meeting, *, restarts: int, may_begin: Callable[[], bool]) -> None:
        """Begin no round yet.

        Args:
            meeting: of this host.
            restarts: how often, after the first start, another is made.
            may_begin: whether another start could end otherwise than the one before.
        """
        self._meeting, self._restarts, self._may_begin = meeting, restarts, may_begin
        self._store: Store | None = None
        self.begun = 0
        """Rounds so far."""
        self.asked = 0
        """How often the agent has looked: it is at work as long as this grows."""
        self.meets = False
        """Whether other hosts are waited for just now."""

    def next_rendezvous(self) -> RendezvousInfo:
        """The next round; see `RendezvousHandler`."""
        place = self._meeting.place
        if self.begun > self._restarts or (self.begun and not self._may_begin()):
            raise RendezvousClosedError(self._meeting.changed or "a rank has died")
        self.meets = True
        try:
            met = self._meeting.next_round(self._make_store)
        except NoMeeting as error:
            raise RendezvousTimeoutError(str(error)) from None
        finally:
            self.meets = False
        self.begun += 1
        os.environ[launch.ROUND] = str(self.begun)  # ranks inherit it
        if place.rank:
            self._store = TCPStore(place.names[0], met.store_port, is_master=False, timeout=self._patience())
        assert self._store is not None  # noqa: S101  # the first host's was made by `_make_store`
        at = RendezvousStoreInfo(master_addr=place.names[0], master_port=met.ranks_port)
        return RendezvousInfo(PrefixStore(f"round-{met.store_port}", self._store), place.rank, len(place.names), at)

    def _make_store(self) -> int:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=self._patience())
        self._store = store
        return int(store.port)

    def _patience(self) -> timedelta:
        return timedelta(seconds=self._meeting.place.silence_seconds)

    def num_nodes_waiting(self) -> int:
        """More than 0 when the ranks must be started anew."""
        self.asked += 1
        return int(bool(self._meeting.changed))

    def get_backend(self) -> str:
        """The name of this kind."""
        return BACKEND

    def get_run_id(self) -> str:
        """There is one run at a meeting."""
        return BACKEND

    def is_closed(self) -> bool:
        """Whether no round will follow."""
        return self._meeting.over is not None

    def set_closed(self) -> None:
        """Nothing: who started the agent tells the others how it has ended."""

    def shutdown(self) -> bool:
        """The same."""
        return True
