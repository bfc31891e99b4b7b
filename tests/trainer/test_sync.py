"""`trainer sync`: what could not be delivered is, once and as it was told, whatever has happened to runs and stores."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.running import empty_store, runs_in
from trainer import names
from trainer import sync as sync_module
from trainer.runs import RUN_FILE, Identity, RunFolder, held, new_run
from trainer.spool import REJECTED, Position
from trainer.sync import STILL_TRAINING, close_dead, sync
from trainer.sync_command import sync as command
from trainer.tracking import MlflowDoor, beginning

pytestmark = pytest.mark.usefixtures("own_variables")

OUTPUT = Path("output")
AWAY = "http://127.0.0.1:9"


def trained(store: str, *, name: str = "r", end: str | None = "FINISHED", **begin: Any) -> RunFolder:
    """A run that has written all down and delivered nothing; without `end` its process died. Still held."""
    folder = new_run(OUTPUT, Identity(name, {}, store))
    spool = folder.spool
    spool.append("begin", **beginning(run_name=name, key=folder.key) | begin)
    spool.append("params", values={"a.b": "1"})
    spool.append("tags", values={names.TAG_STRATEGY: "s"})
    for step in range(1, 6):
        spool.append("metrics", step=step, values={names.TRAIN_LOSS: step / 3, names.EVAL_LOSS: math.nan})
    spool.append("artifact", kept=spool.keep_text("text", "t.txt"), name="t.txt", folder=None)
    spool.append("dataset", name="train", digest="f" * 32, source="x.jsonl", context="train")
    if end is not None:
        spool.append("end", status=end)
        folder.write(state="over")
    return folder


def left(store: str, **how: Any) -> Path:
    """The same, let go of."""
    folder = trained(store, **how)
    folder.release()
    return folder.path


def only_run(store: str) -> Run:
    """The one run of a store."""
    (run,) = runs_in(store)
    return run


def everything(store: str, run: Run) -> tuple[object, ...]:
    """What a store has of a run, times included."""
    client = MlflowClient(store)
    histories = {
        key: [(repr(m.value), m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    info = (run.info.run_id, run.info.status, run.info.start_time, run.info.end_time, run.info.run_name)
    inputs = [(pair.dataset.name, len(pair.tags)) for pair in run.inputs.dataset_inputs]
    artifacts = [(file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)]
    return info, histories, run.data.params, run.data.tags, inputs, artifacts


def said(*folders: Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(command, [str(folder) for folder in folders])


def quiet(path: Path, gone: int, total: int) -> None:
    """Nobody watches."""


# --- what arrives ------------------------------------------------------------------------------------------------


def test_a_run_whose_store_was_away_arrives_with_its_own_times(store: str) -> None:
    """Rows, params, tags, artifacts, inputs, the beginning and the end; what was kept for it goes."""
    folder = trained(AWAY)
    told = list(folder.spool.read())
    folder.release()
    done = said(OUTPUT)
    assert (done.exit_code, done.stdout) == (
        0,
        f"{folder.path}: {len(told)} delivered\neverything of 1 runs is in MLflow\n",
    )
    run = only_run(store)
    info, histories, params, _, inputs, artifacts = everything(store, run)
    assert info == (run.info.run_id, "FINISHED", told[0].time_ms, told[-1].time_ms, "r")
    assert isinstance(histories, dict)
    rows = [entry for entry in told if entry.kind == "metrics"]
    assert histories[names.TRAIN_LOSS] == [(repr(e.body["step"] / 3), e.body["step"], e.time_ms) for e in rows]
    assert [value for value, _, _ in histories[names.EVAL_LOSS]] == ["nan"] * 5
    assert (params, inputs, artifacts) == ({"a.b": "1"}, [("train", 1)], [("t.txt", 4)])
    assert list((folder.path / "spool" / "files").iterdir()) == []


def test_again_changes_nothing_even_where_it_is_not_known_what_was_delivered(store: str) -> None:
    """Once more; after the position was lost; and from each entry on, as after a kill at any moment."""
    path = left(AWAY)
    sync([OUTPUT], quiet)
    before = everything(store, only_run(store))
    run_id = only_run(store).info.run_id
    for position in (None, Position(), *(Position(number, number, run_id) for number in range(1, 11))):
        if position is not None:
            folder = held(path)
            folder.spool.set_position(position)
            folder.release()
        assert said(OUTPUT).exit_code == 0
        assert everything(store, only_run(store)) == before


def test_a_dead_run_is_closed_once_and_can_still_be_gone_on_with(store: str) -> None:
    """KILLED, at the time at which that was found."""
    path = left(AWAY, end=None)
    for _ in range(2):
        (run,) = sync([path], quiet)
        assert (run.waiting, run.note) == (0, "")
    assert only_run(store).info.status == "KILLED"
    folder = held(path)
    assert folder.facts["state"] == "interrupted"
    assert [entry.kind for entry in folder.spool.read()].count("end") == 1
    folder.spool.append("again")
    folder.spool.append("end", status="FINISHED")
    folder.release()
    sync([path], quiet)
    assert only_run(store).info.status == "FINISHED"


def test_a_process_that_died_before_its_run_began_leaves_nothing_to_deliver(store: str) -> None:
    """Killed while the model was loaded: nothing is made up, and the run can begin when it is gone on with."""
    folder = new_run(OUTPUT, Identity("r", {}, store))
    folder.release()
    assert said(OUTPUT).exit_code == 0
    assert runs_in(store) == []
    again = held(folder.path)
    assert again.spool.last == 0
    again.release()


def test_one_run_that_cannot_be_delivered_keeps_no_other_from_it(store: str) -> None:
    """A training in progress, a damaged folder, a store that is away for good: each is told, with what is left."""
    good, away = left(AWAY, name="good"), left(AWAY, name="away")
    folder = held(away)
    folder.spool.set_position(Position(1, 0, "f" * 32))  # its run was made there
    folder.release()
    damaged, busy = left(AWAY, name="damaged"), left(AWAY, name="busy")
    (damaged / RUN_FILE).write_text("{")
    script = (
        "import sys, time; from pathlib import Path; from trainer.runs import held\n"
        "folder = held(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(busy)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        done = said(OUTPUT)
    finally:
        process.kill()
        process.wait()
    assert done.exit_code == 1 and done.exception.__class__ is SystemExit
    assert f"{good}: 11 delivered\n" in done.stdout
    assert f"{busy}: 0 delivered ({STILL_TRAINING})\n" in done.stdout
    assert f"{away}: 0 delivered, 11 left ({AWAY}: [Errno 111] Connection refused)\n" in done.stdout
    assert f"{damaged}: 0 delivered, 1 left (cannot be read" in done.stdout
    assert "2 of 4 runs are not all in MLflow yet" in done.stderr
    assert only_run(store).info.run_name == "good"


def test_a_folder_without_runs_is_a_mistake(store: str, tmp_path: Path) -> None:
    """Most likely a misspelt one: nobody shall believe that all is well."""
    done = said(tmp_path / "outptu")
    assert "holds no run" in str(done.exception) and done.exit_code != 0


def test_progress_comes_to_its_end(store: str) -> None:
    """Entries that went, of entries there were."""
    left(AWAY)
    seen: list[tuple[int, int]] = []
    sync([OUTPUT], lambda path, gone, total: seen.append((gone, total)))
    assert seen[0] == (0, 11) and seen[-1] == (11, 11) and seen == sorted(seen)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 12))
def test_a_flipped_bit_costs_its_line_alone_and_is_told(store: str, number: int) -> None:
    """Also in the first line, without which it is not known what run it is, and in the last one."""
    path = left(AWAY)
    (segment,) = (path / "spool").glob("0*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b"[", b"{", 1)
    segment.write_bytes(b"".join(lines))
    done = said(OUTPUT)
    assert done.exit_code == 0, done.output
    assert "(1 entries were damaged on disk)" in done.stdout and "but for what is said above" in done.stdout
    run = only_run(store)
    steps = [m.step for m in MlflowClient(store).get_metric_history(run.info.run_id, names.TRAIN_LOSS)]
    assert steps == [step for step in range(1, 6) if step + 3 != number]
    assert run.info.run_name == "r" and run.data.params == ({} if number == 2 else {"a.b": "1"})
    assert run.info.status == ("RUNNING" if number == 11 else "FINISHED")


def test_what_mlflow_never_takes_is_set_aside_and_holds_nothing_up(store: str) -> None:
    """The one param and the one metric whose names it refuses; those beside them arrive."""
    folder = trained(AWAY, end=None)
    folder.spool.append("params", values={"x.y": "1", "bad?name*": "2", "z": "3"})
    folder.spool.append("metrics", step=6, values={names.TRAIN_LOSS: 2.0, "bad?name*": 1.0})
    folder.spool.append("end", status="FINISHED")
    folder.write(state="over")
    folder.release()
    done = said(OUTPUT)
    rejected = folder.path / "spool" / REJECTED
    assert done.exit_code == 0 and f"MLflow refuses what is set aside in {rejected}" in done.stdout
    run = only_run(store)
    assert run.data.params == {"a.b": "1", "x.y": "1", "z": "3"}
    assert (run.data.metrics[names.TRAIN_LOSS], run.info.status) == (2.0, "FINISHED")
    assert rejected.read_text().count("\n") == rejected.read_text().count('bad?name*"') == 2


# --- stores and runs ---------------------------------------------------------------------------------------------


def test_a_run_goes_to_the_store_that_it_was_begun_in(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says now; only one that no store has ever seen goes to that of the environment."""
    (tmp_path / "other").mkdir()
    other = empty_store(tmp_path / "other")
    folder = trained(store)
    folder.spool.set_position(Position(1, 0, MlflowDoor(store).begin(next(folder.spool.read()))))
    folder.release()
    left(AWAY, name="never seen")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert said(OUTPUT).exit_code == 0
    assert (only_run(store).info.run_name, only_run(store).info.status) == ("r", "FINISHED")
    assert only_run(other).info.run_name == "never seen"


