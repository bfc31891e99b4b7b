"""A ranking as text: tables for a terminal, Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.checks import Finding, careful_reading
from analysis.effects import QUESTIONS, two_by_twos
from analysis.page import plain, table
from analysis.ranking import COLUMNS, COST, LEARNED, LOSS, Column, Ranking, Row
from analysis.statistics import Estimate
from analysis.subject import subject_of
from analysis.verdict import all_robustness, verdict

NOTE = "Means over seeds ± half the 95 % interval (Student's t over seeds); where there is one seed, no interval."


def cell(estimate: Estimate, column: Column) -> str:
    """`0.5921 ± 0.0130`, `0.5921` without an interval, `-` without a value."""
    if math.isnan(estimate.mean):
        return "-"
    mean = f"{estimate.mean * column.scale:,.{column.digits}f}"
    if math.isnan(estimate.half_width) or estimate.half_width == 0:
        return mean
    return f"{mean} ± {estimate.half_width * column.scale:,.{column.digits}f}"


def plus_minus(found: Estimate) -> str:
    """A mean in full, with half its interval where it has one."""
    return f"{found.mean:.4f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.4f}")


def effect(found: Estimate) -> list[str]:
    """Cells of a difference: `+0.0315`, `+0.0211 to +0.0418`, `5`."""
    interval = "-" if math.isnan(found.low) else f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{found.mean:+.4f}", interval, str(found.n)]


def columns_of(ranking: Ranking) -> list[Column]:
    """The usual columns that any run has a value in, the ranked metric first where it is not one of them."""
    shown = [c for c in COLUMNS if any(not math.isnan(row.estimates[c.key].mean) for row in ranking.rows)]
    if all(column.key != ranking.by for column in COLUMNS):
        shown.insert(0, Column(ranking.by, ranking.by, LOSS))
    return shown


def render(ranking: Ranking, console: Console) -> None:
    """To a terminal: one table for each group of columns, one row an arm, then the verdict."""
    parts: list[RenderableType] = []
    for group in (LOSS, LEARNED, COST):
        columns = [column for column in columns_of(ranking) if column.group == group]
        if not columns or not ranking.rows:
            continue
        grid = Table(box=box.SIMPLE_HEAD, title=group, title_justify="left", pad_edge=False)
        grid.add_column("")
        if group == LOSS:
            grid.add_column("n", justify="right")
            grid.add_column("margin", justify="right")
        for column in columns:
            grid.add_column(column.header, justify="right")
        for row in ranking.rows:
            head = [str(row.estimates[ranking.by].n), margin(row)] if group == LOSS else []
            grid.add_row(Text(row.label), *head, *(cell(row.estimates[column.key], column) for column in columns))
        parts.append(grid)
    console.print(Group(*parts, Text("\n".join(footer(ranking)))))


def markdown(ranking: Ranking) -> str:
    """One table, one row an arm, then the verdict."""
    columns = columns_of(ranking)
    lines = table(
        ["", "n", "margin", *(column.header for column in columns)],
        [
            [plain(row.label), str(row.estimates[ranking.by].n), margin(row)]
            + [cell(row.estimates[c.key], c) for c in columns]
            for row in ranking.rows
        ],
    )
    return "\n".join([*lines, "", *(line if line.startswith("- ") else line + "  " for line in footer(ranking))]) + "\n"


def as_csv(ranking: Ranking) -> str:
    """Mean, lower and upper end and n of every column, unrounded, in the units of `names.py`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [column.key for column in columns_of(ranking)]
    fields = ("mean", "low", "high", "n")
    writer.writerow(["arm", "strategy", "margin_percent", *(f"{key}:{field}" for key in keys for field in fields)])
    for row in ranking.rows:
        cells = [_plain(getattr(row.estimates[key], field)) for key in keys for field in fields]
        writer.writerow([row.label, row.strategy, _plain(row.margin), *("" if c is None else c for c in cells)])
    return out.getvalue()


def as_json(ranking: Ranking) -> str:
    """Everything, unrounded; what is not a finite number is null."""
    keys = [column.key for column in columns_of(ranking)]
    tree = {
        "by": ranking.by,
        "at": str(ranking.at),
        "rows": [
            {
                "arm": row.label,
                "strategy": row.strategy,
                "margin_percent": _plain(row.margin),
                "runs": [reading.run.id for reading in row.readings],
                "estimates": {
                    key: {f: _plain(getattr(row.estimates[key], f)) for f in ("mean", "low", "high", "n", "excluded")}
                    for key in keys
                },
            }
            for row in ranking.rows
        ],
        "differences": [
            {
                "first": d.first,
                "second": d.second,
                **{f: _plain(getattr(d.estimate, f)) for f in ("mean", "low", "high", "n")},
                "p": _plain(d.p),
                "p_holm": _plain(d.p_adjusted),
                "method": d.method,
                "distinguishable": d.distinguishable,
            }
            for d in ranking.differences
        ],
        "interactions": [] if ranking.each else _interactions(ranking),
        "excluded": [{"run": run.id, "name": run.name, "reason": reason} for run, reason in ranking.excluded],
        "verdict": [*verdict(ranking), *all_robustness(ranking)],
        "findings": [
            {"check": found.check, "text": found.text, "numbers": {k: _plain(v) for k, v in found.numbers.items()}}
            for found in _noticed(ranking)
        ],
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def _interactions(ranking: Ranking) -> list[dict[str, Any]]:
    """Every 2x2 of a ranking: its four arms, and how the effect of the second factor depends on the first."""
    return [
        {
            "question": name,
            "within": effects.within,
            "arms": [row.label for row in effects.cells.values()],
            **{f: _plain(getattr(effects.interaction.estimate, f)) for f in ("mean", "low", "high", "n")},
            "p": _plain(effects.interaction.p),
            "p_holm": _plain(effects.interaction.p_adjusted),
            "distinguishable": effects.interaction.distinguishable,
        }
        for name, question in QUESTIONS.items()
        for effects in two_by_twos(ranking, question)
    ]


FORMATS: dict[str, Callable[[Ranking], str]] = {"markdown": markdown, "csv": as_csv, "json": as_json}


def footer(ranking: Ranking) -> list[str]:
    """The verdict, what the intervals are, and what was left out and why."""
    lines = [*verdict(ranking), *all_robustness(ranking), f"Ranked by {ranking.by}, read at {ranking.at}. {NOTE}"]
    if ranking.n_not_finite:
        lines.append(f"{ranking.n_not_finite} points of these curves are not finite numbers and count nowhere.")
    if len(ranking.rows) > 1 and (findings := _noticed(ranking)):
        lines += ["Noticed:", *(f"- {finding.text}" for finding in findings)]
    if ranking.excluded:
        lines.append("Not ranked:")
        lines += [f"- {run.name or run.strategy} ({run.id[:8]}) {reason}" for run, reason in ranking.excluded]
    return lines


def _noticed(ranking: Ranking) -> list[Finding]:
    """What a careful reader notices; of rows that are runs nothing, since it is about arms."""
    return [] if ranking.each else careful_reading(subject_of(ranking))


def margin(row: Row) -> str:
    """How much worse than the winner, in percent."""
    return "-" if math.isnan(row.margin) else f"{row.margin:.1f} %"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
