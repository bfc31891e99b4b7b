"""The one door to MLflow: finds the store, makes or adopts a run, and takes to it what a spool holds."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES
from sqlalchemy import inspect
from sqlalchemy.exc import SQLAlchemyError

from trainer import names
from trainer.addresses import Store, sqlite_file, tracking_uri, without_credentials, without_password
from trainer.errors import TrackingError, UserError, reason_of
from trainer.spool import BEGIN, Entry, Spool

_PARAM_LENGTH = 6000  # MLflow's own limit; whether it cuts or refuses what is longer is a setting of its user
_SHORT_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}  # seconds
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}  # seconds
_AWAY = re.compile(
    r"(?i)connection (refused|reset|aborted|timed out)|timed? ?out|max retries exceeded|could not translate host name|"
    r"(starting up|shutting down|recovery mode)|closed the connection|error code (429|5\d\d)|"
    r"no route to host|network is unreachable|remote end closed"
)
"""What stores say that are not there now and may be there later."""
_SCHEMA = re.compile(r"database schema \(found version (\w+)")


class MlflowDoor:
    """Takes the entries of one run's spool to MLflow. Taking an entry twice changes nothing there.

    Rows keep the time at which they were written down, and MLflow's key of a row is (run, metric, time, step, value).
    """

    def __init__(self, uri: str) -> None:
        """Go to a store; nothing is asked of it yet."""
        self._uri = uri
        for name, value in _PATIENCE.items():  # we try again ourselves, from a thread that nobody waits for
            os.environ.setdefault(name, value)

    @cached_property
    def client(self) -> MlflowClient:
        """Of the store; one that cannot be reached may raise here already."""
        mlflow.set_tracking_uri(self._uri)
        with alone_at_birth(self._uri):
            return MlflowClient(self._uri)

    def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
        """Take entries in their order; those of rows that follow each other in one request.

        Returns:
            The run that they went to.

        Raises:
            Exception: of whatever kind; some of them may have been taken.
        """
        for kind, group in groupby(entries, key=lambda entry: entry.kind):
            for together in [list(group)] if kind == "metrics" else [[entry] for entry in group]:
                run_id = self._deliver(together, spool, run_id)
        return run_id

    def begin(self, entry: Entry) -> str:
        """Make or find the run that the first entry describes; its id.

        Raises:
            TrackingError: the run was made for us and has ended, or the experiment was deleted.
        """
        with refused(self._uri):
            return self._begin(entry)

    def _begin(self, entry: Entry) -> str:
        body, key = entry.body, entry.body["key"]
        if body["adopt"]:
            return _adopt(self.client, body["adopt"], body["run_name"], key)
        parent = self.client.get_run(body["parent"]) if body["parent"] else None
        experiment_id = parent.info.experiment_id if parent else _experiment_id(self.client, body)
        if found := self.client.search_runs([experiment_id], f"tags.{names.TAG_KEY} = '{key}'", max_results=1):
            return str(found[0].info.run_id)
        made = self.client.create_run(experiment_id, start_time=entry.time_ms, tags=body["tags"])
        return str(made.info.run_id)

    def look_for(self, run_id: str) -> None:
        """Look whether a run that was made before is still there.

        Raises:
            TrackingError: somebody has deleted it.
        """
        if self.client.get_run(run_id).info.lifecycle_stage != LifecycleStage.ACTIVE:
            do = f"mlflow runs restore --run-id {run_id}, or start a new run with --resume never"
            raise TrackingError(f"MLflow run {run_id}", "a run that was deleted", "one that is there", do)

    def hand_over(self, run_id: str, continued_in: str) -> None:
        """Close a run that `mlflow run` has made for a training that another run already holds."""
        self.client.set_tag(run_id, names.TAG_CONTINUED_IN, continued_in)
        self.client.set_terminated(run_id, "FINISHED")

    def _deliver(self, together: list[Entry], spool: Spool, run_id: str) -> str:
        if together[0].kind == BEGIN:
            return self.begin(together[0])
        try:
            self._take(together, spool, run_id)
        except MlflowException as error:
            # A value that MLflow will never take must not hold back all that comes after it. A run that somebody has
            # deleted answers in the same way, and can be restored.
            never = error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE)
            if not never or self.client.get_run(run_id).info.lifecycle_stage != LifecycleStage.ACTIVE:
                raise
            parts = _parts(together)
            for part in parts:
                self._deliver([part], spool, run_id)
            if not parts:
                spool.reject(together[0], str(error))
        return run_id

    def _take(self, together: list[Entry], spool: Spool, run_id: str) -> None:
        client, entry = self.client, together[0]
        match entry.kind, entry.body:
            case "metrics", _:
                rows = [(e.time_ms, e.body["step"], e.body["values"].items()) for e in together]
                metrics = [Metric(key, float(value), at, step) for at, step, row in rows for key, value in row]
                client.log_batch(run_id, metrics=metrics)
            case "params", {"values": values}:
                known = client.get_run(run_id).data.params  # `mlflow run` has logged its `-P` values as they were spelt
                new = [Param(key, value[:_PARAM_LENGTH]) for key, value in values.items() if key not in known]
                client.log_batch(run_id, params=new)
            case "tags", {"values": values}:
                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])
            case "artifact", {"kept": kept, "name": name, "folder": folder}:
                if (path := spool.file(kept)).exists():  # else it was delivered, and the position was not
                    with tempfile.TemporaryDirectory() as aside:
                        client.log_artifact(run_id, str(shutil.copy(path, Path(aside) / name)), folder)
            case "dataset", {"name": name, "digest": digest, "source": source, "context": context}:
                entity = Dataset(name, digest, "local", json.dumps({"uri": source}))
                client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
            case "again", _:
                client.update_run(run_id, status="RUNNING")
            case "end", {"status": status}:
                client.set_terminated(run_id, status, end_time=entry.time_ms)


def _parts(together: list[Entry]) -> list[Entry]:
    """What was refused together in smaller pieces: entries, or values of one; none where it is as small as can be."""
    first, values = together[0], together[0].body.get("values", {})
    parts = [replace(first, body=first.body | {"values": {key: value}}) for key, value in values.items()]
    return together if len(together) > 1 else parts if len(parts) > 1 else []


def beginning(*, run_name: str, key: str) -> dict[str, Any]:
    """What the first entry of a spool says: which run to adopt, or what a new one is to be.

    A new one is hung under the run that the environment names, or under one that is active in this process.

    Args:
        run_name: for the MLflow UI; an adopted run takes it too, unless the user named that one.
        key: of this training, on every machine.
    """
    active = mlflow.active_run()
    parent = os.environ.get(names.PARENT_VARIABLE) or (active.info.run_id if active else None)
    tags = {MLFLOW_RUN_NAME: run_name, names.TAG_KEY: key} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
    tags |= json.loads(os.environ.get(names.TAGS_VARIABLE) or "{}")
    return {
        "run_name": run_name,
        "key": key,
        "adopt": None if parent else made_for_us(),
        "parent": parent,
        "experiment_id": os.environ.get("MLFLOW_EXPERIMENT_ID"),
        "experiment": os.environ.get("MLFLOW_EXPERIMENT_NAME") or names.EXPERIMENT,
        "tags": resolve_tags(tags),
    }


def made_for_us() -> str | None:
    """The run that `mlflow run` has made before it started us."""
    return os.environ.get("MLFLOW_RUN_ID") or None


def reach_store(uri: str | None = None) -> Store:
    """The store in use, after one look whether it is there.

    Left alone, MLflow tries to reach a server for four minutes and a database for two.

    Args:
        uri: another one than that of the environment.

    Raises:
        TrackingError: it is a file store, or what is there cannot be used: waiting would not help.
    """
    uri = without_credentials(uri or tracking_uri())
    scheme = urlsplit(uri).scheme.partition("+")[0]
    try:
        with told(uri), _short_patience():
            if scheme in ("http", "https"):
                MlflowClient(uri).search_experiments(max_results=1)
            elif scheme in ("postgresql", "mysql", "mssql") or (
                uri.startswith("sqlite") and sqlite_file(uri).is_file()  # one that is not there, MLflow makes
            ):
                inspect(create_sqlalchemy_engine(uri)).has_table("experiments")  # type: ignore[no-untyped-call]  # MLflow's
    except TrackingError as error:
        if scheme == "sqlite" or not _AWAY.search(error.got):
            raise
        return Store(uri, away=reason_of(ValueError(error.got)))
    return Store(uri, away="")


def abandon(error: BaseException, status: str) -> None:
    """Close the run that `mlflow run` has made for us when a mistake or an interrupt came before training.

    The reason becomes the run's description. Does nothing where there is no such run or it has ended already, and
    raises nothing: `error` is what matters.
    """
    run_id = made_for_us()
    if run_id is None:
        return
    with suppress(Exception), _short_patience():
        client = MlflowClient(without_credentials(tracking_uri()))
        if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(run_id).info.status)):
            if names.TAG_STRATEGY not in client.get_run(run_id).data.tags:  # else a rank died that had described it
                note = f"Ended before training: {type(error).__name__}\n```\n{error}\n```"
                client.set_tag(run_id, names.TAG_NOTE, note)
            client.set_terminated(run_id, status)


@contextmanager
def alone_at_birth(uri: str) -> Iterator[None]:
    """One process at a time: of two that make the tables of a new SQLite file together, MLflow breaks one."""
    if not uri.startswith("sqlite"):
        yield
        return
    name = hashlib.sha256(bytes(sqlite_file(uri).resolve())).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"mlflow-{name}.lock"):
        yield


@contextmanager
def _short_patience() -> Iterator[None]:
    """MLflow's requests give up after about twenty seconds, unless the user has said how long to try."""
    changed = {name: value for name, value in _SHORT_PATIENCE.items() if name not in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            del os.environ[name]


@contextmanager
def told(uri: str) -> Iterator[None]:
    """While a store is used: whatever keeps it from that becomes one message without passwords.

    Raises:
        TrackingError: something did.
    """
    try:
        yield
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0].replace(uri, without_password(uri))
        if schema := _SCHEMA.search(text):
            raise _other_schema(uri, schema[1]) from None
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"
        raise TrackingError(
            f"MLFLOW_TRACKING_URI ({without_password(uri)})",
            text,
            "a database (sqlite:///mlflow.db, postgresql+psycopg2://...) or a running MLflow server (http://...)",
            f"log in: {login}"
            if "error code 401" in text
            else "start the server with --allowed-hosts and this name (docs/server.md)"
            if "Invalid Host" in text
            else "start the server or correct MLFLOW_TRACKING_URI",
        ) from None


