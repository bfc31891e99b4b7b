"""MLflow as these tests meet it: without variables of whoever runs them, and with an empty store of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import empty_store, without_mlflow_variables


@pytest.fixture
def own_variables() -> Iterator[None]:
    """A test starts without MLflow's variables and leaves none behind."""
    with without_mlflow_variables():
        yield


@pytest.fixture
def store(own_variables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store, named by the environment as a user would; artifacts land in `tmp_path`, the current folder."""
    uri = empty_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
