"""What a comparison says beyond its order: effects of two settings that are crossed, and winners domain by domain."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.ranking import Ranking, Reading, Row
from analysis.settings import AUGMENTATION, BLOCKS, METHOD, SCHEDULE, differing, setting
from analysis.statistics import (
    Contrast,
    Difference,
    Estimate,
    Interaction,
    all_differences,
    contrast,
    estimate,
    holm,
    interaction,
)
from trainer import names

METHODS = ("lora", "full")


def n_blocks(row: Row) -> float:
    """How many vision blocks an arm trains; nan where it is not known, or changes from stage to stage."""
    params = row.readings[0].run.params
    text = params.get(names.VISION_BLOCKS, "")
    if params.get(SCHEDULE, "null") != "null":
        return math.nan
    try:
        return float(len(json.loads(text)))
    except (ValueError, TypeError):
        first, dash, last = params.get(BLOCKS, "").partition("-")
        return float(last) - float(first) + 1 if dash and first.isdigit() and last.isdigit() else math.nan


@dataclass(frozen=True, slots=True)
class Factor:
    """A setting that is looked at on two levels, and how it is spoken of."""

    key: str
    """Param."""
    levels: tuple[str, str] | Callable[[Row], float]
    """Two values of the param; or what orders arms, and of the values found the lowest and the highest are taken."""
    name: str
    """`depth`, of its effect."""
    plural: str
    """`depths`, of its levels."""
    at: str
    """What stands before a level: at all blocks, with LoRA."""
    header: str
    """Of its levels in a table."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Level -> as it is written, where that is otherwise."""

    def word(self, level: str) -> str:
        """A level as it is written."""
        return self.words.get(level, level)


@dataclass(frozen=True, slots=True)
class Question:
    """Two factors that are crossed, and what is asked of them."""

    title: str
    first: Factor
    second: Factor
    within: Factor | None = None
    """What is the same in all four arms: each of its values makes a 2x2 of its own."""
    robustness: bool = False
    """Whether the second factor is a disturbance, which an arm can be given with all else the same. Asked is then which
    level of the first bears it better, and else what each of the two does."""
    missing: str = ""
    """What is said where no 2x2 was run; empty: nothing."""


_DEPTH = Factor(BLOCKS, n_blocks, "depth", "depths", "at", "vision blocks")
_METHOD = Factor(METHOD, METHODS, "method", "methods", "with", "method", {"lora": "LoRA"})
_NOISE = Factor(AUGMENTATION, ("clean", "published_noisy"), "noise", "modes", "under", "augmentation")

QUESTIONS = {
    "depth_by_method": Question(
        "Depth and method",
        _DEPTH,
        _METHOD,
        missing="No two depths were each trained with LoRA and fully: there is no 2x2 to take apart.",
    ),
    "method_by_noise": Question("Robustness to noisy augmentation", _METHOD, _NOISE, within=_DEPTH, robustness=True),
}
"""What a report asks."""


@dataclass(frozen=True, slots=True)
class Effects:
    """A 2x2: effects in the unit of the ranked metric, over the seeds that all four arms have."""

    question: Question
    within: str
    """Value of what the four arms share; empty where the question has no such."""
    levels: tuple[tuple[str, str], tuple[str, str]]
    """Of the first factor, and of the second."""
    cells: Mapping[tuple[str, str], Row]
    """(level of the first, level of the second) -> arm."""
    first: Contrast
    """Second level of the first factor minus its first level, mean over the levels of the second."""
    second: Contrast
    """Likewise of the second factor."""
    first_at: Mapping[str, Contrast]
    """Level of the second factor -> effect of the first there."""
    second_at: Mapping[str, Contrast]
    """Level of the first factor -> effect of the second there."""
    interaction: Contrast
    """Effect of the second factor at the second level of the first, minus its effect at the first level."""
    confounded: Mapping[str, tuple[str, ...]]
    """Param that differs between cells beside the two factors -> its value in the order of `cells`."""


