"""Ranks as processes: what they are told, how they end together, and that whoever starts them imports no torch."""

import argparse
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from trainer import collector, launch
from trainer.config.schema import Launch
from trainer.hosts import elastic
from trainer.processes import to_their_end
from trainer.runs import Identity, new_run, read_facts


def ranks(script: str, asked: list[int] | None = None, n: int = 2) -> int:
    """The status of so many ranks that run a few lines of Python."""
    prelude = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
    return launch._to_their_end(n, [sys.executable, "-c", prelude + script], [] if asked is None else asked)


def test_each_rank_is_told_its_place_and_where_they_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torch's launcher; cores are shared, unless the user has said how many threads."""
    monkeypatch.setattr(launch, "cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT"]
    script = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert ranks(script) == 0
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first[:-1] == ["0", "0", "2", "2", "127.0.0.1", "2"] and second[:-1] == [
        "1",
        "1",
        "2",
        "2",
        "127.0.0.1",
        "2",
    ]
    assert first[-1] == second[-1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch._environment(0, 2, 1)["OMP_NUM_THREADS"] == "3"


def test_the_port_is_the_first_ranks_alone() -> None:
    """Torch's store, which allows reuse, may listen on it; nobody is given it by chance."""
    with launch._free_port() as port, socket.socket() as other, socket.socket() as store:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("0.0.0.0", port))
        store.listen()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("", 0),
        ("time.sleep(rank)", 0),
        ("sys.exit(3 if rank else 0)", 3),
        ("time.sleep(rank * 60); sys.exit(2 + rank)", 2),
        ("rank and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)", 128 + signal.SIGKILL),
    ],
)
def test_the_rank_that_fails_first_gives_the_status_and_ends_the_others(script: str, expected: int) -> None:
    """At once, not after the minute that they would have slept; a rank that is through ends nobody."""
    started = time.monotonic()
    assert ranks(script) == expected
    assert time.monotonic() - started < 20


def test_every_signal_is_passed_on_to_every_rank(tmp_path: Path) -> None:
    """The second Ctrl-C too, which is another wish than the first."""
    asked: list[int] = []
    script = (
        f"seen = open(r'{tmp_path}/' + str(rank), 'ab', buffering=0)\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.write(b'int '))\n"
        "signal.signal(signal.SIGTERM, lambda *_: (seen.write(b'term '), sys.exit(0)))\n"
        "seen.write(b'ready '); time.sleep(60); time.sleep(60)"
    )

    def ask() -> None:
        for words, number in ((1, signal.SIGINT), (2, signal.SIGINT), (3, signal.SIGTERM)):
            while any(len(path.read_text().split()) < words for path in (tmp_path / "0", tmp_path / "1")):
                time.sleep(0.05)
            asked.append(number)

    for rank in "01":
        (tmp_path / rank).touch()
    threading.Thread(target=ask, daemon=True).start()
    assert ranks(script, asked) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["ready int int term "] * 2


def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang in an exchange that nobody answers."""
    monkeypatch.setattr(launch, "_LAST_SECONDS", 0.3)
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True)\nif rank: time.sleep(1); sys.exit(4)\n"
    )
    assert ranks(script + "time.sleep(60)") == 4


@pytest.mark.parametrize(("seconds", "written"), [(60.0, "01"), (0.2, "0")])
def test_ranks_that_are_asked_to_end_have_as_long_as_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, written: str
) -> None:
    """Not the half minute of ranks that may wait for one that has failed; one that has ended as asked has not."""
    monkeypatch.setattr(launch, "_LAST_SECONDS", 0.2)
    monkeypatch.setattr(launch, "END_SECONDS", seconds)
    asked: list[int] = []
    script = (
        "signal.signal(signal.SIGTERM, lambda *_: (\n"
        f"    time.sleep(rank), open(r'{tmp_path}/written' + str(rank), 'w'), sys.exit(143)))\n"
        f"open(r'{tmp_path}/ready' + str(rank), 'w'); time.sleep(60)"
    )

    def ask() -> None:
        while len([*tmp_path.glob("ready*")]) < 2:
            time.sleep(0.05)
        asked.append(signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    ranks(script, asked)
    assert sorted(path.name for path in tmp_path.glob("written*")) == [f"written{rank}" for rank in written]


def test_ranks_that_torch_starts_have_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that may be started again, or lie on several hosts."""
    given: list[argparse.Namespace] = []
    monkeypatch.setattr(torchrun, "run", given.append)
    asked = Launch(nproc=2, restarts=1)
    elastic.start(asked, elastic.hosts_of(asked), [])
    assert [one.shutdown_timeout for one in given] == [300]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "NCCL error in: x.cpp:81\nncclSystemError: it failed\nLast error:\nno room\n",
            "NCCL error in: x.cpp:81 ... no room",
        ),
        ("closed by peer\nException raised from recv at s.cpp:9 (most recent call first):\nframe #0", "closed by peer"),
        ("", "RuntimeError"),
    ],
)
def test_an_error_of_many_lines_is_told_by_its_first_and_its_last(error: str, told: str) -> None:
    """NCCL says last what was wrong; torch's frames say nothing to users."""
    assert launch.told_of_another(RuntimeError(error)).endswith(f": another rank does not answer: {told}")


def test_whoever_starts_ranks_imports_no_torch() -> None:
    """Where there can be no GPU to count: its ranks wait for it."""
    script = (
        "import sys; from trainer import __main__, launch, ranks; from trainer.config.load import load\n"
        "launch.may_have_gpus = lambda: False\n"
        "ranks.settled(load('last6_lora'), 'auto')\n"
        "sys.executable = 'true'; assert launch.start(2, []) == 0\n"
        "print('torch' not in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_collector_rests_while_libraries_are_imported_and_works_afterwards() -> None:
    """Also where an import fails; what was there is not gone through again."""
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), collector.at_rest():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > before
    gc.unfreeze()


def test_after_ctrl_c_a_run_whose_ranks_had_to_be_killed_is_closed(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after any other end; it goes on to end the launcher."""
    folder = new_run(Path("output"), Identity("r", {}, store))
    folder.release()

    def start(nproc: int, arguments: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "start", start)
    with pytest.raises(KeyboardInterrupt):
        to_their_end(Launch(nproc=2), [], Path("output"))
    assert read_facts(folder.path)["state"] == "interrupted"
