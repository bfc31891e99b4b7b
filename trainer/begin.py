"""Begins a run, or goes on with one that was interrupted: its folder, its resume point, its tracker."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trainer import launch, names, provenance
from trainer.addresses import Store
from trainer.checkpoint import BadCheckpoint
from trainer.errors import ConfigError, Paused, TrainingStopped, UserError
from trainer.position import Position
from trainer.redact import of_environment
from trainer.resume import FOLDER, Point, forget_newer, forget_points, newest_good, read_point, restore_best
from trainer.runs import (
    Identity,
    RunFolder,
    State,
    disk,
    held_when_free,
    new_run,
    one_at_a_time,
    taken_again,
    unfinished,
)
from trainer.spool import AGAIN, BEGIN, END, Spool
from trainer.tracker import Diverged, SpoolTracker, Tracker

if TYPE_CHECKING:
    from trainer.tracking import MlflowDoor

AUTO, NEVER = "auto", "never"
_CLOSE_SECONDS = 10.0
"""How long the end of a run that has not come to training waits for its delivery."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for about an interrupted run."""

    resume: str
    """`auto`, `never`, or the folder of a run, or of one of its resume points."""
    allow_drift: bool
    """Whether it may be gone on with under another configuration."""
    total_steps: int
    """Optimizer steps of the training that was asked for."""
    patience: int | None = None
    """Evaluations without a better loss after which it ends early; None: it does not."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The run that this process trains, or, on all ranks but the first, what it needs to know of it."""

    path: Path
    """The run's folder."""
    point: Point | None
    """Where training goes on; None: at its beginning."""
    resumed: bool = False
    """Whether the run was there before."""
    left_upto: int = 0
    """Number of the last entry of a course that was left, by another layout or configuration; 0: it never was."""
    drift: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Key -> (value before, value now) of what has changed and was allowed to."""
    lines: tuple[str, ...] = ()
    """What a user should know about it."""
    folder: RunFolder | None = None
    """Held by the first rank alone."""

    @property
    def key(self) -> str:
        """Of this training; empty on all ranks but the first."""
        return self.folder.key if self.folder else ""

    def __enter__(self) -> Self:
        """The run is held."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of it; as over, or as one that can be gone on with. A folder in which nothing has begun is removed."""
        if self.folder is None:
            return
        nothing_begun = self.folder.spool.last == 0
        try:
            if nothing_begun or _last_word(self.folder.spool) == END:
                with suppress(OSError):
                    self.folder.write(state=_state_after(error))
                    if error is None:
                        forget_points(self.path)
            elif not isinstance(error, UserError):  # it ends before a tracker could tell; a mistake begins nothing
                from trainer.sync import close  # MLflow, which only the first rank needs

                if note := close(self.folder, time.monotonic() + _CLOSE_SECONDS):
                    sys.stderr.write(f"the run is not closed in MLflow ({note}): python -m trainer sync {self.path}\n")
        finally:
            self.folder.release()
        if nothing_begun and not self.resumed:
            shutil.rmtree(self.path, ignore_errors=True)


def _state_after(error: BaseException | None) -> State:
    """Of a run that was ended by an error, or by none."""
    match error:
        case None:
            return "over"
        case Paused():
            return "paused"
        case TrainingStopped() if not isinstance(error, Diverged):
            return "stopped"
        case _:
            return "interrupted"


def _last_word(spool: Spool) -> str:
    """What was told last of a run's life: that it began, went on, or ended."""
    return next((kind for kind in reversed([e.kind for e in spool.read()]) if kind in (BEGIN, AGAIN, END)), "")


def begin_on_ranks(accelerator: Any, identity: Identity, parent: Path, asked: Asked) -> Begun:
    """`begin` on the first rank; the others get what they need to know."""
    begun: Begun | None = launch.on_first_rank(
        accelerator, lambda: begin(parent, identity, asked), elsewhere=lambda: None
    )
    known: Begun = launch.on_first_rank(accelerator, lambda: replace(begun, folder=None) if begun else None)
    return begun or known


def begin(parent: Path, identity: Identity, asked: Asked) -> Begun:
    """Find the run to go on with, or make a new one.

    Args:
        parent: folder of all runs.
        identity: of the training that was asked for.
        asked: how.

    Raises:
        ConfigError: the run is held by another process, is over, differs, or cannot be read.
    """
    from trainer.sync import close_dead  # MLflow, which only the first rank needs

    hide = of_environment()
    identity = replace(identity, name=hide.text(identity.name), params=hide.tree(dict(identity.params)))
    with one_at_a_time(parent):
        wanted = Path(asked.resume) if asked.resume not in (AUTO, NEVER) else None
        if asked.resume == AUTO:
            # changed data is no other training, but a mistake
            wanted = unfinished(parent, identity, but_for=names.DIGESTS)
        if wanted is None:
            folder = new_run(parent, identity)
            folder.write(made_with=provenance.made_with(), total_steps=asked.total_steps)
            begun = Begun(folder.path, None, folder=folder)
        else:
            with disk(wanted):
                begun = _again(wanted, identity, asked)
    closed = close_dead(parent, but=begun.path)
    return replace(begun, lines=(*closed, *begun.lines))