@dataclass(frozen=True, slots=True)
class DomainResult:
    """One domain: arms by eval loss, and whether the first is more than seed noise ahead of the second."""

    domain: str
    losses: Mapping[str, Estimate]
    """Arm -> eval loss over seeds, nats per supervised token; the lowest first."""
    ahead: Difference
    """The second arm minus the first; p adjusted by Holm over all pairs of all domains."""


def two_by_twos(ranking: Ranking, question: Question) -> list[Effects]:
    """Every 2x2 that a ranking holds for a question, in the order of the ranking; none where a cell was not run.

    Of several arms in a cell the best is taken. For a disturbance these are the best arms that were run with and
    without it, all else the same, if there are such.

    The p of interactions are adjusted by Holm over the 2x2s found, and so are those of the effects at one level; means
    over levels are not adjusted.
    """
    groups = _by_level(ranking.rows, question.within)
    cells = {within: _cells(rows, question) for within, rows in groups.items()}
    found = [_effects(ranking.by, question, within, four) for within, four in cells.items() if four]
    told = iter(holm([one.interaction.p for one in found]))
    at_levels = iter(holm([c.p for one in found for c in (*one.first_at.values(), *one.second_at.values())]))
    return [
        replace(
            one,
            interaction=replace(one.interaction, p_adjusted=next(told)),
            first_at=_adjusted(one.first_at, at_levels),
            second_at=_adjusted(one.second_at, at_levels),
        )
        for one in found
    ]


def lacking(ranking: Ranking, question: Question) -> list[tuple[Row, str]]:
    """What would make a 2x2 of the arms that were run: an arm, and the level of the second factor to give it."""
    found = []
    for rows in _by_level(ranking.rows, question.within).values():
        wanted = _levels(question.second, _best(rows, question.second)) or ()
        for level, of_level in _by_level(rows, question.first).items():
            have = _best(of_level, question.second)
            missing = [one for one in wanted if one not in have]
            if len(missing) == 1 and (callable(question.first.levels) or level in question.first.levels):
                found.append((next(have[one] for one in wanted if one in have), missing[0]))
    return found


def _adjusted(effects: Mapping[str, Contrast], p_values: Iterator[float]) -> dict[str, Contrast]:
    return {level: replace(effect, p_adjusted=next(p_values)) for level, effect in effects.items()}


def _cells(rows: Sequence[Row], question: Question) -> dict[tuple[str, str], Row] | None:
    """The four arms; None where one is missing.

    Args:
        rows: the best first.
        question: what is asked.
    """
    first, second = question.first, question.second
    columns = _levels(second, _best(rows, second))
    if columns is None:
        return None
    pairs = {level: _pair(of_level, question) for level, of_level in _by_level(rows, first).items()}
    whole = {level: pair for level, pair in pairs.items() if pair.keys() >= {*columns}}
    lines = _levels(first, {level: pair[columns[0]] for level, pair in whole.items()})
    return {(line, column): pairs[line][column] for line in lines for column in columns} if lines else None


def _levels(factor: Factor, found: Mapping[str, Row]) -> tuple[str, str] | None:
    """The two levels to compare, of the values found."""
    if not callable(factor.levels):
        return factor.levels if found.keys() >= {*factor.levels} else None
    places = {value: factor.levels(row) for value, row in found.items()}
    ordered = sorted((value for value, place in places.items() if not math.isnan(place)), key=places.__getitem__)
    return (ordered[0], ordered[-1]) if len(ordered) > 1 else None


def _pair(rows: Sequence[Row], question: Question) -> Mapping[str, Row]:
    """Of one level of the first factor: level of the second -> the best arm there, or the best that has a like."""
    best = _best(rows, question.second)
    if not question.robustness:
        return best
    keys = [key for key in differing([row.readings[0].run for row in rows]) if key != question.second.key]
    alike: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        params = row.readings[0].run.params
        alike.setdefault(tuple(setting(params, key) for key in keys), []).append(row)
    pairs = [_best(of_one, question.second) for of_one in alike.values()]
    return next((pair for pair in pairs if _levels(question.second, pair)), best)


