"""The end of a comparison: rank, plots and report by `python -m analysis`, on the runs that lie below one parent."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from trainer import names
from trainer.compare.parent import Parent
from trainer.runs import SPOOL, disk
from trainer.spool import entries, position_of

REPORT, RANKING, LOG = "report", "ranking.txt", "report.log"


def where(parent: str) -> str:
    """The filter that finds the runs of a comparison's arms, and not those that only tried out a rate."""
    return f"tags.mlflow.parentRunId = '{parent}' AND tags.{names.TAG_ROLE} = '{names.ARM}'"


def rank(of: Parent) -> str:
    """The ranking of what has come to its end, as a table for a terminal; empty where there is none, see the log.

    Raises:
        ConfigError: the disk does not take it.
    """
    with disk(of.path):
        log = (of.path / LOG).open("w", encoding="utf-8")
    with log:
        done = _analysis("rank", of.run_id, out=subprocess.PIPE, errors=log)
    if done.returncode:
        return ""
    with disk(of.path):
        (of.path / RANKING).write_text(done.stdout, encoding="utf-8")
    of.tracker.file(of.path / RANKING)
    return done.stdout


def report(of: Parent) -> bool:
    """Write the report with its figures beside the runs, and as artifacts of the parent; whether that could be done.

    Raises:
        ConfigError: the disk takes no log.
    """
    with disk(of.path):
        log = (of.path / LOG).open("a", encoding="utf-8")
    with log:
        return _analysis("report", of.run_id, "--out", str(of.path / REPORT), out=log, errors=log).returncode == 0


def _analysis(
    command: str, parent: str, *arguments: str, out: int | IO[str], errors: IO[str]
) -> subprocess.CompletedProcess[str]:
    """A command of the analysis, in the store of this process; it may not take the run that MLflow has made for us."""
    told = [sys.executable, "-m", "analysis", command, "--where", where(parent), "--by", names.EVAL_LOSS, *arguments]
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    return subprocess.run(told, env=kept, stdout=out, stderr=errors, check=False, encoding="utf-8")


def deliver(runs: Sequence[Path]) -> list[str]:
    """Bring to the store what runs could not while they trained; a line for each of which something is left."""
    from trainer.sync import sync  # MLflow

    behind = [path for path in runs if not _is_delivered(path / SPOOL)]
    synced = sync(behind, lambda *_: None) if behind else []
    return [f"{run.path}: {run.waiting} entries are not in MLflow ({run.note})" for run in synced if run.waiting]


def _is_delivered(spool: Path) -> bool:
    return position_of(spool).delivered >= max((entry.number for entry in entries(spool)), default=0)
