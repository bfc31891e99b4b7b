"""Hostile `-P` values through real `mlflow run`: nothing in them is executed, and they end in the one message.

A short search takes the first two sets of values: each takes seconds.
"""

from pathlib import Path

import pytest

from tests.hostile.harness import EXAMPLES, is_a_message
from tests.running import empty_store, runs_in
from tests.test_mlproject import EXPERIMENT, mlflow_run

CASES: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "a shell's signs": (
        "last6_lora",
        {
            "model": "a\ntouch trap\n",
            "train_jsonl": "$(touch trap)",
            "val_jsonl": "x'; touch trap; 'y",
            "output_dir": '"; touch trap; "',
            "training.seed": "`touch trap`",
            "tuner.lora_rank": "${IFS}|touch trap&",
        },
        ["5 mistakes", "-P model.model", "-P custom.train_jsonl", "-P custom.val_jsonl", "-P training.seed"],
    ),
    "leading dashes and no letters": (
        "last6_lora",
        {"model": "--help", "train_jsonl": "-", "val_jsonl": "--", "seed": "-1", "max_steps": " ", "profile": "pocket"},
        ["4 mistakes", "'--help': no such model", "'-': no such file", "'--': no such file", "at least 0"],
    ),
    "ten thousand letters of all kinds": (
        "main",
        {"config": "ü😀\u202e\x1b[2J" + "x" * 10_000, "training.run_name": "", "model": "y" * 5_000},
        ["no such file", "ü😀"],
    ),
    "tags and bombs": (
        "validate",
        {
            "train_jsonl": "",
            "tuner.target_modules": "[&a [x, x], &b [*a, *a], &c [*b, *b]]",
            "training.seed": "!!python/object/apply:os.system [touch trap]",
            "training.vit_lr": ".nan",
            "training.num_train_epochs": "1e999",
            "launch.nproc": "9" * 5_000,
        },
        ["-P training.seed", "tag", "-P training.vit_lr", "a finite number", "-P launch.nproc"],
    ),
}


@pytest.mark.parametrize("case", CASES if EXAMPLES else list(CASES)[:2])
def test_a_hostile_value_is_told_as_what_it_is(tmp_path: Path, case: str) -> None:
    """In declared parameters and in others; the run is FAILED, and no file was made anywhere near."""
    entry, parameters, words = CASES[case]
    store = empty_store(tmp_path)
    done = mlflow_run(entry, parameters, tmp_path, store)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" not in done.stderr
    told = "error: " + done.stderr.split("error: ")[1].split("\n2")[0]
    is_a_message(told)
    for word in words:
        assert word in told, told
    assert [run.info.status for run in runs_in(store, EXPERIMENT)] == ["FAILED"]
    made = {path.name for path in [*tmp_path.rglob("*"), *Path(__file__).parents[2].glob("trap*")]}
    assert made == {"mlflow.db"}
