"""The one door to MLflow, on a real SQLite store: what is written, which run is used, how it ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.running import ROOT, empty_store, environment, open_run, runs_in
from trainer import names
from trainer.errors import TrackingError
from trainer.tracking import abandon

pytestmark = pytest.mark.usefixtures("own_variables")

OURS = names.EXPERIMENT


def only_run(store: str, experiment: str = OURS) -> Run:
    """The one run of an experiment."""
    (run,) = runs_in(store, experiment)
    return run


def made_by_mlflow_run(store: str, **params: str) -> str:
    """A run as `mlflow run` makes it before it starts us: RUNNING, at random named, its `-P` values as params."""
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("theirs")).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    return run_id


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_row_lands_at_one_step_and_one_time(store: str) -> None:
    """Value, step and a shared timestamp of now."""
    before = int(time.time() * 1000)
    with open_run(run_name="r") as tracker:
        tracker.metrics({"train/loss": 1.5, "learning_rate/vision": 1e-4}, step=7)
    client = MlflowClient(store)
    rows = [client.get_metric_history(tracker.run_id, key)[0] for key in ("train/loss", "learning_rate/vision")]
    assert [(m.value, m.step) for m in rows] == [(1.5, 7), (1e-4, 7)]
    assert before <= rows[0].timestamp == rows[1].timestamp <= time.time() * 1000


def test_params_that_are_already_there_stay_as_they_are(store: str) -> None:
    """`mlflow run` has logged `-P` in the user's spelling; ours differs and raises nothing, new keys arrive."""
    with open_run(run_name="r") as tracker:
        MlflowClient(store).log_param(tracker.run_id, "training.vit_lr", "1e-4")
        tracker.params({"training.vit_lr": "0.0001", "training.seed": "3"})
        tracker.params({"training.vit_lr": "0.0001", "training.seed": "4"})
    assert only_run(store).data.params == {"training.vit_lr": "1e-4", "training.seed": "3"}


@pytest.mark.parametrize("cuts", ["true", "false"])
def test_any_number_of_params_of_any_length_is_taken(store: str, monkeypatch: pytest.MonkeyPatch, cuts: str) -> None:
    """More than the hundred that a call takes, and values longer than are kept, whatever MLflow is set to."""
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", cuts)
    values = {f"section.key{i}": "x" * (7000 if i == 0 else i) for i in range(250)}
    with open_run(run_name="r") as tracker:
        tracker.params(values)
    logged = only_run(store).data.params
    assert len(logged) == 250
    assert logged["section.key0"] == "x" * 6000 and logged["section.key249"] == "x" * 249


def test_tags_description_text_and_files_arrive(store: str, tmp_path: Path) -> None:
    """Tags can be set again; the description is the one that the MLflow UI shows."""
    (tmp_path / "plan.json").write_text("{}")
    with open_run(run_name="r") as tracker:
        tracker.tags({"training_gate": "open", "seed": "17"})
        tracker.tags({"training_gate": "passed"})
        tracker.description("**bold**")
        tracker.text("é", "note.txt")
        tracker.file(tmp_path / "plan.json", "folder")
    run = only_run(store)
    assert (run.data.tags["training_gate"], run.data.tags["seed"]) == ("passed", "17")
    assert run.data.tags["mlflow.note.content"] == "**bold**"
    artifacts = Path(MlflowClient(store).download_artifacts(run.info.run_id, ""))
    assert (artifacts / "note.txt").read_text(encoding="utf-8") == "é"
    assert (artifacts / "folder" / "plan.json").read_text() == "{}"


def test_a_dataset_keeps_its_whole_digest_and_its_context(store: str) -> None:
    """32 hex characters of the 36 that MLflow allows."""
    digest = "0123456789abcdef" * 2
    with open_run(run_name="r") as tracker:
        tracker.dataset("val", digest, "val.jsonl", "validation")
    (pair,) = only_run(store).inputs.dataset_inputs
    assert (pair.dataset.name, pair.dataset.digest) == ("val", digest)
    assert json.loads(pair.dataset.source) == {"uri": "val.jsonl"}  # the form that the MLflow UI reads
    assert [(tag.key, tag.value) for tag in pair.tags] == [("mlflow.data.context", "validation")]


