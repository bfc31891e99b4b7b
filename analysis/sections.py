"""The sections of a report, as Markdown: what was compared, what came out, how sure that is, what to run next."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from analysis.advice import command_of, next_steps, recommendation
from analysis.checks import careful_reading
from analysis.comparison import AXES, Comparison, mean_at, round_points
from analysis.effects import arm_by_domain, by_domain, depth_by_method
from analysis.page import plain, table
from analysis.ranking import COST, LEARNED, LOSS, Ranking, Row, verdict
from analysis.records import OverRecords
from analysis.runs import Run
from analysis.settings import differing, is_setting
from analysis.statistics import Estimate
from analysis.subject import subject_of
from analysis.tables import NOTE, cell, columns_of, margin
from trainer import names

FIGURES = {
    "eval_loss": "Eval loss. Thin lines: runs; thick: mean over seeds; band: from the lowest seed to the highest; open "
    "marks: the lowest evaluation of a run.",
    "train_loss": "Train loss. Thin lines: as logged; thick: mean over seeds of the smoothed curves.",
    "gap": "Generalization gap, eval minus train loss, both smoothed.",
    "learning_rate": "Learning rate of the vision part.",
    "gap_bars": "Gap at the end, with 95 % intervals over seeds.",
    "costs": "The ranked metric against what it cost; the dotted line joins arms that no other beats in both.",
    "blocks": "The ranked metric against the number of trained vision blocks; of several arms at one depth, the best.",
    "vit_lr": "The ranked metric against the vision learning rate, arms that differ in nothing else.",
    "rank": "The ranked metric against the LoRA rank, arms that differ in nothing else.",
    "domains": "Eval loss by domain, the lowest of each in bold; shade: how far above it.",
}
"""Figure of `plots.py` -> what it shows."""


@dataclass(frozen=True, slots=True)
class Material:
    """All that a report is written from."""

    comparison: Comparison
    records: Sequence[OverRecords]
    environments: Mapping[str, Any]
    """Run id -> what it ran on, as the trainer logged it."""
    figures: Sequence[str]
    """Names of the figures that were drawn, which lie in `figures/` as PNG."""
    axis: str
    """Of curves: a key of `AXES`."""
    made: datetime
    points: Sequence[float] = ()
    """Where on the axis the curves are told; empty: at round numbers."""

    @property
    def ranking(self) -> Ranking:
        """What was ranked."""
        return self.comparison.ranking


def document(material: Material) -> str:
    """The whole report; pictures are named as `figures/NAME.png`."""
    ranking = material.ranking
    sections = [
        _head(material),
        _summary(ranking),
        _compared(ranking),
        _final(material),
        _curves(material),
        _two_by_two(material),
        _domains(material),
        _certainty(material),
        _findings(ranking),
        _recommended(ranking),
        _next(ranking),
        _reproduce(material),
        _common(ranking),
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def _head(material: Material) -> Iterator[str]:
    ranking = material.ranking
    n_runs = sum(len(row.readings) for row in ranking.rows)
    labels = [plain(row.label) for row in ranking.rows]
    yield f"# Comparison of {', '.join(labels) if len(labels) <= 6 else f'{len(labels)} arms'}"
    yield ""
    yield (
        f"{_counted(n_runs, 'run')} of {_counted(len(ranking.rows), 'arm')}; ranked by `{ranking.by}`, read at "
        f"{ranking.at}. Made on {material.made:%d %B %Y, %H:%M} UTC by `python -m analysis report` from the runs in "
        "MLflow."
    )
    yield ""


def _summary(ranking: Ranking) -> Iterator[str]:
    yield from ("## Summary", "")
    if ranking.rows:
        advice = recommendation(ranking, careful_reading(subject_of(ranking)))
        yield f"**{plain(advice.arm)}** comes first; confidence in it: **{advice.confidence}**."
        yield ""
    yield from (plain(line) if not line.startswith("- ") else f"- {plain(line[2:])}" for line in verdict(ranking))
    yield ""
    column = next((c for c in columns_of(ranking) if c.key == ranking.by), columns_of(ranking)[0])
    yield from table(
        ["arm", "seeds", ranking.by, "margin over the winner"],
        [[plain(r.label), str(r.estimates[ranking.by].n), cell(r.estimates[ranking.by], column), margin(r)]
         for r in ranking.rows],
    )  # fmt: skip
    yield from ("", NOTE, "")


def _compared(ranking: Ranking) -> Iterator[str]:
    """Params in which the arms differ: found, never typed in."""
    runs = [reading.run for row in ranking.rows for reading in row.readings]
    yield from ("## What was compared", "")
    rows = []
    for key in differing(runs, derived=True):
        values = [", ".join(dict.fromkeys(r.run.params.get(key, "-") for r in row.readings)) for row in ranking.rows]
        rows.append([f"`{key}`", *(plain(_short(value)) for value in values)])
    if rows:
        yield from ("Found by comparing the params of the runs; everything else is the same in all (see the end).", "")
        yield from table(["", *(plain(row.label) for row in ranking.rows)], rows)
    else:
        yield "The runs do not differ in any param but the seed."
    yield ""


def _final(material: Material) -> Iterator[str]:
    ranking = material.ranking
    yield from ("## Metrics", "", f"Read at {ranking.at}. {NOTE}", "")
    for group in (LOSS, LEARNED, COST):
        columns = [column for column in columns_of(ranking) if column.group == group]
        if columns and ranking.rows:
            yield from (f"### {group[0].upper()}{group[1:]}", "")
            yield from table(
                ["arm", *(column.header for column in columns)],
                [[plain(row.label), *(cell(row.estimates[c.key], c) for c in columns)] for row in ranking.rows],
            )
            yield ""
    yield from _figures(material, "gap_bars", "costs")


def _curves(material: Material) -> Iterator[str]:
    yield from ("## Curves", "")
    yield from _figures(material, "eval_loss", "train_loss", "gap", "learning_rate")
    metric, axis = material.comparison.loss, material.axis
    points = material.points or round_points(material.comparison, metric, axis)
    if not points:
        return
    label = AXES[axis][2]
    yield from (f"`{metric}` at {label}, mean over seeds, straight between evaluations; empty after a run's end.", "")
    rows = []
    for point in points:
        means = [mean_at(material.comparison, row, metric, axis, point) for row in material.ranking.rows]
        rows.append([f"{point:,g}", *("" if math.isnan(mean) else f"{mean:.4f}" for mean in means)])
    yield from table([label, *(plain(row.label) for row in material.ranking.rows)], rows)
    yield ""


def _two_by_two(material: Material) -> Iterator[str]:
    ranking = material.ranking
    effects = depth_by_method(ranking)
    yield from ("## Depth and method", "")
    yield from _figures(material, "blocks", "vit_lr", "rank")
    if effects is None:
        yield "No two depths were each trained with LoRA and fully: there is no 2x2 to take apart."
        yield ""
        return
    few, many = effects.depths
    yield from table(
        ["vision blocks", "LoRA", "full"],
        [[plain(depth), *(_mean(effects.cells[depth, method], ranking.by) for method in ("lora", "full"))]
         for depth in effects.depths],
    )  # fmt: skip
    yield ""
    yield from table(
        ["effect on " + ranking.by, "", "95 % interval", "seeds"],
        [
            [name, *_estimate(found)]
            for name, found in (
                (f"depth: {plain(many)} minus {plain(few)}, mean of both methods", effects.depth),
                ("method: full minus LoRA, mean of both depths", effects.method),
                (
                    f"interaction: what full adds at {plain(many)}, minus what it adds at {plain(few)}",
                    effects.interaction,
                ),
            )
        ],
    )
    yield ""
    if effects.confounded:
        header = ["differs as well", *(f"{plain(depth)}, {method}" for depth, method in effects.cells)]
        yield (
            "These effects are confounded: the cells differ in more than depth and method. They are the effects of the "
            "configurations as a whole, unless arms with tuned rates and equal batches are compared."
        )
        yield ""
        yield from table(header, [[f"`{key}`", *map(plain, values)] for key, values in effects.confounded.items()])
        yield ""


def _domains(material: Material) -> Iterator[str]:
    results = by_domain(material.ranking)
    yield from ("## Domains", "")
    if not results:
        yield from ("No domain in which two arms or more were evaluated.", "")
        return
    yield from _figures(material, "domains")
    rows = []
    for result in results:
        first, second, *_ = result.losses
        pair = result.ahead.estimate
        interval = "-" if math.isnan(pair.low) else f"{pair.low:+.4f} to {pair.high:+.4f}"
        told = "yes" if result.ahead.distinguishable else "no" if result.ahead.method != "untested" else "one seed"
        rows.append([plain(result.domain), plain(first), _plus_minus(result.losses[first]), plain(second),
                     f"{pair.mean:+.4f}", interval, told])  # fmt: skip
    yield from table(["domain", "lowest eval loss", "", "next", "ahead by", "95 % interval", "distinguishable"], rows)
    yield from (
        "",
        "Distinguishable: p at most 0.05 after Holm over all pairs in all domains; intervals are of one pair.",
        "",
    )
    found = arm_by_domain(material.ranking)
    if found is not None and not math.isnan(found.p):
        same = "not shown to depend" if found.p > 0.05 else "depend"
        yield (
            f"Arm x domain: the differences between arms {same} on the domain: F({found.freedom[0]}, "
            f"{found.freedom[1]}) = {found.f:.2f}, p = {found.p:.2g}; arm and domain together move the loss by "
            f"{found.size:.4f} nats (root mean square). Repeated measures over seeds, sphericity taken for granted."
        )
    else:
        yield "Arm x domain: needs at least two seeds that were run in every arm."
    yield ""


def _certainty(material: Material) -> Iterator[str]:
    ranking = material.ranking
    yield from ("## How sure this is", "", "### Over seeds", "")
    tested = [pair for pair in ranking.differences if pair.method != "untested"]
    if tested:
        yield from table(
            ["second minus first", "difference", "95 % interval", "n", "p", "p, Holm", "test", "distinguishable"],
            [[f"{plain(d.second)} - {plain(d.first)}", *_estimate(d.estimate), f"{d.p:.2g}", f"{d.p_adjusted:.2g}",
              d.method, "yes" if d.distinguishable else "no"] for d in tested],
        )  # fmt: skip
        yield ""
    if len(tested) < len(ranking.differences) or not tested:
        yield from ("Pairs with fewer than two seeds are not tested: nothing tells a difference from noise.", "")
    yield from ("### Over validation records", "")
    if material.records:
        yield (
            "A separate statement: the uncertainty of this validation set only, for the weights as they are, each "
            "record's loss averaged over seeds (paired bootstrap, 10,000 resamples). It says nothing about other seeds."
        )
        yield ""
        winner = plain(ranking.rows[0].label)
        yield from table(
            [f"minus {winner}", "difference", "95 % interval", "records"],
            [[plain(found.arm), *_estimate(found.difference)] for found in material.records],
        )
    else:
        yield "No per-record losses of the same records in all arms."
    yield ""


def _findings(ranking: Ranking) -> Iterator[str]:
    yield from ("## What a careful reader notices", "")
    findings = careful_reading(subject_of(ranking))
    yield from (f"- {plain(finding.text)}" for finding in findings)
    if not findings:
        yield "Nothing."
    yield ""


def _recommended(ranking: Ranking) -> Iterator[str]:
    yield from ("## Recommendation", "")
    if not ranking.rows:
        yield from ("Nothing was ranked.", "")
        return
    advice = recommendation(ranking, careful_reading(subject_of(ranking)))
    yield f"Train **{plain(advice.arm)}**. Confidence: **{advice.confidence}**."
    yield from (f"- {plain(sentence)}" for sentence in advice.why)
    yield ""


def _next(ranking: Ranking) -> Iterator[str]:
    yield from ("## What to run next", "")
    for step in next_steps(ranking, careful_reading(subject_of(ranking))):
        yield f"- {plain(step.why)}"
        if step.command:
            yield from ("", f"      {step.command}", "")
    yield ""


def _reproduce(material: Material) -> Iterator[str]:
    rows = material.ranking.rows
    runs = [reading.run for row in rows for reading in row.readings]
    yield from ("## Reproducibility", "")
    facts = {
        "code": names.TAG_CODE_VERSION,
        "base weights": names.TAG_BASE_DIGEST,
        "training data": names.TAG_TRAIN_DIGEST,
        "validation data": names.TAG_VAL_DIGEST,
    }
    yield from table(
        ["", "commit or digest"],
        [[what, ", ".join(f"`{value}`" for value in dict.fromkeys(run.tags.get(tag, "-") for run in runs))]
         for what, tag in facts.items()],
    )  # fmt: skip
    yield ""
    if commands := [line for row in rows for line in _commands([reading.run for reading in row.readings])]:
        yield from ("In a checkout of that commit:", "", *(f"    {line}" for line in commands), "")
    yield (
        "`resolved_config.yaml` among a run's artifacts holds every value that it ran with. Runs: "
        + ", ".join(f"{plain(run.name)} `{run.id}`" for run in runs)
        + "."
    )
    yield from ("", *_environment(material))


def _commands(runs: Sequence[Run]) -> list[str]:
    """Commands of an arm's runs; those that differ in nothing but the seed as one loop of the shell."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        if command := command_of(run):
            seeds.setdefault(command.replace(f" -P seed={run.seed}", " -P seed=$seed", 1), []).append(run.seed)
    return [
        f"for seed in {' '.join(of)}; do {command}; done" if len(of) > 1 else command.replace("$seed", of[0])
        for command, of in seeds.items()
    ]


