"""Where a study is kept: one address, a database that all workers reach, and a lock that one of them has at a time."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from trainer.addresses import sqlite_file, without_password
from trainer.errors import ConfigError, UserError, reason_of

OUTAGES = (StorageInternalError, OperationalError, InterfaceError, OSError)
"""What a database that has gone away raises, directly or through Optuna."""
_TAKE, _GIVE = "SELECT pg_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"
"""PostgreSQL's lock ends with its connection, so with the process that has taken it."""
_KEY = {"key": int.from_bytes(b"sweep", "big")}
"""One for all studies of a database: whoever comes first also makes its tables."""
_SQLITE_SECONDS = 60.0
"""How long a statement waits for another process that writes."""
MAX_RETRIES = 3
"""Of a trial whose worker died: one that kills its workers, by their memory for example, must not go round for ever."""
_BEATS = 6
"""In the time after which a silent worker counts as dead."""


class Storage:
    """A study's database, seen from one worker."""

    def __init__(self, url: str, name: str, *, grace_seconds: int) -> None:
        """Nothing is asked of it yet.

        Args:
            url: of SQLAlchemy; `sqlite:///FILE`, or `postgresql+psycopg2://…` for many machines.
            name: of the study.
            grace_seconds: a worker that has been silent for so long counts as dead.

        Raises:
            ConfigError: no address of a database that can be shared.
        """
        self.url, self.name, self.grace_seconds = url, name, grace_seconds
        try:
            self._kind, told = urlsplit(url).scheme.partition("+")[0], without_password(url)
        except ValueError:
            self._kind, told = "", "no address"
        if self._kind not in ("sqlite", "postgresql") or (self._kind == "sqlite" and not sqlite_file(url).name):
            raise ConfigError(
                "--storage", told, "sqlite:///FILE (one machine), or postgresql+psycopg2://HOST/DATABASE",
                "give the address of a database, or leave it out: a file in the sweep's folder",
            )  # fmt: skip

    @property
    def shown(self) -> str:
        """The address without a password."""
        return without_password(self.url)

    @property
    def beat_seconds(self) -> int:
        """Between two signs of life of a trial."""
        return max(1, self.grace_seconds // _BEATS)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever keeps the database from being used becomes one message without passwords.

        Raises:
            ConfigError: it cannot be reached, or refuses.
        """
        try:
            yield
        except UserError:
            raise
        except (OptunaError, SQLAlchemyError, OSError, ImportError) as error:
            told = without_password(reason_of(_root(error)).replace(self.url, self.shown))
            raise ConfigError(
                "--storage", f"{self.shown}: {told}", "a database that answers and may be written",
                "start it or correct the address; what has been trained is kept, and the same command goes on",
            ) from None  # fmt: skip

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One worker at a time: points are given out, and dead workers' trials taken back, by whoever is in here."""
        if self._kind == "sqlite":
            file = sqlite_file(self.url)
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_name(file.name + ".lock")):
                yield
            return
        engine = sqlalchemy.create_engine(self.url, poolclass=NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text(_TAKE), _KEY)
            try:
                yield
            finally:
                with suppress(SQLAlchemyError):  # the lock ends with the connection
                    connection.execute(sqlalchemy.text(_GIVE), _KEY)

    def open(self) -> optuna.storages.RDBStorage:
        """Optuna's view of it; its tables are made where there are none, so only one worker at a time may be here.

        Raises:
            ConfigError: see `told`; or it is MLflow's, whose tables do not go together with Optuna's.
        """
        options = {"connect_args": {"timeout": _SQLITE_SECONDS}} if self._kind == "sqlite" else {"pool_pre_ping": True}
        with self.told(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if sqlalchemy.inspect(sqlalchemy.create_engine(self.url, poolclass=NullPool)).has_table("experiments"):
                do = "make one (createdb sweeps) and name it; leave --storage out for a file"
                raise ConfigError("--storage", f"{self.shown}, a database of MLflow", "a database of its own", do)
            try:
                return optuna.storages.RDBStorage(
                    self.url,
                    engine_kwargs=options,
                    heartbeat_interval=self.beat_seconds,
                    grace_period=self.grace_seconds,
                    heartbeat_stale_trial_callback=lambda study, trial: retry(study, trial, most=MAX_RETRIES),
                )
            except RuntimeError as error:  # its tables are those of another version
                do = "use that version, or another database"
                allowed = f"a database of Optuna {optuna.__version__}"
                raise ConfigError("--storage", f"{self.shown}: {error}", allowed, do) from None


class Heart:
    """Says of all trials of a worker, again and again, that they are alive."""

    def __init__(self, storage: optuna.storages.RDBStorage, seconds: float) -> None:
        """Begin, with no trial yet.

        Args:
            storage: the study's.
            seconds: between two signs of life.
        """
        self._storage, self._seconds = storage, seconds
        self._trials: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def keep(self, trial_id: int) -> None:
        """Say it of one more trial, now for the first time."""
        self._storage.record_heartbeat(trial_id)
        self._trials.add(trial_id)

    def drop(self, trial_id: int) -> None:
        """Say it no longer."""
        self._trials.discard(trial_id)

    def end(self) -> None:
        """Fall silent."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            for trial_id in tuple(self._trials):
                with suppress(
                    OptunaError, SQLAlchemyError, OSError
                ):  # the database is away: the next beat may reach it
                    self._storage.record_heartbeat(trial_id)


def retry(study: optuna.Study, trial: FrozenTrial, *, most: int | None) -> None:
    """Let the point of a trial be tried once more, by an attempt that knows the earlier ones.

    Args:
        study: that has it.
        trial: over.
        most: attempts after the first; None: as many as it takes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        trial.user_attrs = {}  # its worker's
        RetryHeartbeatStaleTrialCallback(max_retry=most)(study, trial)


def default_url(folder: Path) -> str:
    """The address of a file in a sweep's folder.

    Args:
        folder: of the sweep.
    """
    return f"sqlite:///{folder.resolve()}/study.db"


def _root(error: BaseException) -> Exception:
    """What lies at the bottom of an error that Optuna has wrapped."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error if isinstance(error, Exception) else Exception(str(error))
