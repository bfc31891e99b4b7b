"""Whole runs of `progressive_lora` as users start them: on ranks and under ZeRO-2 as alone, and killed at a switch."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.faults.comparing import SHORT, Result, assert_same, result_of
from tests.running import ROOT, empty_store, environment, flags, runs_in, start_trainer, trainer, wait_for
from trainer import names

# Nine steps, three a stage; rows at each, evaluations at 0, 3, 6, 9: at both switches.
STAGED = SHORT | {"training.max_steps": "9", "training.eval_steps": "3", "tracking.generate_records": "0"}
LAYOUTS = {
    "plain": {"training.gradient_accumulation_steps": "2"},
    "two ranks": {"launch.nproc": "2", "training.gradient_accumulation_steps": "1"},
    "zero2": {"deepspeed.enabled": "true", "training.gradient_accumulation_steps": "2"},
    "zero2 on two ranks": {
        "deepspeed.enabled": "true", "launch.nproc": "2", "training.gradient_accumulation_steps": "1",
    },
}  # fmt: skip
ZERO = ["run", "progressive_lora", "--seed", "3", *flags(STAGED | LAYOUTS["zero2"])]
ZERO_ON_TWO = ["run", "progressive_lora", "--seed", "3", *flags(STAGED | LAYOUTS["zero2 on two ranks"])]


@functools.cache
def whole(layout: str) -> tuple[str, Run]:
    """A run without dropout in one of the layouts: its store and its run."""
    folder = Path(tempfile.mkdtemp(prefix="stages-"))
    store = empty_store(folder)
    settings = STAGED | {"tuner.lora_dropout": "0"} | LAYOUTS[layout]
    done = trainer("run", "progressive_lora", *flags(settings), cwd=folder, store=store, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "step 3/9  vision blocks 20, 21 begin to train; now 20, 21, 22, 23 do" in done.stderr
    (run,) = runs_in(store)
    return store, run


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_across_switches_any_layout_gives_the_losses_of_one_rank(layout: str) -> None:
    """Every exact metric at every step to 1e-5, and a gate that has passed in every stage."""
    (store, run), (plain_store, plain) = whole(layout), whole("plain")
    assert run.info.status == "FINISHED" and run.data.tags[names.TAG_GATE] == "passed"
    exact = [name for name in plain.data.metrics if names.metric(name).exact]
    assert set(exact) == {name for name in run.data.metrics if names.metric(name).exact}
    worst = 0.0
    for name in exact:
        ours, theirs = (
            {m.step: m.value for m in MlflowClient(s).get_metric_history(r.info.run_id, name)}
            for s, r in ((store, run), (plain_store, plain))
        )
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
        worst = max(worst, *(abs(ours[step] - theirs[step]) / max(1.0, abs(theirs[step])) for step in theirs))
    print(f"\n{layout}: largest difference {worst:.1e}")


@functools.cache
def left_alone(ranks: int) -> Result:
    """A run under ZeRO-2 that nothing happens to; of one rank the last resume point is kept."""
    folder = Path(tempfile.mkdtemp(prefix="alone-"))
    store = empty_store(folder)
    done = kept(ZERO, folder, store) if ranks == 1 else trainer(*ZERO_ON_TWO, cwd=folder, store=store, timeout=600)
    assert done.returncode == 0, done.stderr
    return result_of(folder, store)


def kept(
    command: list[str], folder: Path, store: str, fault: dict[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    """The trainer, with a fault or without, which leaves its resume points when it is over."""
    process = [sys.executable, "-m", "tests.faults.dying", json.dumps(fault or {}), *command]
    variables = environment(store, PYTHONPATH=str(ROOT))
    return subprocess.run(process, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(("unharmed", "seconds"), [(3, 0.0), (3, 0.4), (7, 0.2)], ids=str)
def test_killed_at_a_switch_under_zero2_and_resumed_it_is_bit_identical(
    tmp_path: Path, unharmed: int, seconds: float
) -> None:
    """SIGKILL as the switch begins, while the engine is rebuilt, and in the stage behind it, with dropout."""
    store = empty_store(tmp_path)
    fault: dict[str, object] = {"place": "a switch of stages", "unharmed": unharmed, "seconds": seconds}
    assert kept(ZERO, tmp_path, store, fault).returncode == -signal.SIGKILL
    resumed = kept(ZERO, tmp_path, store)
    assert resumed.returncode == 0 and "going on with" in resumed.stderr, resumed.stderr
    assert_same(result_of(tmp_path, store), left_alone(1))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["20, 21 begin", "step 8/9  train"])
def test_two_ranks_under_zero2_killed_in_any_stage_go_on_bit_identical(tmp_path: Path, at: str) -> None:
    """All processes at once, at a switch and within a stage."""
    store = empty_store(tmp_path)
    process = start_trainer(*ZERO_ON_TWO, cwd=tmp_path, store=store)
    wait_for(process, at)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(200)
    time.sleep(1)  # until the kernel has ended the other ranks too, which hold the run's lock
    resumed = trainer(*ZERO_ON_TWO, cwd=tmp_path, store=store, timeout=600)
    assert resumed.returncode == 0 and "going on with" in resumed.stderr, resumed.stderr
    assert_same(result_of(tmp_path, store), left_alone(2))
