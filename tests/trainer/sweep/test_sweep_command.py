"""`trainer sweep` as users type it: a real sweep on the built-in model, its ranking, and the same command once more."""

import csv
import io
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.running import SMALL, empty_store, runs_in, trainer
from trainer import names
from trainer.errors import ConfigError
from trainer.sweep_command import sweep

SWEEP = """
strategy: last6_lora
settings: {training.max_steps: 2, tracking.generate_records: 0, tracking.preview_records: 0}
space:
  training.vit_lr: [1.0e-4, 2.0e-4]
seeds: [5]
"""


def test_a_mistake_is_one_message(tmp_path: Path) -> None:
    """Exit status 2, no traceback, no password, and nothing is made."""
    storage = ("--storage", "oracle://me:secret@db/x")
    done = trainer("sweep", "vit_lr", "--seeds", "1", *storage, cwd=tmp_path, store="sqlite:///mlflow.db")
    assert done.returncode == 2
    assert "--storage" in done.stderr and "postgresql+psycopg2" in done.stderr and "secret" not in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["block"], r"did you mean blocks\?"),
        (["vit_lr", "--jobs", "none"], r"--jobs[\s\S]*a whole number from 1"),
        (["vit_lr", "--grace", "0"], r"--grace"),
        (["vit_lr", "--study", "a b"], r"--study[\s\S]*letters"),
        (["vit_lr", "--training.vit_lr", "1"], r"vit_lr.yaml:\d+: space: training.vit_lr[\s\S]*for every point"),
    ],
)
def test_other_mistakes_are_told_too(arguments: list[str], message: str) -> None:
    """Before MLflow is imported."""
    with pytest.raises(ConfigError, match=message):
        sweep.main(arguments, standalone_mode=False)


def test_a_dry_run_shows_points_room_and_places_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The points with their seeds, and where all will lie."""
    monkeypatch.chdir(tmp_path)
    sweep.main(["accumulation", "--seeds", "4,5", "--jobs", "1", "--dry_run", "true"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count("all_full") == 4 and "output/sweeps/accumulation" in said
    assert "1 at once" in said and list(tmp_path.iterdir()) == []


def test_a_sweep_trains_its_points_below_one_run_and_ends_with_their_ranking(tmp_path: Path) -> None:
    """The same command once more trains nothing, and says the same."""
    store = empty_store(tmp_path)
    (tmp_path / "two.yaml").write_text(SWEEP)
    settings = {
        key: text for key, text in SMALL.items() if key not in ("training.max_steps", "tracking.generate_records")
    }
    del settings["tracking.preview_records"]
    command = ["sweep", "two.yaml", *(part for key, text in settings.items() for part in (f"--{key}", text))]
    done = trainer(*command, cwd=tmp_path, store=store, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = runs_in(store)
    (parent,) = [run for run in runs if run.data.tags.get(names.TAG_ROLE) == "parent"]
    trials = [run for run in runs if run.data.tags.get(names.TAG_ROLE) == "trial"]
    assert len(runs) == 3 and {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert {run.data.params["training.vit_lr"] for run in trials} == {"0.0001", "0.0002"}
    assert {run.data.tags["sweep.point.training.vit_lr"] for run in trials} == {"0.0001", "0.0002"}
    assert names.TAG_STRATEGY not in parent.data.tags  # else the analysis would rank it

    client = MlflowClient(store)
    rows = list(csv.DictReader(io.StringIO(_text(client, parent.info.run_id, names.ARTIFACT_TRIALS, tmp_path))))
    best = {run.data.params["training.vit_lr"]: run.data.metrics[names.BEST_LOSS] for run in trials}
    assert {row["training.vit_lr"]: float(row[names.BEST_LOSS]) for row in rows} == best
    found = json.loads(_text(client, parent.info.run_id, names.ARTIFACT_POINTS, tmp_path))
    assert found["points"][0]["mean"] == min(best.values())
    assert "train the best:\n    python -m trainer run last6_lora" in done.stdout
    assert "2 of 2 trials are over" in parent.data.tags[names.TAG_NOTE]

    again = trainer(*command, cwd=tmp_path, store=store)
    assert again.returncode == 0 and "this sweep is finished" in again.stderr
    assert again.stdout == done.stdout and len(runs_in(store)) == 3


def _text(client: MlflowClient, run_id: str, artifact: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, artifact, str(folder))).read_text(encoding="utf-8")
