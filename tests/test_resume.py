"""A run that was asked to end goes on as if nothing had happened: by the same command, under the same settings.

One run is ended by SIGTERM in its fourth step; every test gets it as it was left. What SIGKILL leaves is in `faults`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.faults.comparing import SHORT, Result, assert_same, result_of
from tests.running import ROOT, empty_store, environment, flags, runs_in, start_trainer, trainer, wait_for
from trainer import names

COMMAND = ["run", "last6_lora", "--seed", "3", *flags(SHORT)]
A_WORKER = ["--data.dataloader_num_workers", "1"]


def kept(*arguments: str, cwd: Path, store: str) -> subprocess.CompletedProcess[str]:
    """The trainer, which leaves its resume points when it is over."""
    command = [sys.executable, "-m", "tests.faults.dying", "{}", *arguments]
    variables = environment(store, PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@dataclass(frozen=True)
class Interrupted:
    """A run that has ended before its time."""

    folder: Path
    store: str
    run_id: str
    status: int
    seconds: float
    """From the signal to the end of the process."""
    stderr: str

    @property
    def home(self) -> Path:
        """The run's own folder."""
        (file,) = (self.folder / "output").glob("*/run.json")
        return file.parent


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    store = empty_store(folder)
    done = kept(*COMMAND, *A_WORKER, cwd=folder, store=store)
    assert done.returncode == 0, done.stderr
    return result_of(folder, store)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Asked to end while it takes its fourth step, with the whole of its process group, a loader process too."""
    folder = tmp_path_factory.mktemp("ended")
    store = empty_store(folder)
    process = start_trainer(*COMMAND, *A_WORKER, cwd=folder, store=store)
    try:
        wait_for(process, "step 3/6")
        asked = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        _, rest = process.communicate(timeout=240)
        seconds = time.monotonic() - asked
    finally:
        process.kill()
    (run,) = runs_in(store)
    shutil.copytree(folder, folder.with_name("as-it-was-left"))
    return Interrupted(folder, store, run.info.run_id, process.returncode, seconds, rest)


@pytest.fixture
def interrupted(ended: Interrupted) -> Interrupted:
    """The same run, as it was left, at the same place.

    The database is put back under this process's open connections. SQLite tells by a counter of writes in the file
    whether the pages that it remembers still hold, and two tests may write equally often: the connections are closed.
    """
    MlflowClient(ended.store)._tracking_client.store.engine.dispose()
    for name in ("output", "mlruns"):
        shutil.rmtree(ended.folder / name, ignore_errors=True)
    shutil.copytree(ended.folder.with_name("as-it-was-left"), ended.folder, dirs_exist_ok=True)
    return ended


def test_a_signal_ends_the_run_after_its_step_with_a_resume_point(interrupted: Interrupted) -> None:
    """KILLED, exit status 143, well within 30 seconds, and a message that says how to go on."""
    (run,) = runs_in(interrupted.store)
    assert (interrupted.status, run.info.status) == (143, "KILLED")
    assert interrupted.seconds < 30
    assert "a resume point is written; the same command goes on from there" in interrupted.stderr
    assert interrupted.stderr.count("stopping after this optimizer step") == 1
    steps = [step for step, _ in MlflowClientRows(interrupted).of(names.TRAIN_LOSS)]
    assert (interrupted.home / "resume" / f"step-{steps[-1]}").is_dir()


@dataclass(frozen=True)
class MlflowClientRows:
    """Rows of the interrupted run."""

    run: Interrupted

    def of(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        history = MlflowClient(self.run.store).get_metric_history(self.run.run_id, metric)
        return sorted((m.step, m.value) for m in history)


def test_the_same_command_ends_the_same_run_bit_identical(interrupted: Interrupted, left_alone: Result) -> None:
    """One run in MLflow, which says where it was taken up again. The number of loader processes changes nothing."""
    done = kept(*COMMAND, cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0, done.stderr
    assert f"going on with {interrupted.home.relative_to(interrupted.folder)}, after optimizer step" in done.stderr
    result = result_of(interrupted.folder, interrupted.store)
    assert_same(result, left_alone)
    assert result.run.info.run_id == interrupted.run_id
    assert result.run.data.tags[names.TAG_RESUMED_AT] in "345"


def test_through_mlflow_run_the_first_run_goes_on_and_the_new_one_points_to_it(
    interrupted: Interrupted, left_alone: Result
) -> None:
    """`mlflow run` makes one before it starts us: without a strategy, so that no comparison takes it; it ends well."""
    settings = [f"-P{key}={value}" for key, value in {**SHORT, "seed": "3"}.items()]
    command = ["mlflow", "run", str(ROOT), "-e", "last6_lora", "--env-manager", "local", *settings]
    command += ["--experiment-name", names.EXPERIMENT, "-P", f"output_dir={interrupted.folder}/output"]
    done = subprocess.run(
        command, cwd=interrupted.folder, env=environment(interrupted.store), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    runs = {run.info.run_id: run for run in runs_in(interrupted.store)}
    first = runs.pop(interrupted.run_id)
    (made,) = runs.values()
    assert (first.info.status, made.info.status) == ("FINISHED", "FINISHED")
    assert made.data.tags[names.TAG_CONTINUED_IN] == interrupted.run_id
    assert names.TAG_STRATEGY not in made.data.tags and made.data.metrics == {}
    for name, rows in left_alone.rows.items():
        if names.metric(name).exact:
            assert MlflowClientRows(interrupted).of(name) == rows, name


def flip_a_bit(point: Path) -> None:
    """In the middle of its tensors."""
    file = point / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_resume_point_is_passed_over_and_without_a_sound_one_nothing_is_thrown_away(
    interrupted: Interrupted, left_alone: Result
) -> None:
    """A flipped bit is found before anything is taken from it, and the point before is as good. Where no point is sound
    a person decides: the run is refused, and stays as it is.
    """
    newest, older = sorted((interrupted.home / "resume").iterdir(), reverse=True)[:2]
    flip_a_bit(newest)
    sound = (older / "tensors.safetensors").read_bytes()
    flip_a_bit(older)
    refused = trainer(*COMMAND, cwd=interrupted.folder, store=interrupted.store)
    assert refused.returncode == 2 and "none is sound" in refused.stderr and "--resume never" in refused.stderr
    assert newest.is_dir() and older.is_dir()
    (older / "tensors.safetensors").write_bytes(sound)
    done = kept(*COMMAND, cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its SHA-256 differs); the one before it is taken") == 1
    assert_same(result_of(interrupted.folder, interrupted.store), left_alone)


def test_on_another_number_of_ranks_it_goes_on_and_says_what_that_means(
    interrupted: Interrupted, left_alone: Result
) -> None:
    """The optimizer's state is kept whole and by name; sums in another order agree to rounding."""
    two = ["--launch.nproc", "2", "--training.gradient_accumulation_steps", "1"]
    done = kept(*COMMAND, *two, cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0, done.stderr
    assert "launch.nproc from 1 to 2" in done.stderr and "to rounding, not to the bit" in done.stderr
    (run,) = runs_in(interrupted.store)
    assert (run.info.run_id, run.info.status) == (interrupted.run_id, "FINISHED")
    # dropout is drawn by rank, so that masks of two ranks are others: the losses stay near, and no row is missing
    rows = MlflowClientRows(interrupted).of(names.EVAL_LOSS)
    assert [step for step, _ in rows] == [step for step, _ in left_alone.rows[names.EVAL_LOSS]]
    assert rows[-1][1] == pytest.approx(left_alone.rows[names.EVAL_LOSS][-1][1], rel=0.1)


def test_under_auto_it_goes_on_with_the_ranks_that_it_had(interrupted: Interrupted, left_alone: Result) -> None:
    """And comes out as if nothing had happened, whatever this machine would have chosen for a new run."""
    done = kept(*COMMAND, "--launch.nproc", "auto", cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stderr and "to rounding" not in done.stderr
    assert_same(result_of(interrupted.folder, interrupted.store), left_alone)


def test_another_configuration_is_refused_with_its_differences_or_allowed_and_tagged(interrupted: Interrupted) -> None:
    """Nothing is lost by the refusal."""
    changed = [*COMMAND, "--training.vit_lr", "2e-4", "--resume", str(interrupted.home)]
    refused = trainer(*changed, cwd=interrupted.folder, store=interrupted.store)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "training.vit_lr: 0.00012 before, 0.0002 now" in refused.stderr and "--allow_drift" in refused.stderr
    assert runs_in(interrupted.store)[0].info.status == "KILLED"

    done = trainer(*changed, "--allow-drift", cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(interrupted.store)
    assert (run.info.run_id, run.info.status) == (interrupted.run_id, "FINISHED")
    assert json.loads(run.data.tags[names.TAG_DRIFT]) == {"training.vit_lr": ["0.00012", "0.0002"]}


def test_never_begins_anew_and_a_run_that_is_over_is_not_gone_on_with(interrupted: Interrupted) -> None:
    """The interrupted run stays as it is; a finished one is refused by name, and by auto not looked at."""
    anew = trainer(*COMMAND, "--resume", "never", cwd=interrupted.folder, store=interrupted.store)
    assert anew.returncode == 0, anew.stderr
    status = {run.info.run_id: run.info.status for run in runs_in(interrupted.store)}
    assert status.pop(interrupted.run_id) == "KILLED" and list(status.values()) == ["FINISHED"]
    (over,) = (
        path.parent
        for path in (interrupted.folder / "output").glob("*/run.json")
        if json.loads(path.read_text())["state"] == "over"
    )
    refused = trainer(*COMMAND, "--resume", str(over), cwd=interrupted.folder, store=interrupted.store)
    assert refused.returncode == 2 and "a run that is over" in refused.stderr


def test_two_processes_cannot_train_one_run_and_a_dead_one_keeps_nothing(interrupted: Interrupted) -> None:
    """The second is refused with the first one's process; after SIGKILL the lock is free, and the next command, for
    another seed, closes what was left RUNNING.
    """
    first = start_trainer(*COMMAND, cwd=interrupted.folder, store=interrupted.store)
    try:
        wait_for(first, "going on with")
        deadline = time.monotonic() + 30
        while runs_in(interrupted.store)[0].info.status != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGSTOP)
        second = trainer(*COMMAND, cwd=interrupted.folder, store=interrupted.store)
        assert second.returncode == 2, second.stderr
        assert f"process {first.pid}" in second.stderr and "--resume never" in second.stderr
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(200)
    assert [run.info.status for run in runs_in(interrupted.store)] == ["RUNNING"]
    other = ["run", "last6_lora", "--seed", "4", *flags({**SHORT, "training.max_steps": "1"})]
    done = trainer(*other, cwd=interrupted.folder, store=interrupted.store)
    assert done.returncode == 0 and "whose process had died" in done.stderr
    assert MlflowClient(interrupted.store).get_run(interrupted.run_id).info.status == "KILLED"


def test_usr1_writes_a_resume_point_and_goes_on(tmp_path: Path) -> None:
    """What batch systems send before they take a node away; the run that follows its course is the same."""
    store = empty_store(tmp_path)
    settings = SHORT | {"training.eval_steps": "100", "tracking.generate_records": "0"}
    process = start_trainer("run", "frozen_vision", *flags(settings), cwd=tmp_path, store=store)
    try:
        wait_for(process, "step 2/6")
        process.send_signal(signal.SIGUSR1)
        wait_for(process, "step 6/6  train")
        (home,) = (path.parent for path in (tmp_path / "output").glob("*/run.json"))
        assert len(list((home / "resume").glob("step-*"))) == 1
        process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0
    assert runs_in(store)[0].info.status == "FINISHED"
