"""How a run is begun or gone on with, without a model: what is refused, from where, and what is left to the next."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.running import runs_in
from trainer import names
from trainer.begin import AUTO, NEVER, Asked, Begun, begin, open_tracker
from trainer.checkpoint import write_folder
from trainer.errors import ConfigError, Interrupted, TrackingError, TrainingStopped
from trainer.events import Seen
from trainer.position import Position, Progress
from trainer.runs import RUN_FILE, Identity, held, read_facts
from trainer.sync import close_dead
from trainer.tracking import reach_store


def identity(store: str, **params: str) -> Identity:
    """Of a training."""
    known = {"training.vit_lr": "1e-4", "launch.nproc": "1", names.TAG_TRAIN_DIGEST: "a" * 32} | params
    return Identity("arm-seed3", known, store)


def asked(resume: str | Path = AUTO, *, drift: bool = False, steps: int = 10, patience: int | None = None) -> Asked:
    """What a command line asks for."""
    return Asked(str(resume), drift, steps, patience)


def train(begun: Begun, *, steps: range = range(0), error: BaseException | None = None) -> None:
    """Log a row for each step, and end."""
    with begun, open_tracker(begun, reach_store(), run_name="r", close_seconds=20) as tracker:
        for step in steps:
            tracker.metrics({names.TRAIN_LOSS: step / 3}, step)
        if error is not None:
            raise error


def interrupt(begun: Begun, *, steps: range = range(1, 3)) -> Path:
    """The same, ended before its time; the run's folder."""
    with pytest.raises(Interrupted):
        train(begun, steps=steps, error=Interrupted("as asked"))
    return begun.path


def point(home: Path, step: int, *, key: str | None = None, progress: Progress | None = None, **how: bool) -> Path:
    """A resume point without tensors."""
    position = Position(Seen(step=step), progress or Progress(), how.get("passed", True), how.get("ended", False))
    folder = home / "resume" / f"step-{step}"
    state = json.dumps({"position": asdict(position), "parts": {}})
    facts = {"format": 1, "key": key or read_facts(home)["key"], "step": step, "spool": 2}
    write_folder(folder, lambda aside: (aside / "state.json").write_text(state), facts)
    return folder


def test_an_interrupted_run_of_the_same_configuration_is_gone_on_with(store: str, tmp_path: Path) -> None:
    """Not one that is over, nor one that stopped itself; that one only by name."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    again = begin(tmp_path / "out", identity(store), asked())
    assert (again.path, again.resumed) == (home, True)
    train(again)
    assert read_facts(home)["state"] == "over"
    with pytest.raises(TrainingStopped):
        train(begin(tmp_path / "out", identity(store), asked()), error=TrainingStopped("a loss is not finite"))
    anew = begin(tmp_path / "out", identity(store), asked())
    (stopped,) = {path.parent for path in (tmp_path / "out").glob(f"*/{RUN_FILE}")} - {home, anew.path}
    train(anew)
    named = begin(tmp_path / "out", identity(store), asked(stopped))
    assert named.path == stopped
    train(named)
    with pytest.raises(ConfigError, match="a run that is over"):
        begin(tmp_path / "out", identity(store), asked(home))


def test_what_is_refused_names_its_reason(store: str, tmp_path: Path) -> None:
    """And touches nothing: another configuration, batch, data, store; a folder that is no run, or not there."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    before = (home / RUN_FILE).read_bytes()
    other = {
        "training.vit_lr: 1e-4 before, 2e-4 now": identity(store, **{"training.vit_lr": "2e-4"}),
        "another effective batch": identity(store, **{names.EFFECTIVE_BATCH_PACKS: "8"}),
        "data.train_digest": identity(store, **{names.TAG_TRAIN_DIGEST: "b" * 32}),
        "whose MLflow run is in": identity("sqlite:////elsewhere.db"),
    }
    for words, changed in other.items():
        with pytest.raises(ConfigError, match=words):
            begin(tmp_path / "out", changed, asked(home))
    with pytest.raises(ConfigError, match="another effective batch"):
        begin(tmp_path / "out", other["another effective batch"], asked(home, drift=True))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no run"):
            begin(tmp_path / "out", identity(store), asked(folder))
    assert (home / RUN_FILE).read_bytes() == before and list((tmp_path / "empty").iterdir()) == []


def test_changed_data_is_no_other_training(store: str, tmp_path: Path) -> None:
    """The same command on a file that was changed must not quietly begin anew, nor go on."""
    interrupt(begin(tmp_path / "out", identity(store), asked()))
    with pytest.raises(ConfigError, match=names.TAG_TRAIN_DIGEST):
        begin(tmp_path / "out", identity(store, **{names.TAG_TRAIN_DIGEST: "b" * 32}), asked())