def test_a_run_that_somebody_has_deleted_waits_until_it_is_restored(store: str) -> None:
    """Nothing is made anew behind the back of whoever deleted it."""
    path = left(AWAY, end=None)
    sync([OUTPUT], quiet)
    run_id = only_run(store).info.run_id
    MlflowClient(store).delete_run(run_id)
    folder = held(path)
    folder.spool.append("metrics", step=6, values={names.TRAIN_LOSS: 2.0})
    folder.release()
    done = said(OUTPUT)
    assert done.exit_code == 1 and "1 left" in done.stdout and "was deleted" in done.stdout
    assert runs_in(store) == []
    MlflowClient(store).restore_run(run_id)
    assert said(OUTPUT).exit_code == 0
    assert only_run(store).data.metrics[names.TRAIN_LOSS] == 2.0


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED"])
def test_a_run_that_mlflow_run_had_made_is_taken_while_it_runs(store: str, status: str) -> None:
    """`mlflow run` ends it with its process: where the store was away in between, the training gets one of its own."""
    client = MlflowClient(store)
    made = client.create_run(client.create_experiment(names.EXPERIMENT)).info.run_id
    if status != "RUNNING":
        client.set_terminated(made, status)
    left(AWAY, adopt=made)
    for _ in range(2):
        assert said(OUTPUT).exit_code == 0
        runs = {run.info.run_id: run for run in runs_in(store)}
        assert len(runs) == (1 if status == "RUNNING" else 2)
        (ours,) = (run for run in runs.values() if names.TAG_STRATEGY in run.data.tags)
        assert (ours.info.status, ours.data.params) == ("FINISHED", {"a.b": "1"})


