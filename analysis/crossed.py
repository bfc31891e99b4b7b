"""The part of a report on two settings that are crossed: cells, effects, confounders, what is more robust."""

import math
from collections.abc import Iterator

from analysis.effects import Effects
from analysis.page import code, plain, table
from analysis.settings import same
from analysis.statistics import Contrast
from analysis.tables import effect, plus_minus
from analysis.verdict import robustness, shared


def two_by_two(effects: Effects, by: str) -> Iterator[str]:
    """One 2x2 as Markdown.

    Args:
        effects: of two factors.
        by: the ranked metric.
    """
    first, second = effects.question.first, effects.question.second
    lines, columns = effects.levels
    if effects.question.robustness:
        yield from (plain(shared(effects) + robustness(effects, by)), "")
    yield from table(
        [first.header, *(plain(second.word(column)) for column in columns)],
        [[plain(first.word(line)), *(plus_minus(effects.cells[line, column].estimates[by]) for column in columns)]
         for line in lines],
    )  # fmt: skip
    yield ""
    yield from _by_level(effects, by) if effects.question.robustness else _over_levels(effects, by)
    yield from _confounded(effects)


def _over_levels(effects: Effects, by: str) -> Iterator[str]:
    """What each factor does in the mean of the other."""
    first, second = effects.question.first, effects.question.second
    (a, b), (x, y) = _words(effects)
    found = {
        f"{first.name}: {b} minus {a}, mean of both {second.plural}": effects.first,
        f"{second.name}: {y} minus {x}, mean of both {first.plural}": effects.second,
        _interaction(effects): effects.interaction,
    }
    header = ["effect on " + by, "", "95 % interval", "seeds"]
    yield from table(header, [[name, *effect(one.estimate)] for name, one in found.items()])
    yield ""


def _by_level(effects: Effects, by: str) -> Iterator[str]:
    """What each factor does at each level of the other."""
    first, second = effects.question.first, effects.question.second
    (a, b), (x, y) = _words(effects)
    found: dict[str, Contrast] = {}
    for level, one in effects.second_at.items():
        found[f"{second.name} {first.at} {plain(first.word(level))}: {y} minus {x}"] = one
    for level, one in effects.first_at.items():
        found[f"{first.name} {second.at} {plain(second.word(level))}: {b} minus {a}"] = one
    found[_interaction(effects)] = effects.interaction
    header = ["effect on " + by, "", "95 % interval", "seeds", "p, Holm", "distinguishable"]
    yield from table(header, [[name, *effect(one.estimate), *_test(one)] for name, one in found.items()])
    yield from ("", "The interaction answers the question and is corrected apart from the other effects.", "")


def _test(found: Contrast) -> tuple[str, str]:
    if math.isnan(found.p_adjusted):
        return "-", "too few seeds"
    return f"{found.p_adjusted:.2g}", "yes" if found.distinguishable else "no"


def _interaction(effects: Effects) -> str:
    at = effects.question.first.at
    (a, b), (_, y) = _words(effects)
    return f"interaction: what {y} adds {at} {b}, minus what it adds {at} {a}"


def _words(effects: Effects) -> tuple[tuple[str, str], tuple[str, str]]:
    """Levels of both factors as Markdown."""
    first, second = effects.question.first, effects.question.second
    (a, b), (x, y) = effects.levels
    return (plain(first.word(a)), plain(first.word(b))), (plain(second.word(x)), plain(second.word(y)))


def _confounded(effects: Effects) -> Iterator[str]:
    """What else differs between the cells."""
    if not effects.confounded:
        return
    first, second = effects.question.first, effects.question.second
    yield (
        f"These effects are confounded: the cells differ in more than {first.name} and {second.name}. They are the "
        "effects of the configurations as a whole, unless arms with tuned rates and equal batches are compared."
    )
    told = [[same(value) for value in values] for values in effects.confounded.values()]
    if effects.question.robustness and all(v[0] == v[1] and v[2] == v[3] for v in told):
        yield (
            f"Cells of one {first.name} differ in {second.name} alone: its effect on either is not confounded, the "
            "comparison of the two is."
        )
    yield ""
    header = ["differs as well", *(f"{plain(line)}, {plain(column)}" for line, column in effects.cells)]
    yield from table(header, [[code(key), *map(plain, values)] for key, values in effects.confounded.items()])
    yield ""
