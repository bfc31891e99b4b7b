"""How long training waits for data: real short runs of the pocket profile, augmented and not, by number of workers.

    python benchmarks/data_wait.py                                # a table; several runs of each, in turns

Waiting is the time inside `next(steps)`: reading, augmenting and encoding where there is no worker, standing idle for
workers where there are. A step is everything from one batch to the next, evaluation and saving left out.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer import run as root
from trainer.config.load import load
from trainer.data.loader import Batch, train_steps

LEFT_OUT = 3
"""First steps that are not counted: workers start, and memory is taken for the first time."""


def measure(mode: str, workers: int, steps: int, strategy: str) -> tuple[float, float, float]:
    """Share of a step that is waiting, milliseconds of a step, samples a second; medians over the steps of a run."""
    waits: list[float] = []
    whole: list[float] = []
    samples: list[int] = []

    def timed(*args: Any, **kwargs: Any) -> Iterator[list[Batch]]:
        batches = train_steps(*args, **kwargs)
        while True:
            started = time.perf_counter()
            step = next(batches)
            waits.append(time.perf_counter() - started)
            samples.append(sum(batch.n_samples for batch in step))
            yield step
            whole.append(time.perf_counter() - started)

    overrides = {
        "max_steps": str(steps),
        "custom.augmentation.mode": mode,
        "data.dataloader_num_workers": str(workers),
        **dict.fromkeys(("tracking.probe_records", "tracking.vision_gain_records", "tracking.generate_records"), "0"),
        **{"training.eval_steps": str(10 * steps), "training.logging_steps": str(10 * steps), "custom.digits.ood": "0"},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        original, root.train_steps = root.train_steps, timed
        try:
            root.run(load(strategy, overrides=overrides | {"output_dir": folder}))
        finally:
            root.train_steps = original
    counted = slice(LEFT_OUT, len(whole))
    share = sum(waits[counted]) / sum(whole[counted])
    return share, 1000 * median(whole[counted]), sum(samples[counted]) / sum(whole[counted])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="last6_lora")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--workers", default="0,1,2", help="comma-separated")
    arguments = parser.parse_args()
    kinds = list(product(("off", "clean"), map(int, arguments.workers.split(","))))
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for mode, workers in kinds:
            found[mode, workers].append(measure(mode, workers, arguments.steps, arguments.strategy))
    table = Table(
        title=f"waiting for data, {arguments.strategy}, {os.cpu_count()} CPUs, medians of {arguments.repeats}"
    )
    for heading in ("augmentation", "workers", "waiting, % of a step", "step, ms", "samples/s"):
        table.add_column(heading, justify="right")
    for (mode, workers), runs in found.items():
        share, step, rate = (median(values) for values in zip(*runs, strict=True))
        table.add_row(mode, str(workers), f"{100 * share:.1f}", f"{step:.0f}", f"{rate:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
