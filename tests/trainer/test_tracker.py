"""What a run logs to: nothing twice and nothing lost over any number of resumes, and no secret in what is written."""

import math
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from trainer import names
from trainer import spool as spool_module
from trainer.errors import Interrupted
from trainer.redact import Redactor
from trainer.spool import Entry, Position, Spool
from trainer.tracker import Diverged, SpoolTracker, status_after

LOSS, OTHER, MEASURED = names.TRAIN_LOSS, names.EVAL_LOSS, names.TRAIN_SECONDS


class Nowhere:
    """A door to a store that is away."""

    def deliver(self, entries: Sequence[Entry], spool: Spool, run_id: str) -> str:
        """Take nothing."""
        raise ConnectionRefusedError(111, "Connection refused")


def tracker(
    spool: Spool, *, after: int = 0, left_upto: int = 0, environment: dict[str, str] | None = None
) -> SpoolTracker:
    """The tracker of a run, resumed after an entry; nothing is delivered."""
    return SpoolTracker(
        spool, Nowhere(), Redactor(environment or {}), resumed_after=after, left_upto=left_upto, close_seconds=0
    )


def train(into: SpoolTracker, first: int, last: int, *, drift: float = 0.0) -> int:
    """Log what training from one step to another logs; the entry that a resume point after it would name."""
    for step in range(first, last + 1):
        into.metrics({LOSS: step / 3 + drift, MEASURED: step * 1.5}, step)
        if step % 2 == 0:
            into.metrics({OTHER: step / 7}, step)
            into.metrics({names.GENERATION_SECONDS: 1.0}, step)
    return into.last


def rows(spool: Spool) -> list[tuple[int, list[str]]]:
    """(step, metrics) of every row in the spool."""
    return [(e.body["step"], sorted(e.body["values"])) for e in spool.read() if e.kind == "metrics"]


def expected_rows(last: int) -> list[tuple[int, list[str]]]:
    """The same of a run that nothing happened to."""
    found = []
    for step in range(1, last + 1):
        found.append((step, sorted([LOSS, MEASURED])))
        if step % 2 == 0:
            found += [(step, [OTHER]), (step, [names.GENERATION_SECONDS])]
    return found


# --- resumed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", range(4, 9))
def test_rows_that_come_again_are_not_logged_again(tmp_path: Path, killed_at: int) -> None:
    """Those that are exact are compared; measured ones, which differ, are known by their step."""
    spool = Spool(tmp_path)
    point = train(tracker(spool), 1, 3)
    train(tracker(spool, after=point), 4, killed_at)
    train(tracker(Spool(tmp_path), after=point), 4, 10)
    assert rows(Spool(tmp_path)) == expected_rows(10)


def test_a_run_resumed_many_times_has_every_row_once(tmp_path: Path) -> None:
    """Also where it is interrupted, with a resume point, before it has come to where it was before."""
    spool = Spool(tmp_path)
    run = tracker(spool)
    points = {0: 0, 5: train(run, 1, 5)}
    train(run, 6, 20)
    for resumed_at, interrupted_at in pairwise([5, 8, 9, 12, 12, 19, 23, 30]):
        run = tracker(Spool(tmp_path), after=points[resumed_at])
        run.tags({names.TAG_RESUMED_AT: str(resumed_at)})
        points[interrupted_at] = train(run, resumed_at + 1, interrupted_at)
        run._append("end", status="KILLED")
    assert rows(Spool(tmp_path)) == expected_rows(30)


def test_what_is_needed_for_the_next_comparison_is_not_given_up(tmp_path: Path) -> None:
    """A point that is written while rows come again names the entry before those that are still to come."""
    spool = Spool(tmp_path)
    train(tracker(spool), 1, 10)
    run = tracker(Spool(tmp_path))
    run.tags({})
    assert run.last == 0
    point = train(run, 1, 4)
    ahead = [e for e in spool.read(point) if e.kind == "metrics"]
    assert ahead[0].body["step"] <= 5
    train(run, 5, 10)
    assert run.last == Spool(tmp_path).last