def test_a_drift_leaves_its_mark_however_often_it_is_interrupted(store: str, tmp_path: Path) -> None:
    """From the first value to the last, also where the process that brought it was killed before it told anybody."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    second = identity(store, **{"training.vit_lr": "2e-4"})
    killed = begin(tmp_path / "out", second, asked(home, drift=True))
    assert killed.folder is not None
    killed.folder.release()
    interrupt(begin(tmp_path / "out", second, asked()), steps=range(0))
    third = identity(store, **{"training.vit_lr": "3e-4"})
    train(begin(tmp_path / "out", third, asked(home, drift=True)))
    (run,) = runs_in(store)
    assert json.loads(run.data.tags[names.TAG_DRIFT]) == {"training.vit_lr": ["1e-4", "3e-4"]}


def test_another_layout_goes_on_and_says_so(store: str, tmp_path: Path) -> None:
    """Rows that were logged need not come out the same."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    begun = begin(tmp_path / "out", identity(store, **{"launch.nproc": "2"}), asked())
    assert begun.path == home and begun.left_upto > 0
    assert any("launch.nproc from 1 to 2" in line for line in begun.lines)
    train(begun)


# --- from where --------------------------------------------------------------------------------------------------


def test_the_newest_point_is_taken_or_the_one_that_is_named(store: str, tmp_path: Path) -> None:
    """Newer ones are of a course that is left then, and go once the older one is in use."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    older, newer = point(home, 2), point(home, 4)
    begun = begin(tmp_path / "out", identity(store), asked())
    assert begun.point is not None and begun.point.folder == newer
    interrupt(begun, steps=range(0))
    named = begin(tmp_path / "out", identity(store), asked(older))
    assert named.point is not None and named.point.folder == older and newer.is_dir()
    interrupt(named, steps=range(0))
    assert not newer.exists()


def test_where_no_point_is_sound_the_run_is_refused_and_keeps_them(store: str, tmp_path: Path) -> None:
    """What is wrong with them may be the disk's, or this version's."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    damaged, foreign = point(home, 2), point(home, 4, key="f" * 32)
    (damaged / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"none is sound[\s\S]*of another training[\s\S]*--resume never"):
        begin(tmp_path / "out", identity(store), asked())
    assert damaged.is_dir() and foreign.is_dir()


@pytest.mark.parametrize(
    ("ended", "steps", "goes_on"),
    [
        (True, 4, Position(Seen(step=4), passed=True, ended=True)),  # as it was: nothing is left to do
        (True, 10, Position(Seen(step=4), passed=True, ended=False)),  # it is to be longer now: training goes on
        (False, 10, Position(Seen(step=4), passed=True, ended=False)),
        (False, 4, Position(Seen(step=4), passed=False, ended=False)),  # this pass has become the last one
    ],
)
def test_a_point_fits_a_training_that_is_longer_or_shorter_now(
    store: str, tmp_path: Path, ended: bool, steps: int, goes_on: Position
) -> None:
    """The last pass does more than others, and only the last."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    point(home, 4, ended=ended)
    begun = begin(tmp_path / "out", identity(store), asked(steps=steps))
    assert begun.point is not None and begun.point.position == goes_on
    train(begun)


def test_a_training_that_has_ended_early_ends_there_again_or_goes_on_with_more_patience(
    store: str, tmp_path: Path
) -> None:
    """By the patience that is asked for now."""
    for patience, ended in ((2, True), (5, False)):
        home = interrupt(begin(tmp_path / str(patience), identity(store), asked(patience=2)))
        point(home, 4, ended=True, progress=Progress(patience=2, evaluations=5, lowest=1.0, without_better=2))
        begun = begin(tmp_path / str(patience), identity(store), asked(patience=patience))
        assert begun.point is not None and begun.point.position.ended is ended
        train(begun)


def test_a_point_beyond_the_end_is_refused(store: str, tmp_path: Path) -> None:
    """There is nothing between it and the end."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    point(home, 4)
    with pytest.raises(ConfigError, match=r"after optimizer step 4, for 3 steps"):
        begin(tmp_path / "out", identity(store), asked(steps=3))


# --- what is left to the next command ------------------------------------------------------------------------------


