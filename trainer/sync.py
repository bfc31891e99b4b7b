"""Delivers what runs could not deliver while they trained, and closes runs whose process has died (`trainer sync`)."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.addresses import store_name
from trainer.delivery import Courier
from trainer.errors import ConfigError, TrackingError, reason_of
from trainer.runs import Busy, RunFolder, held, runs_below
from trainer.spool import REJECTED
from trainer.tracking import MlflowDoor, Store, reach_store


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of one run."""

    path: Path
    run_id: str
    delivered: int
    """Entries that went now."""
    waiting: int
    """Entries that could not."""
    note: str
    """Why not, or what else there is to know; empty where there is nothing."""


def close_dead(parent: Path, *, but: Path | None = None) -> list[str]:
    """Close every run below a folder whose process died without a word, as KILLED; a line for each.

    Args:
        parent: folder of runs.
        but: a run that is left alone.
    """
    lines = []
    for path, facts in runs_below(parent):
        if facts["state"] == "running" and path != but:
            with suppress(ConfigError):
                folder = held(path)
                try:
                    _close(folder)
                    done = _deliver(folder, lambda _: None)
                    lines.append(f"closed {path}, whose process had died{f' ({done.note})' if done.note else ''}")
                finally:
                    folder.release()
    return lines


def sync(folders: Iterable[Path], watch: Callable[[Path, int, int], None]) -> list[Synced]:
    """Deliver all runs of some folders to their ends.

    Args:
        folders: of runs, or folders of such folders.
        watch: called with a run's folder, entries that went, and entries there were.

    Raises:
        ConfigError: a folder holds no run.
    """
    found: dict[Path, dict[str, Any]] = {}
    for parent in folders:
        below = dict(runs_below(parent))
        if not below:
            raise ConfigError("sync", f"{parent}, which holds no run", "folders of runs, such as output", "check it")
        found |= below
    return [_sync(path, watch) for path in sorted(found)]


def _sync(path: Path, watch: Callable[[Path, int, int], None]) -> Synced:
    try:
        folder = held(path)
    except Busy:
        return Synced(path, "", 0, 0, "still training: it delivers by itself")
    try:
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


def _close(folder: RunFolder) -> None:
    """Say for a dead process how its run has ended; it can be gone on with."""
    folder.spool.append("end", status="KILLED")
    folder.write(state="interrupted")


def _deliver(folder: RunFolder, count: Callable[[int], None]) -> Synced:
    spool, before = folder.spool, folder.spool.last - _waiting(folder)
    courier, note = Courier(spool, MlflowDoor("")), ""
    try:
        courier = Courier(spool, MlflowDoor(_store_of(folder).uri))
        courier.carry_all(count)
        if folder.facts["state"] == "over":
            spool.forget(courier.number)
    except Exception as error:  # noqa: BLE001  # told, and the next sync tries again
        note = f"{error.where}: {error.got}" if isinstance(error, TrackingError) else reason_of(error)
    if courier.lost:
        note = f"{courier.lost} entries were damaged on disk {note}".strip()
    if (spool.folder / REJECTED).exists():
        note = f"MLflow refuses what is set aside in {spool.folder / REJECTED} {note}".strip()
    return Synced(folder.path, spool.run_id, courier.number - before, spool.last - courier.number, note)


def _waiting(folder: RunFolder) -> int:
    position = folder.spool.position
    return folder.spool.last - min(position.number, position.files)


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