@pytest.mark.parametrize(
    ("row", "step", "said"),
    [
        ({LOSS: 2.0}, 2, "train/loss 1.0 before, 2.0 now"),
        ({LOSS: 1.0 + 2**-52}, 2, "train/loss 1.0 before, 1.0000000000000002 now"),
        ({LOSS: math.nan}, 2, "train/loss 1.0 before, nan now"),
        ({LOSS: 1.0}, 3, "a row of step 2 before, one of step 3 now"),
        ({LOSS: 1.0, OTHER: 1.0}, 2, "a row of step 2"),
    ],
)
def test_another_number_stops_the_run_and_says_which(
    tmp_path: Path, row: dict[str, float], step: int, said: str
) -> None:
    """To the last bit: something beside the configuration has changed. Nothing is logged."""
    spool = Spool(tmp_path)
    tracker(spool).metrics({LOSS: 1.0}, 2)
    with pytest.raises(Diverged, match="--resume never") as raised:
        tracker(spool).metrics(row, step)
    assert said in str(raised.value) and spool.last == 1


def test_nan_is_the_same_as_nan(tmp_path: Path) -> None:
    """A spike that overflowed does so again."""
    spool = Spool(tmp_path)
    for _ in range(2):
        tracker(spool).metrics({LOSS: math.nan, OTHER: math.inf}, 1)
    assert spool.last == 1


def test_what_is_measured_may_differ(tmp_path: Path) -> None:
    """In a row with exact values; the row that was logged first stays."""
    spool = Spool(tmp_path)
    for seconds in (1.0, 2.0):
        tracker(spool).metrics({LOSS: 1.0, MEASURED: seconds}, 1)
    assert [e.body["values"][MEASURED] for e in spool.read()] == [1.0]


def test_where_numbers_may_differ_rows_are_known_by_step_and_metrics(tmp_path: Path) -> None:
    """On another number of ranks, say; also when it is interrupted on its way. The rows of the new course are its own:
    they must come again as they were.
    """
    spool = Spool(tmp_path)
    run = tracker(spool)
    point = train(run, 1, 3)
    train(run, 4, 12)
    left = spool.last
    middle = train(tracker(Spool(tmp_path), after=point, left_upto=left), 4, 7, drift=0.5)
    for _ in range(2):
        train(tracker(Spool(tmp_path), after=middle, left_upto=left), 8, 15, drift=0.5)
    assert rows(Spool(tmp_path)) == expected_rows(15)
    with pytest.raises(Diverged):
        train(tracker(Spool(tmp_path), after=middle, left_upto=left), 8, 15, drift=0.7)


def test_under_another_cadence_no_row_is_taken_for_another(tmp_path: Path) -> None:
    """With evaluations at other steps, rows of steps that were passed before are new, and are logged."""
    spool = Spool(tmp_path)
    for step, key in ((2, LOSS), (2, OTHER), (4, LOSS), (4, OTHER)):
        tracker(spool, after=spool.last).metrics({key: 1.0}, step)
    run = tracker(spool, left_upto=spool.last)
    for step, key in ((2, LOSS), (3, LOSS), (3, OTHER), (4, LOSS), (5, LOSS)):
        run.metrics({key: 1.0}, step)
    assert [(e.body["step"], *e.body["values"]) for e in spool.read(4)] == [(3, LOSS), (3, OTHER), (5, LOSS)]


# --- damaged -----------------------------------------------------------------------------------------------------


