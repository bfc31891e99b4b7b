"""Stores that cannot be used are told in one message, without passwords; a real `mlflow server` can be used."""

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from tests.running import empty_store, mlflow_server, open_run
from trainer import names, tracking
from trainer.addresses import tracking_uri, without_password
from trainer.errors import TrackingError
from trainer.tracker import Tracker
from trainer.tracking import reach_store

pytestmark = pytest.mark.usefixtures("own_variables")


# --- stores that cannot be used ----------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["file:///tmp/runs", "mlruns", "./mlruns", "/tmp/mlruns"])
def test_file_stores_are_refused_with_one_message(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is created."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=rf"{re.escape(uri)}, a file store[\s\S]*sqlite:///mlflow.db"):
        tracking_uri()
    with pytest.raises(TrackingError):
        open_run(run_name="r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hush@127.0.0.1:port",
        "postgresql+nodriver://user:hush@127.0.0.1:9/db",
        "foo://user:hush@host/db",
        "sqlite:////proc/no/such/folder/x.db",
    ],
)
def test_a_store_that_cannot_be_used_is_told_quickly_without_its_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One message within twenty seconds, where MLflow alone retries for minutes; nobody sees the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(TrackingError) as raised:
        open_run(run_name="r")
    assert time.monotonic() - started < 20
    assert raised.value.where.startswith(f"MLFLOW_TRACKING_URI ({without_password(uri)}")
    shown = str(raised.value) + "".join(capfd.readouterr())
    assert "hush" not in shown and "user:" not in shown


def test_a_server_that_is_away_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is logged is kept, in a folder that tells no password, until the store is back."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hush@127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    assert "refused" in reach_store().away
    with open_run(run_name="r", close_seconds=0) as tracker:
        _write_something(tracker)
    assert tracker.run_id == ""
    assert tracker.waiting == 7  # its beginning, five things that were told, and its end
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hush" not in path.read_bytes(), path


def test_a_file_that_is_no_database_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow alone tries ten times, for two minutes."""
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    started = time.monotonic()
    with pytest.raises(TrackingError, match="not a database"):
        reach_store()
    assert time.monotonic() - started < 10


def test_a_server_that_never_answers_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing. Twenty seconds at most in earnest, two in this test."""
    tries, seconds = (int(value) for value in tracking._SHORT_PATIENCE.values())
    assert (1 + tries) * seconds <= 20
    monkeypatch.setitem(tracking._SHORT_PATIENCE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "timed out" in reach_store().away
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("https://me:s3cret@host:5000/mlflow", "https://host:5000/mlflow"),
        ("postgresql://me:p%40ss@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://me:p@ss@db/mlflow", "postgresql://db/mlflow"),
        (
            "postgresql://db/mlflow?user=me&password=s3cret&sslmode=on",
            "postgresql://db/mlflow?user=me&password=***&sslmode=on",
        ),
    ],
)
def test_what_is_shown_of_a_uri_holds_no_password(uri: str, shown: str) -> None:
    """Neither before the host nor among the options."""
    assert without_password(uri) == shown


# --- through a server --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` with its own database."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, empty_store(folder)) as address:
        yield address


def test_everything_goes_through_a_server_too(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, params, tags, datasets and artifacts; a failure with its traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server}")
    with open_run(run_name="good") as tracker:
        _write_something(tracker)
    with pytest.raises(RuntimeError), open_run(run_name="bad") as failed:
        raise RuntimeError("stop")
    client = MlflowClient(f"http://{server}")
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {"train/loss": 1.0}, {"a.b": "1"})
    assert run.inputs.dataset_inputs[0].dataset.digest == "f" * 32
    assert Path(client.download_artifacts(tracker.run_id, "t.txt", str(tmp_path))).read_text() == "text"
    assert client.get_run(failed.run_id).info.status == "FAILED"
    assert "stop" in Path(client.download_artifacts(failed.run_id, names.ARTIFACT_TRACEBACK, str(tmp_path))).read_text()


def test_user_and_password_leave_the_uri_of_a_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow, which puts URIs into its error messages, gets them through its own variables instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hu%40sh@{server}")
    with open_run(run_name="r"):
        pass
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == f"http://{server}"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "hu@sh")


def _write_something(tracker: Tracker) -> None:
    tracker.metrics({"train/loss": 1.0}, step=1)
    tracker.params({"a.b": "1"})
    tracker.tags({"strategy": "s"})
    tracker.text("text", "t.txt")
    tracker.dataset("train", "f" * 32, "train.jsonl", "train")
