"""The report: its sections on recorded runs and on the published ones, its files, its place in MLflow."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient

from analysis.comparison import CURVES_NEEDED, Comparison
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.records import over_records
from analysis.sections import Material, document
from analysis.verdict import verdict
from benchmarks import recorded
from tests.analysis.test_cli import analysis, published  # noqa: F401  # a fixture
from tests.running import runs_in

LOSS = "eval/loss"
SECTIONS = (
    "Summary", "What was compared", "Metrics", "Curves", "Depth and method", "Domains", "How sure this is",
    "What a careful reader notices", "Recommendation", "What to run next", "Reproducibility", "Common configuration",
)  # fmt: skip


def ranking_of_records() -> Ranking:
    """The recorded five arms, ranked."""
    found = [read(run, LOSS, At(), {}) for run in recorded.runs()]
    return rank([one for one in found if isinstance(one, Reading)], LOSS, At())


def written(ranking: Ranking, points: Sequence[float] = ()) -> str:
    """A report on recorded runs, without figures."""
    comparison = Comparison(ranking, recorded.curves({*CURVES_NEEDED, LOSS}))
    losses = over_records(ranking, recorded.record_losses)
    material = Material(comparison, losses, {}, [], "samples", datetime(2026, 1, 2, tzinfo=UTC), points)
    return document(material)


def section(text: str, title: str) -> str:
    """The text below one heading."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, its header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [
            [cell.strip() for cell in row.strip("|").split(" | ")]
            for row in block.strip().splitlines()
            if "| --- |" not in row
        ]
        for block in blocks
    ]


@pytest.fixture(scope="module")
def text() -> str:
    """The report on the five arms."""
    return written(ranking_of_records())


def test_all_sections_are_there_in_order(text: str) -> None:
    """Those of the published report, and what that one lacked."""
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == SECTIONS


def test_what_differs_is_found_in_the_params(text: str) -> None:
    """Nothing that is equal in all runs is listed as a difference, and nothing that differs as common."""
    (table,) = tables(section(text, "What was compared"))
    differs = {row[0].strip("`"): row[1:] for row in table[1:]}
    assert {"strategy.vision.blocks", "strategy.vision.method", "training.vit_lr"} <= differs.keys()
    assert all(len({*values}) > 1 for values in differs.values())
    common = section(text, "Common configuration")
    assert "num_train_epochs 4" in common and "vit_lr" not in common


def test_the_verdict_and_the_interval_of_every_pair_are_told(text: str) -> None:
    """As the ranking has them."""
    ranking = ranking_of_records()
    for line in verdict(ranking):
        assert line.lstrip("- ")[:40] in text.replace("\\", "")
    pairs, *_ = tables(section(text, "How sure this is"))
    assert len(pairs) - 1 == len(ranking.differences) == 10
    for row, pair in zip(pairs[1:], ranking.differences, strict=True):
        assert row[0] == f"{pair.second} - {pair.first}" and row[1] == f"{pair.estimate.mean:+.4f}"


def test_records_are_a_statement_of_their_own(text: str) -> None:
    """Four arms against the winner, over 96 records, and said to be about this validation set only."""
    part = section(text, "How sure this is").split("### Over validation records")[1]
    (table,) = tables(part)
    assert len(table) == 5 and {row[-1] for row in table[1:]} == {"96"}
    assert "this validation set only" in part


def test_the_2x2_has_effects_with_intervals_and_says_that_they_are_confounded(text: str) -> None:
    """Depth, method, interaction; vit_lr and accumulation vary with the arm."""
    cells, effects, confounded = tables(section(text, "Depth and method"))
    assert [row[0] for row in cells] == ["vision blocks", "last-6", "all"]
    assert len(effects) == 4 and all(" to " in row[2] for row in effects[1:])
    assert {row[0].strip("`") for row in confounded[1:]} == {
        "training.vit_lr", "training.gradient_accumulation_steps", "effective_batch.packs",
    }  # fmt: skip


def test_the_domains_have_winners_and_an_interaction(text: str) -> None:
    """Three domains; F with (5-1)(3-1) degrees of freedom."""
    part = section(text, "Domains")
    (table,) = tables(part)
    assert [row[0] for row in table[1:]] == ["card", "ruled", "weave"]
    assert "F(8, " in part


