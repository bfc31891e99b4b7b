"""The five arms' runs as Parquet files: saved from a store, read by tests and simulations, put back into a store.

python benchmarks/recorded.py sqlite:///copy.db      # puts them into a store, to look at them in the MLflow UI
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from analysis.comparison import CURVES_NEEDED
from analysis.curves import Curve, last_write_wins
from analysis.runs import Imported, Run
from analysis.store import Store
from trainer import names

FOLDER = Path(__file__).parent / "results" / "five_arms"


def save(store: Store, runs: Iterable[Run], folder: Path = FOLDER) -> None:
    """Write `runs.parquet`, `curves.parquet` (every metric, every row) and `records.parquet` (per-record losses)."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = sorted(runs, key=lambda run: (run.strategy, run.seed))
    told = [
        {
            "run_id": run.id,
            "name": run.name,
            "started": run.started,
            "params": json.dumps(run.params, sort_keys=True),
            "tags": json.dumps({k: v for k, v in run.tags.items() if not k.startswith("mlflow.")}, sort_keys=True),
        }
        for run in kept
    ]
    pd.DataFrame(told).to_parquet(folder / "runs.parquet", compression="zstd", index=False)
    curves = [
        pd.DataFrame({"run_id": run_id, "metric": metric, "step": c.steps, "time": c.times, "value": c.values})
        for metric in sorted({metric for run in kept for metric in run.metrics})
        for run_id, c in store.curves([run.id for run in kept], metric).items()
        if len(c)
    ]
    _written(curves, folder / "curves.parquet")
    losses = {run.id: store.record_losses(run.id) for run in kept}
    _written([f.assign(run_id=run_id) for run_id, f in losses.items() if f is not None], folder / "records.parquet")


def _written(frames: list[pd.DataFrame], path: Path) -> None:
    frame = pd.concat(frames, ignore_index=True)
    for column in frame.select_dtypes(["object", "str"]):
        frame[column] = frame[column].astype("category")  # a file a tenth as large
    frame.to_parquet(path, compression="zstd", index=False)


@cache
def runs() -> tuple[Run, ...]:
    """The runs as the store gives them, newest values and all."""
    frame = pd.read_parquet(FOLDER / "runs.parquet")
    last = {run_id: of_run for run_id, of_run in _curves().groupby("run_id", observed=True)}
    return tuple(
        Run(
            id=row.run_id,
            name=row.name,
            experiment_id="1",
            status="FINISHED",
            started=int(row.started),
            params=json.loads(row.params),
            tags=json.loads(row.tags),
            metrics=last[row.run_id].groupby("metric", observed=True)["value"].last().to_dict(),
            last_step=int(last[row.run_id]["step"].max()),
            experiment=names.EXPERIMENT,
        )
        for row in frame.itertuples(index=False)
    )


def curves(metrics: Iterable[str] = CURVES_NEEDED) -> dict[str, Mapping[str, Curve]]:
    """Run id -> metric -> curve; empty where a run has not logged it."""
    wanted = [*metrics]
    frame = _curves()
    found = {
        key: last_write_wins(zip(rows["step"], rows["time"], rows["value"], strict=True))
        for key, rows in frame[frame["metric"].isin(wanted)].groupby(["run_id", "metric"], observed=True)
    }
    empty = last_write_wins([])
    return {run.id: {metric: found.get((run.id, metric), empty) for metric in wanted} for run in runs()}


def record_losses(run_id: str) -> pd.DataFrame:
    """Per-record losses of a run, as `Store.record_losses`."""
    frame = _records()
    return frame[frame["run_id"] == run_id].drop(columns="run_id").reset_index(drop=True)


def replay(store: Store, wanted: Iterable[Run], experiment: str = names.EXPERIMENT) -> dict[str, str]:
    """Write recorded runs into a store, curves and all; recorded id -> id there."""
    frame = _curves()
    made = {}
    for run in wanted:
        of_run = frame[frame["run_id"] == run.id]
        rows = [
            (metric, int(step), int(time), float(value))
            for metric, step, time, value in zip(
                of_run["metric"], of_run["step"], of_run["time"], of_run["value"], strict=True
            )
        ]
        one = Imported(run.id, run.name, "Replayed from benchmarks/results/five_arms.", run.tags, run.params, rows)
        made[run.id], _ = store.import_run(one, experiment)
    return made


@cache
def _curves() -> pd.DataFrame:
    frame = pd.read_parquet(FOLDER / "curves.parquet").astype({"run_id": str, "metric": str})
    return frame.sort_values(["run_id", "metric", "step", "time"], kind="stable")


@cache
def _records() -> pd.DataFrame:
    return pd.read_parquet(FOLDER / "records.parquet").astype({"run_id": str, "record_id": str, "set": str, "at": str})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    os.environ["MLFLOW_TRACKING_URI"] = sys.argv[1]
    print(f"{len(replay(Store(create=True), runs()))} runs in experiment {names.EXPERIMENT} of {sys.argv[1]}")
