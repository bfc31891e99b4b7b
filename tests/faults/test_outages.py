"""The tracker is away, slow or mad while runs train; every row is there once when all is well again.

The short form kills the server once, `--long` ten times, and that alone does what is marked so.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.faults.comparing import SHORT
from tests.faults.proxy import Fault, FaultProxy, Mode
from tests.running import ROOT, empty_store, environment, flags, mlflow_process, runs_in, start_trainer, trainer
from tests.server_process import ServerProcess, started
from tests.servers import postgres
from trainer import names


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL."""
    with postgres(tmp_path_factory.mktemp("postgres")) as uri:
        yield uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[ServerProcess]:
    """A real MLflow server on it."""
    with started(mlflow_process(tmp_path_factory.mktemp("server"), database)) as process:
        yield process


def exact_rows(store: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every row of every exact metric."""
    client = MlflowClient(store)
    logged = [name for name in client.get_run(run_id).data.metrics if names.metric(name).exact]
    return {name: sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) for name in logged}


def artifacts_of(store: str, run_id: str) -> set[str]:
    """Names of a run's artifacts."""
    return {file.path for file in MlflowClient(store).list_artifacts(run_id)}


def restart(server: ServerProcess, times: int, seconds: float, training: subprocess.Popen[str]) -> int:
    """Kill the server and start it again, so often or until training is over; how often it was."""
    draw = random.Random(3)
    for number in range(times):
        time.sleep(draw.uniform(0.3, seconds))
        if training.poll() is not None:
            return number
        server.kill()
        time.sleep(draw.uniform(0.3, seconds))
        server.start()
    return times


def until_it_is_there(store: str, process: subprocess.Popen[str]) -> None:
    """Wait for the run of a process to begin."""
    ends = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < ends and not runs_in(store):
        time.sleep(0.2)


@pytest.mark.slow
def test_a_server_that_is_killed_and_lies_costs_no_row(
    tmp_path: Path, server: ServerProcess, request: pytest.FixtureRequest
) -> None:
    """MLflow on PostgreSQL, killed and started again, behind a proxy that drops, delays, truncates, answers errors and
    loses answers to what was done: the run is the one that was logged to a file in peace.
    """
    restarts, steps = (10, 400) if request.config.getoption("--long") else (1, 24)
    settings = SHORT | {"training.max_steps": str(steps), "training.num_train_epochs": "1000"}
    settings |= {"training.eval_steps": str(steps // 4), "tracking.close_seconds": "120"}
    peaceful = tmp_path / "in-peace"
    peaceful.mkdir()
    store = empty_store(peaceful)
    done = trainer("run", "frozen_vision", *flags(settings), cwd=peaceful, store=store, timeout=900)
    assert done.returncode == 0, done.stderr
    expected = exact_rows(store, runs_in(store)[0].info.run_id)

    with FaultProxy(server.port) as proxy:
        weights = {Fault(Mode.PASS): 6.0, Fault(Mode.DELAY, seconds=0.5): 1.0, Fault(Mode.HANG): 0.2}
        weights |= {Fault(mode): 1.0 for mode in (Mode.DROP, Mode.RESET, Mode.LOSE_ANSWERS)}
        weights |= {Fault(Mode.TRUNCATE, size=size): 0.7 for size in (0, 20, 300)}
        weights |= {Fault(Mode.ERROR, status=status): 0.7 for status in (429, 500, 503)}
        variables = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
        away = tmp_path / "in-trouble"
        away.mkdir()
        process = start_trainer(
            "run", "frozen_vision", *flags(settings), cwd=away, store=f"http://127.0.0.1:{proxy.port}", **variables
        )
        said: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(process.stderr or []))
        reader.start()
        try:
            until_it_is_there(server.uri, process)  # making one can happen twice, see docs/reliability.md
            proxy.set_random(5, weights)
            killed = restart(server, restarts, 6.0, process)
            process.wait(900)
        finally:
            process.kill()
            reader.join(60)
        text = "".join(said)
        assert process.returncode == 0, text
        assert killed >= 1 and sum(proxy.counts[mode] for mode in Mode if mode is not Mode.PASS) >= 5
        print(f"\nserver killed {killed} times; requests by what became of them: {dict(proxy.counts)}")
    (run,) = runs_in(server.uri)
    assert run.info.status == "FINISHED" and run.data.tags[names.TAG_GATE] == "passed"
    assert exact_rows(server.uri, run.info.run_id) == expected
    assert artifacts_of(server.uri, run.info.run_id) >= artifacts_of(store, runs_in(store)[0].info.run_id)
    assert "Traceback" not in text


def test_a_run_that_never_saw_its_server_is_made_by_sync_and_again_changes_nothing(
    tmp_path: Path, server: ServerProcess
) -> None:
    """Started with the server down, ended with it down, within the time that it says it waits."""
    server.kill()
    settings = SHORT | {"training.max_steps": "2", "tracking.generate_records": "0", "tracking.close_seconds": "1"}
    done = trainer("run", "all_lora", "--seed", "9", *flags(settings), cwd=tmp_path, store=server.uri)
    assert done.returncode == 0, done.stderr
    assert f"{server.uri} does not answer" in done.stderr
    assert "python -m trainer sync output/all_lora-seed9-" in done.stdout
    away = trainer("sync", "output", cwd=tmp_path, store=server.uri)
    assert away.returncode == 1 and "nothing is lost" in away.stderr
    server.start()
    for _ in range(2):
        synced = trainer("sync", "output", cwd=tmp_path, store=server.uri)
        assert synced.returncode == 0, synced.stderr
        (run,) = (run for run in runs_in(server.uri) if run.data.tags["seed"] == "9")
        assert run.info.status == "FINISHED"
        assert [step for step, _ in exact_rows(server.uri, run.info.run_id)[names.TRAIN_LOSS]] == [1, 2]


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def test_eight_runs_at_once_into_one_store_lose_nothing(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Through the door and the spool of a run, without its model: 150 rows each, and no word of a locked database."""
    store = f"sqlite:///{tmp_path}/mlflow.db" if kind == "sqlite" else request.getfixturevalue("database")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from trainer.redact import of_environment\n"
        "from trainer.spool import Spool\n"
        "from trainer.tracker import SpoolTracker\n"
        "from trainer.tracking import MlflowDoor, beginning, reach_store\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        "spool.append('begin', **beginning(run_name=sys.argv[1], key=sys.argv[1]))\n"
        "door = MlflowDoor(reach_store().uri)\n"
        "with SpoolTracker(spool, door, of_environment(), close_seconds=120) as tracker:\n"
        "    tracker.params({f'a.b{i}': str(i) for i in range(150)})\n"
        "    for step in range(150):\n"
        "        tracker.metrics({'train/loss': step / 7, 'eval/loss': 1.0}, step)\n"
        "        time.sleep(0.02)\n"
        "        for notice in tracker.notices(): print(notice, file=sys.stderr)\n"
        "    tracker.text('x', 'x.txt')\n"
        "assert tracker.waiting == 0\n"
    )
    variables = environment(store, PYTHONPATH=str(ROOT), MLFLOW_EXPERIMENT_NAME=f"eight {kind}")
    started_at_once = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"run {i}"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True
        )
        for i in range(8)
    ]
    said = [process.communicate(timeout=300)[1] for process in started_at_once]
    assert [process.returncode for process in started_at_once] == [0] * 8, said
    assert "locked" not in "".join(said) and "Traceback" not in "".join(said)
    runs = runs_in(store, f"eight {kind}")
    assert sorted(run.info.run_name or "" for run in runs) == [f"run {i}" for i in range(8)]
    for run in runs:
        history = MlflowClient(store).get_metric_history(run.info.run_id, "train/loss")
        assert sorted((m.step, m.value) for m in history) == [(step, step / 7) for step in range(150)]
        assert (run.info.status, len(run.data.params)) == ("FINISHED", 150)


def test_a_full_disk_is_waited_out(tmp_path: Path) -> None:
    """The run's folder lies on a disk of 12 MB that fills up: training goes on, nothing torn is left, and what could
    not be kept meanwhile is made up for when there is room.
    """
    disk = tmp_path / "output"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    store = empty_store(tmp_path)
    settings = SHORT | {"training.max_steps": "30", "training.num_train_epochs": "1000", "training.eval_steps": "4"}
    process = start_trainer("run", "frozen_vision", *flags(settings), cwd=tmp_path, store=store)
    try:
        said: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "step  5/30" in line and not (disk / "full").exists():
                fill(disk / "full")
            if "step 15/30" in line:
                (disk / "full").unlink(missing_ok=True)
        process.wait(200)
        text = "".join(said)
        assert process.returncode == 0, text
        assert "No space left on device; what was saved before is untouched" in text and "Traceback" not in text
        (run,) = runs_in(store)
        assert run.info.status == "FINISHED"
        rows = exact_rows(store, run.info.run_id)
        assert [step for step, _ in rows[names.TRAIN_LOSS]] == list(range(1, 31))
    finally:
        process.kill()
        process.wait(200)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(file: Path) -> None:
    """Take all the room that is left."""
    with file.open("wb") as handle:
        for size in (2**16, 2**8, 1):
            try:
                while True:
                    os.write(handle.fileno(), b"x" * size)
            except OSError:
                continue


@pytest.mark.long  # the spool's own test has it in milliseconds
def test_a_clock_that_jumps_back_moves_no_row(tmp_path: Path) -> None:
    """By an hour in the middle of a run: rows keep their order, and the last value is the last."""
    store = empty_store(tmp_path)
    settings = SHORT | {"tracking.generate_records": "0"}
    script = (
        "import time, trainer.spool\n"
        "real, calls = time.time, [0]\n"
        "class Clock:\n"
        "    def __getattr__(self, name): return getattr(time, name)\n"
        "    def time(self):\n"
        "        calls[0] += 1\n"
        "        return real() - (3600 if calls[0] > 40 else 0)\n"
        "trainer.spool.time = Clock()\n"
        "from trainer.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "run", "frozen_vision", *flags(settings)]
    variables = environment(store, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(store)
    history = MlflowClient(store).get_metric_history(run.info.run_id, names.TRAIN_LOSS)
    by_time = sorted(history, key=lambda m: (m.timestamp, m.step))
    assert [m.step for m in by_time] == list(range(1, 7))
    assert run.data.metrics[names.TRAIN_LOSS] == by_time[-1].value


def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    """Under ZeRO-2 on two ranks, one dies by SIGKILL: the others are ended, the run is closed, and can be resumed."""
    store = empty_store(tmp_path)
    settings = SHORT | {"launch.nproc": "2", "deepspeed.enabled": "true", "tracking.generate_records": "0"}
    process = start_trainer("run", "last6_lora", *flags(settings), cwd=tmp_path, store=store)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 3/6  train" in line:
                break
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        variables = {rank: Path(f"/proc/{rank}/environ").read_bytes().split(b"\0") for rank in ranks}
        second = next(rank for rank, of in variables.items() if b"RANK=1" in of)  # numbers of processes can wrap around
        os.kill(int(second), signal.SIGKILL)
        process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode != 0
    (run,) = runs_in(store)
    assert run.info.status in ("FAILED", "KILLED")
    again = trainer("run", "last6_lora", *flags(settings), cwd=tmp_path, store=store)
    assert again.returncode == 0, again.stderr
    (finished,) = runs_in(store)
    assert (finished.info.run_id, finished.info.status) == (run.info.run_id, "FINISHED")
    assert [s for s, _ in exact_rows(store, run.info.run_id)[names.TRAIN_LOSS]] == list(range(1, 7))
