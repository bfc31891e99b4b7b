"""A run in a process of its own: what it is told, what its folder says, and that it ends with whoever began it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.running import ROOT, environment
from trainer import names
from trainer.compare import children
from trainer.compare.children import Child, Evaluated, Job, is_held, last_words, standing
from trainer.compare.jobs import Board, Ended, room_for, run_all
from trainer.errors import ConfigError
from trainer.runs import Identity, new_run
from trainer.spool import BEGIN, Position

# What a child does of ours: it listens to signals, and ends with its parent.
LISTENING = """
import sys, time
from trainer.signals import SIGNALS, end_with_parent
SIGNALS.install(is_rank=False)
end_with_parent(under_mlflow=True)
print("up", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class StandIn(Job):
    """A job whose process runs a script in place of a training."""

    script: str = ""

    @property
    def command(self) -> list[str]:
        """Of the interpreter."""
        return ["-c", self.script]


def stand_in(folder: Path, script: str, name: str = "a") -> StandIn:
    """A job with a folder of its own."""
    return StandIn(name, (), folder / name, script=script)


def quiet() -> Board:
    """A board for tests."""
    return Board(0)


def wait_until_up(job: Job) -> None:
    """Until its process listens."""
    until = time.monotonic() + 120
    while "up" not in (job.log.read_text() if job.log.exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- one child ----------------------------------------------------------------------------------------------------


def test_the_command_is_a_run_with_its_name_and_a_folder_of_its_own() -> None:
    """The same command goes on with the run; what the run belongs to is no part of it."""
    job = Job("a-seed17", ("last6_lora", "--seed", "17"), Path("out/a"), "f" * 32, {"comparison.role": "arm"})
    told = "-m trainer run last6_lora --seed 17 --output_dir out/a --training.run_name a-seed17"
    assert " ".join(job.command) == told


def test_a_child_is_told_of_its_parent_and_not_of_our_own_mlflow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would adopt that one."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "e" * 32)
    found = children.environment(Job("a", (), Path("a"), "f" * 32, {"k": "v"}), threads=3)
    assert "MLFLOW_RUN_ID" not in found
    assert found[names.PARENT_VARIABLE] == "f" * 32
    assert json.loads(found[names.TAGS_VARIABLE]) == {"k": "v"}
    assert found["OMP_NUM_THREADS"] == "3"


def test_a_child_writes_to_its_log_and_ends_with_its_status(tmp_path: Path) -> None:
    """Both of its streams; a second attempt is written below the first."""
    job = stand_in(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    for _ in range(2):
        child = Child(job, threads=1)
        assert child.wait(200) == 3
    assert sorted(job.log.read_text().split()) == ["err", "err", "out", "out"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    """Here, because a file is in its place."""
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        Child(stand_in(tmp_path / "taken", ""), threads=1)


def test_a_child_that_is_asked_to_end_ends_as_signals_do(tmp_path: Path) -> None:
    """A shell's status for SIGTERM."""
    job = stand_in(tmp_path, LISTENING)
    child = Child(job, threads=1)
    wait_until_up(job)
    child.ask_to_end()
    assert child.wait(200) == 143


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    """Its run can be gone on with all the same."""
    job = stand_in(
        tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    child = Child(job, threads=1)
    wait_until_up(job)
    child.ask_to_end()
    assert child.wait(0.5) is None
    child.kill()
    assert child.poll() == 128 + signal.SIGKILL


# --- what a folder says -------------------------------------------------------------------------------------------


def test_no_run_has_begun_in_an_empty_folder(tmp_path: Path) -> None:
    """Nor in one that is not there."""
    now = standing(tmp_path / "none")
    assert (now.path, now.state, now.step, now.evaluations, now.run_id) == (None, "", 0, (), "")
    assert not is_held(tmp_path / "none")


def test_losses_are_read_from_the_spool_while_another_process_writes_it(tmp_path: Path) -> None:
    """A half-written line is left alone; a step that was evaluated again counts once."""
    folder = new_run(tmp_path, Identity("a", {"k": "v"}, "sqlite:///x.db"))
    folder.write(total_steps=9)
    folder.spool.append(BEGIN, key=folder.key)
    for step, loss in ((0, 2.0), (4, 1.5), (4, 1.0)):
        values = {names.EVAL_LOSS: loss, names.SAMPLES_SEEN: float(step * 8)}
        folder.spool.append("metrics", step=step, values=values)
    folder.spool.append("metrics", step=6, values={names.TRAIN_LOSS: 1.0})
    folder.spool.sync()
    (segment,) = (folder.path / "spool").glob("*.jsonl")
    with segment.open("ab") as torn:
        torn.write(b"00000000 [6, 0")
    now = standing(tmp_path)
    assert now.evaluations == (Evaluated(0, 0, 2.0), Evaluated(4, 32, 1.0))
    assert (now.state, now.step, now.total_steps, now.params) == ("running", 6, 9, {"k": "v"})
    assert segment.read_bytes().endswith(b"[6, 0")
    folder.release()


def test_rows_that_are_delivered_are_kept_where_somebody_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spool forgets them otherwise, segment by segment."""
    monkeypatch.setattr("trainer.spool.SEGMENT_BYTES", 100)
    for keep, left in ((False, 2), (True, 8)):
        folder = new_run(tmp_path / str(keep), Identity("a", {}, "sqlite:///x.db"))
        if keep:
            folder.spool.keep_all()
        for step in range(8):
            folder.spool.append("metrics", step=step, values={names.EVAL_LOSS: 1.0, names.SAMPLES_SEEN: 1.0})
        folder.spool.sync()
        folder.spool.set_position(Position(8, 8, "f" * 32))
        folder.spool.forget(8)
        assert len(standing(tmp_path / str(keep)).evaluations) == left
        folder.release()


# --- many children ------------------------------------------------------------------------------------------------


def test_what_fails_stops_nothing_else(tmp_path: Path) -> None:
    """Each is told as soon as it has ended."""
    jobs = [stand_in(tmp_path, f"import sys; sys.exit({status})", f"job{status}") for status in (0, 1, 0, 2)]
    jobs = [StandIn(f"{job.name}-{n}", (), tmp_path / str(n), script=job.script) for n, job in enumerate(jobs)]
    told: list[Ended] = []
    room = room_for(2, ranks=1, gpus=[], runs=4)
    done = run_all(jobs, room, quiet(), ended=told.append)
    assert {(end.job.name, end.status) for end in done} == {("job0-0", 0), ("job1-1", 1), ("job0-2", 0), ("job2-3", 2)}
    assert told == done


def test_at_most_so_many_run_at_once(tmp_path: Path) -> None:
    """Each notes when it began and ended; of three, never more than two overlap."""
    script = "import time; a = time.time(); time.sleep(0.3); print(a, time.time())"
    jobs = [stand_in(tmp_path, script, name) for name in "abc"]
    assert [end.status for end in run_all(jobs, room_for(2, ranks=1, gpus=[], runs=3), quiet())] == [0, 0, 0]
    spans = [tuple(map(float, job.log.read_text().split())) for job in jobs]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) <= 2


def test_a_run_that_another_process_has_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was told to end, and is at it; the others go first."""
    order: list[str] = []
    monkeypatch.setattr("trainer.compare.jobs.is_held", lambda folder: folder.name == "a" and order != ["b"])
    jobs = [stand_in(tmp_path, "", name) for name in "ab"]
    run_all(jobs, room_for(1, ranks=1, gpus=[], runs=2), quiet(), ended=lambda end: order.append(end.job.name))
    assert order == ["b", "a"]


def test_it_is_waited_for_as_long_as_it_may_take_to_end_however_late_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then others have trained for hours; after that its process is started, and says who has the run."""
    now = [0.0]
    until: dict[str, float] = {"late": 1290.0, "never": math.inf}

    def held(folder: Path) -> bool:
        if folder.name != "first":
            now[0] += 10
        return now[0] < until.get(folder.name, 0)

    def ended(end: Ended) -> None:
        now[0] += 1000 if end.job.name == "first" else 0
        at[end.job.name] = now[0]

    at: dict[str, float] = {}
    monkeypatch.setattr("trainer.compare.jobs.is_held", held)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: time.sleep(0.01))
    monkeypatch.setattr("trainer.compare.jobs.time", clock)
    jobs = [stand_in(tmp_path, "", name) for name in ("first", "late", "never")]
    run_all(jobs, room_for(1, ranks=1, gpus=[], runs=3), quiet(), ended=ended)
    assert 1290 <= at["late"] < 1320 and 1300 < at["never"] < 1340


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_whole_dies_or_is_ended_no_child_is_left(tmp_path: Path, number: signal.Signals) -> None:
    """Killed without a word, its children notice; asked to end, it asks them."""
    script = f"""
from pathlib import Path
from trainer.compare.children import Job
from trainer.compare.jobs import Board, room_for, run_all
from trainer.signals import SIGNALS
class StandIn(Job):
    command = ["-c", {LISTENING!r}]
SIGNALS.install(is_rank=False)
jobs = [StandIn(name, (), Path({str(tmp_path)!r}) / name) for name in "ab"]
run_all(jobs, room_for(2, ranks=1, gpus=[], runs=2), Board(2))
"""
    whole = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment(None, PYTHONPATH=str(ROOT)))
    for name in "ab":
        wait_until_up(stand_in(tmp_path, "", name))
    pids = [child.pid for child in psutil.Process(whole.pid).children()]
    assert len(pids) == 2
    os.kill(whole.pid, number)
    whole.wait(200)
    until = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


# --- how many at once ---------------------------------------------------------------------------------------------


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for each, or for as many as it has ranks."""
    assert room_for(None, ranks=1, gpus=["0", "1", "3"], runs=15).gpus == ("0", "1", "3")
    assert room_for(None, ranks=2, gpus=["0", "1", "2"], runs=15).gpus == ("0,1",)
    assert room_for(None, ranks=1, gpus=["0", "1"], runs=1).jobs == 1
    with pytest.raises(ConfigError, match="3 runs"):
        room_for(3, ranks=1, gpus=["0", "1"], runs=15)
    with pytest.raises(ConfigError):
        room_for(None, ranks=2, gpus=["0"], runs=15)


def test_cores_are_shared_by_the_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them where nothing is asked; what is asked otherwise, and never more runs than there are."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("trainer.launch.cores", lambda: 6)
    found = [room_for(asked, ranks=1, gpus=[], runs=runs) for asked, runs in ((None, 15), (None, 2), (3, 15), (12, 15))]
    assert [(room.jobs, room.threads) for room in found] == [(6, 1), (2, 3), (3, 2), (12, 1)]
    assert set(found[0].gpus) == {None}


def test_last_words_are_the_message_of_a_log_or_its_last_line(tmp_path: Path) -> None:
    """Of several attempts, those of the last."""
    log = tmp_path / "log.txt"
    assert last_words(log) == []
    log.write_text("error: of before\nerror: a\n  got:     b\n  allowed: c\n  do:      d\nsome more\n")
    assert last_words(log) == ["error: a", "  got:     b", "  allowed: c", "  do:      d"]
    log.write_text("one\n  two\n\n")
    assert last_words(log) == ["  two"]