def damage(folder: Path, number: int) -> None:
    """Flip a bit in one line."""
    (path,) = folder.glob("0*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b'"', b"#", 1)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("number", range(1, 14))
def test_a_flipped_bit_does_not_keep_a_run_from_going_on(tmp_path: Path, number: int) -> None:
    """The row that is gone is logged anew where MLflow cannot have it, and not where it has; but the last of all is,
    for then a row could be lost. Others are as they were.
    """
    for delivered in (False, True):
        folder = tmp_path / str(delivered)
        spool = Spool(folder)
        train(tracker(spool), 1, 6)
        spool.append("end", status="KILLED")
        spool.close()
        gone = list(spool.read())[number - 1]
        damage(folder, number)
        if delivered:
            Spool(folder).set_position(Position(spool.last, spool.last, "run"))
        again = Spool(folder)
        train(tracker(again), 1, 8)
        wanted = expected_rows(8)
        if delivered and number < 11:
            wanted.remove((gone.body["step"], sorted(gone.body["values"])))
        assert sorted(rows(again)) == sorted(wanted)


def test_where_every_resume_point_is_damaged_a_forgotten_beginning_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were delivered and forgotten cannot be compared; they are not logged twice, and what follows is."""
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 500)
    spool = Spool(tmp_path)
    train(tracker(spool), 1, 60)
    spool.set_position(Position(spool.last, spool.last, "run"))
    spool.forget(spool.last - 20)
    left = rows(spool)
    assert left[0][0] == 1 and len(left) < 60
    train(tracker(Spool(tmp_path)), 1, 70)
    assert rows(Spool(tmp_path)) == left + expected_rows(70)[len(expected_rows(60)) :]


# --- what is written ---------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_in_anything_that_is_written(tmp_path: Path) -> None:
    """Params, tags, description, texts, names of files, datasets, the reason of a failure."""
    token = "s3cr3t/t0k3n-9f8e"
    spool = Spool(tmp_path / "spool")
    run = tracker(spool, environment={"MY_API_KEY": token, "FLAT_TOKEN": "flatsecret99"})
    source = tmp_path / "flatsecret99.txt"
    source.write_text("content")
    with pytest.raises(ValueError, match="cannot read"), run:
        run.params({"data.train_jsonl": f"/data/{token}/train.jsonl"})
        run.tags({"source": f"https://me:{token}@host/x", "list": "flatsecret99"})
        run.description(f"**{token}**")
        run.text(f'{{"path": "{token}"}}', "flatsecret99.json")
        run.file(source, "flatsecret99")
        run.dataset("train", "f" * 32, f"/data/{token}/train.jsonl", "train")
        raise ValueError(f"cannot read /data/{token}/train.jsonl")
    written = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert len(written) == 4  # the entries, two texts, a file
    for path in written:
        assert "flatsecret" not in str(path)
        for secret in (token.encode(), b"flatsecret99", b"me:"):
            assert secret not in path.read_bytes()
    kept = [entry.body["kept"] for entry in spool.read() if entry.kind == "artifact"]
    assert all(spool.file(name).is_file() for name in kept)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (Interrupted(), "KILLED"),
        (SystemExit(1), "FAILED"),
        (Diverged(), "FAILED"),
        (OSError(28, "No space left on device"), "FAILED"),
    ],
    ids=repr,
)
def test_the_last_entry_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    """Whatever happened; and it is on disk when the tracker is closed."""
    assert status_after(error) == status
    spool = Spool(tmp_path)
    try:
        with tracker(spool):
            if error is not None:
                raise error
    except BaseException as raised:  # noqa: BLE001
        assert raised is error
    last = list(Spool(tmp_path).read())[-1]
    assert (last.kind, last.body) == ("end", {"status": status})


def test_a_run_that_did_not_end_well_says_how_to_bring_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the tracker was away; of one that went well its result says it."""
    spool = Spool(tmp_path / "output" / "run" / "spool")
    with pytest.raises(KeyboardInterrupt), tracker(spool):
        raise KeyboardInterrupt
    assert f"1 entries are not delivered: python -m trainer sync {tmp_path}/output/run" in capsys.readouterr().err


def test_ctrl_c_while_the_rest_is_delivered_leaves_nothing_unsaid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a thread that goes on to write in a spool which another process may have by then."""
    spool = Spool(tmp_path / "output" / "run" / "spool")
    run = tracker(spool)

    def interrupted(seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.delivery._done, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), run:
        pass
    said = capsys.readouterr().err
    assert f"1 entries are not delivered: python -m trainer sync {tmp_path}/output/run" in said
    assert spool._handle is None
    run.delivery._thread.join(60)
    assert not run.delivery._thread.is_alive()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_no_row(small_disk: Path) -> None:
    """What cannot be written is held; a file that cannot be kept is left out, and that is said."""
    spool = Spool(small_disk / "spool")
    with tracker(spool) as run:
        for step in range(2000):
            run.metrics({LOSS: step / 3}, step)
        assert spool.trouble is not None
        run.sync()
        run.text("x" * 10_000, "a.txt")
        assert "a.txt is not in MLflow: No space left on device" in run.notices()
    (last,) = [entry for entry in spool.held() if entry.kind == "end"]
    assert last.body["status"] == "FINISHED"
