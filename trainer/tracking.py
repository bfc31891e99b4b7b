"""The one door to MLflow: opens or adopts a run, takes params, tags, metric rows and artifacts, and closes it truly."""

import hashlib
import json
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES
from sqlalchemy import inspect
from sqlalchemy.exc import SQLAlchemyError

from trainer import names
from trainer.errors import TrackingError, UserError

_PARAM_LENGTH = 6000  # MLflow's own limit; whether it cuts or refuses what is longer is a setting of its user
_SHORT_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}  # seconds
_INTERRUPTED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
_SCHEMA = re.compile(r"database schema \(found version (\w+)")
_SECRET = re.compile(r"(?i)([?&][^=&]*(?:pass|pwd|token|secret)[^=&]*=)[^&#]*")


class Tracker:
    """What a run tells the outside. This one tells nobody: it is for all ranks but the first, which speaks for them."""

    run_id = ""

    def at_end(self, log: Callable[[], None]) -> None:
        """Call `log` before the run is closed, however it ends; it never hides the error that ended it."""

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row, all of it at one step and one time."""

    def params(self, values: Mapping[str, str]) -> None:
        """Log params; a key that is already there stays as it is."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def description(self, markdown: str) -> None:
        """Set the run's description, which the MLflow UI renders."""

    def text(self, content: str, artifact: str) -> None:
        """Store a text as an artifact."""

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read; `context` is train, validation or out_of_domain."""

    def __enter__(self) -> Self:
        """The run is open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run as what it was."""


class MlflowTracker(Tracker):
    """One MLflow run, from its start (or its adoption from `mlflow run`) to its end."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        """Use `open_run`, which finds or makes the run."""
        self._client, self.run_id = client, run_id
        self._last_words: list[Callable[[], None]] = []

    def at_end(self, log: Callable[[], None]) -> None:
        """Call `log` before the run is closed, however it ends; it never hides the error that ended it."""
        self._last_words.append(log)

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
        self._client.log_batch(self.run_id, params=new)

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
        entity = Dataset(name, digest, "local", json.dumps({"uri": source}))
        self._client.log_inputs(self.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run as what it was: FINISHED, KILLED when interrupted, FAILED (with the traceback) otherwise."""
        status = _status_after(error)
        with _short_patience() if error else nullcontext():
            try:
                for log in self._last_words:
                    with suppress(Exception) if error else nullcontext():
                        log()
                if status == "FAILED":
                    self.text("".join(traceback.format_exception(kind, error, trace)), names.ARTIFACT_TRACEBACK)
            except Exception:
                status = "FAILED"
                raise
            finally:  # whatever became of the last words and the artifact
                self._client.set_terminated(self.run_id, status)


def open_run(*, run_name: str, parent_run_id: str | None = None) -> MlflowTracker:
    """Adopt the run that `mlflow run` has made for us, or make one; nested inside an active or named parent.

    Args:
        run_name: for the MLflow UI; an adopted run takes it too, unless the user named that one.
        parent_run_id: the run to hang a new one under.

    Raises:
        TrackingError: the store is a file store, or cannot be used.
    """
    uri = reach_store()
    with told(uri):
        mlflow.set_tracking_uri(uri)
        with alone_at_birth(uri):
            client = MlflowClient(uri)
        active = mlflow.active_run()
        adopted = os.environ.get("MLFLOW_RUN_ID")
        if adopted and active is None and parent_run_id is None:
            return MlflowTracker(client, _adopt(client, adopted, run_name))
        parent = client.get_run(parent_run_id) if parent_run_id else active
        experiment_id = parent.info.experiment_id if parent else _experiment_id(client)
        tags = {MLFLOW_RUN_NAME: run_name} | ({MLFLOW_PARENT_RUN_ID: parent.info.run_id} if parent else {})
        return MlflowTracker(client, client.create_run(experiment_id, tags=resolve_tags(tags)).info.run_id)


def reach_store() -> str:
    """The store in use, after one look whether it is there at all.

    Left alone, MLflow tries to reach a server for four minutes and a database for two. That is right in the middle of
    a training, and too long for somebody who has mistyped an address.

    Raises:
        TrackingError: the store is a file store, or not to be had.
    """
    uri = _without_credentials(tracking_uri())
    with told(uri), _short_patience():
        if urlsplit(uri).scheme in ("http", "https"):
            MlflowClient(uri).search_experiments(max_results=1)
        elif urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql") or (
            uri.startswith("sqlite") and sqlite_file(uri).is_file()  # one that is not there, MLflow makes
        ):
            inspect(create_sqlalchemy_engine(uri)).has_table("experiments")  # type: ignore[no-untyped-call]
    return uri


