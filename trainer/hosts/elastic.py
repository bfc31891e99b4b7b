"""Starts this host's ranks through torch.distributed.run, and all of them again when one has died or a host is gone."""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer import launch
from trainer.config.schema import Launch
from trainer.errors import ConfigError
from trainer.hosts import network
from trainer.hosts.hostfile import Host, Hosts, hosts_from
from trainer.hosts.meeting import Meeting, Place, meeting_of
from trainer.hosts.rounds import BACKEND, Rounds
from trainer.signals import pass_on

_MISTAKE, _STOPPED, _BROKEN, INTERRUPTED = 2, 3, 1, 143
"""Exit statuses of ranks; after the first two, another start would end in the same way."""
_STUCK_SECONDS = 90.0
"""What torch's agent has to notice that a host is gone, and to end its ranks, before this process ends without it."""
_LAST_WORD_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of this host have ended."""

    status: int
    reason: str
    """Why, where no rank has said it; else empty."""


def hosts_of(config: Launch) -> Hosts:
    """The hosts of a run; this one alone where the configuration names none.

    Raises:
        ConfigError: the file of hosts cannot be used.
    """
    if config.hosts is None:
        return Hosts((Host("127.0.0.1", config.ranks),), 0)
    return hosts_from(config.hosts, config.host_rank)


def start(config: Launch, hosts: Hosts, arguments: Sequence[str]) -> Ended:
    """Run `python -m trainer ARGUMENTS` on this host's ranks of a run, to their end.

    Args:
        config: how often and how long.
        hosts: which hosts, and which of them this is.
        arguments: of the command; the same on all hosts.

    Raises:
        ConfigError: the hosts do not come together, or more ranks than GPUs are asked for here.
        KeyboardInterrupt: the ranks were ended by it.
    """
    launch.refuse_more_than_gpus(hosts.slots, "launch.hosts" if config.hosts else "launch.nproc")
    if len(hosts.all) > 1:
        network.use(config.interface, hosts.first)
        here = f"{hosts.slots} of {hosts.ranks} ranks here"
        print(f"host {hosts.rank} of {len(hosts.all)}, {here}; waiting for the others", file=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", str(launch.threads(hosts.slots)))
    names = [host.name for host in hosts.all]
    port = config.port if len(names) > 1 else 0
    place = Place(names, hosts.rank, hosts.ranks, port, config.join_seconds, config.silence_seconds)
    meeting = meeting_of(place)
    status, reason = _BROKEN, f"{names[hosts.rank]} has ended with an error that it tells"
    try:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            ended = _run(config, hosts, arguments, meeting, Path(folder))
        status, reason = ended.status, ended.reason or f"{names[hosts.rank]} has ended with status {ended.status}"
        return ended
    except ConfigError:
        status, reason = _MISTAKE, f"{names[hosts.rank]} has ended with a mistake that it tells"
        raise
    except (KeyboardInterrupt, SystemExit):
        status, reason = INTERRUPTED, f"{names[hosts.rank]} was asked to end"
        raise
    finally:
        meeting.end(status, reason)


def _run(config: Launch, hosts: Hosts, arguments: Sequence[str], meeting: Meeting, folder: Path) -> Ended:
    """All rounds, in torch's elastic agent."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry

    os.environ[launch.STATUSES] = str(folder)
    rounds = Rounds(meeting, restarts=config.restarts, may_begin=lambda: _may_begin(folder))
    rendezvous_handler_registry.register(BACKEND, lambda _: rounds)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # all that it says, we say
    options = [f"--nnodes={len(hosts.all)}", f"--nproc-per-node={hosts.slots}", f"--max-restarts={config.restarts}"]
    options += [f"--rdzv-backend={BACKEND}", f"--rdzv-endpoint={hosts.first}:{config.port}", "--rdzv-id=trainer"]
    options += [f"--signals-to-handle={','.join(s.name for s in launch.heeded_signals())}", f"--log-dir={folder}/log"]
    options.append(f"--shutdown-timeout={launch.END_SECONDS:.0f}")  # where this process is asked; torch's own is 30 s
    asked = torchrun.get_args_parser().parse_args([*options, "-m", "trainer", *arguments])
    failed = ""
    try:
        with _kept_signals(), _watched(meeting, rounds):
            torchrun.run(asked)  # type: ignore[no-untyped-call]  # theirs
    except ChildFailedError:
        failed = meeting.changed or "a rank has died"
    except RendezvousError as error:
        failed = str(error)
        if not rounds.begun and meeting.over is None:
            raise ConfigError(
                "launch.hosts", failed, "the same command on every host of the file, within launch.join_seconds",
                "start it there too; if it runs, see that launch.port is not closed between the hosts",
            ) from None  # fmt: skip
    except SignalException as asked_by:
        if asked_by.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return Ended(128 + asked_by.sigval, "")
    finally:
        del os.environ[launch.STATUSES]
    return _ended(failed, _statuses(folder), meeting)


def _ended(failed: str, statuses: set[int], meeting: Meeting) -> Ended:
    """How it has ended here, from what the ranks of the last round, and other hosts, have said."""
    for status in (_MISTAKE, _STOPPED):
        if status in statuses:
            return Ended(status, "")
    if len(meeting.place.names) > 1 and not meeting.done:
        meeting.wait_for_end(_LAST_WORD_SECONDS if failed else 0)
    if meeting.over is not None:
        final = meeting.over.status in (_MISTAKE, _STOPPED)
        return Ended(meeting.over.status if final else INTERRUPTED, meeting.over.reason)
    if not failed:
        return Ended(0, "")
    return Ended(_BROKEN, "") if _BROKEN in statuses else Ended(INTERRUPTED, failed)


def _statuses(folder: Path) -> set[int]:
    """What the ranks of the last round have ended with, as far as they could say it."""
    return {int(path.read_text(encoding="ascii") or _BROKEN) for path in folder.glob("rank-*")}


def _may_begin(folder: Path) -> bool:
    """Whether another start could end otherwise than the one before, whose statuses are then forgotten."""
    if {_MISTAKE, _STOPPED} & _statuses(folder):
        return False
    for path in folder.glob("rank-*"):
        path.unlink()
    return True


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Handlers of signals are as before when this is over; meanwhile SIGUSR1 goes to the ranks."""
    numbers = (*launch.heeded_signals(), signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGUSR1, lambda number, _: pass_on(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watched(meeting: Meeting, rounds: Rounds) -> Iterator[None]:
    """End this process, and its ranks with it, where torch's agent waits for ever on a line that was cut."""
    done = threading.Event()

    def watch() -> None:
        asked, since = rounds.asked, time.monotonic()
        while not done.wait(1.0):
            if rounds.asked != asked or rounds.meets or not meeting.changed:
                asked, since = rounds.asked, time.monotonic()
            elif time.monotonic() - since > _STUCK_SECONDS:
                os.write(2, f"{meeting.changed}; the same command goes on from the newest resume point\n".encode())
                pass_on(signal.SIGKILL)
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()
