"""Delivers what runs could not deliver while they trained, and closes runs whose process has died (`trainer sync`)."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.addresses import Store, store_name
from trainer.delivery import Courier, told_in_a_line
from trainer.errors import ConfigError, TrackingError
from trainer.runs import RUN_FILE, Busy, RunFolder, held, is_of_this_host, runs_below
from trainer.spool import BEGIN, END, REJECTED, Entry, Position
from trainer.tracking import MlflowDoor, beginning, reach_store

STILL_TRAINING = "still training: it delivers by itself"
_OTHERS_SECONDS = 20.0
"""How long a training waits at its beginning for the delivery of runs that have died."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of one run."""

    path: Path
    run_id: str
    delivered: int
    """Entries that went now."""
    waiting: int
    """Entries that could not; at least one where they cannot be counted."""
    note: str
    """Why not, or what else there is to know; empty where there is nothing."""


def close_dead(parent: Path, *, but: Path | None = None) -> list[str]:
    """Close every run below a folder whose process died without a word, as KILLED; a line for each.

    Args:
        parent: folder of runs.
        but: a run that is left alone.
    """
    lines, until = [], time.monotonic() + _OTHERS_SECONDS
    for path, facts in runs_below(parent):
        mine = but is not None and path.resolve() == but.resolve()
        if _is_dead(facts) and not mine:  # unless a process holds it
            with suppress(ConfigError):
                folder = held(path)
                try:
                    if not _is_dead(folder.facts):  # it has ended, or goes on elsewhere, while others were delivered
                        continue
                    note = close(folder, until)
                    lines.append(f"closed {path}, whose process had died{f' ({note})' if note else ''}")
                finally:
                    folder.release()
    return lines


def close(folder: RunFolder, until: float) -> str:
    """Close a run whose process ends, or has ended, without a word, as KILLED; why not all was delivered, or nothing.

    Args:
        folder: of the run, held by this process.
        until: when to give the delivery up, by the monotonic clock.
    """

    def count(_: int) -> None:
        if time.monotonic() > until:
            raise TimeoutError("the rest would take longer: python -m trainer sync")

    _close(folder)
    return _deliver(folder, count).note if time.monotonic() < until else "not delivered yet"


def sync(folders: Iterable[Path], watch: Callable[[Path, int, int], None]) -> list[Synced]:
    """Deliver all runs of some folders to their ends; what is wrong with one keeps no other from it.

    Args:
        folders: of runs, or folders of such folders.
        watch: called with a run's folder, entries that went, and entries there were.

    Raises:
        ConfigError: a folder holds no run.
    """
    found: dict[Path, Path] = {}
    for parent in folders:
        below = [file.parent for file in parent.rglob(RUN_FILE)]  # runs of comparisons and sweeps lie deeper
        if not below:
            raise ConfigError(
                "sync", f"{parent}, which holds no run", "folders of runs, such as output", "check the path"
            )
        found |= {path.resolve(): path for path in below}
    return [_sync(path, watch) for path in sorted(found.values())]


def _sync(path: Path, watch: Callable[[Path, int, int], None]) -> Synced:
    try:
        folder = held(path)
    except Busy:
        return Synced(path, "", 0, 0, STILL_TRAINING)
    except ConfigError as error:
        return Synced(path, "", 0, 1, f"cannot be read ({told_in_a_line(error)})")
    try:
        if folder.facts["state"] == "running" and not is_of_this_host(folder.facts):
            return Synced(path, "", 0, 0, f"trained on {folder.facts['host']}, or died there: sync there, or resume it")
        if folder.facts["state"] == "running":
            _close(folder)
        total = _waiting(folder)
        gone = 0

        def count(more: int) -> None:
            nonlocal gone
            gone += more
            watch(path, gone, total)

        watch(path, 0, total)
        return _deliver(folder, count)
    finally:
        folder.release()


def _is_dead(facts: Mapping[str, Any]) -> bool:
    """Whether a run that nobody holds was left as one that trains, on this host."""
    return facts["state"] == "running" and is_of_this_host(facts)


def _close(folder: RunFolder) -> None:
    """Say for a dead process how its run has ended, where it had begun; it can be gone on with."""
    if folder.spool.last:
        folder.spool.append(END, status="KILLED")
    with suppress(OSError):  # no room: it is closed once more the next time
        folder.write(state="interrupted")


def _deliver(folder: RunFolder, count: Callable[[int], None]) -> Synced:
    spool, before = folder.spool, folder.spool.last - _waiting(folder)
    lost, note = 0, ""
    try:
        door = MlflowDoor(_store_of(folder).uri)
        number = spool.position.number
        ensure_begun(folder, door)
        count(spool.position.number - number)
        courier = Courier(spool, door)
        try:
            courier.carry_all(count)
        finally:
            lost = courier.lost
        if folder.facts["state"] == "over":
            spool.forget(courier.number)
    except Exception as error:  # noqa: BLE001  # told, and the next sync tries again
        note = told_in_a_line(error)
    if lost:
        note = f"{lost} entries were damaged on disk {note}".strip()
    if (spool.folder / REJECTED).exists():
        note = f"MLflow refuses what is set aside in {spool.folder / REJECTED} {note}".strip()
    waiting = _waiting(folder)
    return Synced(folder.path, spool.run_id, spool.last - waiting - before, waiting, note)


def ensure_begun(folder: RunFolder, door: MlflowDoor) -> None:
    """Make or find the MLflow run, also where the entry that describes it is damaged, or names a run that has ended.

    `mlflow run` ends the run that it has made for a training, whether or not that has ever reached it.

    Raises:
        TrackingError: it was deleted, may not be made, or was made for another training.
    """
    spool = folder.spool
    if spool.run_id:
        return door.look_for(spool.run_id)
    first = next(spool.read(), None)
    if first is None:
        return None
    if first.kind != BEGIN:
        name = str(folder.facts.get("name", folder.path.name))
        first = Entry(0, int(folder.facts["began"] * 1000), BEGIN, beginning(run_name=name, key=folder.key))
        first.body.update(adopt=None, parent=None)
    try:
        run_id = door.begin(first)
    except TrackingError:
        if not first.body["adopt"] or spool.last <= first.number:  # a run that begins now: a forgotten variable
            raise
        run_id = door.begin(replace(first, body=first.body | {"adopt": None}))
    return spool.set_position(Position(first.number, 0, run_id))


def _waiting(folder: RunFolder) -> int:
    return folder.spool.last - folder.spool.position.delivered


def _store_of(folder: RunFolder) -> Store:
    """The store that a run belongs to; one that was never reached gives way to that of the environment.

    Raises:
        TrackingError: it is not there.
    """
    begun, asked = folder.facts["store"], os.environ.get("MLFLOW_TRACKING_URI")
    by_environment = asked and (store_name(asked) == begun or not folder.spool.run_id)
    store = reach_store(None if by_environment else begun)
    if store.away:
        raise TrackingError(store.name, store.away, "a store that is there", "start it, and sync again")
    if store.name != begun:
        folder.write(store=store.name)
    return store
