"""The gallery: what arms said of an image beside the truth, what they disagree on first; a page for a real browser."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, expect

from analysis.gallery import Gallery, Shown, chosen_runs, gather, judged
from analysis.gallery_page import page as html
from analysis.ranking import At, Ranking, parse_at, rank
from analysis.reading import read_ranking
from analysis.store import Store
from tests.analysis.conftest import needs_chromium
from tests.running import Trained, trained
from trainer import names
from trainer.data.digits import ensure_digits
from trainer.data.geometry import Geometry
from trainer.data.records import Object, Picture, Record, read_records
from trainer.errors import UserError

TRUTH = Record(
    "val.jsonl:1",
    (Picture(Path("a.png"), 100, 100),),
    (
        Object(Geometry("bbox_2d", (10, 10, 30, 30)), "one/red"),
        Object(Geometry("bbox_2d", (50, 50, 80, 80)), "two/blue"),
        Object(Geometry("bbox_2d", (5, 80, 20, 95)), "three/green"),
    ),
)


def answer(*objects: tuple[list[int], str]) -> str:
    """As a model gives it, in norm100: pixels of the image above."""
    leaves = {f"object_{n}": {"bbox_2d": box, "desc": desc} for n, (box, desc) in enumerate(objects, 1)}
    return json.dumps({"image_1": leaves})


def test_each_object_is_worth_what_the_truth_says_of_it() -> None:
    """In its place and of its type, in its place alone, of nothing; and what was not found."""
    text = answer(([10, 10, 30, 30], "one/blue"), ([50, 50, 80, 80], "nine/blue"), ([60, 5, 90, 20], "one/red"))
    said = judged(TRUTH, text, "norm100", (100, 100))
    assert [mark for _, mark in said.objects] == ["found", "misnamed", "wrong"]
    assert [each.desc for each in said.missed] == ["three/green"]
    assert said.score.f1 == pytest.approx(2 / 6)


def test_a_broken_answer_says_so() -> None:
    """And keeps its whole objects."""
    said = judged(TRUTH, answer(([10, 10, 30, 30], "one"))[:-2], "norm100", (100, 100))
    assert said.state == "repaired"
    assert len(said.objects) == 1


@pytest.fixture(scope="module")
def ranked() -> tuple[Trained, Ranking]:
    """A real run, ranked alone; its store is that of the environment while this lasts."""
    done = trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", done.store)
        return done, read_ranking(Store(), None, None, names.EVAL_LOSS, parse_at("final"))


@pytest.fixture
def store(ranked: tuple[Trained, Ranking], monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of that run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ranked[0].store)
    return Store()


def test_answers_are_those_that_the_run_has_kept(ranked: tuple[Trained, Ranking], store: Store) -> None:
    """Nothing is generated anew: two validation records were captioned, both are shown with the truth of the file."""
    done, ranking = ranked
    found = gather(store, ranking, seed=None, val_jsonl=None, records=10)
    kept = {line["record_id"]: line for line in map(json.loads, done.artifact("best_predictions.jsonl").open())}
    assert {image.record.id for image in found.images} == set(kept)
    for image in found.images:
        (said,) = image.said.values()
        assert said.text == kept[image.record.id]["text"]
        assert said.score.true == kept[image.record.id]["score"]["true"] == len(image.record.objects)
        assert image.disagreement == 1 - said.score.f1


def test_other_records_are_refused(ranked: tuple[Trained, Ranking], store: Store, tmp_path: Path) -> None:
    """Boxes of one file over the images of another would look like answers."""
    other = ensure_digits(tmp_path, seed=5, n_train=1, n_val=2, n_ood=0).val
    with pytest.raises(UserError, match="records with the digest"):
        gather(store, ranked[1], seed=None, val_jsonl=other, records=10)
    with pytest.raises(UserError, match="not there"):
        gather(store, ranked[1], seed=None, val_jsonl=tmp_path / "gone.jsonl", records=10)


def test_without_a_run_that_is_ranked_the_reason_is_to_be_seen_elsewhere(store: Store) -> None:
    """One message, as of the other commands."""
    with pytest.raises(UserError, match="no run that can be ranked"):
        gather(store, rank([], "eval/loss", At()), seed=None, val_jsonl=None, records=1)


def test_arms_are_shown_on_one_seed(ranked: tuple[Trained, Ranking]) -> None:
    """The lowest that all share; one that an arm does not have is a mistake."""
    (row,) = ranked[1].rows
    (reading,) = row.readings

    def arm(label: str, *seeds: str) -> object:
        runs = [replace(reading, run=replace(reading.run, tags={**reading.run.tags, "seed": seed})) for seed in seeds]
        return replace(row, label=label, readings=tuple(runs))

    ranking = replace(ranked[1], rows=(arm("a", "18", "9"), arm("b", "9", "17", "18")))  # type: ignore[arg-type]
    assert {label: of.run.seed for label, of in chosen_runs(ranking, None).items()} == {"a": "9", "b": "9"}
    with pytest.raises(UserError, match="which a does not have"):
        chosen_runs(ranking, "17")


@pytest.fixture(scope="module")
def gallery(ranked: tuple[Trained, Ranking], tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Two arms on digits: one that is right but for one object of the last record, one that says nothing there."""
    paths = ensure_digits(tmp_path_factory.mktemp("digits"), seed=5, n_train=1, n_val=6, n_ood=0)
    records = read_records(paths.val).records
    images = []
    for n, record in enumerate(records):
        right = [([*map(round, o.geometry.points)], o.desc) for o in record.objects if o.geometry.kind == "bbox_2d"]
        texts = {"<b>a</b>": answer(*right), "b": answer(*(right if n else []))}
        said = {label: judged(record, text, "none", record.size) for label, text in texts.items()}
        images.append(Shown(record, said, 0.0 if n else 1.0))
    reading = ranked[1].rows[0].readings[0]
    return Gallery({"<b>a</b>": reading, "b": reading}, tuple(images), ("a note & more",))