def _again(wanted: Path, identity: Identity, asked: Asked) -> Begun:
    """Take an interrupted run as it stands, with its newest sound resume point or the one that was named."""
    named = wanted if wanted.parent.name == FOLDER else None
    folder = held_when_free(named.parent.parent if named else wanted)
    try:
        drift = _allowed(folder, identity, asked.allow_drift)
        point, lines = _named_point(named, folder.key) if named else newest_good(folder.path, folder.key)
        if point is None and lines:
            bad = "".join(f"\n             {line}" for line in lines)
            raise ConfigError(
                "--resume", f"{folder.path}, of whose resume points none is sound:{bad}",
                "a sound resume point", "mend the disk, or start a new run with --resume never",
            )  # fmt: skip
        point = point and replace(point, position=_position(point, asked))
        before = {key: folder.facts["params"].get(key) for key in identity.layout()}
        layout = {key: (old, new) for key, new in identity.layout().items() if (old := before[key]) != new}
        changed = bool(drift or layout) or _sums_vary()
        lines += _inexact(folder, layout)
        at = f"after optimizer step {point.position.seen.step}" if point else "at its beginning: it has no resume point"
        lines.append(f"going on with {folder.path}, {at}")
        if point is not None:
            restore_best(folder.path, point)
        else:
            shutil.rmtree(folder.path / "best", ignore_errors=True)
        taken_again(folder)
        known = dict(folder.facts.get("drift", {}))
        drift = {**known, **{key: (known.get(key, pair)[0], pair[1]) for key, pair in drift.items()}}
        if changed or asked.allow_drift:
            params = {**folder.facts["params"], **identity.params}
            folder.write(params=params, left_upto=folder.spool.last, drift=drift)
        return Begun(folder.path, point, True, folder.facts["left_upto"], drift, tuple(lines), folder)
    except BaseException:
        folder.release()
        raise