@contextmanager
def refused(uri: str) -> Iterator[None]:
    """While a store is written to: a server that knows the user and does not let them is a mistake, and no outage.

    Raises:
        TrackingError: it does not let them.
    """
    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(PERMISSION_DENIED) and "error code 403" not in str(error):
            raise
        raise TrackingError(
            f"MLFLOW_TRACKING_URI ({without_password(uri)})",
            "this user may not log to this experiment (403)",
            "an experiment of one's own, or one that its owner has granted EDIT",
            "set MLFLOW_EXPERIMENT_NAME (mlflow run: --experiment-name) to another, or ask its owner",
        ) from None


def _other_schema(uri: str, version: str) -> TrackingError:
    """A database of another MLflow; MLflow itself advises to upgrade it, also where it is the newer one."""
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    older = any(migrations.glob(f"{version}_*.py"))
    return TrackingError(
        f"MLFLOW_TRACKING_URI ({without_password(uri)})",
        f"a store made by {'an older' if older else 'a newer'} MLflow (database schema {version})",
        f"the schema of MLflow {mlflow.__version__}",
        f"back it up, then: mlflow db upgrade {without_password(uri)}"
        if older
        else "use that newer MLflow here, or another store",
    )


def _adopt(client: MlflowClient, run_id: str, run_name: str, key: str) -> str:
    """Take over a run that was made for us.

    Raises:
        TrackingError: it has ended already, so that its params and curves are those of another training.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        raise TrackingError(
            "MLFLOW_RUN_ID", f"{run_id}, which this store does not have", "a run of this store", "unset MLFLOW_RUN_ID"
        ) from None
    if run.data.tags.get(names.TAG_KEY) == key:
        return run_id  # adopted before
    if RunStatus.is_terminated(RunStatus.from_string(run.info.status)):
        raise TrackingError(
            "MLFLOW_RUN_ID",
            f"{run_id}, a run that is {run.info.status}",
            "a run that `mlflow run` has just made",
            "unset MLFLOW_RUN_ID to start a new run",
        )
    named_by_user = run.info.run_name and not _is_random_name(run.info.run_name)
    client.update_run(run_id, status="RUNNING", name=run.info.run_name if named_by_user else run_name)
    client.set_tag(run_id, names.TAG_KEY, key)
    return run_id


def _is_random_name(name: str) -> bool:
    """Whether MLflow has drawn a run's name, such as `sedate-fox-123`, because nobody gave one."""
    words = name.split("-")
    return len(words) == 3 and words[0] in _GENERATOR_PREDICATES and words[1] in _GENERATOR_NOUNS


def _experiment_id(client: MlflowClient, body: Mapping[str, Any]) -> str:
    """The experiment that the environment named when the run began, else ours, made when it is not there.

    Raises:
        TrackingError: it was deleted.
    """
    if body["experiment_id"]:
        return str(body["experiment_id"])
    name = body["experiment"]
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process made it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise TrackingError(
            f"MLflow experiment {name!r}",
            "an experiment that was deleted",
            "one that is there, or a new name",
            f"mlflow experiments restore --experiment-id {found.experiment_id}, or set MLFLOW_EXPERIMENT_NAME",
        )
    return str(found.experiment_id)
