"""The end of a comparison: rank, plots and report by `python -m analysis`, a process each, on the runs below one parent."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import names
from trainer.spool import entries, position_of

ARM, TRIAL = "arm", "trial"
"""Values of the tag `comparison.role`, beside `parent`."""
REPORT = "report"
_BY = names.EVAL_LOSS


def where(parent: str) -> str:
    """The filter that finds the runs of a comparison's arms, and not those that only tried out a rate."""
    return f"tags.mlflow.parentRunId = '{parent}' AND tags.{names.TAG_ROLE} = '{ARM}'"


def rank(parent: str, *arguments: str, into: Path | None = None) -> int:
    """Rank what is below a parent, on the terminal or into a file; the exit status."""
    return _analysis(["rank", "--where", where(parent), "--by", _BY, *arguments], into)


def report(parent: str, folder: Path) -> int:
    """Write the report with its figures, also as artifacts of the parent; the exit status."""
    return _analysis(["report", "--where", where(parent), "--by", _BY, "--out", str(folder / REPORT)], folder / "report.log")


def _analysis(arguments: Sequence[str], into: Path | None) -> int:
    """A command of the analysis, in the store of this process; it may not take the run that MLflow has made for us."""
    command = [sys.executable, "-m", "analysis", *arguments]
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    if into is None:
        sys.stdout.flush()
        return subprocess.run(command, env=kept, check=False).returncode
    with into.open("wb") as out:
        return subprocess.run(command, env=kept, stdout=out, check=False).returncode


def deliver(runs: Sequence[Path]) -> list[str]:
    """Bring to the store what runs could not while they trained; a line for each of which something is left."""
    from trainer.sync import sync  # MLflow

    behind = [path for path in runs if not _is_delivered(path / "spool")]
    return [f"{run.path}: {run.waiting} entries are not in MLflow ({run.note})"
            for run in (sync(behind, lambda *_: None) if behind else []) if run.waiting]  # fmt: skip


def _is_delivered(spool: Path) -> bool:
    return position_of(spool).delivered >= max((entry.number for entry in entries(spool)), default=0)
