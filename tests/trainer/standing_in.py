"""Lets processes stand in for the runs of a comparison, says what they do, and tells which were started."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT
from trainer.compare.children import Job


def stand_in(monkeypatch: pytest.MonkeyPatch, **behaviour: dict[str, Any]) -> None:
    """From now on, runs are stand-ins; what each does is said under its name, its arm's, or `all`.

    Keys: `loss` at the end, `status` (1: fails; 3: stops itself), `by_seed` and `by_rate`, added to the loss, `params`.
    """
    behave(**behaviour)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(Job, "command", property(_command))


def behave(**behaviour: dict[str, Any]) -> None:
    """What they do from now on."""
    Path("behaviour.json").write_text(json.dumps(behaviour), encoding="utf-8")


def _command(job: Job) -> list[str]:
    strategy, *rest = job.arguments
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    told = {"name": job.name, "folder": str(job.folder), "strategy": strategy, "given": given}
    return ["-m", "tests.stand_in_run", json.dumps(told)]  # as a script, it would take tests/trainer for our package


def started() -> list[str]:
    """`NAME SAMPLES` or `NAME end` of every run that was started, in order."""
    file = Path("started.txt")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
