"""The write-ahead spool: what is told survives kills, full disks, flipped bits and odd clocks, and stays small."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from trainer import spool as spool_module
from trainer.spool import REJECTED, SEGMENT_BYTES, Entry, Position, Spool, entry_of


def numbers(spool: Spool, after: int = 0) -> list[int]:
    """Numbers of the entries on disk."""
    return [entry.number for entry in spool.read(after)]


def segments(folder: Path) -> list[Path]:
    """The files that entries lie in."""
    return sorted(folder.glob("0*.jsonl"))


def filled(folder: Path, count: int) -> Spool:
    """A spool with some rows."""
    spool = Spool(folder)
    for step in range(count):
        spool.append("metrics", step=step, values={"train/loss": step / 3})
    return spool


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few rows each."""
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 300)


# --- what comes back ---------------------------------------------------------------------------------------------


def test_what_is_told_comes_back_to_the_bit_and_in_order(tmp_path: Path) -> None:
    """Also in another process, also NaN and infinity, also letters of all kinds."""
    rows = {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 5e-324, "f": -0.0}
    with_all = 'é 数字 \u2028 \n \0 \U0001f600 "\\'
    spool = Spool(tmp_path)
    spool.append("metrics", step=1, values=rows)
    spool.append("tags", values={"text": with_all})
    first, second = Spool(tmp_path).read()
    assert (first.number, second.number) == (1, 2)
    assert repr(first.body["values"]) == repr(rows)  # NaN is unequal to itself, and -0.0 equal to 0.0
    assert second.body["values"]["text"] == with_all


def test_what_no_store_would_take_is_replaced_before_it_is_written(tmp_path: Path) -> None:
    """The stray byte of a file name that is not UTF-8: a database refuses it for ever, and all that comes after it."""
    spool = Spool(tmp_path)
    spool.append("params", values={"data.train_jsonl": os.fsdecode(b"caf\xe9.jsonl")})
    (entry,) = spool.read()
    assert entry.body["values"] == {"data.train_jsonl": "caf?.jsonl"}


def test_what_json_cannot_hold_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    """Whoever tells it hears of it; entries before and after are there, without a gap."""
    spool = Spool(tmp_path)
    spool.append("tags", values={})
    with pytest.raises(TypeError):
        spool.append("tags", values={"path": Path("x")})
    spool.append("tags", values={})
    assert numbers(spool) == [1, 2]


def test_reading_from_the_middle(tmp_path: Path, small_segments: None) -> None:
    """From every number on, over all segments."""
    spool = filled(tmp_path, 30)
    assert len(segments(tmp_path)) > 4
    for after in range(31):
        assert numbers(spool, after) == list(range(after + 1, 31))


