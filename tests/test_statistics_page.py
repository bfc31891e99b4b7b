"""docs/statistics.md draws its example from the recorded five arms: it tells the verdicts that the code gives."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from analysis.statistics import all_differences, difference
from benchmarks import recorded
from trainer import names

PAGE = (Path(__file__).parents[1] / "docs" / "statistics.md").read_text(encoding="utf-8")
LOSSES: dict[str, dict[str, float]] = {}
for _run in recorded.runs():
    LOSSES.setdefault(_run.strategy, {})[_run.seed] = _run.metrics[names.EVAL_LOSS]
SEEDS = sorted(LOSSES["all_lora"])


def found(n_seeds: int) -> tuple[int, Counter[frozenset[str]]]:
    """How many groups of so many seeds there are, and in how many of them each pair is told apart."""
    groups = [*combinations(SEEDS, n_seeds)]
    told: Counter[frozenset[str]] = Counter()
    for seeds in groups:
        pairs = all_differences({arm: {seed: of[seed] for seed in seeds} for arm, of in LOSSES.items()})
        told.update(frozenset((pair.first, pair.second)) for pair in pairs if pair.distinguishable)
    return len(groups), told


@pytest.mark.parametrize("n_seeds", [3, 4, 5])
def test_the_table_of_fewer_seeds_is_what_the_verdicts_would_have_been(n_seeds: int) -> None:
    """A column a number of seeds; at five there is one group."""
    n_groups, told = found(n_seeds)
    header = re.search(
        r"^\| pair \| margin \| (\d) seeds, (\d+) groups \| (\d) seeds, (\d) groups \|", PAGE, re.MULTILINE
    )
    assert header and header.groups() == ("3", "10", "4", "5")
    rows = re.findall(r"^\| (\w+), (\w+) \| [\d.]+ % \| (\d+) \| (\d+) \| (yes|no) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for first, second, *cells in rows:
        cell = cells[n_seeds - 3]
        times = told[frozenset((first, second))]
        assert cell == (str(times) if n_groups > 1 else "yes" if times else "no"), (first, second)


def test_two_seeds_find_as_little_as_the_page_says() -> None:
    """Even the largest differences."""
    n_groups, told = found(2)
    assert n_groups == 10 and told[frozenset(("all_lora", "last6_lora"))] == 3
    assert "10.6 % is found in 3 of 10 groups of two seeds" in PAGE


def test_pairs_and_their_absence_give_the_p_that_is_told() -> None:
    """The same numbers by seed, and as if their seeds had nothing in common."""
    gains = [f"{LOSSES['frozen_vision'][seed] - LOSSES['last6_lora'][seed]:.4f}" for seed in SEEDS]
    assert f"{', '.join(gains[:-1])} and {gains[-1]} behind `last6_lora`" in " ".join(PAGE.split())
    paired = difference("last6_lora", "frozen_vision", LOSSES)
    apart = {arm: {f"{arm} {seed}": loss for seed, loss in of.items()} for arm, of in LOSSES.items()}
    welch = difference("last6_lora", "frozen_vision", apart)
    assert (paired.method, welch.method) == ("paired", "welch")
    assert f"p = {paired.p:.3f}. The same numbers without their pairs give p = {welch.p:.3f}" in " ".join(PAGE.split())


def test_one_seed_alone_turns_the_order_of_two_arms_around() -> None:
    """Seed 20, and no other."""
    assert [seed for seed in SEEDS if LOSSES["last6_full"][seed] < LOSSES["last6_lora"][seed]] == ["20"]
    assert "seed 20 alone has `last6_full` ahead" in PAGE


def test_the_interval_lies_within_the_margin_of_the_example() -> None:
    """1 % of the loss, on both sides."""
    pair = difference("last6_lora", "last6_full", LOSSES).estimate
    margin = 0.01 * sum(LOSSES["last6_lora"].values()) / len(SEEDS)
    assert -margin < pair.low and pair.high < margin
    assert f"1 % is {margin:.4f}, and the interval {pair.low:+.4f} to {pair.high:+.4f} lies inside" in PAGE
