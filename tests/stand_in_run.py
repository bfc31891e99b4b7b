"""A process that stands in for a training run: it writes a run's folder as training does, in a tenth of a second.

    python -m tests.stand_in_run '{"name": ..., "folder": ..., "strategy": ..., "given": {option: value}}'

What it does beside is said in behaviour.json: see `tests.trainer.standing_in`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from trainer import names
from trainer.runs import Identity, RunFolder, held, new_run, runs_below
from trainer.spool import BEGIN

TOTAL, BETWEEN, STEP = 900, 100, 10
"""Training samples of a run, between two evaluations, and of an optimizer step."""


def behaviour(asked: dict[str, Any]) -> dict[str, Any]:
    """What is said of all, of the arm, and of this run, the last one first."""
    known = json.loads(Path("behaviour.json").read_text(encoding="utf-8"))
    arm = asked["given"].get("--tracking.arm", asked["strategy"])
    return {"loss": 1.0, **known.get("all", {}), **known.get(arm, {}), **known.get(asked["name"], {})}


def folder_of(asked: dict[str, Any], params: dict[str, str]) -> RunFolder:
    """The unfinished run, or a new one."""
    parent = Path(asked["folder"])
    for path, facts in runs_below(parent):
        if facts["state"] in ("paused", "interrupted", "running"):
            return held(path)
    folder = new_run(parent, Identity(asked["name"], {"strategy": asked["strategy"], **params}, "x"))
    folder.write(total_steps=TOTAL // STEP)
    folder.spool.append(BEGIN, key=folder.key)
    return folder


def main() -> int:
    """Exit status: as the run that it stands for."""
    asked = json.loads(sys.argv[1])
    given, mine = asked["given"], behaviour(asked)
    with Path("started.txt").open("a", encoding="utf-8") as started:
        started.write(f"{asked['name']} {given.get('--pause_after_samples', 'end')}\n")
    if mine.get("status") == 1:
        print("error: told to fail", file=sys.stderr)
        return 1
    folder = folder_of(asked, mine.get("params", {}))
    if mine.get("status") == 3:
        folder.write(state="stopped")
        return 3
    rate = f"{float(given.get('--training.vit_lr', given.get('--training.aligner_lr', 0))):g}"
    loss = mine["loss"] + mine.get("by_seed", {}).get(given["--training.seed"], 0.0)
    loss += mine.get("by_rate", {}).get(rate, 0.0)
    rows = [entry.body["values"] for entry in folder.spool.read() if entry.kind == "metrics"]
    seen = int(rows[-1][names.SAMPLES_SEEN]) if rows else -BETWEEN
    end = min(TOTAL, int(given.get("--pause_after_samples", TOTAL)))
    for samples in range(seen + BETWEEN, end + 1, BETWEEN):
        at = {names.SAMPLES_SEEN: float(samples), names.TRAIN_SECONDS: samples / 10}
        row = {names.EVAL_LOSS: loss + BETWEEN / (BETWEEN + samples), **at}
        folder.spool.append("metrics", step=samples // STEP, values=row)
    folder.spool.sync()
    folder.write(state="over" if end == TOTAL else "paused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
