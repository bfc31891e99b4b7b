"""The tables of docs/use.md are what the files of benchmarks/results/predicting say; who is compared says the same."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import predicting
from benchmarks import predicting_page as page
from tests.running import trained

PAGE = page.PAGE.read_text(encoding="utf-8")


def test_every_table_of_the_page_is_made_from_its_results() -> None:
    """`python -m benchmarks.predicting tables` would change nothing, and every table has its place."""
    assert page.filled(PAGE) == PAGE
    assert set(re.findall(r"<!-- (\w+) -->\n", PAGE)) - {"end"} == set(page.TABLES)


def test_a_figure_that_differs_from_its_results_is_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands between the marks of a table whose results are there."""
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / "pocket.json").write_text(json.dumps(RESULT))
    assert page.filled("a\n<!-- predicting -->\nwrong\n<!-- end -->\nb\n") == (
        f"a\n<!-- predicting -->\n{page.table(RESULT)}\n<!-- end -->\nb\n"
    )
    left = "<!-- predicting_random_4b -->\nNot run.\n<!-- end -->\n"
    assert page.filled(left) == left


@pytest.mark.parametrize("name", sorted(page.TABLES.values()))
def test_results_say_what_they_were_measured_on(name: str) -> None:
    """Hardware, versions, commit and date; every case of theirs has all contenders."""
    path = page.RESULTS / name
    if path.exists():  # a page may be ahead of its results
        told = json.loads(path.read_text(encoding="utf-8"))
        assert {"processor", "cores", "memory_bytes", "versions", "commit", "date"} <= set(told["facts"])
        cases = {run["batch"] for run in told["runs"]}
        whole = {(batch, by) for batch in cases for by in (page.OURS, page.DRAWN, page.PLAIN)}
        assert {(run["batch"], run["by"]) for run in told["runs"]} == whole


def run(by: str, batch: int | str, *seconds: float, images: int = 1) -> dict[str, object]:
    """A contender's times in a case."""
    return {"by": by, "batch": batch, "images": images, "others": 0.01, "seconds": list(seconds)}


RESULT = {
    "facts": {
        "date": "2026-01-01", "processor": "P", "cores": 2, "memory_bytes": 2**30, "commit": "abc",
        "versions": {"torch": "2", "transformers": "5", "peft": "0"},
    },
    "model": "pocket", "arm": "a", "dtype": "float32", "device": "cpu", "threads": 2, "max_new_tokens": 8,
    "image": [96, 96], "answer_tokens": [3, 5, 8],
    "runs": [
        *(run(by, 1, *(float(n) for n in range(1, 22))) for by in (page.OURS, page.DRAWN, page.PLAIN)),
        run(page.OURS, 4, 2.0, 1.0, 4.0, images=8),
        run(page.DRAWN, 4, 4.0, 4.0, 4.0, images=8),
        run(page.PLAIN, 4, 8.0, 8.0, 8.0, images=8),
        *(run(by, page.COLD, 5.0, 6.0, 7.0) for by in (page.OURS, page.DRAWN, page.PLAIN)),
    ],
    "answers": [
        {"batch": 1, "same": 19, "beginning": 1, "other": 1, "as_alone": 21},
        {"batch": 4, "same": 24, "beginning": 0, "other": 0, "as_alone": 8},
    ],
}  # fmt: skip


def test_a_row_has_the_median_and_how_far_turns_are_apart() -> None:
    """Of 21 images one at a time 11 s, 20 s for 95 in 100; 8 images in 1, 2 and 4 s are 8, 4 and 2 a second."""
    assert page.table(RESULT).splitlines()[-4:] == [
        "| one at a time: median ms | 11000 | 11000 | 11000 | 19 of 21 |",
        "| p95 ms | 20000 | 20000 | 20000 |  |",
        "| 4 at once: images/s | 4.00 (2.00 to 8.00) | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | 24 of 24 |",
        "| cold start, one image: s | 6.00 (5.00 to 7.00) | 6.00 (5.00 to 7.00) | 6.00 (5.00 to 7.00) |  |",
    ]


def test_texts_are_the_same_or_a_beginning_or_another() -> None:
    """A stop that comes early leaves a beginning; everything else is another answer."""
    found = predicting.compared(["{}", '{"a"', "x", "{} "], ["{}", '{"a":1}', "y", "{}"])
    assert found == {"same": 1, "beginning": 1, "other": 2}


def test_who_begins_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is always measured behind the same other."""
    monkeypatch.setattr(predicting, "PATIENCE", 0)
    monkeypatch.setattr(predicting, "_of_others", lambda: 0.0)
    order: list[str] = []
    contenders = {name: lambda *_, name=name: order.append(name) or [name] for name in "abc"}
    done = predicting.timed(contenders, [[Path()]] * 3, 1)
    assert "".join(order) == "abcbcacab"
    assert done.texts["a"] == [["a"]] * 3 and all(len(of) == 3 for of in done.seconds.values())


def test_a_turn_that_others_disturb_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two is disturbed once; what was timed then does not count."""
    spent = iter((0.0, 9.0, 9.0, 9.0, 9.0, 9.0))
    monkeypatch.setattr(predicting, "PATIENCE", 0)
    monkeypatch.setattr(predicting, "_of_others", lambda: next(spent))
    said = iter(["disturbed", "first", "second"])
    done = predicting.timed({"a": lambda *_: [next(said)]}, [[Path()]] * 2, 1)
    assert done.texts == {"a": [["first"], ["second"]]} and done.others == 0


def test_the_baseline_says_what_we_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter, loaded in both ways, on three scenes, alone and together."""
    monkeypatch.setattr(predicting, "TRIES", 0)
    monkeypatch.setattr(predicting, "PATIENCE", 0)
    subject = predicting.trained_subject(trained().checkpoint, max_new_tokens=12)
    told = predicting.measure(subject, predicting.digits(tmp_path, 3), tmp_path, ((1, 3), (3, 3)), repetitions=2)
    assert told["answers"] == [
        {"batch": 1, "same": 3, "beginning": 0, "other": 0, "as_alone": 3},
        {"batch": 3, "same": 6, "beginning": 0, "other": 0, "as_alone": 3},
    ]
    assert [(each["by"], each["batch"], len(each["seconds"])) for each in told["runs"]] == [
        *((by, 1, 3) for by in (page.OURS, page.DRAWN, page.PLAIN)),
        *((by, 3, 2) for by in (page.OURS, page.DRAWN, page.PLAIN)),
    ]
    assert 0 < told["answer_tokens"][1] <= 12


def test_what_a_gpu_measures_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, random weights: every answer has as many tokens as are allowed."""
    monkeypatch.setattr(predicting, "RANDOM_TOKENS", 3)
    monkeypatch.setattr(predicting, "TRIES", 0)
    monkeypatch.setattr(predicting, "PATIENCE", 0)
    subject = predicting.random_subject("tiny", "cpu")
    told = predicting.measure(subject, predicting.noise(tmp_path, 2, 64), tmp_path, ((2, 2),), repetitions=1)
    assert told["answer_tokens"] == [3, 3, 3]
    assert sum(told["answers"][0][kind] for kind in ("same", "beginning", "other")) == 2
