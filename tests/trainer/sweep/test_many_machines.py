"""Three workers on one PostgreSQL, one of them killed: one COMPLETE a grid point, and the study goes on."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from tests.running import SMALL, flags, runs_in, start_trainer, trainer
from tests.servers import postgres
from trainer import names
from trainer.sweep.conduct import base_of
from trainer.sweep.storage import Storage
from trainer.sweep.study import opened
from trainer.sweep.sweep_file import read_sweep

pytestmark = pytest.mark.slow

SWEEP = """
strategy: last6_lora
space:
  training.vit_lr: [1.0e-4, 1.2e-4, 1.5e-4, 2.0e-4]
seeds: [5, 6]
"""
SETTINGS = {key: text for key, text in SMALL.items() if key != "training.max_steps"}
SETTINGS |= {"training.max_steps": "12", "tracking.generate_records": "0", "tracking.preview_records": "0"}


def logs(folder: Path) -> dict[str, str]:
    """Trial -> what its processes have said so far."""
    return {path.parent.name[:4]: path.read_text() for path in folder.glob("output/sweeps/many/*/log.txt")}


def until(true: Callable[[], bool], workers: list[subprocess.Popen[str]], seconds: float = 900) -> None:
    """Wait for something to be so, as long as some worker lives."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and any(worker.poll() is None for worker in workers)
        time.sleep(0.2)


def test_three_workers_share_a_study_and_one_of_them_is_killed(tmp_path: Path) -> None:
    """Every point is COMPLETE once, that of the killed worker in the same folder, from its resume point."""
    (tmp_path / "many.yaml").write_text(SWEEP)
    with postgres(tmp_path) as uri:
        study_uri = uri.removesuffix("/mlflow") + "/mlflow_users"  # empty as long as no server with logins has used it
        variables = {"SWEEP_STORAGE": study_uri}
        command = ["sweep", str(tmp_path / "many.yaml"), "--jobs", "1", "--grace", "20", *flags(SETTINGS)]
        workers = [start_trainer(*command, cwd=tmp_path, store=uri, **variables) for _ in range(3)]
        try:
            until(lambda: sum("step  3/12" in log for log in logs(tmp_path).values()) >= 2, workers)
            os.kill(workers[0].pid, signal.SIGKILL)
            said = [worker.communicate(timeout=1800)[1] for worker in workers]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
        assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0], said
        again = trainer(*command, cwd=tmp_path, store=uri, **variables)
        assert again.returncode == 0 and "this sweep is finished" in again.stderr
        assert again.stdout.count("2/2") == 4

        sweep = read_sweep(str(tmp_path / "many.yaml"), overrides=SETTINGS)
        with opened(sweep, Storage(study_uri, "many", grace_seconds=20), base_of(sweep)) as study:
            tried = study.tried()
        assert [one.state for one in tried] == [TrialState.COMPLETE] * 8
        assert len({str(one.point) for one in tried}) == 8
        assert sum(one.attempts for one in tried) == 9  # that of the killed worker, and no other, twice
        (killed,) = [one for one in tried if one.attempts == 2]
        assert len({one.worker for one in tried}) == 2  # of the last attempts: the killed one is not among them

        runs = runs_in(uri)
        roles = Counter(run.data.tags[names.TAG_ROLE] for run in runs)
        assert roles == {"parent": 1, "trial": 8} and {run.info.status for run in runs} == {"FINISHED"}
        (resumed,) = [run for run in runs if names.TAG_RESUMED_AT in run.data.tags]
        assert int(resumed.data.tags[names.TAG_TRIAL]) == killed.first
        steps = [row.step for row in MlflowClient(uri).get_metric_history(resumed.info.run_id, names.TRAIN_LOSS)]
        assert len(steps) == len(set(steps)) and max(steps) == 12
        print(f"trial {killed.first} was taken over at step {resumed.data.tags[names.TAG_RESUMED_AT]}")
        for line in sorted(line for text in said for line in text.splitlines() if "eval/best_loss" in line):
            print(line)
