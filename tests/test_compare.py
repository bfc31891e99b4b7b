"""`trainer compare` with real runs: two identical arms, the same numbers, one parent; and SIGKILL in the middle."""

import io
import os
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO, Any

import pytest
from mlflow import MlflowClient

from analysis.__main__ import cli as analysis_cli
from analysis.store import Store
from tests.running import empty_store, environment, flags, runs_in, start_trainer, trainer, without_mlflow_variables
from trainer import names
from trainer.__main__ import cli
from trainer.compare import conclusion
from trainer.compare.children import standing

# As little of everything as makes a run: what is measured beside the loss has its own tests.
LEAST = {
    "global_max_length": "720",
    "custom.digits.train": "8",
    "custom.digits.val": "4",
    "custom.digits.ood": "0",
    "tracking.probe_records": "0",
    "tracking.vision_gain_records": "0",
    "tracking.generate_records": "0",
    "tracking.preview_records": "0",
}
TWO = ["compare", "--strategies", "a=frozen_vision,b=frozen_vision", "--seeds", "3", "--jobs", "2"]
PARENT = "mlflow.parentRunId"


def in_this_process(command: str, parent: str, *arguments: str, out: int | IO[str], errors: IO[str]) -> Any:
    """The analysis without another process, which would import all that is here already."""
    told, said = ["--where", conclusion.where(parent), "--by", names.EVAL_LOSS, *arguments], io.StringIO()
    with redirect_stdout(said):
        analysis_cli([command, *told], standalone_mode=False)
    return type("Done", (), {"returncode": 0, "stdout": said.getvalue()})


def as_a_user(monkeypatch: pytest.MonkeyPatch, folder: Path, **variables: str) -> None:
    """In a folder of one's own, with the tests' cache of data, and one thread."""
    monkeypatch.chdir(folder)
    for name, value in ({k: environment(None)[k] for k in ("XDG_CACHE_HOME", "OMP_NUM_THREADS")} | variables).items():
        monkeypatch.setenv(name, value)


def test_two_identical_arms_come_out_equal_below_one_parent_and_are_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A/A on one seed: each run a process of its own, the same batches, and so the same losses to the last bit."""
    with without_mlflow_variables():
        store = empty_store(tmp_path)
        as_a_user(monkeypatch, tmp_path, MLFLOW_TRACKING_URI=store)
        monkeypatch.setattr(conclusion, "_analysis", in_this_process)
        command = [*TWO, "--max_steps", "2", *flags(LEAST)]
        cli(command, standalone_mode=False)
        runs = {run.info.run_name: run for run in runs_in(store)}
        parent, a, b = (runs[name] for name in ("comparison of a, b", "a-seed3", "b-seed3"))
        assert parent.data.tags[names.TAG_ROLE] == "parent" and parent.info.status == "FINISHED"
        for run in (a, b):
            assert (run.info.status, run.data.tags[PARENT]) == ("FINISHED", parent.info.run_id)
        assert [run.data.tags[names.TAG_STRATEGY] for run in (a, b)] == ["a", "b"]
        assert a.data.tags[names.TAG_ORDER_DIGEST] == b.data.tags[names.TAG_ORDER_DIGEST]
        assert a.data.metrics[names.EVAL_LOSS] == b.data.metrics[names.EVAL_LOSS]
        said = capsys.readouterr()
        assert "a has the lowest eval/loss" in said.out or "b has the lowest eval/loss" in said.out
        artifacts = {file.path for file in MlflowClient(store).list_artifacts(parent.info.run_id)}
        assert {"ranking.txt", "report"} <= artifacts
        assert {run.id for run in Store().runs()} == {a.info.run_id, b.info.run_id}

        logs = {log: log.read_bytes() for log in tmp_path.glob("output/*/arms/*/log.txt")}
        assert len(logs) == 2
        cli(command, standalone_mode=False)
        assert capsys.readouterr().out == said.out
        assert {log: log.read_bytes() for log in logs} == logs
        assert len(runs_in(store)) == 3


def test_a_dry_run_tells_arms_commands_and_hours_where_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained, and no store is made."""
    as_a_user(monkeypatch, tmp_path)
    cli([*TWO, "--dry_run", "--max_steps", "2", *flags(LEAST)], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count("python -m trainer run frozen_vision --training.seed 3") == 2
    assert "not known" in said and "Hand-set" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_after_sigkill_the_same_command_goes_on_exactly(tmp_path: Path) -> None:
    """The whole is killed with runs on their way: they end by themselves, and no number is another for it."""
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    longer = LEAST | {"custom.digits.train": "32", "training.eval_steps": "2", "training.logging_steps": "1"}
    command = [*TWO, "--max_steps", "12", *flags(longer)]
    stores = {}
    for folder in (left_alone, killed):
        folder.mkdir()
        stores[folder] = empty_store(folder)
    done = trainer(*command, cwd=left_alone, store=stores[left_alone], timeout=900)
    assert done.returncode == 0, done.stderr

    process = start_trainer(*command, cwd=killed, store=stores[killed])
    until = time.monotonic() + 300
    while not any(standing(arm).step >= 3 for arm in killed.glob("output/*/arms/*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = trainer(*command, cwd=killed, store=stores[killed], timeout=900)
    assert again.returncode == 0, again.stderr

    rows = []
    for folder in (left_alone, killed):
        runs = {run.info.run_name: run for run in runs_in(stores[folder])}
        assert sorted(runs) == ["a-seed3", "b-seed3", "comparison of a, b"]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        client = MlflowClient(stores[folder])
        exact = [name for name in runs["a-seed3"].data.metrics if names.metric(name).exact]
        rows.append(
            {(arm, name): sorted((m.step, m.value) for m in client.get_metric_history(runs[arm].info.run_id, name))
             for arm in ("a-seed3", "b-seed3") for name in exact}
        )  # fmt: skip
    assert rows[0] == rows[1]
