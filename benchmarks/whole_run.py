"""Measures whole runs: from the start of a process to an eval loss, with start-up, compiling and evaluations in it.

    python benchmarks/whole_run.py --arm last6_lora --loss 0.65 --epochs 2 --turns 2

Three forms of the pocket run take turns. `plain`: transformers' forward pass, one process, as the Trainer would do it.
`cold`: as this project trains by default, on a machine that has never done it (no compiled kernels, no image features).
`warm`: the same once more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import facts
from mlflow import MlflowClient

from trainer import names
from trainer.cache import cache_folder

OUT = Path(__file__).parent / "results" / "performance" / "whole_run.json"
FORMS = {"plain": ["--model.fused", "false", "--launch.nproc", "1"], "cold": [], "warm": []}


def run(form: str, arguments: list[str], cache: Path, loss: float) -> dict[str, Any]:
    """One run in a folder of its own: seconds to the loss, to the end of the process, and how it went."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "MLFLOW_TRACKING_URI": store}
        command = [sys.executable, "-m", "trainer", "run", *arguments, *FORMS[form]]
        started = time.time()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        whole = time.time() - started
        client = MlflowClient(store)
        (only,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
        rows = client.get_metric_history(only.info.run_id, names.EVAL_LOSS)
    reached = [row.timestamp / 1000 - started for row in sorted(rows, key=lambda row: row.step) if row.value <= loss]
    return {
        "form": form,
        "seconds_to_loss": reached[0] if reached else None,
        "seconds": whole,
        "losses": {row.step: row.value for row in rows},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="last6_lora", help="a strategy file of experiments/")
    parser.add_argument("--loss", type=float, default=0.65, help="eval loss, nats a supervised token")
    parser.add_argument("--epochs", type=int, default=2, help="of the 576 built-in scenes")
    parser.add_argument("--turns", type=int, default=2, help="runs of each form")
    asked = parser.parse_args()
    arguments = [asked.arm, "--training.num_train_epochs", str(asked.epochs), "--tracking.generate_records", "0",
                 "--training.eval_steps", "12"]  # fmt: skip
    found = []
    for _ in range(asked.turns):
        with tempfile.TemporaryDirectory() as cache:
            digits = Path(cache) / cache_folder().name  # the data is there: drawing it is nobody's training
            digits.mkdir()
            for folder in cache_folder().glob("digits-*"):
                (digits / folder.name).symlink_to(folder)
            for form in FORMS:
                found.append(run(form, arguments, Path(cache), asked.loss))
                print(json.dumps({key: value for key, value in found[-1].items() if key != "losses"}), flush=True)
    for form in FORMS:
        of = [each["seconds_to_loss"] for each in found if each["form"] == form and each["seconds_to_loss"]]
        print(f"{form:<6} {median(of):.1f} s to {asked.loss}" if of else f"{form}: not reached")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"facts": facts(), "arm": asked.arm, "loss": asked.loss, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
