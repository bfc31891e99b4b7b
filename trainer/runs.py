"""The folder of one run: what the run was made from, who holds it, whether it is over; finds the one to go on with."""

import fcntl
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import durable
from trainer.errors import ConfigError
from trainer.spool import Spool

RUN_FILE, SPOOL = "run.json", "spool"
_LOCK = "lock"
_CLOSING_SECONDS = 60.0
_HELD: set[Path] = set()
"""Folders of runs that this process holds."""
_FORMAT = 1
# `stopped` by itself: the same command would end in the same way, and begins a new run; a run that is named can go on
# `paused`: the same command goes on, as after an interruption; whoever closes runs of dead processes leaves it alone
State = Literal["running", "interrupted", "paused", "stopped", "over"]

LAYOUT = (
    "launch.nproc",
    "launch.gpus",
    "training.gradient_accumulation_steps",
    "training.per_device_train_batch_size",
    "training.per_device_eval_batch_size",
    "training.gradient_checkpointing",
    "training.vit_gradient_checkpointing",
)
"""Settings that change in which order sums are made and nothing else, as long as the effective batch is the same."""
FREE = (
    *("training.output_dir", "training.run_name", "data.dataloader_num_workers", "tracking.close_seconds"),
    *("launch.hosts", "launch.host_rank", "launch.port", "launch.interface", "launch.restarts"),
    *("launch.join_seconds", "launch.silence_seconds"),
)
"""Settings that change no number at all."""