def _inexact(folder: RunFolder, layout: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """A line for everything, beside the configuration, of which the last bit of a number may depend."""
    if layout:
        changed = ", ".join(f"{key} from {old} to {new}" for key, (old, new) in layout.items())
        yield f"{changed}: sums are made in another order; numbers agree to rounding, not to the bit"
    elif _sums_vary():
        yield "sums on a GPU are made in no fixed order; numbers agree to rounding, not to the bit"
    before = folder.facts.get("made_with", {})
    for what, value in provenance.made_with().items():
        if before.get(what, value) != value:
            yield f"the run was begun with {what} {before[what]}, this is {value}"


def _sums_vary() -> bool:
    """Whether the same step gives the same numbers to rounding only: flash-attention's backward pass, for one."""
    import torch

    return torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()


def _position(point: Point, asked: Asked) -> Position:
    """Where training goes on from a point, for as many steps and as much patience as are asked for now.

    Raises:
        ConfigError: training would have ended before.
    """
    here = point.position
    if here.seen.step > asked.total_steps:
        raise ConfigError(
            "--resume", f"{point.folder}, after optimizer step {here.seen.step}, for {asked.total_steps} steps",
            "a resume point before the end", "name an older one, or start a new run with --resume never",
        )  # fmt: skip
    ended = here.seen.step == asked.total_steps or replace(here.progress, patience=asked.patience).stop
    # The last pass does more than others: where a pass has become the last, it is gone through again.
    return replace(here, ended=here.ended and ended, passed=here.passed and (here.ended or not ended))


def _allowed(folder: RunFolder, identity: Identity, allow_drift: bool) -> dict[str, tuple[str, str]]:
    """What has changed since the run began.

    Raises:
        ConfigError: more than is allowed.
    """
    if folder.facts["state"] == "over":
        raise ConfigError(
            "--resume",
            f"{folder.path}, a run that is over",
            "an interrupted run",
            "start a new run with --resume never",
        )
    if folder.facts["store"] != identity.store:
        raise ConfigError(
            "--resume", f"{folder.path}, whose MLflow run is in {folder.facts['store']}, not in {identity.store}",
            "the same tracking store",
            f"set MLFLOW_TRACKING_URI={folder.facts['store']}, or start a new run with --resume never",
        )  # fmt: skip
    drift = identity.differences(folder.facts["params"])
    told = "".join(f"\n             {key}: {old} before, {new} now" for key, (old, new) in drift.items())
    if names.EFFECTIVE_BATCH_PACKS in drift:
        raise ConfigError(
            "--resume", f"{folder.path}, with another effective batch:{told}",
            "the same number of packs in an optimizer step, by which the place in the data is counted",
            "change launch.nproc, accumulation and batch size together, or start a new run with --resume never",
        )  # fmt: skip
    if drift and not allow_drift:
        raise ConfigError(
            "--resume", f"{folder.path}, begun with another configuration:{told}", "the same configuration",
            "use that one, start a new run with --resume never, or go on under the new one with --allow_drift",
        )  # fmt: skip
    return drift


def _named_point(folder: Path, key: str) -> tuple[Point, list[str]]:
    try:
        return read_point(folder, key), []
    except BadCheckpoint as error:
        raise unusable(folder, error) from None


def unusable(folder: Path, error: BadCheckpoint) -> ConfigError:
    """The message where the resume point that was asked for cannot be used."""
    return ConfigError(
        "--resume", f"{folder}: {error}", "a sound resume point of this training",
        "name an older one, or start a new run with --resume never",
    )  # fmt: skip


def restored(begun: Begun, restore: Callable[[Point], None]) -> None:
    """Take from the resume point what `restore` takes, where there is one.

    Raises:
        ConfigError: it is not what it should be.
    """
    if begun.point is None:
        return
    try:
        restore(begun.point)
    except BadCheckpoint as error:
        raise unusable(begun.point.folder, error) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unusable(begun.point.folder, BadCheckpoint(f"{type(error).__name__} {error}")) from None


def open_tracker(begun: Begun, store: Store, *, run_name: str, close_seconds: float) -> SpoolTracker:
    """Open the spool of a run; its MLflow run is made now where the store is there, else when it is.

    Args:
        begun: the run, held by this process.
        store: where its MLflow run is.
        run_name: for the MLflow UI.
        close_seconds: how long the end of the run waits for the delivery.

    Raises:
        TrackingError: the store is there and refuses.
    """
    from trainer.tracking import MlflowDoor, beginning, told

    assert begun.folder is not None  # noqa: S101  # only the first rank opens one
    spool, redactor, door = begun.folder.spool, of_environment(), MlflowDoor(store.uri)
    if os.environ.get(names.PARENT_VARIABLE):
        spool.keep_all()  # whoever compares runs reads their losses there
    if spool.last == 0:
        spool.append(BEGIN, **redactor.tree(beginning(run_name=run_name, key=begun.folder.key)))
    else:
        spool.append(AGAIN)
    if not store.away:
        with told(store.uri):
            door.client  # noqa: B018  # a store that is not there yet is made now
        _reach(begun.folder, door)
    forget_newer(begun.path, begun.point)  # not before: now it is known that the point can be used
    tracker = SpoolTracker(
        spool, door, redactor,
        resumed_after=begun.point.spool if begun.point else 0, left_upto=begun.left_upto, close_seconds=close_seconds,
    )  # fmt: skip
    if begun.resumed:
        step = begun.point.position.seen.step if begun.point else 0
        drift = {names.TAG_DRIFT: json.dumps({k: list(v) for k, v in begun.drift.items()})} if begun.drift else {}
        tracker.tags({names.TAG_RESUMED_AT: str(step), **drift})
    return tracker


def _reach(folder: RunFolder, door: "MlflowDoor") -> None:
    """Make or find the MLflow run of a spool, if that can be done at once; close the one that was made for nothing."""
    from trainer.sync import ensure_begun
    from trainer.tracking import made_for_us

    try:
        ensure_begun(folder, door)
        made = made_for_us()
        if made is not None and made != folder.spool.run_id:
            door.hand_over(made, folder.spool.run_id)
    except UserError:
        raise
    except Exception:  # noqa: BLE001  # it has gone away in between: the delivery tries again, and says so
        return


@contextmanager
def open_aside(name: str) -> Iterator[Tracker]:
    """A tracker for work that is not a training: its spool lies in a folder that goes when all of it is delivered."""
    from trainer.tracking import reach_store

    store = reach_store()
    folder = new_run(Path(tempfile.mkdtemp(prefix=f"{name}-")), Identity(name, {}, store.name))
    begun = Begun(folder.path, None, folder=folder)
    with begun, open_tracker(begun, store, run_name=name, close_seconds=20) as tracker:
        yield tracker
    if tracker.waiting == 0:
        shutil.rmtree(folder.path.parent, ignore_errors=True)
