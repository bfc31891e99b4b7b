"""`python -m analysis` as it is typed: what it prints, its exit status, its messages; on the published comparison."""

import csv
import io
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from analysis.published import published_runs
from tests.running import ROOT, empty_store, environment, runs_in, trained
from trainer.errors import UserError

ARMS = ("last6_lora", "last6_full", "all_lora", "all_full")

Analysis = Callable[..., "subprocess.CompletedProcess[str]"]


def analysis(*arguments: str, store: str | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """To its end, from another folder."""
    command = [sys.executable, "-m", "analysis", *arguments]
    variables = environment(store, PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the published comparison, imported twice."""
    folder = tmp_path_factory.mktemp("published")
    store = empty_store(folder)
    for word in ("imported", "already there"):
        done = analysis("import_published", store=store, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert [line.split(":")[0] for line in done.stdout.splitlines()] == [word] * 4
    return store


def test_a_second_import_adds_nothing(published: str) -> None:
    """Four runs, each row once, tagged as published and with the note that it was not measured here."""
    client = MlflowClient(published)
    runs = runs_in(published, "published")
    assert len(runs) == 4
    for run in runs:
        assert run.data.tags["source"] == "published" and "training_gate" not in run.data.tags
        assert "not measured by this project" in run.data.tags["mlflow.note.content"]
        assert len(client.get_metric_history(run.info.run_id, "eval/loss")) == 1


def test_points_after_the_last_step_are_not_imported(published: str) -> None:
    """The report gives all_full at 8000 and 10000, and it ended at 6900."""
    (run,) = (run for run in runs_in(published, "published") if run.data.tags["strategy"] == "all_full")
    history = MlflowClient(published).get_metric_history(run.info.run_id, "eval/loss_smoothed")
    assert sorted(m.step for m in history) == [2000, 4000, 6000, 6900]
    assert "8000, 10000" in run.data.tags["mlflow.note.content"]


def test_the_published_order_gaps_and_margins_come_out(published: str, tmp_path: Path) -> None:
    """To the printed digit; 10.96 % is 11.0 and not the 10.9 of the report. One seed each: nothing is told apart."""
    done = analysis("rank", store=published, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ (\w+) \(published\) +1 +(\d+\.\d) % +(0\.\d{4}).* (0\.\d{4}) *$", done.stdout, re.MULTILINE)
    assert rows == [
        ("last6_lora", "0.0", "0.5550", "0.3549"),
        ("last6_full", "1.9", "0.5655", "0.3674"),
        ("all_lora", "11.0", "0.6158", "0.3779"),
        ("all_full", "13.0", "0.6271", "0.4100"),
    ]
    assert "one run an arm cannot tell a difference from the noise of seeds" in done.stdout
    assert "±" not in done.stdout.partition("Means over seeds")[0]


def test_all_formats_hold_the_same_numbers(published: str, tmp_path: Path) -> None:
    """Markdown for people; CSV and JSON unrounded."""
    printed = {
        form: analysis("rank", "--format", form, store=published, cwd=tmp_path).stdout
        for form in ("markdown", "csv", "json")
    }
    tree = json.loads(printed["json"])
    assert [row["arm"] for row in tree["rows"]] == [f"{a} (published)" for a in ARMS]
    assert tree["rows"][1]["estimates"]["eval/loss_smoothed"] == {
        "mean": 0.5655, "low": None, "high": None, "n": 1, "excluded": 0,
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    assert [float(row["eval/loss:mean"]) for row in rows] == [0.5534, 0.5697, 0.6082, 0.6281]
    assert float(rows[2]["margin_percent"]) == pytest.approx(100 * (0.6158 - 0.555) / 0.555)
    assert printed["markdown"].splitlines()[2].startswith("| last6_lora (published) | 1 | 0.0 % | 0.5550 | 0.5534 |")


@pytest.mark.parametrize(
    "change", [lambda text: b"\xff" + text, lambda text: text.replace(b"final_step: 6900", b"final_step: 0")]
)
def test_a_file_that_holds_no_published_runs_is_told(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """With its name, whatever is wrong with it."""
    (tmp_path / "x.yaml").write_bytes(change((ROOT / "experiments" / "published" / "stage3.yaml").read_bytes()))
    with pytest.raises(UserError, match=r"x\.yaml"):
        published_runs(tmp_path / "x.yaml")


def test_the_shipped_numbers_are_the_published_ones() -> None:
    """Value by value, where the reference is at hand."""
    reference = ROOT.parent / "shared" / "reference" / "stage3_published.yaml"
    if not reference.is_file():
        pytest.skip("the reference is not here")
    theirs = yaml.safe_load(reference.read_text())["runs"]
    ours = yaml.safe_load((ROOT / "experiments" / "published" / "stage3.yaml").read_text())["runs"]
    names = {"eval_curve_approx": "eval_curve", "wall_days": "days"}
    for arm, run in theirs.items():
        moved = {"vit_lr": run.pop("vit_lr"), "gradient_accumulation_steps": run.pop("gradient_accumulation_steps")}
        vision = run.pop("vision")
        assert ours[arm].pop("params") == {
            "strategy.vision.blocks": vision["blocks"],
            "strategy.vision.method": vision["method"],
            **{f"training.{key}": value for key, value in moved.items()},
        }
        assert {names.get(key, key): value for key, value in run.items()} == ours[arm]
    assert list(theirs) == list(ours)


def test_a_run_of_ours_is_ranked(tmp_path: Path) -> None:
    """Trained by the trainer, read by the analysis: every column has a value, and the two agree on it."""
    done = analysis("rank", "--format", "json", "--by", "eval/loss", store=trained().store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    metrics = trained().run.data.metrics
    assert row["strategy"] == "last6_lora" and row["runs"] == [trained().run.info.run_id]
    for key, found in row["estimates"].items():
        if key in metrics:
            assert found["mean"] == metrics[key]
    assert row["estimates"]["step"]["mean"] == 3
    assert row["estimates"]["trainable_parameters/total"]["mean"] > 1e5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rank", "--experiment", "publishd"], ["--experiment", "did you mean published"]),
        (["rank", "--by", "eval/los"], ["--by", "did you mean eval/loss"]),
        (["rank", "--by", "eval/f1"], ["--by", "eval/f1", "a metric that these runs have"]),
        (["rank", "--at", "samples=x"], ["--at", "samples=N"]),
        (["rank", "--where", "rank is 8"], ["--where", "single quotes"]),
        (["plot", "--where", "rank = '8'"], ["--where", "single quotes"]),
        (["report", "--axis", "furlongs"], ["furlongs", "samples"]),
        (["promote"], ["last6_lora (published) is not distinguishable from last6_full", "--anyway"]),
        (["promote", "--anyway"], ["no checkpoint"]),
        (["plot", "--out", "/proc/figures"], ["/proc/figures", "--out"]),
        (["rank", "--where", "params.x = 1"], ["--where"]),
        (["rank", "--where", "params.tuner.lora_rank = '99'"], ["for which --where holds"]),
        (["rank", "--format", "xml"], ["xml"]),
        (["import_published", "--file", "none.yaml"], ["none.yaml", "experiments/published"]),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    published: str, tmp_path: Path, arguments: list[str], told: list[str]
) -> None:
    """Where, what was got, what is allowed, what to do; no traceback."""
    done = analysis(*arguments, store=published, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(text in done.stderr for text in told), done.stderr


def test_an_empty_store_is_told(tmp_path: Path) -> None:
    """With what to do first."""
    done = analysis("rank", store=empty_store(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and "mlflow run . -e last6_lora" in done.stderr


def test_an_unreachable_server_and_a_store_of_a_newer_mlflow_are_told(tmp_path: Path) -> None:
    """One message each."""
    gone = analysis("rank", store="http://127.0.0.1:9", cwd=tmp_path)
    assert gone.returncode == 2 and "error: MLFLOW_TRACKING_URI" in gone.stderr and "Traceback" not in gone.stderr
    store = empty_store(tmp_path)
    for version, told in (("ffffffffffff", "a newer MLflow"), ("451aebb31d03", "mlflow db upgrade")):
        with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
            database.execute("UPDATE alembic_version SET version_num = ?", [version])
        other = analysis("rank", store=store, cwd=tmp_path)
        assert other.returncode == 2 and told in other.stderr and "Traceback" not in other.stderr