def test_time_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_segments: None) -> None:
    """Whatever the clock does, also between two processes, also where the last segment holds nothing sound."""
    clock = iter([1000.0, 2000.0, 500.0, 400.0, 300.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    spool = filled(tmp_path, 3)
    segments_before = segments(tmp_path)
    (tmp_path / "000000000004.jsonl").touch()  # made by a process that was killed before its first line
    again = Spool(tmp_path)
    again.append("tags")
    assert len(segments(tmp_path)) == len(segments_before) + 1
    assert [entry.time_ms for entry in again.read()] == [1_000_000, 2_000_000, 2_000_000, 2_000_000]
    assert spool.last == 3


# --- kills -------------------------------------------------------------------------------------------------------


def test_a_line_torn_anywhere_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    """A process killed in the middle of a write, after every single byte."""
    filled(tmp_path, 3).close()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    start_of_last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for length in range(start_of_last, len(whole)):
        path.write_bytes(whole[:length])
        spool = Spool(tmp_path)
        assert (spool.last, path.read_bytes()) == (2, whole[:start_of_last])
        spool.append("tags", values={"after": "the kill"})
        assert numbers(Spool(tmp_path)) == [1, 2, 3]


def test_a_killed_process_loses_nothing_that_it_told(tmp_path: Path) -> None:
    """SIGKILL, with no farewell: what `append` has returned from is there."""
    script = (
        "import os, signal, sys; from pathlib import Path; from trainer.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        "for step in range(1000): spool.append('metrics', step=step, values={})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -9
    assert numbers(Spool(tmp_path)) == list(range(1, 1001))


def test_zeros_where_a_power_cut_took_the_end(tmp_path: Path) -> None:
    """Some file systems keep the length of a file and lose what was in it."""
    filled(tmp_path, 3).close()
    (path,) = segments(tmp_path)
    with path.open("ab") as end:
        end.write(b"\0" * 500)
    spool = Spool(tmp_path)
    spool.append("tags")
    assert numbers(spool) == [1, 2, 3, 4]


def test_a_number_that_was_delivered_is_not_given_twice(tmp_path: Path) -> None:
    """A power cut takes lines that have been delivered already, artifacts or not: what comes next is new."""
    for position in (Position(5, 3, "run"), Position(3, 5, "run")):
        spool = Spool(tmp_path)
        spool.set_position(position)
        assert Spool(tmp_path).last == 5


def test_a_write_that_was_interrupted_after_it_came_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C hits between the write and the note of it: the line is written again with the next one."""
    write = os.write

    def interrupted(handle: int, data: bytes) -> int:
        write(handle, data)
        raise KeyboardInterrupt

    spool = filled(tmp_path, 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "write", interrupted)
        spool.append("tags", values={"a": "b"})
    spool.append("end", status="KILLED")
    assert [entry.kind for entry in spool.read()] == ["metrics", "tags", "end"]
    assert [entry.kind for entry in Spool(tmp_path).read()] == ["metrics", "tags", "end"]


# --- flipped bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [0, 2, 4], ids=["the first", "one in the middle", "the last"])
def test_any_flipped_bit_costs_at_most_its_line_and_its_neighbour(tmp_path: Path, line: int) -> None:
    """Checksum, number, text or line end: no entry comes back as another one than it was, and what is told later has
    numbers of its own, so that the damage is found by its gap.
    """
    filled(tmp_path, 5).close()
    (path,) = segments(tmp_path)
    whole, entries = path.read_bytes(), {entry.number: entry for entry in Spool(tmp_path).read()}
    lines = whole.splitlines(keepends=True)
    start = sum(map(len, lines[:line]))
    for offset in range(start, start + len(lines[line])):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << bit
            path.write_bytes(damaged)
            spool = Spool(tmp_path)
            found = list(spool.read())
            assert all(entries[entry.number] == entry for entry in found)
            assert len(found) >= (4 if damaged.count(b"\n") >= 5 else 3)
            at_the_line_end = offset == start + len(lines[line]) - 1
            told = spool.append("tags", values={})
            assert told.number >= (5 if at_the_line_end else 6)
            assert list(spool.read())[-1] == told


def test_a_damaged_position_is_none_rather_than_another(tmp_path: Path) -> None:
    """One flipped digit would leave entries out for ever; sending all again changes nothing."""
    spool = Spool(tmp_path)
    spool.set_position(Position(120, 110, "f" * 32))
    assert spool.position == Position(120, 110, "f" * 32)
    path = tmp_path / "delivered"
    content = path.read_bytes()
    for offset in range(len(content) - 1):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        assert spool.position == Position()
    path.write_bytes(content[: len(content) // 2])
    assert spool.position == Position()


def test_files_of_others_in_the_folder_are_no_segments(tmp_path: Path) -> None:
    """What a file browser or a copying program leaves there."""
    spool = filled(tmp_path, 2)
    (tmp_path / "000000000001 (copy).jsonl").write_text("x")
    (tmp_path / REJECTED).write_text("x")
    assert numbers(spool) == [1, 2]


def test_hostile_lines_are_damaged_lines() -> None:
    """A checksum that fits makes no entry of what is none."""
    sound = Entry(1, 2, "tags", {}).line()
    assert entry_of(sound) == Entry(1, 2, "tags", {})
    for text in (b"", b"\n", b"zz x\n", b"00000000 \n", sound[:-1], sound.replace(b" ", b"", 1), b"\xff" * 9):
        assert entry_of(text) is None
    for content in (b"[]", b"{}", b"[1,2,3]", b'["a",2,"k",{}]', b"[1,2,3,4]", b"[" * 100_000, b"1"):
        assert entry_of(b"%08x %s\n" % (zlib.crc32(content), content)) is None


# --- size --------------------------------------------------------------------------------------------------------


def test_what_is_delivered_and_not_needed_goes_but_never_what_says_which_run_it_is(
    tmp_path: Path, small_segments: None
) -> None:
    """Nor what is not delivered, nor the segment that is written to."""
    spool = Spool(tmp_path)
    spool.append("begin", key="k")
    for step in range(50):
        spool.append("metrics", step=step, values={})
    spool.forget(51)
    assert numbers(spool) == list(range(1, 52)), "nothing is known to be delivered"
    spool.set_position(Position(51, 20, "run"))
    spool.forget(40)
    left = numbers(spool)
    assert left[0] == 1 and set(range(21, 52)) <= set(left) and 10 not in left
    spool.set_position(Position(51, 51, "run"))
    spool.forget(51)
    assert len(segments(tmp_path)) == 2 and numbers(spool)[0] == 1 and numbers(spool)[-1] == 51
    spool.append("tags")
    assert numbers(Spool(tmp_path))[-1] == 52


def test_twenty_thousand_rows_cost_the_same_each_and_no_memory(tmp_path: Path) -> None:
    """While the server is away all day: time of a row, of a look at the newest, and what is held in memory stay flat;
    delivered at last, nearly all of it goes.
    """
    spool, values = Spool(tmp_path), {f"eval/loss_by_domain/{i}": i / 7 for i in range(10)}

    def thousand(first: int) -> float:
        began = time.process_time()
        for step in range(first, first + 1000):
            spool.append("metrics", step=step, values=values)
        return time.process_time() - began

    thousand(0)
    early = min(thousand(1000), thousand(2000))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for first in range(3000, 17_000, 1000):
        thousand(first)
    assert tracemalloc.get_traced_memory()[0] - before < 200_000
    tracemalloc.stop()
    late = min(thousand(first) for first in (17_000, 18_000, 19_000))
    assert late < 5 * early  # others work on this machine too
    began = time.process_time()
    assert len(list(islice(spool.read(19_900), 50))) == 50
    assert time.process_time() - began < 2
    size = sum(path.stat().st_size for path in segments(tmp_path))
    assert size > 20 * SEGMENT_BYTES
    spool.set_position(Position(20_000, 20_000, "run"))
    spool.forget(20_000)
    assert sum(path.stat().st_size for path in segments(tmp_path)) < 3 * SEGMENT_BYTES


# --- threads -----------------------------------------------------------------------------------------------------


def test_a_reader_beside_a_writer_misses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is seen half is one that is being written: neither it nor what follows is passed over."""
    write = os.write

    def slowly(handle: int, data: bytes) -> int:
        half = len(data) // 2
        return write(handle, data[:half]) + (time.sleep(0.0002) or write(handle, data[half:]))

    monkeypatch.setattr(os, "write", slowly)
    spool = Spool(tmp_path)
    writer = threading.Thread(target=lambda: [spool.append("metrics", step=step) for step in range(400)])
    writer.start()
    found: list[int] = []
    while writer.is_alive() or len(found) < 400:
        written = spool.written
        new = numbers(spool, found[-1] if found else 0)
        found += new
        assert found == list(range(1, len(found) + 1)) and len(found) >= written
    writer.join()


def test_nothing_is_read_behind_a_line_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its number would be passed over, and the entry never delivered: the rest comes right after the half."""
    spool = filled(tmp_path, 2)
    (path,) = segments(tmp_path)
    third, fourth = (Entry(number, 1, "tags", {}).line() for number in (3, 4))
    with path.open("ab", buffering=0) as end:
        end.write(third[:20])

        def written_meanwhile(line: bytes) -> Entry | None:
            if line == third[:20]:
                end.write(third[20:] + fourth)
            return entry_of(line)

        monkeypatch.setattr(spool_module, "entry_of", written_meanwhile)
        assert numbers(spool) == [1, 2]
        end.write(third[20:] + fourth)
    assert numbers(spool) == [1, 2, 3, 4]


def test_reading_goes_on_over_what_is_forgotten_meanwhile(tmp_path: Path, small_segments: None) -> None:
    """What goes has been delivered, so that it is no loss."""
    spool = filled(tmp_path, 40)
    entries = spool.read()
    assert next(entries).number == 1
    spool.set_position(Position(40, 40, "run"))
    spool.forget(30)
    rest = [entry.number for entry in entries]
    assert rest[-1] == 40 and rest == sorted(rest) and set(range(31, 41)) <= set(rest)


def test_many_threads_tell_at_once(tmp_path: Path) -> None:
    """Each entry once, numbered in the order in which it was written."""
    spool = Spool(tmp_path)
    threads = [threading.Thread(target=lambda: [spool.append("tags") for _ in range(100)]) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(spool) == list(range(1, 501))


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that a disk has."""
    path = disk / "ballast"
    with path.open("wb") as ballast, pytest.raises(OSError, match="No space"):
        while True:
            os.write(ballast.fileno(), b"x" * 512)
    return path


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(small_disk: Path) -> None:
    """In order, with the times at which it was told, and nothing half; until then it is known to be held."""
    spool = filled(small_disk / "spool", 3)
    ballast = fill(small_disk)
    told = [spool.append("metrics", step=step, values={"x": "y" * 3000}) for step in range(10)]
    assert "No space" in str(spool.trouble)
    assert spool.last == 13 and 3 <= spool.written < 13 and [entry.number for entry in spool.held()][-1] == 13
    assert numbers(spool) == list(range(1, spool.written + 1))
    assert numbers(Spool(small_disk / "spool")) == list(range(1, spool.written + 1)), "what a kill now would leave"
    ballast.unlink()
    spool.sync()
    assert spool.trouble is None and spool.held() == [] and spool.written == 13
    assert list(spool.read(3)) == told


def test_half_a_line_is_cut_off_before_it_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for a part of it."""
    write = os.write
    spool = filled(tmp_path, 2)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
        spool.append("tags", values={"a": "b"})
        assert numbers(spool) == [1, 2] and spool.written == 2
    spool.append("end", status="FINISHED")
    assert numbers(spool) == [1, 2, 3, 4]


def test_no_half_file_is_kept_and_no_position_half_written(small_disk: Path) -> None:
    """The old position counts, and room that a half copy took is given back."""
    spool = filled(small_disk / "spool", 1)
    spool.set_position(Position(1, 1, "run"))
    source = small_disk.parent / "big.bin"
    source.write_bytes(b"x" * 100_000)
    for keep in (lambda: spool.keep_file(source, "big.bin"), lambda: spool.keep_text("x" * 100_000, "big.txt")):
        with pytest.raises(OSError, match="No space"):
            keep()
    assert list((spool.folder / "files").iterdir()) == []
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        spool.set_position(Position(2, 2, "run"))
    assert spool.position == Position(1, 1, "run")


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.txt", "x" * 250 + ".txt", os.fsdecode(b"caf\xe9.txt"), "数" * 80 + ".txt"])
def test_a_kept_file_is_found_by_the_name_that_the_spool_gives_back(tmp_path: Path, name: str) -> None:
    """Also where its name is as long as a name can be, or no UTF-8: it travels through JSON."""
    spool = Spool(tmp_path)
    source = tmp_path / "source"
    source.write_text("content")
    for kept in (spool.keep_file(source, name), spool.keep_text("content", name)):
        travelled = json.loads(json.dumps(kept).encode("utf-8"))
        assert spool.file(travelled).read_text() == "content"
        assert kept.endswith(".txt")


def test_an_entry_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    """Delivered files are removed."""
    for name in ("../run.json", "/etc/passwd", "a/b"):
        with pytest.raises(ValueError, match="not the name of a file in the spool"):
            Spool(tmp_path).file(name)
