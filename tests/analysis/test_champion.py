"""Promotion: a real checkpoint in a real registry; refused where nothing says that the winner is better."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.analysis.test_cli import analysis
from tests.running import Trained, mlflow_server, trained
from trainer.checkpoint import file_sha256


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the store with the one trained run."""
    folder = tmp_path_factory.mktemp("champion")
    shutil.copy(trained().store.removeprefix("sqlite:///"), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def weights(one: Trained) -> Path:
    """The adapter that the run has saved at its best evaluation."""
    (path,) = one.folder.glob("output/*/best/adapter_model.safetensors")
    return path


def test_a_winner_without_a_second_is_refused(store: str, tmp_path: Path) -> None:
    """One message, nothing registered."""
    done = analysis("promote", store=store, cwd=tmp_path)
    assert done.returncode == 2 and "not distinguishable from any other" in done.stderr and "--anyway" in done.stderr
    assert list(MlflowClient(store).search_registered_models()) == []


def test_anyway_registers_the_best_checkpoint_under_the_alias(store: str, tmp_path: Path) -> None:
    """The same bytes come back from the registry; metrics, run and comparison are linked; again adds no version."""
    for _ in range(2):
        done = analysis("promote", "--anyway", "--name", "vision", store=store, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "models:/vision@champion is version 1" in done.stdout
    client = MlflowClient(store)
    version = client.get_model_version_by_alias("vision", "champion")
    run = trained().run
    assert version.run_id == run.info.run_id
    assert version.tags["distinguishable"] == "no, promoted anyway"
    assert float(version.tags["eval/loss"]) == pytest.approx(run.data.metrics["eval/loss"], rel=1e-5)
    assert client.get_run(version.tags["comparison"]).data.tags.get("strategy") is None
    got = client.download_artifacts(version.run_id, "champion/adapter_model.safetensors", str(tmp_path))
    assert file_sha256(Path(got)) == file_sha256(weights(trained()))


def test_a_checkpoint_that_is_not_what_was_written_is_refused(store: str, tmp_path: Path) -> None:
    """A flipped bit, then no file: told with the path."""
    path = weights(trained())
    kept = path.read_bytes()
    try:
        path.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        flipped = analysis("promote", "--anyway", store=store, cwd=tmp_path)
        path.unlink()
        gone = analysis("promote", "--anyway", store=store, cwd=tmp_path)
    finally:
        path.write_bytes(kept)
    assert flipped.returncode == 2 and "not the file that the run has written" in flipped.stderr
    assert gone.returncode == 2 and "not there" in gone.stderr and str(path) in gone.stderr


def test_the_registry_of_a_server_takes_it_too(store: str, tmp_path: Path) -> None:
    """The version's source is the run's own artifact folder, which is all that a server accepts."""
    with mlflow_server(tmp_path, store) as place:
        done = analysis("promote", "--anyway", "--name", "served", store=f"http://{place}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert MlflowClient(f"http://{place}").get_model_version_by_alias("served", "champion").version == "1"