@needs_chromium
def test_the_page_in_a_browser(gallery: Gallery, page: Page, tmp_path: Path) -> None:
    """Nothing is fetched, nothing fails; every image is seen; tabs choose a domain, orders sort."""
    path = tmp_path / "gallery.html"
    path.write_text(html(gallery), encoding="utf-8")
    asked: list[str] = []
    wrong: list[str] = []

    def note(request: Request) -> None:
        if not request.url.startswith("data:"):
            asked.append(request.url)

    page.on("request", note)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    assert asked == [path.as_uri()] and not wrong
    cards = page.locator("article")
    expect(cards).to_have_count(len(gallery.images))
    expect(cards.first.locator("figcaption b")).to_have_text(["truth", "<b>a</b>", "b"])
    expect(page.get_by_text("a note & more")).to_be_visible()
    assert cards.first.locator("svg[role=img] polygon.true").count() == len(gallery.images[0].record.objects)
    domain = gallery.images[0].record.domain
    page.get_by_role("tab", name=domain).click()
    shown = sum(image.record.domain == domain for image in gallery.images)
    expect(page.locator("article:visible")).to_have_count(shown)
    page.get_by_role("tab", name="all").click()
    page.locator("#order").select_option("best first")
    scores = [float(str(card.get_attribute("data-score"))) for card in cards.all()]
    assert scores == sorted(scores, reverse=True)


def test_the_command_logs_the_page_to_the_comparison(ranked: tuple[Trained, Ranking], tmp_path: Path) -> None:
    """As an artifact of the run that stands for it."""
    from tests.analysis.test_cli import analysis

    done = analysis("gallery", "--out", str(tmp_path / "page.html"), store=ranked[0].store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.split()[-1]
    assert [each.path for each in ranked[0].client.list_artifacts(run_id, "gallery")] == ["gallery/page.html"]
