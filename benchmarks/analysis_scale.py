"""How the analysis scales: ranking 10,000 runs against bare search_runs, 200 curves in bulk against one call each.

    python benchmarks/analysis_scale.py --runs 10000 --curves 200 --points 500

Fills a SQLite store in a temporary folder by plain SQL (MLflow's own client takes minutes for it), then measures on it
directly and through a real `mlflow server`. Times are medians over `--repeats`, the two sides of a ratio in turn.
Memory is the peak resident size of a process of its own that ranks, beside one that only pages through the runs.
"""

import argparse
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from rich.progress import track

from trainer import names
from trainer.config.load import load

STRATEGIES = ("last6_lora", "last6_full", "all_lora", "all_full", "frozen_vision")
METRICS = [name for name, meaning in names.METRICS.items() if meaning.better]
EXPERIMENT = "scale"


def fill(store: Path, runs: int, curves: int, points: int) -> None:
    """A store of finished runs with all params and latest metrics; the first `curves` of them have whole curves."""
    client = MlflowClient(f"sqlite:///{store}")
    experiment = int(client.create_experiment(EXPERIMENT, artifact_location=str(store.parent / "artifacts")))
    generator = np.random.default_rng(17)
    params = {strategy: load(strategy).params() for strategy in STRATEGIES}
    with sqlite3.connect(store) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(runs)")]
        for index in track(range(runs), description="filling"):
            run_id, strategy, seed = uuid.UUID(bytes=generator.bytes(16)).hex, STRATEGIES[index % 5], index // 5
            row = {
                "run_uuid": run_id, "name": f"{strategy}-seed{seed}", "source_type": "LOCAL", "source_name": "",
                "entry_point_name": "", "user_id": "u", "status": "FINISHED",
                "start_time": index, "end_time": index + 1,
                "source_version": "", "lifecycle_stage": "active", "artifact_uri": "", "experiment_id": experiment,
            }  # fmt: skip
            database.execute(
                f"INSERT INTO runs ({', '.join(k for k in row if k in columns)}) "  # noqa: S608  # our own names
                f"VALUES ({', '.join('?' for k in row if k in columns)})",
                [value for key, value in row.items() if key in columns],
            )
            tags = {names.TAG_STRATEGY: strategy, names.TAG_SEED: str(seed), names.TAG_GATE: "passed",
                    names.TAG_TRAIN_DIGEST: "d", "mlflow.runName": row["name"]}  # fmt: skip
            database.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
                                 [(key, value, run_id) for key, value in tags.items()])  # fmt: skip
            own = {**params[strategy], "training.seed": str(seed)}
            database.executemany("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
                                 [(key, value, run_id) for key, value in own.items()])  # fmt: skip
            for metric in METRICS:
                values = generator.normal(0.5, 0.02, points if index < curves else 1)
                steps = range(1, len(values) + 1)
                if index < curves:
                    database.executemany(
                        "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)",
                        [(metric, float(v), s, run_id, s) for s, v in zip(steps, values, strict=True)],
                    )
                database.execute(
                    "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
                    "VALUES (?, ?, ?, ?, 0, ?)",
                    (metric, float(values[-1]), len(values), len(values), run_id),
                )


@contextmanager
def server(store: Path) -> Iterator[str]:
    """A real server on the store; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--port",
        str(port),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd=store.parent, start_new_session=True,
    )  # fmt: skip
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
            time.sleep(0.5)
        time.sleep(3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def bare() -> int:
    """What every tool must do: page through the runs as MLflow gives them."""
    client = MlflowClient()
    found, token = 0, None
    ids = [client.get_experiment_by_name(EXPERIMENT).experiment_id]
    while True:
        page = client.search_runs(ids, f"tags.`{names.TAG_STRATEGY}` LIKE '%'", max_results=1000, page_token=token)
        found, token = found + len(page), page.token
        if not token:
            return found


def ranking() -> int:
    """What `rank` does before it prints, and the text it prints."""
    from analysis.ranking import At
    from analysis.reading import read_ranking
    from analysis.store import Store
    from analysis.tables import markdown

    ranked = read_ranking(Store(), EXPERIMENT, None, names.EVAL_LOSS, At())
    markdown(ranked)
    return sum(len(row.readings) for row in ranked.rows)


def curves_in_bulk(run_ids: list[str]) -> int:
    """Three curves of every run, as figures need them."""
    from analysis.store import Store

    store = Store()
    return sum(len(curve) for metric in METRICS[:3] for curve in store.curves(run_ids, metric).values())


def curves_one_by_one(run_ids: list[str]) -> int:
    """The same by one request a run and metric."""
    client = MlflowClient()
    return sum(len(client.get_metric_history(run_id, metric)) for metric in METRICS[:3] for run_id in run_ids)


def timed(call: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and what the call returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def paired(one: Callable[[], int], other: Callable[[], int], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, run in turn after one warm-up each, and the median of their ratios, other / one."""
    assert one() == other()  # noqa: S101  # both have done the same work
    times = [(timed(one)[0], timed(other)[0]) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in times), statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    )  # fmt: skip


def peak_megabytes(what: str) -> float:
    """Peak resident size of a process that does one of the above."""
    command = [sys.executable, __file__, "--only", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Fill, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--curves", type=int, default=200, help="runs with whole curves")
    parser.add_argument("--points", type=int, default=500, help="of each curve")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("bare", "ranking", "nothing"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        import analysis.reading
        import analysis.tables  # noqa: F401  # so that imports are no part of the difference

        {"bare": bare, "ranking": ranking, "nothing": lambda: 0}[arguments.only]()
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent before exec as well
        print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024)
        return
    print(f"{arguments.runs} runs, {len(METRICS)} metrics, {len(load('last6_lora').params())} params each\n")
    print("| store | bare search, s | rank, s | ratio | one by one, s | bulk, s | times faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "mlflow.db"
        fill(store, arguments.runs, arguments.curves, arguments.points)
        run_ids = [run.info.run_id for run in _newest_last(store)[: arguments.curves]]
        with server(store) as address:
            for name, uri in (("SQLite", f"sqlite:///{store}"), ("server", address)):
                os.environ["MLFLOW_TRACKING_URI"] = uri
                plain, ranked, ratio = paired(bare, ranking, arguments.repeats)
                bulk, singly, speed = paired(
                    lambda: curves_in_bulk(run_ids), lambda: curves_one_by_one(run_ids), arguments.repeats
                )
                told = f"{plain:.1f} | {ranked:.1f} | {ratio:.2f} | {singly:.2f} | {bulk:.2f} | {speed:.1f}"
                print(f"| {name} | {told} |", flush=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
        print("\nPeak resident memory, MB (imports alone; paging; ranking): ", end="")
        print(", ".join(f"{peak_megabytes(what):.0f}" for what in ("nothing", "bare", "ranking")))


def _newest_last(store: Path) -> list:  # type: ignore[type-arg]
    """The runs in the order they were made."""
    client = MlflowClient(f"sqlite:///{store}")
    ids = [client.get_experiment_by_name(EXPERIMENT).experiment_id]
    return client.search_runs(ids, order_by=["attributes.start_time ASC"], max_results=1000)


if __name__ == "__main__":
    main()
