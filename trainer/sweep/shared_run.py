"""The MLflow run that all trials of a sweep are nested below: made once, whichever worker comes first."""

import time
from collections.abc import Mapping
from contextlib import suppress

from trainer import names
from trainer.addresses import Store
from trainer.errors import TrackingError
from trainer.redact import of_environment
from trainer.spool import BEGIN, Entry
from trainer.tracking import MlflowDoor, beginning, made_for_us, told


class Parent:
    """That run, seen from one worker."""

    def __init__(self, store: Store) -> None:
        """Nothing is asked of the store yet.

        Args:
            store: that all workers log to.

        Raises:
            TrackingError: it does not answer, so that nobody could say whether the run is there.
        """
        if store.away:
            do = "start it, and give the same command again; once begun, trials train through an outage"
            raise TrackingError(
                f"MLFLOW_TRACKING_URI ({store.name})", store.away, "a store that answers when a worker begins", do
            )
        self._store, self._door = store, MlflowDoor(store.uri)
        self.run_id = ""

    def found_or_made(self, known: str | None, *, study: str, key: str, over: bool) -> str:
        """The run; a worker that `mlflow run` has started makes its own run this one, or closes it.

        Args:
            known: what an earlier worker has made.
            study: its name.
            key: of the study, everywhere.
            over: whether nothing is left to be done.

        Raises:
            TrackingError: it is not there, or may not be made.
        """
        with told(self._store.uri):
            self.run_id = self._found(known) if known else self._made(study, key)
            if made_for_us() not in (None, self.run_id):
                self._door.hand_over(str(made_for_us()), self.run_id)
            if not over:
                self._door.client.update_run(self.run_id, status="RUNNING")
        return self.run_id

    def _made(self, study: str, key: str) -> str:
        body = beginning(run_name=f"sweep {study}", key=key)
        run_id = self._door.begin(Entry(0, int(time.time() * 1000), BEGIN, of_environment().tree(body)))
        for tag, value in ((names.TAG_SWEEP, study), (names.TAG_ROLE, names.PARENT)):
            self._door.client.set_tag(run_id, tag, value)
        return run_id

    def _found(self, known: str) -> str:
        try:
            self._door.look_for(known)
        except TrackingError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever MLflow raises where it has no such run
            raise TrackingError(
                "MLFLOW_TRACKING_URI", f"{self._store.name}, which has no run {known} ({error})",
                "the store that the study's other workers log to",
                "give all workers the same one, or begin another study with --study NAME",
            ) from None  # fmt: skip
        return known

    def tell(self, description: str, artifacts: Mapping[str, str], *, status: str | None) -> None:
        """Write down how the sweep stands; where the store has gone away, the next worker does.

        Args:
            description: Markdown.
            artifacts: name -> text.
            status: to close the run with; None: others are at it.
        """
        with suppress(Exception):
            redactor = of_environment()
            self._door.client.set_tag(self.run_id, names.TAG_NOTE, redactor.text(description))
            for name, text in artifacts.items():
                self._door.client.log_text(self.run_id, redactor.text(text), name)
            status = status or ("KILLED" if made_for_us() == self.run_id else None)  # MLflow closes its own in any case
            if status:
                self.close(status)

    def close(self, status: str) -> None:
        """End the run; where the store has gone away, the next worker does.

        Args:
            status: of MLflow.
        """
        with suppress(Exception):
            if self._door.client.get_run(self.run_id).info.status != status:
                self._door.client.set_terminated(self.run_id, status)
