"""`--pause_after_samples`: a run stops on its way as if nothing had happened, and the same command goes on with it."""

from pathlib import Path

import click
import pytest
from mlflow import MlflowClient

from tests.running import SMALL, empty_store, flags, runs_in, trained, trainer
from tests.test_run import exact_rows
from trainer import names
from trainer.__main__ import cli
from trainer.errors import ConfigError
from trainer.runs import read_facts
from trainer.sync import close_dead

COMMAND = ["run", "last6_lora", "--seed", "3", *flags(SMALL)]


def test_a_paused_run_goes_on_by_the_same_command_to_the_numbers_of_one_that_was_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 0, `paused`, KILLED in MLflow until it goes on there; nobody closes it as a run that has died."""
    store = empty_store(tmp_path)
    paused = trainer(*COMMAND, "--pause_after_samples", "9", cwd=tmp_path, store=store)
    assert paused.returncode == 0, paused.stderr
    assert "paused after optimizer step 2, a resume point is written; the same command goes on" in paused.stderr
    (home,) = (file.parent for file in (tmp_path / "output").glob("*/run.json"))
    (run,) = runs_in(store)
    assert (read_facts(home)["state"], run.info.status) == ("paused", "KILLED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert close_dead(tmp_path / "output") == []
    assert read_facts(home)["state"] == "paused"

    rest = trainer(*COMMAND, cwd=tmp_path, store=store)
    assert rest.returncode == 0, rest.stderr
    (run,) = runs_in(store)
    assert (read_facts(home)["state"], run.info.status) == ("over", "FINISHED")
    assert run.data.tags[names.TAG_RESUMED_AT] == "2"
    alone = trained()
    assert exact_rows(MlflowClient(store), run.info.run_id) == exact_rows(alone.client, alone.run.info.run_id)


def test_a_pause_under_mlflow_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends what it has started as FINISHED when the process ends well."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(ConfigError, match="would call the run FINISHED"):
        cli([*COMMAND, "--pause_after_samples", "9"], standalone_mode=False)


@pytest.mark.parametrize("samples", ["0", "-5", "many", "1.5"])
def test_what_is_no_number_of_samples_is_told(samples: str) -> None:
    """Before anything is read."""
    with pytest.raises(click.BadParameter, match=r"not in the range|not a valid integer"):
        cli([*COMMAND, "--pause_after_samples", samples], standalone_mode=False)
