"""Event files of TensorBoard's own writer become runs: steps, wall times, values; a second time, nothing new."""

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from torch.utils.tensorboard import SummaryWriter

from analysis.__main__ import cli
from analysis.store import Store
from analysis.tensorboard import tensorboard_runs
from tests.running import empty_store, runs_in
from trainer.errors import UserError

EVALS = [(0, 0.9, 1000.25), (10, 0.5, 1010.5), (20, 0.6, 1020.75)]


def write(folder: Path, points: list[tuple[int, float, float]], tag: str = "eval/loss") -> None:
    """(step, value, wall time in seconds) as one event file."""
    writer = SummaryWriter(str(folder), filename_suffix=f"-{tag.replace('/', '-')}-{points[0][0]}")
    for step, value, time in points:
        writer.add_scalar(tag, value, step, walltime=time)
    writer.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs below one folder, and an empty store to import them into."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store(tmp_path))
    logs = tmp_path / "logs"
    write(logs / "last6_lora", EVALS)
    write(logs / "last6_lora", [(5, 0.8, 1005.0), (15, 0.4, 1015.0)], "train/loss")
    write(logs / "deep" / "all_full", [(step, value + 0.1, time) for step, value, time in EVALS])
    return logs


def imported(folder: Path) -> None:
    """Through the command itself."""
    cli(["import_tensorboard", str(folder), "--experiment", "X"], standalone_mode=False)


def rows(metric: str, strategy: str = "last6_lora") -> list[tuple[int, int, float]]:
    """(step, milliseconds, value) of one run, in order of time."""
    store = Store().uri
    (run,) = (run for run in runs_in(store, "X") if run.data.tags["strategy"] == strategy)
    history = MlflowClient(store).get_metric_history(run.info.run_id, metric)
    return sorted(((m.step, m.timestamp, m.value) for m in history), key=lambda row: row[1])


def test_steps_wall_times_and_values_are_kept(folder: Path) -> None:
    """Values to float32, in which event files hold them; times to the millisecond, in which MLflow does."""
    imported(folder)
    found = rows("eval/loss")
    assert [(step, time) for step, time, _ in found] == [(0, 1000250), (10, 1010500), (20, 1020750)]
    assert [value for *_, value in found] == pytest.approx([0.9, 0.5, 0.6], rel=1e-7)
    assert [step for step, *_ in rows("train/loss")] == [5, 15]
    runs = runs_in(Store().uri, "X")
    assert {run.data.tags["strategy"] for run in runs} == {"last6_lora", "deep/all_full"}
    assert all(run.data.tags["source"] == "tensorboard" and run.info.status == "FINISHED" for run in runs)


def test_what_a_ranking_reads_is_added(folder: Path) -> None:
    """Smoothed by hand: .9, then (.6 x .36 + .4 x .5) / .64 = .65; the lowest loss and its step."""
    imported(folder)
    smoothed = [value for *_, value in rows("eval/loss_smoothed")]
    assert smoothed[:2] == pytest.approx([0.9, 0.65], rel=1e-6)
    assert rows("eval/best_loss")[0][2] == pytest.approx(0.5) and rows("eval/best_step")[0][2] == 10


def test_a_second_import_adds_nothing_and_a_grown_run_what_is_new(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a resume, which writes a step again into another file."""
    imported(folder)
    before = {metric: rows(metric) for metric in ("eval/loss", "eval/loss_smoothed", "train/loss")}
    capsys.readouterr()
    imported(folder)
    assert capsys.readouterr().out.count("already there") == 2
    assert {metric: rows(metric) for metric in before} == before
    write(folder / "last6_lora", [(20, 0.55, 2020.0), (30, 0.45, 2030.0)])
    imported(folder)
    assert [step for step, *_ in rows("eval/loss")] == [0, 10, 20, 20, 30]
    (run,) = (run for run in Store().runs("X") if run.strategy == "last6_lora")
    curve = Store().curves([run.id], "eval/loss")[run.id]
    assert curve.values.tolist() == pytest.approx([0.9, 0.5, 0.55, 0.45])


def test_values_that_are_not_numbers_are_kept(folder: Path) -> None:
    """A loss that became nan stays visible; the lowest is that of the others."""
    write(folder / "broken", [(0, 0.9, 1.0), (10, math.nan, 2.0)])
    imported(folder)
    assert math.isnan(rows("eval/loss", "broken")[1][2])
    assert rows("eval/best_loss", "broken")[0][2] == pytest.approx(0.9)


@pytest.mark.parametrize("name", ["empty", "none"])
def test_a_folder_without_event_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An empty one, and one that is not there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--logdir"):
        imported(tmp_path / name)


def test_event_files_without_a_scalar_are_told(folder: Path, tmp_path: Path) -> None:
    """A folder of hyperparameters alone is passed over; where there is nothing else, that is said."""
    writer = SummaryWriter(str(folder / "deep" / "text"))
    writer.add_text("note", "no scalar")
    writer.close()
    assert {run.name for run in tensorboard_runs(folder)} == {"deep/all_full", "last6_lora"}
    with pytest.raises(UserError, match="without a scalar"):
        list(tensorboard_runs(folder / "deep" / "text"))
