"""SIGKILL at chosen and at random moments, then the same command again: as if nothing had happened.

The short form dies once in each of three places; `make test-faults ARGS=--long` seven times in each of eight, and
twenty times under ZeRO-2 on two ranks.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.comparing import SHORT, Result, assert_same, result_of
from tests.faults.dying import PLACES
from tests.running import empty_store, environment, flags, start_trainer, trainer, wait_for

COMMAND = ["run", "last6_lora", "--seed", "3", *flags(SHORT)]
TWO_RANKS = [*COMMAND, "--launch.nproc", "2", "--deepspeed.enabled", "true", "--tracking.generate_records", "0"]

# Place -> (how often it is passed at most in such a run before the fault, seconds it takes at most).
EXTENT = {
    "the start": (0, 1.0),
    "the first step": (0, 0.4),
    "a later step": (4, 0.4),
    "a switch of stages": (5, 0.1),  # of a run of one stage: where it is asked for
    "an evaluation": (9, 0.3),
    "the save of a resume point": (2, 0.06),
    "the save of an adapter": (1, 0.06),
    "a spool write": (30, 1.0),
    "after the last step": (0, 3.0),
}

SHORTLY = ("an evaluation", "the save of a resume point", "a spool write")


def trained(folder: Path, fault: dict[str, object] | None = None) -> subprocess.CompletedProcess[str]:
    """The trainer, with a fault or without."""
    command = [sys.executable, "-m", "tests.faults.dying", json.dumps(fault or {}), *COMMAND]
    variables = environment(f"sqlite:///{folder}/mlflow.db", PYTHONPATH=str(Path(__file__).parents[2]))
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    store = empty_store(folder)
    done = trained(folder)
    assert done.returncode == 0, done.stderr
    return result_of(folder, store)


def kill_and_resume(folder: Path, fault: dict[str, object], left_alone: Result) -> str:
    """Let a run die, give the same command again until it ends, and compare; where it died, in words."""
    folder.mkdir()
    store = empty_store(folder)
    died = trained(folder, fault)
    if died.returncode == 0:
        return f"{fault['place']}: over before it came"
    assert died.returncode == -9, died.stderr
    (home,) = (path.parent for path in (folder / "output").glob("*/run.json"))
    if json.loads((home / "run.json").read_text())["state"] != "over":  # else it died with nothing left to do
        resumed = trained(folder)
        assert resumed.returncode == 0, (fault, resumed.stderr)
    assert_same(result_of(folder, store), left_alone)
    shutil.rmtree(folder)
    return str(fault["place"])


@pytest.mark.slow
def test_a_run_killed_anywhere_and_resumed_is_bit_identical(
    tmp_path: Path, left_alone: Result, request: pytest.FixtureRequest
) -> None:
    """Every exact metric, the adapters, what the optimizer remembers; no row is missing and none there twice."""
    is_long = request.config.getoption("--long")
    draw = random.Random(20261126)
    faults = [
        {"place": place, "unharmed": draw.randint(0, most), "seconds": draw.uniform(0, seconds)}
        for place, (most, seconds) in EXTENT.items()
        for _ in range(7 if is_long else place in SHORTLY)
    ]
    assert EXTENT.keys() == PLACES.keys()
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(kill_and_resume, tmp_path / str(i), fault, left_alone) for i, fault in enumerate(faults)]
        fell = Counter(done.result() for done in work)
    print("\nwhere runs were killed, all bit-identical after they were resumed:")
    for place, count in sorted(fell.items()):
        print(f"  {count:3} in {place}")
    assert sum(count for place, count in fell.items() if place in EXTENT) >= 0.8 * len(faults)


@pytest.mark.long
def test_two_ranks_under_zero2_killed_at_random_and_resumed_are_bit_identical(tmp_path: Path) -> None:
    """One rank, or all that was started, dies at a random moment after a random step; twenty times."""
    draw, fell = random.Random(20), Counter[str]()
    alone = tmp_path / "alone"
    alone.mkdir()
    store = empty_store(alone)
    done = trainer(*TWO_RANKS, cwd=alone, store=store)
    assert done.returncode == 0, done.stderr
    left_alone = result_of(alone, store)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = empty_store(folder)
        step, whom = draw.randrange(0, 6), draw.choice(["one rank", "everything"])
        process = start_trainer(*TWO_RANKS, cwd=folder, store=store)
        wait_for(process, f"step {step}/6")
        time.sleep(draw.uniform(0, 1.0))
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if whom == "everything":
            for rank in ranks:
                os.kill(int(rank), signal.SIGKILL)
            process.kill()
        else:
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        process.communicate(timeout=240)
        fell[f"{whom}, after the line of step {step}"] += 1
        resumed = trainer(*TWO_RANKS, cwd=folder, store=store)
        assert resumed.returncode == 0, (number, step, whom, resumed.stderr)
        assert_same(result_of(folder, store), left_alone)
        shutil.rmtree(folder)
    print("\nwhere two ranks were killed, all bit-identical after they were resumed:")
    for place, count in sorted(fell.items()):
        print(f"  {count:3} {place}")
