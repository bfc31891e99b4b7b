"""What a comparison says beyond its order: effects of depth and method in a 2x2, and winners domain by domain."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.ranking import Ranking, Reading, Row
from analysis.settings import BLOCKS, METHOD, differing
from analysis.statistics import (
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


@dataclass(frozen=True, slots=True)
class Effects:
    """Depth {few, many blocks} x method {LoRA, full}: effects in the unit of the ranked metric."""

    depths: tuple[str, str]
    """As configured: fewer vision blocks, more vision blocks."""
    cells: Mapping[tuple[str, str], Row]
    """(depth, method) -> arm."""
    depth: Estimate
    """More blocks minus fewer, mean over methods."""
    method: Estimate
    """Full minus LoRA, mean over depths."""
    interaction: Estimate
    """How much more `full` adds at the greater depth than at the smaller one."""
    confounded: Mapping[str, tuple[str, ...]]
    """Param that differs between cells beside depth and method -> its value in the order of `cells`."""


@dataclass(frozen=True, slots=True)
class DomainResult:
    """One domain: arms by eval loss, and whether the first is more than seed noise ahead of the second."""

    domain: str
    losses: Mapping[str, Estimate]
    """Arm -> eval loss over seeds, nats per supervised token; the lowest first."""
    ahead: Difference
    """The second arm minus the first; p adjusted by Holm over all pairs of all domains."""


def n_blocks(row: Row) -> float:
    """How many vision blocks an arm trains; nan where it is not known."""
    text = row.readings[0].run.params.get(names.VISION_BLOCKS, "")
    try:
        return float(len(json.loads(text)))
    except (ValueError, TypeError):
        first, dash, last = row.readings[0].run.params.get(BLOCKS, "").partition("-")
        return float(last) - float(first) + 1 if dash and first.isdigit() and last.isdigit() else math.nan


def depth_by_method(ranking: Ranking) -> Effects | None:
    """The 2x2 in a ranking, or None where no two depths have an arm of either method.

    Of more than two depths those with the fewest and the most blocks are taken; of several arms in a cell, the better.
    """
    cells: dict[tuple[str, str], Row] = {}
    for row in ranking.rows:
        params = row.readings[0].run.params
        cells.setdefault((params.get(BLOCKS, ""), params.get(METHOD, "")), row)
    whole = [depth for depth in {d for d, _ in cells} if all((depth, method) in cells for method in METHODS)]
    whole = sorted(
        (d for d in whole if not math.isnan(n_blocks(cells[d, "lora"]))), key=lambda d: n_blocks(cells[d, "lora"])
    )
    if len(whole) < 2:
        return None
    few, many = whole[0], whole[-1]
    chosen = {(depth, method): cells[depth, method] for depth in (few, many) for method in METHODS}
    values = {row.label: _by_block(row.readings, ranking.by) for row in chosen.values()}

    def effect(weights: Mapping[tuple[str, str], float]) -> Estimate:
        return contrast({chosen[cell].label: weight for cell, weight in weights.items()}, values)

    sign = {(depth, method): (1 if depth == many else -1, 1 if method == "full" else -1) for depth, method in chosen}
    runs = [row.readings[0].run for row in chosen.values()]
    confounded = {
        key: tuple(run.params.get(key, "-") for run in runs) for key in differing(runs) if key not in (BLOCKS, METHOD)
    }
    return Effects(
        depths=(few, many),
        cells=chosen,
        depth=effect({cell: d / 2 for cell, (d, _) in sign.items()}),
        method=effect({cell: m / 2 for cell, (_, m) in sign.items()}),
        interaction=effect({cell: d * m for cell, (d, m) in sign.items()}),
        confounded=confounded,
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