def _by_level(rows: Sequence[Row], factor: Factor | None) -> dict[str, list[Row]]:
    """Value -> the arms that have it; all under one where there is no factor."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.readings[0].run.params.get(factor.key, "") if factor else "", []).append(row)
    return groups


def _best(rows: Sequence[Row], factor: Factor) -> dict[str, Row]:
    return {level: of_level[0] for level, of_level in _by_level(rows, factor).items()}


def _effects(by: str, question: Question, within: str, cells: Mapping[tuple[str, str], Row]) -> Effects:
    a, b = dict.fromkeys(level for level, _ in cells)
    x, y = dict.fromkeys(level for _, level in cells)
    values = {row.label: _by_block(row.readings, by) for row in cells.values()}

    def effect(weights: Mapping[tuple[str, str], float]) -> Contrast:
        # the other cells weigh nothing, and are there so that all effects are over the same seeds
        return contrast({row.label: weights.get(cell, 0.0) for cell, row in cells.items()}, values)

    runs = [row.readings[0].run for row in cells.values()]
    keys = [key for key in differing(runs) if key not in (question.first.key, question.second.key)]
    return Effects(
        question=question,
        within=within,
        levels=((a, b), (x, y)),
        cells=cells,
        first=effect({(b, x): 0.5, (b, y): 0.5, (a, x): -0.5, (a, y): -0.5}),
        second=effect({(a, y): 0.5, (b, y): 0.5, (a, x): -0.5, (b, x): -0.5}),
        first_at={level: effect({(b, level): 1, (a, level): -1}) for level in (x, y)},
        second_at={level: effect({(level, y): 1, (level, x): -1}) for level in (a, b)},
        interaction=effect({(b, y): 1, (b, x): -1, (a, y): -1, (a, x): 1}),
        confounded={key: tuple(run.params.get(key, "-") for run in runs) for key in keys},
    )


def by_domain(ranking: Ranking) -> list[DomainResult]:
    """Every domain in which at least two arms were evaluated, at the end of their runs."""
    found = domain_values(ranking)
    domains = sorted({domain for of_arm in found.values() for domain in of_arm})
    results: list[tuple[str, dict[str, Estimate]]] = []
    pairs: list[list[Difference]] = []
    for domain in domains:
        values = {arm: of_arm[domain] for arm, of_arm in found.items() if domain in of_arm}
        losses = {arm: estimate([*of_seed.values()]) for arm, of_seed in values.items()}
        losses = dict(sorted(losses.items(), key=lambda item: item[1].mean))
        if len(losses) > 1:
            results.append((domain, losses))
            # the pair of the two best first: it is what is told; the others count into the correction
            few = all_differences({arm: values[arm] for arm in losses})
            pairs.append(few)
    adjusted = iter(holm([pair.p for few in pairs for pair in few]))
    told = []
    for (domain, losses), few in zip(results, pairs, strict=True):
        first, *_ = [replace(pair, p_adjusted=max(next(adjusted), pair.p_adjusted)) for pair in few]
        told.append(DomainResult(domain, losses, first))
    return told


def arm_by_domain(ranking: Ranking) -> Interaction | None:
    """Whether arms differ alike in every domain; None where fewer than two seeds were run in all arms and domains."""
    found = domain_values(ranking)
    domains = sorted(set.intersection(*({*of_arm} for of_arm in found.values()))) if found else []
    if len(found) < 2 or len(domains) < 2:
        return None
    seeds = sorted(set.intersection(*({*of_arm[domain]} for of_arm in found.values() for domain in domains)))
    if len(seeds) < 2:
        return None
    return interaction(
        np.array([[[of_arm[domain][seed] for domain in domains] for of_arm in found.values()] for seed in seeds])
    )


def domain_values(ranking: Ranking) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> domain -> block -> eval loss at the end, nats per supervised token; arms without domains are left out."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in ranking.rows:
        for reading in row.readings:
            for name, value in reading.run.metrics.items():
                if name.startswith(names.EVAL_LOSS_BY_DOMAIN) and math.isfinite(value):
                    domain = name.removeprefix(names.EVAL_LOSS_BY_DOMAIN)
                    values.setdefault(row.label, {}).setdefault(domain, {})[reading.block] = value
    return values


def _by_block(readings: Sequence[Reading], key: str) -> dict[str, float]:
    return {reading.block: reading.values[key] for reading in readings}