def abandon(error: BaseException) -> None:
    """Close the run that `mlflow run` has made for us when a mistake or an interrupt came before `open_run`.

    The reason becomes the run's description. Does nothing where there is no such run or it has ended already, and
    raises nothing: `error` is what matters.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    with suppress(Exception), _short_patience():
        client = MlflowClient(_without_credentials(tracking_uri()))
        if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(run_id).info.status)):
            if names.TAG_STRATEGY not in client.get_run(run_id).data.tags:  # else a rank died that had described it
                note = f"Ended before training: {type(error).__name__}\n```\n{error}\n```"
                client.set_tag(run_id, MLFLOW_RUN_NOTE, note)
            client.set_terminated(run_id, _status_after(error))


def tracking_uri() -> str:
    """The store in use.

    Raises:
        TrackingError: it is a file store, which MLflow has deprecated and on which replay is not safe.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or names.DEFAULT_TRACKING_URI
    if urlsplit(uri).scheme in ("", "file") and uri != "databricks":
        raise TrackingError(
            "MLFLOW_TRACKING_URI",
            f"{uri}, a file store",
            "a database or an MLflow server; MLflow has deprecated file stores",
            f"unset it (default: {names.DEFAULT_TRACKING_URI}), or move old runs with `mlflow migrate-filestore`",
        )
    return uri


def without_password(uri: str) -> str:
    """A URI that can be shown: user and password, where it has them, are left out."""
    netloc = urlsplit(uri).netloc
    return _SECRET.sub(r"\1***", uri.replace(netloc, netloc.rpartition("@")[2], 1) if "@" in netloc else uri)


def _without_credentials(uri: str) -> str:
    """A server's URI without user and password, which go where MLflow takes them from without ever showing them."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return without_password(uri)


def sqlite_file(uri: str) -> Path:
    """The file of a `sqlite:///` URI."""
    return Path(unquote(uri.partition("///")[2].partition("?")[0]))


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
    """Whatever keeps a store from being used becomes one message without passwords."""
    try:
        yield
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0].replace(uri, without_password(uri))
        if schema := _SCHEMA.search(text):
            raise _other_schema(uri, schema[1]) from None
        raise TrackingError(
            f"MLFLOW_TRACKING_URI ({without_password(uri)})",
            text,
            "a database (sqlite:///mlflow.db, postgresql://...) or a running MLflow server (http://...)",
            "start the server or correct MLFLOW_TRACKING_URI",
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


def _adopt(client: MlflowClient, run_id: str, run_name: str) -> str:
    """Take over a run that was made for us.

    Raises:
        TrackingError: it has ended already, so that its params and curves are those of another training.
    """
    info = client.get_run(run_id).info
    if RunStatus.is_terminated(RunStatus.from_string(info.status)):
        raise TrackingError(
            "MLFLOW_RUN_ID",
            f"{run_id}, a run that is {info.status}",
            "a run that `mlflow run` has just made",
            "unset MLFLOW_RUN_ID to start a new run",
        )
    named_by_user = info.run_name and not _is_random_name(info.run_name)
    client.update_run(run_id, status="RUNNING", name=info.run_name if named_by_user else run_name)
    return run_id


def _is_random_name(name: str) -> bool:
    """Whether MLflow has drawn a run's name, such as `sedate-fox-123`, because nobody gave one."""
    words = name.split("-")
    return len(words) == 3 and words[0] in _GENERATOR_PREDICATES and words[1] in _GENERATOR_NOUNS


def _status_after(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    interrupted = isinstance(error, SystemExit) and error.code in _INTERRUPTED
    return "KILLED" if interrupted or isinstance(error, KeyboardInterrupt) else "FAILED"


def _experiment_id(client: MlflowClient) -> str:
    """The experiment that the environment names, else ours, made when it is not there.

    Raises:
        TrackingError: it was deleted.
    """
    if by_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return by_id
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or names.EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:  # another process made it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r}",
            "an experiment that was deleted",
            "one that is there, or a new name",
            f"mlflow experiments restore --experiment-id {found.experiment_id}, or set MLFLOW_EXPERIMENT_NAME",
        )
    return found.experiment_id
