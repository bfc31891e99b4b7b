"""From the spool to the tracker: in order, until it is there, once; training never waits, and no failure stops it."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle
from pathlib import Path

import pytest

from trainer import delivery as delivery_module
from trainer import spool as spool_module
from trainer.delivery import Courier, Delivery
from trainer.errors import TrackingError
from trainer.spool import Entry, Position, Spool

RUN = "f" * 32


class MemoryDoor:
    """Keeps what it takes by its number, as MLflow does by time and step; `faults` says what is wrong with a call."""

    def __init__(self, *faults: str) -> None:
        self.taken: dict[int, Entry] = {}
        self.order: list[int] = []
        self.calls = 0
        self.let_go = threading.Event()
        self._faults = chain(faults, cycle([""]))

    def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
        """Take entries; "refuses" takes none of them, "loses" takes some and says no, "hangs" waits for `let_go`."""
        self.calls += 1
        fault = next(self._faults)
        if fault == "refuses":
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        if fault == "hangs":
            assert self.let_go.wait(200)
        for entry in entries[: len(entries) // 2 + 1] if fault == "loses" else entries:
            if entry.kind == "artifact":
                assert spool.file(entry.body["kept"]).exists() or entry.number in self.taken
            if entry.number not in self.taken:
                self.order.append(entry.number)
            self.taken[entry.number] = entry
        if fault == "loses":
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return RUN


class NoArtifacts(MemoryDoor):
    """Where artifacts go, nothing can be stored."""

    def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
        """Take all but artifacts."""
        if any(entry.kind == "artifact" for entry in entries):
            raise PermissionError(errno.EACCES, "Permission denied", "/mnt/artifacts")
        return super().deliver(entries, spool, run_id)


def filled(folder: Path, rows: int = 120) -> Spool:
    """A spool of a beginning and some rows."""
    spool = Spool(folder)
    spool.append("begin", key="k")
    for step in range(rows):
        spool.append("metrics", step=step, values={})
    return spool


def carry(courier: Courier, tries: int = 50) -> int:
    """Carry until all is there; how many tries failed."""
    for failed in range(tries):
        try:
            courier.carry_all()
        except OSError:
            continue
        return failed
    raise AssertionError("never delivered")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths, and segments hold some sixty rows."""
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 4000)
    for name in ("_PAUSE", "_FIRST_WAIT", "_LONGEST_WAIT"):
        monkeypatch.setattr(delivery_module, name, getattr(delivery_module, name) / 100)


# --- the courier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuses", "loses"])
def test_everything_arrives_once_and_in_order_whatever_fails(tmp_path: Path, fault: str) -> None:
    """Also where the server has done it and its answer was lost."""
    spool, door = filled(tmp_path), MemoryDoor(fault, "", fault, fault, "", fault)
    courier = Courier(spool, door)
    assert carry(courier) == 4
    assert door.order == list(range(1, 122)) and courier.number == 121
    assert list(door.taken.values()) == list(spool.read())
    assert spool.position == Position(121, 121, RUN)


def test_another_process_goes_on_where_delivery_ended(tmp_path: Path) -> None:
    """What was delivered is not sent again; after a kill before that was noted, one batch at most, with its time."""
    spool, door = filled(tmp_path), MemoryDoor("", "refuses")
    with pytest.raises(ConnectionRefusedError):
        Courier(spool, door).carry_all()
    assert spool.position.number == 50
    second = MemoryDoor()
    Courier(Spool(tmp_path), second).carry_all()
    assert second.order == list(range(51, 122))
    spool.set_position(Position(71, 121, RUN))
    third = MemoryDoor()
    Courier(Spool(tmp_path), third).carry_all()
    assert third.order == list(range(72, 122)) and third.taken[100] == second.taken[100]


