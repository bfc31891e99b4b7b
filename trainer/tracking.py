"""The one door to MLflow: opens or adopts a run, takes params, tags, metric rows and artifacts, and closes it truly."""

import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from trainer import names
from trainer.errors import TrackingError

_PARAMS_A_CALL, _PARAM_LENGTH = 100, 6000  # MLflow's own limits


class Tracker(Protocol):
    """What a run tells the outside; the loop and the tests see nothing else of it."""

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row, all of it at one step and one time."""

    def params(self, values: Mapping[str, str]) -> None:
        """Log params; a key that is already there stays as it is."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def text(self, content: str, artifact: str) -> None:
        """Store a text as an artifact."""

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read; `context` is train, validation or out_of_domain."""


class MlflowTracker:
    """One MLflow run, from its start (or its adoption from `mlflow run`) to its end."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        """Use `open_run`, which finds or makes the run."""
        self._client, self.run_id = client, run_id

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row, all of it at one step and one time."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(key, value, now, step) for key, value in row.items()])

    def params(self, values: Mapping[str, str]) -> None:
        """Log params; a key that is already there stays as it is.

        `mlflow run` logs its `-P` values itself, as the user spelt them, and a param can be written once only.
        """
        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, value[:_PARAM_LENGTH]) for key, value in values.items() if key not in known]
        for start in range(0, len(new), _PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_CALL])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def description(self, markdown: str) -> None:
        """Set the run's description, which the MLflow UI renders."""
        self.tags({MLFLOW_RUN_NOTE: markdown})

    def text(self, content: str, artifact: str) -> None:
        """Store a text as an artifact."""
        self._client.log_text(self.run_id, content, artifact)

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read; `context` is train, validation or out_of_domain."""
        entity = Dataset(name, digest, "local", source)
        self._client.log_inputs(self.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def __enter__(self) -> Self:
        """The run is open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run as what it was: FINISHED, KILLED when interrupted, FAILED (with the traceback) otherwise."""
        if error is None:
            self._client.set_terminated(self.run_id, "FINISHED")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self._client.set_terminated(self.run_id, "KILLED")
        else:
            self.text("".join(traceback.format_exception(kind, error, trace)), names.ARTIFACT_TRACEBACK)
            self._client.set_terminated(self.run_id, "FAILED")


def open_run(*, run_name: str, parent_run_id: str | None = None) -> MlflowTracker:
    """Adopt the run that `mlflow run` has made for us, or make one; nested inside an active or named parent.

    Args:
        run_name: for the MLflow UI; an adopted run that `mlflow run` named at random gets it too.
        parent_run_id: the run to hang a new one under.

    Raises:
        TrackingError: the store is a file store, or cannot be used.
    """
    uri = tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        adopted = os.environ.get("MLFLOW_RUN_ID")
        active = mlflow.active_run()
        if adopted and active is None:
            client.update_run(adopted, name=run_name)
            return MlflowTracker(client, adopted)
        parent = parent_run_id or (active.info.run_id if active else None)
        experiment_id = active.info.experiment_id if active else _experiment_id(client)
        tags = {MLFLOW_RUN_NAME: run_name} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        return MlflowTracker(client, client.create_run(experiment_id, tags=tags).info.run_id)
    except MlflowException as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI ({without_password(uri)})",
            str(error).splitlines()[0],
            "a database (sqlite:///mlflow.db, postgresql://...) or a running MLflow server (http://...)",
            "start the server or correct MLFLOW_TRACKING_URI",
        ) from None


def tracking_uri() -> str:
    """The store in use.

    Raises:
        TrackingError: it is a file store, which MLflow has deprecated and on which replay is not safe.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or names.DEFAULT_TRACKING_URI
    if urlsplit(uri).scheme in ("", "file"):
        raise TrackingError(
            "MLFLOW_TRACKING_URI",
            f"{uri}, a file store",
            "a database or an MLflow server; MLflow has deprecated file stores",
            f"unset it (default: {names.DEFAULT_TRACKING_URI}), or move old runs with `mlflow migrate-filestore`",
        )
    return uri


def without_password(uri: str) -> str:
    """A URI that can be shown: user and password, where it has them, are left out."""
    parts = urlsplit(uri)
    return uri.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1) if "@" in parts.netloc else uri


def _experiment_id(client: MlflowClient) -> str:
    """The experiment that the environment names, else ours, made when it is not there."""
    if by_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return by_id
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or names.EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another process made it between the two calls
        made = client.get_experiment_by_name(name)
        if made is None:
            raise
        return made.experiment_id
