"""The folder of a run: what it was made from, who holds it, which one to go on with; its files are never half."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.runs import (
    FREE,
    LAYOUT,
    RUN_FILE,
    Busy,
    Identity,
    held,
    new_run,
    one_at_a_time,
    read_facts,
    runs_below,
    taken_again,
    unfinished,
)

IDENTITY = Identity("last6_lora-seed3", {"training.seed": "3", "training.vit_lr": "1e-4"}, "sqlite:////x/mlflow.db")


def left(parent: Path, identity: Identity = IDENTITY, **facts: object) -> Path:
    """A run as a process leaves it."""
    folder = new_run(parent, identity)
    folder.write(**facts)
    folder.release()
    return folder.path


# --- its folder --------------------------------------------------------------------------------------------------


def test_a_run_is_made_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    """And can be taken again by whoever comes later, under the same key."""
    folder = new_run(tmp_path / "made" / "too", IDENTITY)
    folder.spool.append("begin")
    folder.write(state="interrupted", more={"a": 1})
    folder.release()
    again = held(folder.path)
    assert (again.key, again.spool.last, again.facts["params"]) == (folder.key, 1, dict(IDENTITY.params))
    assert (again.facts["state"], again.facts["more"], again.facts["pid"]) == ("interrupted", {"a": 1}, os.getpid())
    taken_again(again)
    again.release()
    assert read_facts(folder.path)["state"] == "running"


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".", "-x", "数字 é", "a" * 300, "x\n\0y", "*.yaml"])
def test_any_name_makes_a_folder_below_its_parent(tmp_path: Path, name: str) -> None:
    """A run may be called whatever its user likes; two of one name do not meet."""
    parent = tmp_path / "output"
    for _ in range(2):
        new_run(parent, Identity(name, {}, "s")).release()
    assert len(list(parent.iterdir())) == 2 and list(tmp_path.iterdir()) == [parent]
    assert all(not path.name.startswith((".", "-")) for path in parent.iterdir())
    assert {facts["name"] for _, facts in runs_below(parent)} == {name}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """In one message, before anything is trained."""
    (tmp_path / "file").touch()
    for parent in (tmp_path / "file" / "output", Path("/proc/output")):
        with pytest.raises(ConfigError, match=r"training.output_dir[\s\S]*a folder that can be written"):
            new_run(parent, IDENTITY)
        with pytest.raises(ConfigError, match=r"training.output_dir"), one_at_a_time(parent):
            pass


# --- what is known of it -----------------------------------------------------------------------------------------


def test_a_damaged_file_is_no_run_rather_than_another(tmp_path: Path) -> None:
    """Cut off anywhere, or something else altogether; the other runs of the folder are found."""
    sound, path = left(tmp_path), left(tmp_path)
    whole = (path / RUN_FILE).read_bytes()
    contents = [whole[:length] for length in range(0, len(whole) - 2, 7)]
    contents += [b"[]", b"null", b"\xff\xfe", b'{"format": 2}', b"[" * 100_000, whole.replace(b'"pid"', b'"pie"')]
    contents += [whole.replace(b'"params": {', b'"params": 3, "x": {')]
    for content in contents:
        (path / RUN_FILE).write_bytes(content)
        with pytest.raises(ConfigError, match="which holds no run"):
            read_facts(path)
        assert [found for found, _ in runs_below(tmp_path)] == [sound]


def test_a_process_killed_while_it_writes_leaves_what_was_there(tmp_path: Path) -> None:
    """SIGKILL again and again at any moment: the file is always one of those that were written, and whole."""
    folder = left(tmp_path)
    script = (
        "import sys; from pathlib import Path; from trainer.runs import held\n"
        "folder = held(Path(sys.argv[1])); print('held', flush=True); n = folder.facts.get('n', 0)\n"
        "while True: n += 1; folder.write(n=n, more='x' * 5000)\n"
    )
    seen = [0]
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        time.sleep(0.02 + 0.017 * number)
        process.kill()
        process.wait()
        seen.append(read_facts(folder).get("n", 0))
    assert seen == sorted(seen) and seen[-1] > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    """The write fails; the run is still known as it was."""
    folder = new_run(small_disk, IDENTITY)
    with pytest.raises(OSError, match="No space"):
        folder.write(state="over", more="x" * 100_000)
    assert read_facts(folder.path)["state"] == "running"
    folder.release()


# --- who holds it ------------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from pathlib import Path; from trainer.runs import held\n"
    "folder = held(Path(sys.argv[1])); folder.write(pid=__import__('os').getpid()); print('held', flush=True)\n"
)


def holder(path: Path, then: str = "time.sleep(60)") -> "subprocess.Popen[bytes]":
    """Another process that has taken a run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD + then, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """With the first one's number; stopped is not dead; what SIGKILL leaves keeps nobody out."""
    path = left(tmp_path)
    process = holder(path)
    try:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            process.send_signal(number)
            with pytest.raises(Busy, match=f"process {process.pid} on [\\s\\S]*--resume never"):
                held(path)
    finally:
        process.kill()
        process.wait()
    held(path).release()