# --- which run ---------------------------------------------------------------------------------------------------


def test_without_anything_given_a_run_is_made_in_our_experiment(store: str) -> None:
    """Named, with who started it from where, as MLflow's own start_run would say."""
    with open_run(run_name="last6_lora-seed17"):
        assert only_run(store).info.status == "RUNNING"
    run = only_run(store)
    assert (run.info.run_name, run.info.status) == ("last6_lora-seed17", "FINISHED")
    assert run.data.tags["mlflow.user"] and run.data.tags["mlflow.source.name"]


def test_the_default_store_is_mlflow_db_in_the_current_folder(tmp_path: Path) -> None:
    """Even where a folder mlruns lies about, which makes MLflow itself fall back to a file store.

    In a process of its own: MLflow keeps what it has opened by a name that is the same in every folder.
    """
    empty_store(tmp_path)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\n")
    code = "from tests.running import open_run\nwith open_run(run_name='r'):\n    pass"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(None, PYTHONPATH=str(ROOT)), check=True)
    assert only_run(f"sqlite:///{tmp_path}/mlflow.db").info.status == "FINISHED"


def test_the_environment_chooses_the_experiment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, made when it is not there; an id comes first."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by name")
    with open_run(run_name="a"):
        pass
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", MlflowClient(store).create_experiment("by id"))
    with open_run(run_name="b"):
        pass
    assert only_run(store, "by name").info.run_name == "a"
    assert only_run(store, "by id").info.run_name == "b"


def test_a_deleted_experiment_is_told_with_what_to_do(store: str) -> None:
    """Otherwise MLflow says that a lifecycle stage is wrong."""
    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment(OURS))
    with pytest.raises(TrackingError, match=r"deleted[\s\S]*experiments restore --experiment-id"):
        open_run(run_name="r")


