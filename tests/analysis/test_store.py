"""The door to MLflow: runs, filters and whole curves, from a database and through a real server."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from analysis import store as door
from analysis.store import Store, quoted
from tests.running import empty_store, mlflow_server
from trainer.errors import TrackingError

STEPS = 10_000


def new_run(client: MlflowClient, experiment: str, strategy: str | None, **params: str) -> Run:
    """A run with a strategy tag, or without."""
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(experiment_id, run_name=f"{strategy}-run")
    client.log_batch(run.info.run_id, tags=[RunTag("strategy", strategy)] if strategy else [])
    for key, value in params.items():
        client.log_param(run.info.run_id, key.replace("__", "."), value)
    return run


def log_curve(client: MlflowClient, run: Run, metric: str, values: list[float], *, start: int = 1) -> None:
    """One row a step, a millisecond apart."""
    rows = [Metric(metric, value, 1000 + step, step) for step, value in enumerate(values, start)]
    for begin in range(0, len(rows), 1000):
        client.log_batch(run.info.run_id, metrics=rows[begin : begin + 1000], synchronous=True)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs of 10,000 steps, a run without the metric, one without a strategy; two experiments."""
    uri = empty_store(tmp_path_factory.mktemp("store"))
    client = MlflowClient(uri)
    for number in range(3):
        run = new_run(client, "first", f"arm{number}", tuner__lora_rank=str(8 << number))
        log_curve(client, run, "train/loss", [number + 1 / step for step in range(1, STEPS + 1)])
        client.log_metric(run.info.run_id, "eval/loss", number / 10, step=5)
    new_run(client, "second", "bare", tuner__lora_rank="8")
    new_run(client, "second", None)
    return uri


@pytest.fixture(params=["database", "server"])
def store(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> Iterator[Store]:
    """The same runs, read from the database itself and through a server."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "database":
            patch.setenv("MLFLOW_TRACKING_URI", database)
            yield Store()
        else:
            with mlflow_server(tmp_path, database) as address:
                patch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
                yield Store()


def test_whole_curves_come_back_however_long_they_are(store: Store) -> None:
    """30,000 rows are more than MLflow's bulk answer holds: point for point what one request a run gives."""
    client = MlflowClient(store.uri)
    runs = {run.id: run for run in store.runs()}
    curves = store.curves(runs, "train/loss")
    assert set(curves) == set(runs)
    for run_id, run in runs.items():
        history = client.get_metric_history(run_id, "train/loss")
        expected = sorted((m.step, m.value, m.timestamp) for m in history)
        curve = curves[run_id]
        assert len(curve) == (0 if run.strategy == "bare" else STEPS)
        assert list(zip(curve.steps.tolist(), curve.values.tolist(), curve.times.tolist(), strict=True)) == expected


def test_runs_are_those_with_a_strategy_in_one_experiment_or_all(store: Store) -> None:
    """Newest first; the base model's own run, which has no strategy, is not one of them."""
    assert {run.strategy for run in store.runs()} == {"arm0", "arm1", "arm2", "bare"}
    assert [run.strategy for run in store.runs("second")] == ["bare"]
    assert [run.strategy for run in store.runs("first")] == ["arm2", "arm1", "arm0"]
    first = next(run for run in store.runs() if run.strategy == "arm1")
    assert first.metrics["eval/loss"] == 0.1 and first.metrics["train/loss"] == 1 + 1 / STEPS
    assert first.params == {"tuner.lora_rank": "16"}


def test_a_filter_takes_plain_names(store: Store) -> None:
    """Dots and slashes need no backticks."""
    found = store.runs(where="params.tuner.lora_rank = '8'")
    assert {run.strategy for run in found} == {"arm0", "bare"}
    found = store.runs(where="metrics.eval/loss > 0.05 AND tags.strategy != 'arm2'")
    assert [run.strategy for run in found] == ["arm1"]


@pytest.mark.parametrize("cut", [7, 10, 25])
def test_an_answer_that_was_cut_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """In the middle of a run, between two, and inside the only one that was asked for."""
    store = empty_store(tmp_path)
    client = MlflowClient(store)
    runs = [new_run(client, "cut", "arm") for _ in range(4)]
    for number, run in enumerate(runs):
        log_curve(client, run, "eval/loss", [float(number)] * 10)
    monkeypatch.setattr(door, "BULK_ROWS", cut)
    with mlflow_server(tmp_path, store) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
        curves = Store().curves([run.info.run_id for run in runs], "eval/loss")
    assert [curves[run.info.run_id].values.tolist() for run in runs] == [[float(n)] * 10 for n in range(4)]


def test_points_that_are_not_numbers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, not dropped and not made 0."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store(tmp_path))
    client = MlflowClient(Store().uri)
    run = new_run(client, "odd", "arm")
    log_curve(client, run, "train/loss", [1.0, math.nan, 0.5, math.inf, -math.inf])
    curve = Store().curves([run.info.run_id], "train/loss")[run.info.run_id]
    assert curve.n_not_finite == 3 and curve.values[[0, 2, 3, 4]].tolist() == [1.0, 0.5, math.inf, -math.inf]
    assert next(Store().runs()).metrics["train/loss"] == -math.inf


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("params.a.b = 'x'", "params.`a.b` = 'x'"),
        ("metrics.eval/loss<0.5 AND tags.strategy LIKE '%'", "metrics.`eval/loss`<0.5 AND tags.`strategy` LIKE '%'"),
        ("params.`a.b` = 'params.c.d'", "params.`a.b` = 'params.c.d'"),
        ("attributes.status = 'FINISHED'", "attributes.status = 'FINISHED'"),
    ],
)
def test_backticks_are_put_where_they_are_missing(where: str, expected: str) -> None:
    """Around names, not inside texts."""
    assert quoted(where) == expected


def test_mistakes_are_told(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unknown experiment with the nearest name, a filter that is none, a file that is not there and is not made."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    with pytest.raises(TrackingError, match="did you mean first"):
        list(Store().runs("frist"))
    with pytest.raises(TrackingError, match="--where") as caught:
        list(Store().runs(where="lora_rank 16"))
    assert "single quotes" in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(TrackingError, match="not there"):
        Store()
    assert not (tmp_path / "none.db").exists()