def test_a_child_that_outlives_its_parent_keeps_nothing(tmp_path: Path) -> None:
    """Loader processes, started by fork: when the training is killed, they may hang on for a while."""
    path = left(tmp_path)
    fork = "import os\nchild = os.fork()\nif child: print(child, flush=True)\ntime.sleep(60)"
    process = holder(path, fork)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)
        held(path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def _enter(parent: str, seen: str) -> None:
    with one_at_a_time(Path(parent)):
        mark = Path(seen)
        assert not mark.exists()
        mark.touch()
        time.sleep(0.05)
        mark.unlink()


def test_processes_look_for_a_run_one_after_the_other(tmp_path: Path) -> None:
    """Else two would go on with the same one, or both make one."""
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_enter, args=(str(tmp_path), str(tmp_path / "seen"))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4


# --- which one to go on with -------------------------------------------------------------------------------------


def test_the_newest_run_of_the_same_training_that_is_not_over_is_gone_on_with(tmp_path: Path) -> None:
    """In the same store; a process that died without a word has left it `running`."""
    older = left(tmp_path, state="interrupted", began=1.0)
    assert unfinished(tmp_path, IDENTITY, but_for=()) == older
    newer = left(tmp_path, state="running", began=2.0)
    left(tmp_path, state="over", began=3.0)
    left(tmp_path, Identity("n", IDENTITY.params, "sqlite:////other.db"), began=4.0)
    left(tmp_path, Identity("n", {**IDENTITY.params, "training.seed": "4"}, IDENTITY.store), began=5.0)
    left(tmp_path, Identity("n", {**IDENTITY.params, "new.key": "1"}, IDENTITY.store), began=6.0)
    assert unfinished(tmp_path, IDENTITY, but_for=()) == newer
    assert unfinished(tmp_path, IDENTITY, but_for=("new.key",)) != newer
    assert unfinished(tmp_path / "no such folder", IDENTITY, but_for=()) is None


@pytest.mark.parametrize("key", [*LAYOUT, *FREE])
def test_layout_and_what_changes_no_number_make_no_other_training(tmp_path: Path, key: str) -> None:
    """Another number of ranks, another folder."""
    other = Identity(IDENTITY.name, {**IDENTITY.params, key: "2"}, IDENTITY.store)
    assert unfinished(tmp_path, other, but_for=()) is None
    path = left(tmp_path)
    assert unfinished(tmp_path, other, but_for=()) == path


def test_differences_are_told_from_both_sides() -> None:
    """What was changed, what was not there before, and what is there no more."""
    now = Identity("n", {"a": "1", "b": "2", "new": "3"}, "s")
    assert now.differences({"a": "1", "b": "0", "gone": "4"}) == {
        "b": ("0", "2"),
        "gone": ("4", "not there"),
        "new": ("not there", "3"),
    }


def test_a_folder_may_be_the_run_itself(tmp_path: Path) -> None:
    """`sync` takes both."""
    path = left(tmp_path)
    assert [found for found, _ in runs_below(path)] == [found for found, _ in runs_below(tmp_path)] == [path]
