"""The sections of a report, as Markdown: what was compared, what came out, how sure that is, what to run next."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from analysis.advice import Recommendation, next_steps, recommendation
from analysis.checks import Finding, careful_reading
from analysis.comparison import AXES, Comparison, mean_at, round_points
from analysis.crossed import two_by_two
from analysis.effects import QUESTIONS, arm_by_domain, by_domain, two_by_twos
from analysis.page import code, plain, table
from analysis.ranking import COST, LEARNED, LOSS, Ranking
from analysis.records import OverRecords
from analysis.reproduction import common, reproduce, short
from analysis.settings import differing
from analysis.subject import subject_of
from analysis.tables import NOTE, cell, columns_of, effect, margin, plus_minus
from analysis.verdict import verdict

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
    "method_by_noise": "The ranked metric without and with noise, a line a method, with 95 % intervals over seeds; "
    "thin: single seeds. Where lines are not parallel, noise costs one method more; that is tested seed by seed, and "
    "may be told where intervals overlap.",
}
"""Figure of `plots.py` -> what it shows."""

_FIGURES_OF = {"depth_by_method": ("blocks", "vit_lr", "rank")}
"""Question -> figures in its section, where they are others than the one of its own name."""


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
    findings = careful_reading(subject_of(ranking))
    advice = recommendation(ranking, findings) if ranking.rows else None
    sections = [
        _head(material),
        _summary(ranking, advice),
        _compared(ranking),
        _final(material),
        _curves(material),
        _crossed(material),
        _domains(material),
        _certainty(material),
        _findings(findings),
        _recommended(advice),
        _next(ranking, findings),
        reproduce(ranking, material.environments),
        common(ranking),
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


def _summary(ranking: Ranking, advice: Recommendation | None) -> Iterator[str]:
    yield from ("## Summary", "")
    if advice:
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
        rows.append([code(key), *(plain(short(value)) for value in values)])
    if rows:
        yield from ("Found by comparing the params of the runs; everything else is the same in all (see the end).", "")
        yield from table(["", *(plain(row.label) for row in ranking.rows)], rows)
    else:
        yield "The arms do not differ in any setting."
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


def _crossed(material: Material) -> Iterator[str]:
    ranking = material.ranking
    for name, question in QUESTIONS.items():
        found = two_by_twos(ranking, question)
        if not found and not question.missing:
            continue
        yield from (f"## {question.title}", "")
        yield from _figures(material, *_FIGURES_OF.get(name, (name,)))
        if not found:
            yield from (question.missing, "")
        for effects in found:
            yield from two_by_two(effects, ranking.by)


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
        told = "yes" if result.ahead.distinguishable else "no" if result.ahead.method != "untested" else "too few seeds"
        if result.ahead.distinguishable and pair.mean < 0:
            told = "yes, but behind on the seeds that both have"
        rows.append([plain(result.domain), plain(first), plus_minus(result.losses[first]), plain(second),
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
        yield "Arm x domain: needs two domains, and two seeds that were run in every arm."
    yield ""


def _certainty(material: Material) -> Iterator[str]:
    ranking = material.ranking
    yield from ("## How sure this is", "", "### Over seeds", "")
    tested = [pair for pair in ranking.differences if pair.method != "untested"]
    if tested:
        yield from table(
            ["second minus first", "difference", "95 % interval", "n", "p", "p, Holm", "test", "distinguishable"],
            [[f"{plain(d.second)} - {plain(d.first)}", *effect(d.estimate), f"{d.p:.2g}", f"{d.p_adjusted:.2g}",
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
            [[plain(found.arm), *effect(found.difference)] for found in material.records],
        )
    else:
        yield "No two arms have losses of the same records; these are kept for the end and the best evaluation."
    yield ""


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    yield from ("## What a careful reader notices", "")
    yield from (f"- {plain(finding.text)}" for finding in findings)
    if not findings:
        yield "Nothing."
    yield ""


def _recommended(advice: Recommendation | None) -> Iterator[str]:
    yield from ("## Recommendation", "")
    if advice is None:
        yield from ("Nothing was ranked.", "")
        return
    yield f"Train **{plain(advice.arm)}**. Confidence: **{advice.confidence}**."
    yield from (f"- {plain(sentence)}" for sentence in advice.why)
    yield ""


def _next(ranking: Ranking, findings: Sequence[Finding]) -> Iterator[str]:
    yield from ("## What to run next", "")
    for step in next_steps(ranking, findings):
        yield f"- {plain(step.why)}"
        if step.command:
            yield from ("", f"      {step.command}", "")
    yield ""


def _figures(material: Material, *wanted: str) -> Iterator[str]:
    """Those of these figures that were drawn, each with what it shows below it."""
    for name in wanted:
        if name in material.figures:
            yield from (f"![{FIGURES[name]}](figures/{name}.png)", "", f"*{FIGURES[name]}*", "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