def _environment(material: Material) -> Iterator[str]:
    """Packages and machine, once where all runs agree."""
    seen: dict[str, list[str]] = {}
    for found in material.environments.values():
        flat = {**{key: value for key, value in found.items() if key != "packages"}, **found.get("packages", {})}
        for key, value in flat.items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
            seen.setdefault(key, [])
            seen[key] += [text] if text not in seen[key] else []
    if seen:
        yield "Environment: " + "; ".join(f"{key} {plain(' or '.join(values))}" for key, values in seen.items()) + "."
        yield ""


def _common(ranking: Ranking) -> Iterator[str]:
    """Params that are the same in all runs, a line a section."""
    runs = [reading.run for row in ranking.rows for reading in row.readings]
    yield from ("## Common configuration", "")
    sections: dict[str, list[str]] = {}
    for key in sorted({key for run in runs for key in run.params}):
        values = {run.params.get(key) for run in runs}
        if len(values) == 1 and is_setting(key) and (value := values.pop()) not in (None, "null"):
            section, _, rest = key.rpartition(".")
            sections.setdefault(section or "top level", []).append(f"{plain(rest)} {plain(_short(value))}")
    yield from ("The same in all runs; what is not set is left out.", "")
    yield from (f"- `{section}`: {'; '.join(values)}" for section, values in sections.items())
    yield ""
    if ranking.excluded:
        yield from ("Not ranked:", "")
        yield from (f"- {plain(run.name or run.strategy)} (`{run.id}`) {plain(why)}" for run, why in ranking.excluded)
        yield ""


def _figures(material: Material, *wanted: str) -> Iterator[str]:
    """Those of these figures that were drawn, each with what it shows below it."""
    for name in wanted:
        if name in material.figures:
            yield from (f"![{FIGURES[name]}](figures/{name}.png)", "", f"*{FIGURES[name]}*", "")


def _mean(row: Row, key: str) -> str:
    return _plus_minus(row.estimates[key])


def _plus_minus(found: Estimate) -> str:
    return f"{found.mean:.4f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.4f}")


def _estimate(found: Estimate) -> list[str]:
    interval = "-" if math.isnan(found.low) else f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{found.mean:+.4f}", interval, str(found.n)]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _short(value: str) -> str:
    """A param's value in a cell: a run of block numbers as `18-23`, what is long cut."""
    if re.fullmatch(r"\[\d+(, \d+)+\]", value):
        numbers = json.loads(value)
        if numbers == [*range(numbers[0], numbers[-1] + 1)]:
            return f"{numbers[0]}-{numbers[-1]}"
    return value if len(value) <= 60 else value[:57] + "..."
