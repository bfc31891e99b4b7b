"""A study's database as these tests begin with it."""

from pathlib import Path

import pytest

from trainer.sweep.storage import Storage, default_url


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With Optuna's tables: making them takes a second, copying the file none."""
    folder = tmp_path_factory.mktemp("empty")
    Storage(default_url(folder), "s", grace_seconds=60).open().engine.dispose()
    return folder / "study.db"
