"""Prints what is known of a data set: tables for people, or one JSON object."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer import data_figure
from trainer.config.resolved import Resolved
from trainer.data.statistics import Epoch, Quantiles, ranked
from trainer.data.suspicions import Suspicion
from trainer.errors import UserError
from trainer.validate import Validation, validate

_TYPES, _DOMAINS, _PLACES = 15, 15, 3  # rows of a table, places of a warning; the rest is counted
_LONGEST = 60  # characters of a name in a table


def show_validation(resolved: Resolved, form: str, out: Path | None) -> tuple[UserError, ...]:
    """Check the data set of a configuration and print what is known of it, all but the errors.

    Args:
        resolved: the configuration.
        form: a key of `FORMATS`.
        out: picture to draw too.

    Returns:
        What training would refuse, and what has hindered drawing.

    Raises:
        UserError: nothing could be checked: `out` can be no picture, or the model or the taxonomy cannot be read.
    """
    if out:
        data_figure.check_out(out)
    found = validate(resolved)
    FORMATS[form](found)
    try:
        if out:
            data_figure.draw(found, out)
    except UserError as error:
        return (*found.errors, error)
    return found.errors


def show_table(found: Validation, console: Console | None = None) -> None:
    """Print the numbers of a data set as tables, and the warnings below them; not the errors."""
    console = console or Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    resolved = found.resolved
    console.print(Text(resolved.name, style="bold"), f" profile {resolved.profile or 'none'}")
    for name, each in found.sets.items():
        console.print(f"{name:<6} {each.path}", markup=False)
    for table in (_counts(found), _spreads(found), *_names(found), _limits(found)):
        if table.row_count:
            console.print()
            console.print(table)
    if found.epoch:
        console.print(_epoch_line(found.epoch), markup=False)
    if found.warnings:
        console.print(Text("\nwarnings", style="bold"))
    for warning in found.warnings:
        for line in _warning_lines(warning):
            console.print(plain(line))
    if not found.errors:
        console.print("\nsound: training would refuse nothing")


def show_json(found: Validation, console: Console | None = None) -> None:
    """Print everything as one JSON object: counts, quantiles, all bad records, all places of the warnings."""
    (console or Console(soft_wrap=True)).out(json.dumps(as_tree(found), ensure_ascii=False), highlight=False)


FORMATS: Mapping[str, Callable[[Validation], None]] = {"table": show_table, "json": show_json}


def as_tree(found: Validation) -> dict[str, Any]:
    """What `show_json` prints."""
    config = found.resolved.config
    return {
        "config": found.resolved.name,
        "profile": found.resolved.profile,
        "model": config.model.model,
        "sound": not found.errors,
        "max_length": config.max_length,
        "pack_length": config.pack_length,
        "sets": {
            name: {
                "path": str(each.path),
                "records_in_file": each.n_records,
                "bad": {record: [problem.removeprefix(": ").removeprefix(", ") for problem in problems]
                        for record, problems in each.faults.items()},
                "usable": len(each.records),
                **asdict(found.statistics[name]),
            }
            for name, each in found.sets.items()
        },
        "first_epoch": found.epoch and {**asdict(found.epoch), "fill": found.epoch.fill},
        "limits": [asdict(limit) for limit in found.limits],
        "warnings": [asdict(warning) for warning in found.warnings],
        "errors": [
            {"where": error.where, "got": error.got, "allowed": error.allowed, "do": error.do}
            for error in found.errors
        ],
    }  # fmt: skip


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(first, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _counts(found: Validation) -> Table:
    """One row a count, one column a set; what is none everywhere is left out."""
    sets = [(each, found.statistics[name]) for name, each in found.sets.items()]
    table = _table("data set", "", [*found.sets])
    rows: dict[str, list[int]] = {
        "records in the file": [each.n_records for each, _ in sets],
        "  bad": [len(each.faults) for each, _ in sets],
        "  usable": (usable := [len(each.records) for each, _ in sets]),
        "counted below": counted if (counted := [numbers.records for _, numbers in sets]) != usable else [],
        f"  of more than {found.resolved.config.max_length:,} tokens": [numbers.too_long for _, numbers in sets],
        "  with a summary": [numbers.summaries for _, numbers in sets],
        "  with a weight": [numbers.weighted for _, numbers in sets],
        "images": [numbers.images for _, numbers in sets],
        "  different files": [numbers.image_files for _, numbers in sets],
        "objects": [numbers.objects for _, numbers in sets],
        **{f"  {kind}": [numbers.kinds.get(kind, 0) for _, numbers in sets]
           for kind in dict.fromkeys(kind for _, numbers in sets for kind in numbers.kinds)},
        "types": [len(numbers.types) for _, numbers in sets],
        "domains": [len(numbers.domains) for _, numbers in sets],
    }  # fmt: skip
    for word, row in rows.items():
        if any(row):
            table.add_row(word, *(f"{count:,}" for count in row))
    return table


def _spreads(found: Validation) -> Table:
    """Rows by quantity, in each a row a set; one row where all sets have the same numbers."""
    table = _table("over records", "", ["set", "min", "median", "p90", "p99", "max"])
    quantities = dict.fromkeys(key for numbers in found.statistics.values() for key in numbers.spreads)
    for quantity in quantities:
        rows = {name: of for name, numbers in found.statistics.items() if (of := numbers.spreads[quantity])}
        if quantity == "weight" and not any(numbers.weighted for numbers in found.statistics.values()):
            continue
        if len(rows) > 1 and len({*rows.values()}) == 1:
            rows = {"all": next(iter(rows.values()))}
        for place, (name, of) in enumerate(rows.items()):
            table.add_row("" if place else _WORDS[quantity], name, *(_number(value) for value in _values(of)))
    return table


_WORDS = {
    "image_width": "image width, pixels", "image_height": "image height, pixels", "image_megapixels": "megapixels",
    "weight": "weight", "objects": "objects", "prompt_tokens": "tokens, prompt", "image_tokens": "tokens, images",
    "answer_tokens": "tokens, answer", "tokens": "tokens, whole sample",
}  # fmt: skip


def _values(of: Quantiles) -> tuple[float, ...]:
    return of.min, of.median, of.p90, of.p99, of.max


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _names(found: Validation) -> list[Table]:
    """Types and domains with the share that each has in every set."""
    statistics = found.statistics
    types = _shares("types (first element of desc)", {n: (s.types, s.objects) for n, s in statistics.items()}, _TYPES)
    domains = _shares("domains", {n: (s.domains, s.records) for n, s in statistics.items()}, _DOMAINS)
    return [types, domains]


def _shares(title: str, sets: Mapping[str, tuple[Mapping[str, int], int]], most: int) -> Table:
    """A row a name, for each set its count and its share of the total; what is rare or has no name is counted."""
    table = _table(title, "", [header for name in sets for header in (name, "%")])
    names = ranked(*(counts for counts, _ in sets.values()))

    def row(word: Text, of_sets: Sequence[int]) -> None:
        totals = [max(1, total) for _, total in sets.values()]
        pairs = zip(of_sets, totals, strict=True)
        table.add_row(word, *(cell for count, total in pairs for cell in (f"{count:,}", f"{100 * count / total:.1f}")))

    for name in names[:most]:
        row(plain(name, _LONGEST), [counts.get(name, 0) for counts, _ in sets.values()])
    if rest := names[most:]:
        others = [sum(counts.get(name, 0) for name in rest) for counts, _ in sets.values()]
        row(Text(f"{len(rest):,} more", style="italic"), others)
    nameless = [total - sum(counts.values()) for counts, total in sets.values()]
    if names and any(nameless):
        row(Text("none", style="italic"), nameless)
    return table


def _limits(found: Validation) -> Table:
    """A row a length limit, the one that is set marked."""
    sets = [*found.sets]
    heads = [f"too long in {name}" for name in sets]
    title = "what a length limit would do (global_max_length; packs hold every training record that fits once)"
    table = _table(title, "tokens", [*heads, "packs", "% full"])
    for limit in found.limits:
        mark = " (set)" if limit.tokens == found.resolved.config.max_length else ""
        counts = [f"{limit.too_long[name]:,}" for name in sets]
        table.add_row(f"{limit.tokens:,}{mark}", *counts, f"{limit.packs:,}", f"{100 * limit.fill:.0f}")
    return table


def _epoch_line(epoch: Epoch) -> str:
    """In the words of `plan`."""
    packed = "no packing: one sample each"
    if epoch.capacity is not None:
        each = epoch.samples / epoch.packs
        packed = f"{epoch.packs:,} packs of at most {epoch.capacity:,} tokens, {each:.1f} samples a pack, "
        packed += f"{100 * (epoch.fill or 0):.0f} % full"
    return f"first epoch: {epoch.samples:,} samples, {epoch.tokens:,} tokens, {epoch.steps:,} optimizer steps; {packed}"


def _warning_lines(warning: Suspicion) -> list[str]:
    """What is noticed, and below it the first places."""
    lines = [warning.text, *(f"    {place}" for place in warning.places[:_PLACES])]
    if len(warning.places) > _PLACES:
        lines.append(f"    ... and {len(warning.places) - _PLACES:,} more")
    return lines


def plain(text: str, longest: int | None = None) -> Text:
    """A text of the data as it stands: no markup, nothing that moves the cursor, not longer than it may be."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return Text(shown if longest is None or len(shown) <= longest else shown[: longest - 3] + "...")
