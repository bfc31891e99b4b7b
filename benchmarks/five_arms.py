"""Trains the five arms on several seeds and writes the table and the plot that README and docs show.

    python benchmarks/five_arms.py --seeds 17,18,19 --jobs 2      # skips what is already in the store

Each run is its own process with as many threads as fit beside the others. Differences are paired by seed: runs of one
seed see the same batches in the same order (until accumulation differs).
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import matplotlib.pyplot as plt
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.progress import Progress

from trainer import names
from trainer.config.load import load
from trainer.provenance import code_version
from trainer.tracking import tracking_uri

ROOT = Path(__file__).parents[1]
ARMS = ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")
CONTROL = ARMS[0]
COLOURS = dict(zip(ARMS, ("#7f7f7f", "#0072b2", "#56b4e9", "#d55e00", "#e69f00"), strict=True))  # Okabe and Ito 2008
COLUMNS = {
    "eval loss, final": names.EVAL_LOSS,
    "eval loss, best": names.BEST_LOSS,
    "train loss": names.TRAIN_LOSS_SMOOTHED,
    "gap": names.GAP,
    "clean gap": names.GAP_CLEAN,
    "vision gain": names.VISION_GAIN,
    "out of domain": names.OOD_LOSS,
    "F1": names.F1,
}


def finished(client: MlflowClient, code: str | None) -> Iterator[Run]:
    """The runs in the store that ended well, with the pocket profile as it is shipped, on this code (None: on any)."""
    experiment = client.get_experiment_by_name(names.EXPERIMENT)
    if experiment is not None:
        found = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1000)
        yield from (run for run in found if as_shipped(run) and code in (None, run.data.tags[names.TAG_CODE_VERSION]))


def as_shipped(run: Run) -> bool:
    """Whether a run is one of the arms under the pocket profile, with nothing changed but the seed, its gate passed."""
    tags, params = run.data.tags, run.data.params
    if tags.get(names.TAG_STRATEGY) not in ARMS or tags.get(names.TAG_GATE) != "passed":
        return False
    shipped = load(tags[names.TAG_STRATEGY], overrides={"seed": tags[names.TAG_SEED]}).params()
    return all(params.get(key) == value for key, value in shipped.items())


def train(arm: str, seed: int, threads: int) -> None:
    """One run in a process of its own; what it prints goes to a file beside its output."""
    logs = Path("output") / "five_arms"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer", "run", arm, "--seed", str(seed)]
    with (logs / f"{arm}-{seed}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def table(runs: dict[tuple[str, int], Run], seeds: list[int]) -> str:
    """In Markdown: mean and deviation over seeds, and the best eval loss of each arm against the control, by seed."""
    commits = {run.data.tags[names.TAG_CODE_VERSION] for run in runs.values()}
    lines = [
        "# Five arms on pocket and digits",
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; losses in nats per supervised token, "
        "train loss smoothed. `seconds` are of training steps alone, measured with other runs beside them.",
        f"Code: {', '.join(sorted(commits))}. Made by `python benchmarks/five_arms.py`.",
        "",
    ]
    lines += ["| arm | " + " | ".join(COLUMNS) + " | seconds |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for arm in ARMS:
        cells = []
        for metric in (*COLUMNS.values(), names.TRAIN_SECONDS):
            values = [runs[arm, seed].data.metrics[metric] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.0f}" if metric == names.TRAIN_SECONDS
                         else f"{statistics.mean(values):.4f}{spread}")  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", f"Best eval loss minus that of {CONTROL}, same seed:", ""]
    lines += ["| arm | " + " | ".join(f"seed {s}" for s in seeds) + " |", "| --- |" + " --- |" * len(seeds)]
    for arm in ARMS[1:]:
        deltas = [
            runs[arm, s].data.metrics[names.BEST_LOSS] - runs[CONTROL, s].data.metrics[names.BEST_LOSS] for s in seeds
        ]
        lines.append(f"| {arm} | " + " | ".join(f"{d:+.4f}" for d in deltas) + " |")
    return "\n".join(lines) + "\n"


def plot(client: MlflowClient, runs: dict[tuple[str, int], Run], path: Path) -> None:
    """Eval and train loss against samples seen, a thin line a run: accumulation differs, so steps would mislead."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, metric, title in ((axes[0], names.EVAL_LOSS, "eval loss"), (axes[1], names.TRAIN_LOSS, "train loss")):
        for (arm, seed), run in runs.items():
            history = client.get_metric_history(run.info.run_id, metric)
            samples = {m.step: m.value for m in client.get_metric_history(run.info.run_id, names.SAMPLES_SEEN)}
            x, y = [samples[m.step] for m in history], [m.value for m in history]
            label = arm if seed == min(s for _, s in runs) else None
            axis.plot(x, y, color=COLOURS[arm], linewidth=1.2, alpha=0.85, label=label)
        axis.set(title=title, xlabel="samples seen")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per supervised token")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="17,18,19", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for five_arms.md and five_arms.png")
    parser.add_argument("--any-code", action="store_true", help="take runs of other commits too")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)

    def key(run: Run) -> tuple[str, int]:
        return run.data.tags[names.TAG_STRATEGY], int(run.data.tags[names.TAG_SEED])

    code = None if arguments.any_code else code_version()
    have = {key(run) for run in finished(client, code)}
    missing = [(arm, seed) for seed in seeds for arm in ARMS if (arm, seed) not in have]
    with Progress() as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(missing))
        trained = [pool.submit(train, arm, seed, threads) for arm, seed in missing]
        for done in as_completed(trained):
            done.result()
            progress.advance(task)

    runs = {key(run): run for run in finished(client, code)}
    runs = {(arm, seed): runs[arm, seed] for arm in ARMS for seed in seeds}
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "five_arms.md").write_text(table(runs, seeds), encoding="utf-8")
    plot(client, runs, arguments.out / "five_arms.png")
    print(table(runs, seeds))


if __name__ == "__main__":
    main()