def test_the_run_that_mlflow_run_has_made_is_adopted(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second run; its random name gives way to ours."""
    run_id = made_by_mlflow_run(store, seed="18")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with open_run(run_name="last6_lora-seed18") as tracker:
        tracker.params({"seed": "eighteen", "training.seed": "18"})
    assert tracker.run_id == run_id and runs_in(store) == []
    run = only_run(store, "theirs")
    assert (run.info.run_name, run.info.status) == ("last6_lora-seed18", "FINISHED")
    assert run.data.params == {"seed": "18", "training.seed": "18"}


def test_an_adopted_run_keeps_the_name_that_its_user_gave(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run --run-name mine`."""
    run_id = made_by_mlflow_run(store)
    MlflowClient(store).update_run(run_id, name="mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with open_run(run_name="last6_lora-seed17"):
        pass
    assert only_run(store, "theirs").info.run_name == "mine"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_that_has_ended_is_not_adopted(store: str, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """A forgotten MLFLOW_RUN_ID would mix two trainings in one run."""
    run_id = made_by_mlflow_run(store)
    MlflowClient(store).set_terminated(run_id, status)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with pytest.raises(TrackingError, match=rf"MLFLOW_RUN_ID[\s\S]*{status}[\s\S]*unset MLFLOW_RUN_ID"):
        open_run(run_name="r")
    assert only_run(store, "theirs").info.status == status


def test_an_unknown_run_id_is_told(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another store, say."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="0" * 32):
        open_run(run_name="r")


def test_inside_an_active_run_ours_is_nested_in_its_experiment(store: str) -> None:
    """The outer run goes on afterwards."""
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("outer experiment")
    with mlflow.start_run() as outer:
        with open_run(run_name="inner") as tracker:
            pass
        assert mlflow.active_run().info.run_id == outer.info.run_id
    inner = MlflowClient(store).get_run(tracker.run_id)
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert inner.info.experiment_id == outer.info.experiment_id
    assert MlflowClient(store).get_run(outer.info.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("under_mlflow_run", [False, True])
def test_a_named_parent_gets_a_child_in_its_experiment(
    store: str, monkeypatch: pytest.MonkeyPatch, under_mlflow_run: bool
) -> None:
    """Also where `mlflow run` has made the parent: the child is not the parent itself."""
    parent = made_by_mlflow_run(store)
    if under_mlflow_run:
        monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    monkeypatch.setenv(names.PARENT_VARIABLE, parent)
    with open_run(run_name="child") as tracker:
        pass
    assert tracker.run_id != parent
    child = MlflowClient(store).get_run(tracker.run_id)
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert {run.info.run_id for run in runs_in(store, "theirs")} == {parent, tracker.run_id}


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (RuntimeError("no more memory"), "FAILED"),
        (GeneratorExit(), "FAILED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_an_exception_ends_the_run_as_what_it_was(store: str, error: BaseException, status: str) -> None:
    """And goes on; only a failure leaves a traceback."""
    with pytest.raises(type(error)), open_run(run_name="r"):
        raise error
    run = only_run(store)
    assert run.info.status == status
    artifacts = [file.path for file in MlflowClient(store).list_artifacts(run.info.run_id)]
    assert artifacts == ([names.ARTIFACT_TRACEBACK] if status == "FAILED" else [])
    if status == "FAILED":
        text = Path(MlflowClient(store).download_artifacts(run.info.run_id, names.ARTIFACT_TRACEBACK)).read_text()
        assert "raise error" in text and type(error).__name__ in text and str(error) in text


def test_last_words_are_logged_however_a_run_ends(store: str) -> None:
    """Also when one of them fails: it never hides what ended the run."""

    def fails() -> None:
        raise ValueError("a last word that cannot be said")

    for error in (RuntimeError("first"), KeyboardInterrupt()):
        with pytest.raises(type(error)), open_run(run_name="r") as tracker:
            tracker.at_end(fails)
            tracker.at_end(lambda: tracker.tags({"training_gate": "open"}))
            raise error
        assert MlflowClient(store).get_run(tracker.run_id).data.tags["training_gate"] == "open"


def test_a_run_whose_last_words_fail_is_not_finished(store: str) -> None:
    """It lacks an artifact that it promises."""
    with pytest.raises(ZeroDivisionError), open_run(run_name="r") as tracker:
        tracker.at_end(lambda: print(1 / 0))
    assert only_run(store).info.status == "FAILED"


def test_a_failed_run_is_failed_even_if_its_traceback_cannot_be_stored(store: str, tmp_path: Path) -> None:
    """A full disk is a likely reason for both; what is not stored waits beside the run."""
    (tmp_path / "mlruns").write_text("a file where the artifacts' folder should be")
    with pytest.raises(RuntimeError, match="first"), open_run(run_name="r", close_seconds=1):
        raise RuntimeError("first")
    assert only_run(store).info.status == "FAILED"


def test_a_mistake_before_training_closes_the_adopted_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAILED, or KILLED when interrupted, with the reason as its description; one that has ended is left alone."""
    run_id = made_by_mlflow_run(store)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    abandon(TrackingError("where", "got", "allowed", "do"), "FAILED")
    abandon(KeyboardInterrupt(), "KILLED")
    run = only_run(store, "theirs")
    assert run.info.status == "FAILED"
    assert "got:     got" in run.data.tags["mlflow.note.content"]


def test_closing_an_adopted_run_never_hides_the_mistake(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store may be the very thing that is wrong."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    abandon(RuntimeError("x"), "FAILED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///nowhere")
    abandon(RuntimeError("x"), "FAILED")


def test_runs_that_begin_together_on_a_new_sqlite_file_all_find_it_whole(tmp_path: Path) -> None:
    """Two arms started at once, in a folder without a store yet."""
    code = "from tests.running import open_run\nwith open_run(run_name='arm'): pass"
    uri = f"sqlite:///{tmp_path}/new.db"
    here = environment(uri, PYTHONPATH=str(ROOT))
    begun = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=here, stderr=subprocess.PIPE) for _ in range(3)
    ]
    said = [process.communicate()[1] for process in begun]
    assert [process.returncode for process in begun] == [0] * 3, said
    assert len(runs_in(uri)) == 3
