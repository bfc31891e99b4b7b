"""The comparison itself: a run that trains nothing, holds what was asked, and has the runs of all arms below it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import names
from trainer.addresses import Store
from trainer.begin import Begun, open_tracker
from trainer.errors import TrackingError
from trainer.redact import of_environment
from trainer.runs import Identity, RunFolder, disk, held_when_free, new_run, one_at_a_time, runs_below, taken_again
from trainer.tracker import SpoolTracker

NAME = "comparison"
_CLOSE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Parent:
    """A comparison that this process works at."""

    folder: RunFolder
    """Holds what has been found out so far, and the folders of all runs."""
    tracker: SpoolTracker
    """Of its MLflow run."""

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def run_id(self) -> str:
        """Its MLflow run."""
        return self.tracker.run_id

    def known(self, what: str) -> Any:
        """Something that was found out and written down, by this process or one before; None: nothing was."""
        return self.folder.facts.get(what)

    def note(self, **found: Any) -> None:
        """Write something down that a later process must not find out again.

        Raises:
            ConfigError: the disk does not take it.
        """
        with disk(self.path):
            self.folder.write(**found)


def finished(output_dir: Path, asked: Mapping[str, str], store: Store) -> tuple[Path, str] | None:
    """Folder and MLflow run of the same comparison, where that is over."""
    found = _found(output_dir, _identity(asked, store))
    if found is None or found[1]["state"] != "over":
        return None
    return found[0], str(found[1]["mlflow_run"])


def _identity(asked: Mapping[str, str], store: Store) -> Identity:
    return Identity(NAME, of_environment().tree({"command": "compare", **asked}), store.name)


def _found(output_dir: Path, identity: Identity) -> tuple[Path, dict[str, Any]] | None:
    """The newest comparison of the same things in the same store."""
    for path, facts in runs_below(output_dir):
        if facts["params"] == dict(identity.params) and facts["store"] == identity.store:
            return path, facts
    return None


@contextmanager
def opened(output_dir: Path, asked: Mapping[str, str], store: Store, *, title: str) -> Iterator[Parent]:
    """Go on with the same comparison where it was begun before, else begin it; it is closed as what it was.

    Under `mlflow run` the run that MLflow has made is the parent, or is closed in favour of the one from before.

    Args:
        output_dir: holds the folders of all comparisons.
        asked: what makes two comparisons the same, as text.
        store: the tracking store; a comparison begins there, and then works without it for as long as it is away.
        title: of the MLflow run.

    Raises:
        ConfigError: another process is at it, or the folder cannot be used.
        TrackingError: it begins, and the store is away.
    """
    identity = _identity(asked, store)
    with one_at_a_time(output_dir):
        found = _found(output_dir, identity)
        folder = held_when_free(found[0]) if found else new_run(output_dir, identity)
    begun = Begun(folder.path, None, folder=folder, resumed=found is not None)
    with begun:
        if found:
            with disk(folder.path):
                taken_again(folder)
        tracker = open_tracker(begun, store, run_name=title[:200], close_seconds=_CLOSE_SECONDS)
        with tracker:
            if not tracker.run_id:
                raise TrackingError(
                    f"MLFLOW_TRACKING_URI ({store.name})", store.away, "a store that answers when a comparison begins",
                    "start it, and give the same command again; once begun, runs train through an outage",
                )  # fmt: skip
            of = Parent(folder, tracker)
            of.note(mlflow_run=tracker.run_id)
            if not found:
                tracker.tags({names.TAG_ROLE: names.PARENT})
                tracker.params({key: value for key, value in asked.items() if value})
            yield of


def join(run_id: str, store: Store) -> None:
    """Close the run that `mlflow run` has made for a comparison that another run holds already."""
    from trainer.tracking import MlflowDoor, made_for_us

    if (made := made_for_us()) and made != run_id:
        MlflowDoor(store.uri).hand_over(made, run_id)
