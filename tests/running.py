"""Runs the trainer as its users do: in its own process, on its own store, with the built-in model and data."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from tests.server_process import ServerProcess, free_port, started
from trainer import names
from trainer.begin import Begun, open_tracker
from trainer.runs import Identity, new_run
from trainer.tracker import SpoolTracker
from trainer.tracking import reach_store

ROOT = Path(__file__).parents[1]

# Small enough for seconds on two cores, large enough that every metric occurs: 32 training records are eight or nine
# packs of four or so, and an optimizer step takes two; training rows at 1, 2 and 3, evaluations at 0, 2 and 3.
SMALL = {
    "launch.nproc": "1",  # a number, so that a machine of many cores tests the same thing; `auto` has its own tests
    "training.max_steps": "3",
    "training.logging_steps": "2",
    "training.eval_steps": "2",
    "global_max_length": "720",
    "custom.digits.train": "32",
    "custom.digits.val": "8",
    "custom.digits.ood": "4",
    "tracking.probe_records": "4",
    "tracking.vision_gain_records": "8",
    "tracking.generate_records": "2",
    "tracking.preview_records": "2",
}


def flags(overrides: dict[str, str]) -> list[str]:
    """Overrides as the command line of the trainer takes them."""
    return [part for key, value in overrides.items() for part in (f"--{key}", value)]


@functools.cache
def _cache_folder() -> Path:
    """Where these tests keep the built-in data: not in the user's own cache. It goes when they are done."""
    folder = tempfile.mkdtemp(prefix="trainer-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _template_store() -> Path:
    """An empty MLflow database; making its tables takes seconds, copying the file none."""
    path = _cache_folder() / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def empty_store(folder: Path) -> str:
    """The URI of a new, empty MLflow database in a folder."""
    shutil.copy(_template_store(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def environment(store: str | None, **more: str) -> dict[str, str]:
    """The environment of a process: ours without MLflow's variables, with this interpreter as `python`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    kept["XDG_CACHE_HOME"] = str(_cache_folder())
    kept["OMP_NUM_THREADS"] = "1"  # several threads of a busy machine wait for each other
    return kept | ({"MLFLOW_TRACKING_URI": store} if store else {}) | more


def trainer(
    *arguments: str, cwd: Path, store: str | None = None, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m trainer ARGUMENTS` from another folder, to its end."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(store, **variables), capture_output=True, text=True, timeout=timeout
    )


def answer_signals() -> None:
    """In a new process: signals that whoever runs the tests ignores (nohup, a shell's background) count again."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_trainer(*arguments: str, cwd: Path, store: str, **variables: str) -> subprocess.Popen[str]:
    """`python -m trainer ARGUMENTS` in the background, as the leader of its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=cwd,
        env=environment(store, **variables),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=answer_signals,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what a process writes to standard error until a line holds `text`."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came; standard error was:\n{''.join(seen)}")


def open_run(*, run_name: str, close_seconds: float = 20) -> SpoolTracker:
    """The tracker of a new run whose folder lies below the current one; the store is that of the environment."""
    store = reach_store()
    folder = new_run(Path("runs"), Identity(run_name, {}, store.name))
    begun = Begun(folder.path, None, folder=folder)
    return open_tracker(begun, store, run_name=run_name, close_seconds=close_seconds)


@contextmanager
def without_mlflow_variables() -> Iterator[None]:
    """No variable of MLflow's while this lasts; afterwards all variables, and MLflow's own store, are as before."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        os.environ.clear()
        os.environ.update(before)


def runs_in(store: str, experiment: str = names.EXPERIMENT) -> list[Run]:
    """All runs of an experiment; none when it is not there."""
    client = MlflowClient(store)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def mlflow_process(folder: Path, store: str, port: int | None = None) -> ServerProcess:
    """A real `mlflow server` with artifacts in `folder`, on a free port unless one is given; not yet started."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    return ServerProcess(command, folder, port, environment(None, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"))


@contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[str]:
    """A real `mlflow server` on a free port, artifacts in `folder`; its host and port."""
    with started(mlflow_process(folder, store)) as server:  # asked politely to end, it takes twenty seconds
        yield f"127.0.0.1:{server.port}"


@dataclass(frozen=True)
class Trained:
    """One run that went through, and what it wrote to the terminal."""

    store: str
    folder: Path
    run: Run
    stdout: str
    stderr: str

    @property
    def client(self) -> MlflowClient:
        """A client of the run's store."""
        return MlflowClient(self.store)

    def history(self, metric: str) -> list[Metric]:
        """A metric's values in the order they were logged."""
        return sorted(self.client.get_metric_history(self.run.info.run_id, metric), key=lambda m: (m.timestamp, m.step))

    def artifact(self, name: str) -> Path:
        """An artifact as a local file."""
        return _artifacts(self.store, self.run.info.run_id) / name

    @property
    def checkpoint(self) -> Path:
        """The folder of its best checkpoint."""
        return Path(json.loads(self.artifact(names.ARTIFACT_CHECKPOINTS).read_text())["best"]["path"])

    @property
    def val_jsonl(self) -> Path:
        """The validation records that it has logged."""
        logged = {each.dataset.name: each.dataset.source for each in self.run.inputs.dataset_inputs}
        return Path(json.loads(logged["val"])["uri"])


@functools.cache
def _artifacts(store: str, run_id: str) -> Path:
    return Path(MlflowClient(store).download_artifacts(run_id, "", tempfile.mkdtemp(dir=_cache_folder())))


@functools.cache
def trained() -> Trained:
    """`python -m trainer run last6_lora` at the size of `SMALL`, seed 3: trained once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=_cache_folder()))
    store = empty_store(folder)
    done = trainer("run", "last6_lora", "--seed", "3", *flags(SMALL), cwd=folder, store=store)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(store)
    return Trained(store, folder, run, done.stdout, done.stderr)