def test_metrics_arrive_while_artifacts_cannot_be_stored(tmp_path: Path) -> None:
    """And the end of the run; the files are kept until there is a place for them, then they go."""
    spool, door = filled(tmp_path), NoArtifacts()
    kept = spool.keep_text("content", "a.txt")
    spool.append("artifact", kept=kept, name="a.txt", folder=None)
    spool.append("end", status="FINISHED")
    courier = Courier(spool, door)
    with pytest.raises(PermissionError):
        courier.carry_all()
    assert door.order == [*range(1, 122), 123] and spool.file(kept).exists()
    whole = MemoryDoor()
    Courier(spool, whole).carry_all()
    assert whole.order == [122] and not spool.file(kept).exists()
    assert spool.position == Position(123, 123, RUN)


@pytest.mark.parametrize("damaged", [(60,), (119, 120, 121), (2, 3, 121)])
def test_damaged_entries_are_counted_and_hold_nothing_up(
    tmp_path: Path, damaged: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle or at the end: everything else arrives, and nothing waits for ever."""
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 2**17)
    filled(tmp_path).close()
    (path,) = tmp_path.glob("0*1.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    for number in damaged:
        lines[number - 1] = lines[number - 1].replace(b"metrics", b"metrisc")
    path.write_bytes(b"".join(lines))
    door, spool = MemoryDoor(), Spool(tmp_path)
    courier = Courier(spool, door)
    courier.carry_all()
    assert door.order == [number for number in range(1, 122) if number not in damaged]
    assert (courier.lost, courier.number, spool.last) == (len(damaged), 121, 121)
    courier.carry_all()
    assert courier.lost == len(damaged)


def test_a_lost_position_sends_everything_again(tmp_path: Path) -> None:
    """What was forgotten by then is there already; what is left can still be delivered."""
    spool = filled(tmp_path, 2000)
    Courier(spool, MemoryDoor()).carry_all()
    spool.forget(2001)
    assert len(list(spool.read())) < 200
    (tmp_path / "delivered").unlink()
    spool.append("end", status="FINISHED")
    door = MemoryDoor()
    Courier(Spool(tmp_path), door).carry_all()
    assert door.taken[1].kind == "begin" and door.taken[2002].kind == "end"


def test_a_run_whose_first_line_is_damaged_is_told_not_sent_to_nowhere(tmp_path: Path) -> None:
    """It has no run to go to."""
    spool, door = Spool(tmp_path), MemoryDoor()
    spool.append("metrics", step=1, values={})
    with pytest.raises(ValueError, match="`trainer sync` mends it"):
        Courier(spool, door).carry_all()
    assert door.calls == 0 and spool.position == Position()


def test_where_the_position_cannot_be_noted_delivery_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: files that are delivered go, which makes room; entries do not, for nobody would know of it later."""

    def full(position: Position) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool, door = filled(tmp_path, 2000), MemoryDoor()
    kept = spool.keep_text("content", "a.txt")
    spool.append("artifact", kept=kept, name="a.txt", folder=None)
    monkeypatch.setattr(spool, "set_position", full)
    courier = Courier(spool, door)
    courier.carry_all()
    assert courier.number == 2002 and not spool.file(kept).exists()
    spool.forget(courier.number)
    assert len(list(spool.read())) == 2002


def test_a_day_without_a_server_is_made_up_for_in_seconds(tmp_path: Path) -> None:
    """20,000 rows, by the time that our side of it takes."""
    spool, door = filled(tmp_path, 20_000), MemoryDoor()
    began = time.process_time()
    Courier(spool, door).carry_all()
    assert time.process_time() - began < 10
    assert len(door.taken) == 20_001


# --- the thread --------------------------------------------------------------------------------------------------


@pytest.fixture
def deliver(tmp_path: Path) -> Iterator[Callable[..., tuple[Spool, Delivery]]]:
    """Starts the delivery of a spool that holds its beginning; what still hangs at the end is let go."""
    doors: list[MemoryDoor] = []

    def start(door: MemoryDoor, needed_from: Callable[[], int] = lambda: 1) -> tuple[Spool, Delivery]:
        doors.append(door)
        spool = filled(tmp_path, 0)
        delivery = Delivery(spool, door, needed_from=needed_from)
        delivery.start()
        return spool, delivery

    yield start
    for door in doors:
        door.let_go.set()


Start = Callable[..., tuple[Spool, Delivery]]


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Look until it is so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_training_does_not_wait_for_a_server_that_hangs(deliver: Start) -> None:
    """Telling costs what writing a line costs; the end waits as long as it was told, and says what is left."""
    door = MemoryDoor("hangs")
    spool, delivery = deliver(door)
    wait_until(lambda: door.calls == 1)
    began = time.monotonic()
    for step in range(100):
        spool.append("metrics", step=step, values={})
    assert time.monotonic() - began < 30  # it hangs for ever
    began = time.monotonic()
    assert not delivery.finish(0.2)
    assert 0.15 < time.monotonic() - began < 30
    assert delivery.waiting == 101


def test_what_comes_too_late_is_left_to_sync(deliver: Start) -> None:
    """A request that ends after its run has let go of the folder is the last one: another process may have it now."""
    door = MemoryDoor("hangs")
    spool, delivery = deliver(door)
    wait_until(lambda: door.calls == 1)
    for step in range(200):
        spool.append("metrics", step=step, values={})
    delivery.finish(0.05)
    door.let_go.set()
    wait_until(lambda: not delivery._thread.is_alive())
    assert door.calls == 1


def test_the_end_does_not_wait_for_the_next_look(deliver: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that was told is there when it returns."""
    monkeypatch.setattr(delivery_module, "_PAUSE", 60.0)
    door = MemoryDoor()
    spool, delivery = deliver(door)
    spool.append("end", status="FINISHED")
    began = time.monotonic()
    assert delivery.finish(20)
    assert time.monotonic() - began < 15
    assert door.order == [1, 2]


def test_failures_are_said_once_and_so_is_the_end_of_them(deliver: Start) -> None:
    """However often it is tried; with the reason, in a line."""
    door = MemoryDoor("refuses", "refuses", "refuses")
    _, delivery = deliver(door)
    wait_until(lambda: delivery.waiting == 0)
    wait_until(lambda: not delivery.trouble)
    away, back = delivery.notices()
    assert away == (
        "the tracker does not take what is sent ([Errno 111] Connection refused); training goes on, it is kept"
    )
    assert back.startswith("the tracker is back after") and delivery.notices() == []


def test_a_mistake_in_four_parts_is_said_in_a_line(deliver: Start) -> None:
    """Such as an experiment that somebody has deleted: what was got, not only where."""

    class Deleted(MemoryDoor):
        def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
            raise TrackingError("MLflow experiment 'e'", "an experiment that was deleted", "one that is there", "do")

    _, delivery = deliver(Deleted())
    wait_until(lambda: bool(delivery.trouble))
    assert delivery.trouble == "MLflow experiment 'e': an experiment that was deleted"


def test_damage_is_said_while_training_goes_on(tmp_path: Path) -> None:
    """With the folder that it is in."""
    filled(tmp_path, 3).close()
    (path,) = tmp_path.glob("0*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 7'))
    delivery = Delivery(Spool(tmp_path), MemoryDoor(), needed_from=lambda: 1)
    delivery.start()
    assert delivery.finish(20)
    assert delivery.notices() == [f"1 entries of the spool in {tmp_path} are damaged, and lost"]


def test_what_a_resumed_run_would_compare_stays(deliver: Start) -> None:
    """Delivered or not, from the entry on that the older resume point names."""
    spool, delivery = deliver(MemoryDoor(), needed_from=lambda: 1000)
    for step in range(3000):
        spool.append("metrics", step=step, values={})
    assert delivery.finish(30)
    left = [entry.number for entry in spool.read()]
    assert left[0] == 1 and set(range(1000, 3002)) <= set(left) and len(left) < 3001


def test_how_a_run_ended_is_said_even_where_the_disk_takes_nothing(
    deliver: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are not sent past the disk: a resumed run, which could not know it, would bring them a second time."""
    door = MemoryDoor()
    spool, delivery = deliver(door)
    wait_until(lambda: delivery.waiting == 0)

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    spool.append("metrics", step=1, values={})
    spool.append("end", status="FAILED")
    delivery.finish(10)
    assert [entry.kind for entry in door.taken.values()] == ["begin", "end"]
    assert delivery.waiting == 2
