"""As users see it, in a real browser: the MLflow UI on a real server, with our runs and report in it; and the report.

`pytest tests/analysis/test_browser.py --screenshots docs` makes the pictures of the documentation.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Browser, Page, Request, Response, expect

from analysis.store import Store
from benchmarks import recorded
from tests.analysis.conftest import PATIENCE, needs_chromium
from tests.analysis.test_cli import analysis
from tests.running import empty_store, mlflow_server, without_mlflow_variables
from trainer import names

pytestmark = needs_chromium


@dataclass(frozen=True)
class Served:
    """A server with four runs of the five arms and the report on them."""

    address: str
    experiment: str
    runs: dict[str, str]
    """Strategy -> run id."""
    parent: str
    """The run that holds the report."""
    folder: Path
    """What the report was written to."""

    def page(self, path: str) -> str:
        """Address of a page of the MLflow UI."""
        return f"http://{self.address}/#/{path}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Four recorded runs, one seed each, replayed into a real server; the report logged there by its command."""
    folder = tmp_path_factory.mktemp("served")
    four = {run.strategy: run for run in recorded.runs() if run.seed == "17" and run.strategy != "frozen_vision"}
    with mlflow_server(folder, empty_store(folder)) as address:
        uri = f"http://{address}"
        with without_mlflow_variables():
            os.environ["MLFLOW_TRACKING_URI"] = uri
            made = recorded.replay(Store(create=True), four.values())
        done = analysis("report", "--by", "eval/loss", store=uri, cwd=folder)
        assert done.returncode == 0, done.stderr
        experiment = MlflowClient(uri).get_experiment_by_name(names.EXPERIMENT).experiment_id
        ids = {strategy: made[run.id] for strategy, run in four.items()}
        yield Served(address, experiment, ids, done.stdout.split()[-1], folder / "output" / "report")


@pytest.fixture
def keep(request: pytest.FixtureRequest, page: Page):  # type: ignore[no-untyped-def]
    """Writes a screenshot where `--screenshots` says so."""
    folder = request.config.getoption("--screenshots")

    def save(name: str) -> None:
        if folder:
            if (close := page.get_by_role("button", name="Close")).count():  # MLflow's assistant takes a third of it
                close.first.click()
            page.wait_for_timeout(1500)
            page.screenshot(path=Path(folder) / f"{name}.png")

    return save


def test_the_experiment_lists_the_runs_by_name(served: Served, page: Page, keep) -> None:  # type: ignore[no-untyped-def]
    """Each under its arm and seed, and the comparison beside them."""
    page.goto(served.page(f"experiments/{served.experiment}/runs"))
    for strategy in served.runs:
        expect(page.get_by_text(f"{strategy}-seed17", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text(re.compile("^comparison of ")).first).to_be_visible()
    keep("mlflow_experiment")


def test_the_compare_page_shows_params_and_metrics_under_the_contracts_names(
    served: Served, page: Page, keep  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    """Four runs side by side: their settings, tags and metrics."""
    runs, experiments = (json.dumps(ids) for ids in ([*served.runs.values()], [served.experiment]))
    page.goto(served.page(f"compare-runs?runs={runs}&experiments={experiments}"))
    expect(page.get_by_text("Comparing 4 Runs from 1 Experiment")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text(names.EVAL_LOSS_SMOOTHED, exact=True).first).to_be_attached(timeout=PATIENCE)
    text = page.inner_text("body")
    settings = ("strategy.vision.blocks", "strategy.vision.method", "training.vit_lr", names.TAG_GATE)
    for name in (*settings, names.EVAL_LOSS, names.EVAL_LOSS_SMOOTHED, names.BEST_LOSS, names.F1, names.VISION_GAIN):
        assert re.search(rf"\n{re.escape(name)}\s", text), name  # of the metrics the page shows as many as fit
    page.get_by_text("Artifacts", exact=True).last.scroll_into_view_if_needed()
    keep("mlflow_compare")


def test_the_curves_of_all_four_are_drawn_together(served: Served, page: Page, keep) -> None:  # type: ignore[no-untyped-def]
    """MLflow's own plot of one metric, a line a run (and a pale one for it unsmoothed)."""
    runs, experiments = (json.dumps(ids) for ids in ([*served.runs.values()], [served.experiment]))
    keys = json.dumps([names.EVAL_LOSS])
    page.goto(served.page(f"metric?runs={runs}&metric={json.dumps(names.EVAL_LOSS)}&experiments={experiments}"
                          f"&plot_metric_keys={keys}"))  # fmt: skip
    expect(page.locator(".scatterlayer .trace")).to_have_count(8, timeout=PATIENCE)
    for strategy in served.runs:
        expect(page.get_by_text(f"{strategy}-seed17 ({names.EVAL_LOSS})").first).to_be_visible()
    keep("mlflow_curves")


def test_the_report_is_shown_among_the_artifacts(served: Served, page: Page, keep) -> None:  # type: ignore[no-untyped-def]
    """The HTML page inside MLflow, and a figure as a picture."""
    page.goto(served.page(f"experiments/{served.experiment}/runs/{served.parent}/artifacts"))
    page.get_by_text("report", exact=True).first.click()
    page.get_by_text("report.html", exact=True).first.click()
    inside = page.frame_locator("iframe").first
    expect(inside.get_by_role("heading", name=re.compile("^Comparison of "))).to_be_visible(timeout=PATIENCE)
    keep("mlflow_report")
    page.get_by_text("figures", exact=True).first.click()
    page.get_by_text("eval_loss.png", exact=True).first.click()
    picture = page.locator("img[src^='blob:'], img[src*='eval_loss'], .image-outer-container img").first
    expect(picture).to_be_visible(timeout=PATIENCE)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_stands_alone_and_fits_the_screen(served: Served, browser: Browser, width: int) -> None:
    """No request, no error, all pictures drawn, nothing wider than the page but tables that scroll by themselves."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []

    def requested(request: Request) -> None:
        if not request.url.startswith("data:") and not request.url.endswith("report.html"):
            wrong.append(request.url)

    def answered(response: Response) -> None:
        if response.status >= 400:
            wrong.append(response.url)

    page.on("request", requested)
    page.on("response", answered)
    page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((served.folder / "report.html").as_uri())
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("img")
    assert pictures.count() >= 8
    drawn = pictures.evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 100 && i.clientWidth > 100)")
    assert all(drawn)
    too_wide = page.evaluate("""
        [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
            && !e.closest('.wide, pre')).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))""")
    assert too_wide == []
    page.close()