def test_points_can_be_chosen_and_lie_between_evaluations() -> None:
    """At 576 samples, a quarter of the run; beyond the end, nothing."""
    (table,) = tables(section(written(ranking_of_records(), points=(576.0, 2304.0, 9999.0)), "Curves"))
    assert [row[0] for row in table[1:]] == ["576", "2,304", "9,999"]
    ranking = ranking_of_records()
    assert table[2][1:] == [f"{row.estimates[LOSS].mean:.4f}" for row in ranking.rows]
    assert set(table[3][1:]) == {""}


def test_the_commands_are_those_of_every_run(text: str) -> None:
    """One an arm, as a loop over its seeds."""
    loops = re.findall(
        r"^    for seed in ([\d ]+); do mlflow run \. -e (\w+) .* -P seed=\$seed; done$",
        section(text, "Reproducibility"),
        re.MULTILINE,
    )
    found = {(arm, seed) for seeds, arm in loops for seed in seeds.split()}
    assert found == {(run.strategy, run.seed) for run in recorded.runs()} and len(found) == 25


# --- as it is typed -----------------------------------------------------------------------------------------------


def test_the_report_on_the_published_comparison(published: str, tmp_path: Path) -> None:  # noqa: F811
    """A cell after a run's last step stays empty; all nine findings stand in it; both files, and pictures inside."""
    done = analysis("report", "--experiment", "published", store=published, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "report"
    text = (folder / "report.md").read_text()
    (curve,) = tables(section(text, "Curves"))
    assert [row[0] for row in curve[1:]] == ["2,000", "4,000", "6,000", "8,000", "10,000"]
    assert [row[-1] for row in curve[1:]] == ["0.5800", "0.6800", "0.6700", "", ""]
    assert "0.0608/0.5550 = 10.955 %" in text and "8,000, 10,000: they cannot be measurements" in text
    page = (folder / "report.html").read_text()
    pictures = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert {folder / picture for picture in pictures} == {*folder.glob("figures/*.png")}
    assert page.count("data:image/svg+xml;base64,") == len(pictures) == 6


def test_the_report_is_an_artifact_of_one_run_that_no_ranking_takes(published: str, tmp_path: Path) -> None:  # noqa: F811
    """A second report on the same runs goes to the same run; `--local` writes files only."""
    client = MlflowClient(published)
    for _ in range(2):
        assert analysis("report", "--experiment", "published", store=published, cwd=tmp_path).returncode == 0
    local = analysis("report", "--experiment", "published", "--local", "--out", "l", store=published, cwd=tmp_path)
    assert local.returncode == 0 and "in MLflow" not in local.stdout
    (parent,) = (run for run in runs_in(published, "published") if "comparison" in run.data.tags)
    assert "strategy" not in parent.data.tags and parent.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id, "report")} == {
        "report/figures", "report/report.html", "report/report.md",
    }  # fmt: skip
    assert "comes first" in parent.data.tags["mlflow.note.content"]


def test_nothing_else_that_lies_there_goes_to_mlflow(published: str, tmp_path: Path) -> None:  # noqa: F811
    """Neither another file of the folder, nor a figure of an earlier report that this one has not drawn."""
    (tmp_path / "secret.bin").write_bytes(b"x")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "domains.png").write_bytes(b"x")
    done = analysis("report", "--experiment", "published", "--out", ".", store=published, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    client, run_id = MlflowClient(published), done.stdout.split()[-1]
    assert "report/secret.bin" not in {item.path for item in client.list_artifacts(run_id, "report")}
    assert not (tmp_path / "figures" / "domains.png").exists() and (tmp_path / "secret.bin").exists()


@pytest.mark.parametrize("points", ["x", "100,", "-5"])
def test_points_that_are_none_are_told(published: str, tmp_path: Path, points: str) -> None:  # noqa: F811
    """With an example."""
    done = analysis("report", "--points", points, store=published, cwd=tmp_path)
    assert done.returncode == 2 and "--points 500,1000,2000" in done.stderr