@dataclass(frozen=True)
class Identity:
    """What makes two commands the same training."""

    name: str
    """Of the run, and of its folder."""
    params: Mapping[str, str]
    """Dotted key -> value: the whole resolved configuration, and what else it rests on."""
    store: str
    """The tracking store."""

    def layout(self) -> dict[str, str]:
        """The settings that only change the order of sums."""
        return {key: value for key, value in self.params.items() if key in LAYOUT}

    def differences(self, other: Mapping[str, str], *, but_for: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
        """Key -> (other's value, own value) wherever a number could differ by more than the order of sums."""
        keys = sorted({*self.params, *other} - {*LAYOUT, *FREE, *but_for})
        pairs = {key: (other.get(key, "not there"), self.params.get(key, "not there")) for key in keys}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


class RunFolder:
    """The folder of a run that this process holds until it lets go or dies."""

    def __init__(self, path: Path, facts: dict[str, Any], lock: int) -> None:
        """Use `new_run` or `held`."""
        self.path, self.facts, self._lock = path, facts, lock
        self.spool = Spool(path / SPOOL)

    @property
    def key(self) -> str:
        """Of this training, everywhere."""
        return str(self.facts["key"])

    def write(self, *, state: State | None = None, **facts: Any) -> None:
        """Change some of what is known about the run."""
        self.facts |= facts | ({"state": state} if state else {})
        _write_facts(self.path, self.facts)

    def release(self) -> None:
        """Let go of it."""
        self.spool.close()
        _let_go(self.path, self._lock)


class Busy(ConfigError):
    """Another process holds a run: the one that trains it, or for a moment one that closes it."""


def new_run(parent: Path, identity: Identity) -> RunFolder:
    """A folder of its own for a run, made now: better to hear now that it cannot be written.

    Raises:
        ConfigError: it cannot be made.
    """
    safe = re.sub(r"[^\w.+=-]+", "-", identity.name)[:150].strip(".-") or "run"  # a regular expression can be long
    key = uuid.uuid4().hex
    path = parent / f"{safe}-{key[:8]}"
    facts = {
        "format": _FORMAT, "key": key, "name": identity.name, "state": "running", "began": time.time(),
        "store": identity.store, "params": dict(identity.params), "left_upto": 0, **_holder(),
    }  # fmt: skip
    with disk(path):
        path.mkdir(parents=True)
        lock = _take_lock(path)
        try:
            _write_facts(path, facts)
            return RunFolder(path, facts, lock)
        except BaseException:
            _let_go(path, lock)
            shutil.rmtree(path, ignore_errors=True)
            raise


def held(path: Path) -> RunFolder:
    """An existing run's folder, taken by this process.

    Raises:
        Busy: a living process has it; one that has died keeps nothing.
        ConfigError: it is no folder of a run, or cannot be read.
    """
    facts = read_facts(path)
    with disk(path):
        try:
            lock = _take_lock(path)
        except BlockingIOError:
            raise Busy(
                str(path),
                f"a run that process {facts['pid']} on {facts['host']} is training",
                "a run that nobody is training",
                "wait for it, choose another --seed or --output_dir, or start a new run with --resume never",
            ) from None
        try:
            return RunFolder(path, read_facts(path), lock)
        except BaseException:
            _let_go(path, lock)
            raise


def held_when_free(path: Path) -> RunFolder:
    """The same, for a run that is to be gone on with: a command that only closes it is waited for.

    Raises:
        Busy: the process that trains it is alive, or is another host's; or the other command takes too long.
        ConfigError: see `held`.
    """
    until = time.monotonic() + _CLOSING_SECONDS
    while True:
        try:
            return held(path)
        except Busy:
            facts = read_facts(path)
            if not is_of_this_host(facts) or _is_alive(facts["pid"]) or time.monotonic() > until:
                raise
            time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no number of a process
        return True
    return True


def read_facts(path: Path) -> dict[str, Any]:
    """What is known about a run.

    Raises:
        ConfigError: there is no run in this folder.
    """
    try:
        facts = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        if facts["format"] == _FORMAT and isinstance(facts["params"], dict):
            texts = {key: str(facts[key]) for key in ("key", "state", "store", "host")}
            numbers = {key: int(facts[key]) for key in ("pid", "left_upto")}
            return {**facts, **texts, **numbers, "began": float(facts["began"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ConfigError(
        "--resume",
        f"{path}, which holds no run",
        "`auto`, `never`, or the folder of a run in output_dir",
        "check the path",
    )


def runs_below(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, what is known) of every run in a folder, or of the run that it is itself; the newest first."""
    found = []
    for file in (*parent.glob(f"*/{RUN_FILE}"), *parent.glob(RUN_FILE)):
        with suppress(ConfigError):
            found.append((file.parent, read_facts(file.parent)))
    yield from sorted(found, key=lambda pair: -pair[1]["began"])


def unfinished(parent: Path, identity: Identity, *, but_for: Sequence[str]) -> Path | None:
    """The newest run of the same training, in the same store, that has not ended; some keys may differ."""
    for path, facts in runs_below(parent):
        same = facts["store"] == identity.store and not identity.differences(facts["params"], but_for=but_for)
        if facts["state"] in ("running", "interrupted", "paused") and same:
            return path
    return None


@contextmanager
def one_at_a_time(parent: Path) -> Iterator[None]:
    """Of processes that look for a run to go on with, or make one, each sees what the one before has done.

    Raises:
        ConfigError: the folder cannot be made.
    """
    with disk(parent):
        parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with disk(parent):  # there are file systems without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """While a folder is used: what the disk refuses becomes one message.

    Raises:
        ConfigError: the disk has refused something.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "training.output_dir",
            f"{path}: {error.strerror or error}",
            "a folder that can be written",
            "choose another place",
        ) from None


def _take_lock(path: Path) -> int:
    """A lock that ends with this process and that no child of it inherits, as it would a `flock`.

    Raises:
        BlockingIOError: another process has it, or this one, which the system would let have it twice.
    """
    if path.resolve() in _HELD:
        raise BlockingIOError
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    _HELD.add(path.resolve())
    return lock


def _let_go(path: Path, lock: int) -> None:
    _HELD.discard(path.resolve())
    os.close(lock)


def _write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    aside = path / f"{RUN_FILE}.writing"
    try:
        aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        durable.sync(aside)
        aside.replace(path / RUN_FILE)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _holder() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def is_of_this_host(facts: Mapping[str, Any]) -> bool:
    """Whether the process that holds or held a run ran here: of another host's, a lock may say nothing."""
    return str(facts["host"]) == socket.gethostname()


def taken_again(folder: RunFolder) -> None:
    """Note that this process goes on with a run."""
    folder.write(state="running", **_holder())