# --- before a training -------------------------------------------------------------------------------------------


def test_a_training_closes_the_dead_runs_beside_it_but_not_itself(store: str, tmp_path: Path) -> None:
    """However its own folder is spelt: the lock of a process does not keep the process itself out."""
    dead, own = left(AWAY, end=None, name="dead"), trained(AWAY, end=None, name="own")
    lines = close_dead(OUTPUT, but=tmp_path / "output" / ".." / own.path)
    assert lines == [f"closed {dead}, whose process had died"]
    assert (only_run(store).info.run_name, only_run(store).info.status) == ("dead", "KILLED")
    assert own.spool.last == len(list(own.spool.read())) == 10
    own.release()


def test_a_run_that_ends_while_another_is_closed_stays_as_it_has_ended(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what its folder says once it is held, not what it said before the first was delivered."""
    living, dead = (left(AWAY, end=None, name=name) for name in ("living", "dead"))

    def deliver(folder: RunFolder, count: Callable[[int], None]) -> sync_module.Synced:
        ending = held(living)  # the newest comes first
        ending.spool.append("end", status="FINISHED")
        ending.write(state="over")
        ending.release()
        return sync_module.Synced(folder.path, "", 0, 0, "")

    monkeypatch.setattr(sync_module, "_deliver", deliver)
    assert close_dead(OUTPUT) == [f"closed {dead}, whose process had died"]
    folder = held(living)
    assert folder.facts["state"] == "over"
    assert [entry.body for entry in folder.spool.read() if entry.kind == "end"] == [{"status": "FINISHED"}]
    folder.release()


def test_a_training_does_not_wait_long_for_the_runs_of_others(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed; what a slow store does not take in time is left to `sync`."""
    paths = [left(AWAY, end=None, name=name) for name in ("a", "b")]
    monkeypatch.setattr(sync_module, "_OTHERS_SECONDS", -1.0)
    lines = close_dead(OUTPUT)
    assert len(lines) == 2 and all("not delivered yet" in line for line in lines)
    monkeypatch.setattr(sync_module, "_OTHERS_SECONDS", 20.0)
    clock = iter([0.0, *[1.0] * 2, *[30.0] * 100])
    monkeypatch.setattr(sync_module.time, "monotonic", lambda: next(clock))
    for path in paths:
        folder = held(path)
        folder.write(state="running")
        folder.release()
    assert "python -m trainer sync" in " ".join(close_dead(OUTPUT))


def test_a_store_that_is_away_keeps_no_training_from_beginning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said; the dead run is closed when it is back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    path = left(AWAY, end=None)
    (line,) = close_dead(OUTPUT)
    assert line.startswith(f"closed {path}, whose process had died ({AWAY}")
    store = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert said(OUTPUT).exit_code == 0
    assert only_run(store).info.status == "KILLED"


def test_thousands_of_rows_go_in_batches(store: str) -> None:
    """All of them, in order, within seconds."""
    folder = trained(AWAY, end=None)
    for step in range(6, 3000):
        folder.spool.append("metrics", step=step, values={names.TRAIN_LOSS: step / 3})
    folder.release()
    (run,) = sync([OUTPUT], quiet)
    assert (run.waiting, run.delivered) == (0, folder.spool.last + 1)
    history = MlflowClient(store).get_metric_history(only_run(store).info.run_id, names.TRAIN_LOSS)
    assert [m.step for m in history] == list(range(1, 3000))
