"""The tables of docs/performance.md are what the files of benchmarks/results/performance say; nothing is timed here."""

import json
import re

import pytest

from benchmarks import table

PAGE = table.PAGE.read_text(encoding="utf-8")


def test_every_table_of_the_page_is_made_from_its_results() -> None:
    """`python benchmarks/table.py` would change nothing."""
    assert table.filled(PAGE) == PAGE


def test_the_page_has_a_place_for_every_table() -> None:
    """And no place that nobody fills."""
    assert set(re.findall(r"<!-- (\w+) -->\n", PAGE)) - {"end"} == set(table.TABLES)


@pytest.mark.parametrize("name", sorted({file for file, _ in table.TABLES.values()}))
def test_results_say_what_they_were_measured_on(name: str) -> None:
    """Hardware, versions, commit and date."""
    path = table.RESULTS / f"{name}.json"
    if path.exists():  # a page may be ahead of its results
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        assert {"processor", "cores", "memory_bytes", "versions", "commit", "date"} <= set(facts)


def result(*runs: dict[str, object], **more: object) -> table.Result:
    """A result of a machine that is none."""
    versions = {"torch": "2", "transformers": "5", "peft": "0"}
    facts = {"date": "2026-01-01", "processor": "P", "cores": 2, "memory_bytes": 2**30, "versions": versions}
    return {"facts": {**facts, "commit": "abc"}, "runs": list(runs), **more}


def one(contender: str, rate: float, **more: object) -> dict[str, object]:
    """What one process told."""
    told = {"arm": "a", "work": "train", "checkpointing": False, "contender": contender, "samples_per_second": rate}
    return {**told, "supervised_per_second": 10 * rate, "peak_bytes": 2**30, "proportional_bytes": 2**29, **more}


def test_throughput_is_the_median_beside_the_baseline() -> None:
    """Three processes of 2, 3 and 9 samples a second are 3; beside 1.5 that is 2; at 4 GFLOP a sample, 12 of 120."""
    runs = [one(table.BASELINE, 1.5), *(one("ours", rate) for rate in (9.0, 2.0, 3.0))]
    made = table.throughput(result(*runs, gemm_gflops={"M": 120.0, "N": 60.0}, gflop_a_sample={"a": [1.0, 4.0]}))
    assert made.splitlines()[-1] == "| a, train | ours | 3.00 | 2.00 | 30 | 1024 | 512 | 12 | 10 % |"


def test_an_optimization_is_measured_beside_plain_or_what_it_needs() -> None:
    """`y` needs `x`: alone it is 3 beside 2; without `x` there is no `y` either."""
    off, x, both = {"x": False, "y": False}, {"x": True, "y": False}, {"x": True, "y": True}
    switches = {"plain": off, "all": both, "alone: x": x, "without: x": off, "alone: y": both, "without: y": x}
    rates = {"plain": 1.0, "all": 3.0, "alone: x": 2.0, "without: x": 1.0, "alone: y": 3.0, "without: y": 2.0}
    made = table.each(result(*(one(name, rate) for name, rate in rates.items()), switches=switches))
    assert made.splitlines()[-3:] == [
        "| a | x | 2.00 | plain | 3.00 |",
        "| a | y | 1.50 | x | 1.50 |",
        "| a | all | 3.00 | plain |  |",
    ]


def test_curves_tell_the_largest_difference() -> None:
    """At any step."""
    losses = {table.BASELINE: [4.0, 3.0, 2.0], "ours": [4.0, 3.25, 2.0]}
    made = table.curves(result(*(one(name, 1.0, losses=of) for name, of in losses.items())))
    assert made.splitlines()[-1] == "| a | ours | 4.000000 | 2.000000 | 2.5e-01 |"


def test_startup_is_the_median_of_each_moment() -> None:
    """Of three runs on two ranks."""
    runs = [{"ranks": 2, "arguments read": 1.0, "first step": step} for step in (4.0, 9.0, 5.0)]
    assert table.startup(result(*runs, arm="a")).splitlines()[-1] == "| 2 | 1.0 | 5.0 |"