def test_what_a_killed_write_left_keeps_no_run_from_going_on(store: str, tmp_path: Path) -> None:
    """A half-written file of the run itself, and a half-written folder."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    (home / f"{RUN_FILE}.writing").write_text("{")
    (home / "best.writing").mkdir()
    train(begin(tmp_path / "out", identity(store), asked()))
    assert not (home / "best.writing").exists()


@pytest.mark.parametrize("moment", ["while the model is loaded", "after the run was said to go on"])
def test_a_run_that_ends_before_there_is_a_tracker_is_closed_all_the_same(
    store: str, tmp_path: Path, moment: str
) -> None:
    """It was RUNNING in MLflow, or would have become so again."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    MlflowClient(store).update_run(runs_in(store)[0].info.run_id, status="RUNNING")
    begun = begin(tmp_path / "out", identity(store), asked())
    with pytest.raises(KeyboardInterrupt), begun:
        if moment == "after the run was said to go on":
            open_tracker(begun, reach_store(), run_name="r", close_seconds=1)
        else:
            assert begun.folder is not None
            begun.folder.spool.append("again")  # as a killed process had said before
        raise KeyboardInterrupt
    assert runs_in(store)[0].info.status == "KILLED" and read_facts(home)["state"] == "interrupted"
    assert close_dead(tmp_path / "out") == []


def test_on_a_gpu_rows_that_come_again_need_not_be_the_same_to_the_bit(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are made in no fixed order there: what was logged stays, a line says so, and nothing stops."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    begun = begin(tmp_path / "out", identity(store), asked())
    assert begun.path == home and any("numbers agree to rounding" in line for line in begun.lines)
    with begun, open_tracker(begun, reach_store(), run_name="r", close_seconds=20) as tracker:
        for step in (1, 2):
            tracker.metrics({names.TRAIN_LOSS: step / 3 + 1e-6}, step)
    (run,) = runs_in(store)
    history = MlflowClient(store).get_metric_history(run.info.run_id, names.TRAIN_LOSS)
    assert [(m.step, m.value) for m in history] == [(1, 1 / 3), (2, 2 / 3)]


def test_a_second_signal_ends_the_closing_of_such_a_run_and_lets_go_of_it(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not delivered by then is brought by the next command that goes on, or by `sync`."""

    def ended(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("trainer.sync._deliver", ended)
    begun = begin(tmp_path / "out", identity(store), asked())
    with pytest.raises(SystemExit), begun:
        open_tracker(begun, reach_store(), run_name="r", close_seconds=1)
        raise KeyboardInterrupt
    folder = held(begun.path)
    assert folder.facts["state"] == "interrupted"
    folder.release()


def test_a_run_in_which_nothing_has_begun_leaves_no_folder(store: str, tmp_path: Path) -> None:
    """The model could not be loaded, for example."""
    with pytest.raises(RuntimeError), begin(tmp_path / "out", identity(store), asked(NEVER)):
        raise RuntimeError("out of memory")
    assert list((tmp_path / "out").glob("*/")) == []


def test_a_run_that_mlflow_run_had_made_and_ended_unreached_goes_on_as_another(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow run` closes its run as FAILED when the trainer dies; nothing of the training has reached it."""
    client = MlflowClient(store)
    made = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begun = begin(tmp_path / "out", identity(store), asked())
    interrupt_away(begun)
    client.set_terminated(made, "FAILED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_RUN_ID")
    train(begin(tmp_path / "out", identity(store), asked()))
    assert [run.info.status for run in runs_in(store)] == ["FINISHED"]


def interrupt_away(begun: Begun) -> None:
    """A training whose store is away from beginning to end."""
    with pytest.raises(Interrupted), begun, open_tracker(begun, reach_store(), run_name="r", close_seconds=0):
        raise Interrupted("as asked")


def test_a_run_that_was_deleted_is_told_before_training(store: str, tmp_path: Path) -> None:
    """Not after it, when nothing has arrived."""
    interrupt(begin(tmp_path / "out", identity(store), asked()))
    MlflowClient(store).delete_run(runs_in(store)[0].info.run_id)
    with pytest.raises(TrackingError, match=r"deleted[\s\S]*mlflow runs restore"):
        train(begin(tmp_path / "out", identity(store), asked()))


def test_a_full_disk_at_the_beginning_is_one_message(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what has interrupted the run, perhaps."""
    interrupt(begin(tmp_path / "out", identity(store), asked()))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("trainer.runs._write_facts", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            begin(tmp_path / "out", identity(store), asked())
    train(begin(tmp_path / "out", identity(store), asked()))


def test_a_run_that_was_moved_goes_on_where_it_is(store: str, tmp_path: Path) -> None:
    """Its folder is wherever it lies."""
    home = interrupt(begin(tmp_path / "out", identity(store), asked()))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(home, tmp_path / "elsewhere")
    begun = begin(tmp_path / "elsewhere", identity(store), asked())
    assert begun.path == tmp_path / "elsewhere" / home.name
    train(begun)
    assert os.listdir(tmp_path / "out") == [".lock"]
