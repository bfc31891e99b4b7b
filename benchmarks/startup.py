"""Measures how long a training takes to begin: from the start of its process to its first step, and to its end.

    python benchmarks/startup.py

Runs of one step on pocket, as they are by default but for that, one and two ranks in turn. An uncounted run has
read all files before, built the kernels and made the store. Moments are seconds since the first process was started, of
the first rank; all sets are evaluated before the first step, and once more before the end; no captions are generated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import facts

HERE = Path(__file__).parent
OUT = HERE / "results" / "performance" / "startup.json"
RANKS = (1, 2)


def begin(ranks: int, arm: str, store: str) -> dict[str, Any]:
    """One run of one step in a folder of its own: moment -> seconds since its start."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("import moments\n", encoding="utf-8")
        noted = Path(folder) / "moments"
        environment = os.environ | {
            "MOMENTS": str(noted),
            "PYTHONPATH": os.pathsep.join([str(site), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "MLFLOW_TRACKING_URI": store,
        }
        command = [sys.executable, "-m", "trainer", "run", arm, "--max_steps", "1", "--output_dir", folder]
        command += ["--launch.nproc", str(ranks), "--tracking.generate_records", "0"]
        if ranks > 1:  # the same step, shared
            command += ["--training.gradient_accumulation_steps", "1"]
        started = time.time()
        done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
        end = time.time() - started
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        moments: dict[str, float] = {}
        for line in noted.read_text(encoding="utf-8").splitlines():
            rank, at, moment = line.split(" ", 2)
            if rank in ("-", "0"):
                moments[moment] = float(at) - started  # of two that read the arguments, the rank does so last
    return {"ranks": ranks, **moments, "end": end}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="last6_lora", help="a strategy file of experiments/")
    parser.add_argument("--turns", type=int, default=3, help="runs of each number of ranks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        begin(1, asked.arm, store)  # files are in memory then, kernels built, the store's tables made
        runs = [begin(ranks, asked.arm, store) for _ in range(asked.turns) for ranks in RANKS]
    for run in runs:
        print(", ".join(f"{what} {value:.4g}" for what, value in run.items()))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"facts": facts(), "arm": asked.arm, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
