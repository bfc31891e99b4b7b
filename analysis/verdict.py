"""What a ranking shows, in sentences: the winner, what it is told apart from, and what not."""

import math
from collections.abc import Sequence
from typing import Literal

from analysis.effects import QUESTIONS, Effects, two_by_twos
from analysis.ended_early import ended_early, sentences
from analysis.ranking import Ranking, Row, direction
from analysis.statistics import Difference
from trainer import names

_ON_TRAINING_SAMPLES = (names.TRAIN_LOSS, names.TRAIN_LOSS_SMOOTHED, names.GAP)
"""Metrics that change with what is done to training samples, whatever was learned."""

_LISTED = 8
"""So many names stand in a sentence; the rest is counted."""

Standing = Literal["ahead", "reversed", "open", "untested"]


def standing(ranking: Ranking, row: Row) -> Standing:
    """How the winner stands against another arm.

    `reversed`: over all seeds the winner is better, on the seeds that both have it is the other, by more than noise.
    The order is one of means, the test one of pairs; where arms lack seeds of each other the two can disagree.
    """
    pair = pair_of(ranking, ranking.rows[0], row)
    if pair is None or pair.method == "untested":
        return "untested"
    if not pair.distinguishable:
        return "open"
    return "ahead" if _worse_by(ranking, row, pair) > 0 else "reversed"


def pair_of(ranking: Ranking, one: Row, other: Row) -> Difference | None:
    """The comparison of two arms, in whichever order it was made."""
    wanted = {one.label, other.label}
    return next((pair for pair in ranking.differences if {pair.first, pair.second} == wanted), None)


def verdict(ranking: Ranking) -> list[str]:
    """The verdict, a sentence or list item a line."""
    if not ranking.rows:
        return ["No run can be ranked."]
    if ranking.each:
        return ["A row is a run here: what is more than the noise of seeds, only runs pooled by arm can tell."]
    winner, *others = ranking.rows
    ended = sentences(ended_early(ranking))
    if not others:
        if ended:
            return [f"{winner.label} is the only arm that was trained to its end.", *ended]
        return ["One arm only: there is nothing to compare it with."]
    if math.isnan(winner.estimates[ranking.by].mean):
        return [f"No arm has a finite {ranking.by}."]
    word = "lowest" if direction(ranking.by) == "lower" else "highest"
    lines = [f"{winner.label} has the {word} {ranking.by}, {winner.estimates[ranking.by].mean:.4f}."]
    finite = [row for row in others if not math.isnan(row.estimates[ranking.by].mean)]
    stands = {row.label: standing(ranking, row) for row in finite}
    for wanted, text in (
        ("ahead", "It is distinguishable from"),
        ("reversed", "It is distinguishable, but behind on the seeds that both have, from"),
        ("open", "It is not distinguishable from"),
    ):
        told = [row for row in finite if stands[row.label] == wanted]
        lines += [f"{text}:"] * bool(told) + [_told(ranking, row) for row in told]
    untested = [f"{row.label}{_percent(row, ' ({:.1f} %)')}" for row in finite if stands[row.label] == "untested"]
    if untested:
        lines.append(
            f"Against {listed(untested)} there are too few seeds: one run an arm cannot tell a difference from the "
            "noise of seeds."
        )
    if nowhere := [row.label for row in others if row not in finite]:
        lines.append(f"Without a finite value: {listed(nowhere)}.")
    rest = [
        f"{d.first} and {d.second}" for d in ranking.differences
        if winner.label not in (d.first, d.second) and d.method != "untested" and not d.distinguishable
    ]  # fmt: skip
    if rest:
        lines.append(f"Not distinguishable either: {listed(rest)}.")
    return [*lines, *ended]


def all_robustness(ranking: Ranking) -> list[str]:
    """Which arms bear a disturbance better, a sentence for every 2x2 that was run; of rows that are runs nothing."""
    found = [] if ranking.each else [e for q in QUESTIONS.values() if q.robustness for e in two_by_twos(ranking, q)]
    return [f"{shared(effects)}{robustness(effects, ranking.by)}" for effects in found]


def shared(effects: Effects) -> str:
    """`Vision blocks last-6: `, what the four arms have in common; empty where nothing is asked to be."""
    within = effects.question.within
    return f"{within.header.capitalize()} {effects.within}: " if within else ""


def robustness(effects: Effects, by: str) -> str:
    """Which level of the first factor bears the second better: told where the interaction is more than seed noise.

    Args:
        effects: of a question of robustness.
        by: the ranked metric.
    """
    (_, noise), found = effects.levels[1], effects.interaction
    if by in _ON_TRAINING_SAMPLES:
        return f"{by} is measured on the training samples as they were changed: it says nothing about robustness."
    worse = 1 if direction(by) == "lower" else -1
    spared, harmed = effects.levels[0]
    sign = worse
    if worse * found.estimate.mean < 0:
        spared, harmed, sign = harmed, spared, -worse
    one, other = (effects.question.first.word(level) for level in (spared, harmed))
    if math.isnan(found.p):
        return f"Which of {one} and {other} is more robust cannot be told: too few seeds were run in all four arms."
    more = f"{abs(found.estimate.mean):.4f} more than"
    low, high = sorted((sign * found.estimate.low, sign * found.estimate.high))
    sure = (
        f"(95 % interval {low:+.4f} to {high:+.4f}; p = {found.p_adjusted:.2g} after Holm, paired, "
        f"n = {found.estimate.n})"
    )
    if not found.distinguishable:
        return (
            f"No difference in robustness could be told between {one} and {other}, {found.estimate.n} seeds: {noise} "
            f"costs {other} {more} {one} {sure}."
        )
    if worse * effects.second_at[harmed].estimate.mean <= 0:
        return f"{noise} harms neither of {one} and {other}: {one} gains {more} {other} {sure}."
    return f"{one} is more robust than {other}: {noise} costs {other} {more} {one} {sure}."


def listed(items: Sequence[str]) -> str:
    """`a, b and 12 more`."""
    shown = ", ".join(items[:_LISTED])
    return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"


def _worse_by(ranking: Ranking, row: Row, pair: Difference) -> float:
    """How much worse than the winner an arm is by their comparison."""
    sign = 1 if row.label == pair.second else -1
    return sign * pair.estimate.mean * (1 if direction(ranking.by) == "lower" else -1)


def _told(ranking: Ranking, row: Row) -> str:
    pair = pair_of(ranking, ranking.rows[0], row)
    assert pair is not None  # noqa: S101  # it was tested
    shift, sign = pair.estimate, 1 if row.label == pair.second else -1
    low, high = sorted((sign * shift.low, sign * shift.high))
    return (
        f"- {row.label}:{_percent(row, ' {:.1f} % worse;')} difference {sign * shift.mean:+.4f}, 95 % interval "
        f"{low:+.4f} to {high:+.4f}; p = {pair.p_adjusted:.2g} after Holm, {pair.method}, n = {shift.n}"
    )


def _percent(row: Row, form: str) -> str:
    return "" if math.isnan(row.margin) else form.format(row.margin)
