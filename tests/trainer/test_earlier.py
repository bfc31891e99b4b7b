"""The pace of earlier runs: of the same work, on this host, from what they left."""

import json
import socket
from pathlib import Path

import pytest

from trainer import names
from trainer.config.load import load
from trainer.config.resolved import Resolved
from trainer.earlier import earlier_pace
from trainer.runs import RUN_FILE, SPOOL
from trainer.spool import Spool


def resolved(folder: Path, **overrides: str) -> Resolved:
    """`last6_lora` with runs in a folder."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load("last6_lora", overrides={"training.output_dir": str(folder), **given})


def leave_run(folder: Path, of: Resolved, *, tokens: float, seconds: float, began: float, host: str = "") -> Path:
    """What a run leaves behind."""
    path = folder / f"run-{began:g}"
    facts = {
        "format": 1, "key": "k", "name": "n", "state": "over", "began": began, "store": "s",
        "params": {**of.params(), "data.train_digest": "as runs have it"},
        "left_upto": 0, "pid": 1, "host": host or socket.gethostname(),
    }  # fmt: skip
    path.mkdir()
    (path / RUN_FILE).write_text(json.dumps(facts))
    spool = Spool(path / SPOOL)
    spool.append("metrics", step=1, values={names.TOKENS_SEEN: 1.0, names.TRAIN_SECONDS: 9.0})
    spool.append("metrics", step=2, values={names.TOKENS_SEEN: tokens, names.TRAIN_SECONDS: seconds})
    spool.append("metrics", step=2, values={"eval/loss": 1.0})
    spool.close()
    return path


def test_the_newest_run_of_the_same_work_says_how_fast_it_was(tmp_path: Path) -> None:
    """Its last row counts; seed, rates and length of training may differ."""
    mine = resolved(tmp_path)
    leave_run(tmp_path, mine, tokens=1000, seconds=10, began=1)
    leave_run(tmp_path, resolved(tmp_path, training__seed="5", training__max_steps="9"), tokens=900, seconds=3, began=2)
    pace = earlier_pace(mine)
    assert pace is not None
    assert (pace.tokens_per_second, pace.tokens, pace.run) == (300.0, 900, "run-2")


@pytest.mark.parametrize(
    "other", [{"tuner__lora_rank": "8"}, {"launch__nproc": "2"}, {"training__gradient_checkpointing": "true"}]
)
def test_other_work_says_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    """What is trained, ranks, checkpointing."""
    leave_run(tmp_path, resolved(tmp_path, **other), tokens=1000, seconds=10, began=1)
    assert earlier_pace(resolved(tmp_path)) is None


def test_neither_do_other_hosts_or_damaged_runs(tmp_path: Path) -> None:
    """Nor a folder that is not there."""
    mine = resolved(tmp_path)
    leave_run(tmp_path, mine, tokens=1000, seconds=10, began=1, host="another")
    damaged = leave_run(tmp_path, mine, tokens=1000, seconds=10, began=2)
    for segment in (damaged / SPOOL).glob("*.jsonl"):
        segment.write_bytes(b"00000000 [1, 2, \xff\n")
    assert earlier_pace(mine) is None
    assert earlier_pace(resolved(tmp_path / "nowhere")) is None
