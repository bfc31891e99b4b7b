"""What tracking costs a step at `logging_steps: 1`: paired runs of the pocket profile, logged to SQLite and not at all.

    python benchmarks/tracking_overhead.py --pairs 6              # a table; with and without take turns

A step is everything from one batch to the next: its row is written down in it, and delivered beside it. Without
tracking the loop emits the same events to nobody. Evaluation, saving, start and end are left out. The last two columns
say where the time of tracking goes, by the clocks of the threads that spend it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from trainer import run as root
from trainer.config.load import load
from trainer.data.loader import Batch, train_steps
from trainer.tracker import SpoolTracker, Tracker
from trainer.tracking import MlflowDoor

LEFT_OUT = 3
"""First steps that are not counted: memory is taken for the first time."""


def measure(*, tracked: bool, steps: int, strategy: str) -> tuple[float, float, float]:
    """Milliseconds of a step of one run: median; spent writing rows down; spent by the thread that delivers them."""
    whole: list[float] = []
    spent = {"writing": 0.0, "delivering": 0.0}

    def clocked(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                if kind == "writing" or args[1][0].kind == "metrics":
                    spent[kind] += time.thread_time() - started

        return call

    def timed(*args: Any, **kwargs: Any) -> Iterator[list[Batch]]:
        for step in train_steps(*args, **kwargs):
            started = time.perf_counter()
            yield step
            whole.append(time.perf_counter() - started)

    overrides = {
        "max_steps": str(steps),
        "training.logging_steps": "1",
        "training.eval_steps": str(10 * steps),
        "custom.digits.ood": "0",
        **dict.fromkeys(("tracking.probe_records", "tracking.vision_gain_records", "tracking.generate_records"), "0"),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(root, "train_steps", timed),
        patch.object(SpoolTracker, "metrics", clocked(SpoolTracker.metrics, "writing")),
        patch.object(MlflowDoor, "_take", clocked(MlflowDoor._take, "delivering")),
    ):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        resolved = load(strategy, overrides=overrides | {"output_dir": folder})
        if tracked:
            root.run(resolved)
        else:
            with patch.object(root, "open_tracker", lambda *_, **__: Tracker()):
                root.run(resolved)
    return 1000 * median(whole[LEFT_OUT:]), 1000 * spent["writing"] / steps, 1000 * spent["delivering"] / steps


def main() -> None:
    """Measure pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="runs with and without tracking")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--strategy", default="last6_lora")
    arguments = parser.parse_args()
    console, table = (
        Console(),
        Table("pair", "tracked ms", "not tracked ms", "overhead %", "writing ms", "delivering ms"),
    )
    shares = []
    for number in range(1, arguments.pairs + 1):
        order = (True, False) if number % 2 else (False, True)  # neither always comes first
        found = {on: measure(tracked=on, steps=arguments.steps, strategy=arguments.strategy) for on in order}
        (on, writing, delivering), (off, _, _) = found[True], found[False]
        shares.append(100 * (on / off - 1))
        table.add_row(
            str(number), f"{on:.1f}", f"{off:.1f}", f"{shares[-1]:+.2f}", f"{writing:.2f}", f"{delivering:.2f}"
        )
    console.print(table)
    console.print(f"median overhead of {arguments.pairs} pairs: {median(shares):+.2f} %")


if __name__ == "__main__":
    main()
