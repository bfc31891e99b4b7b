"""The sections of a report for running it again: commits, digests, commands, environment, the common configuration."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.advice import command_of
from analysis.page import code, plain, table
from analysis.ranking import Ranking
from analysis.runs import Run
from analysis.settings import is_setting, same
from trainer import names


def reproduce(ranking: Ranking, environments: Mapping[str, Any]) -> Iterator[str]:
    """Code, weights and data by digest, a command for every run, packages and machine.

    Args:
        ranking: of at least one arm.
        environments: run id -> what it ran on, as the trainer logged it.
    """
    rows = ranking.rows
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
        [[what, ", ".join(code(value) for value in dict.fromkeys(run.tags.get(tag, "-") for run in runs))]
         for what, tag in facts.items()],
    )  # fmt: skip
    yield ""
    if commands := [line for row in rows for line in _commands([reading.run for reading in row.readings])]:
        yield from (
            "In a checkout of the commit of a run:",
            "",
            *(f"    {line}" for line in commands),
            "",
        )
    yield (
        "`resolved_config.yaml` among a run's artifacts holds every value that it ran with. Runs: "
        + ", ".join(f"{plain(run.name)} {code(run.id)}" for run in runs)
        + "."
    )
    yield from ("", *_environment(environments))


def _commands(runs: Sequence[Run]) -> list[str]:
    """Commands of an arm's runs; those that differ in nothing but the seed as one loop of the shell."""
    seeds: dict[str, dict[str, str]] = {}
    for run in runs:
        if command := command_of(run):
            together = re.sub(r" -P seed=-?\d+(?= |$)", " -P seed=$seed", command, count=1)
            seeds.setdefault(together, {})[command] = run.seed
    return [
        f"for seed in {' '.join(of.values())}; do {together}; done" if len(of) > 1 else next(iter(of))
        for together, of in seeds.items()
    ]


def _environment(environments: Mapping[str, Any]) -> Iterator[str]:
    """Packages and machine, once where all runs agree."""
    seen: dict[str, list[str]] = {}
    for found in environments.values():
        flat = {**{key: value for key, value in found.items() if key != "packages"}, **found.get("packages", {})}
        for key, value in flat.items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
            seen.setdefault(key, [])
            seen[key] += [text] if text not in seen[key] else []
    if seen:
        yield (
            "Environment: "
            + "; ".join(f"{plain(key)} {plain(' or '.join(values))}" for key, values in seen.items())
            + "."
        )
        yield ""


def common(ranking: Ranking) -> Iterator[str]:
    """Params that are the same in all runs, a line a section."""
    runs = [reading.run for row in ranking.rows for reading in row.readings]
    yield from ("## Common configuration", "")
    sections: dict[str, list[str]] = {}
    for key in sorted({key for run in runs for key in run.params}):
        values = {run.params.get(key) for run in runs}
        if (
            len({same(value) for value in values}) == 1
            and is_setting(key)
            and (value := values.pop()) not in (None, "null")
        ):
            section, _, rest = key.rpartition(".")
            sections.setdefault(section or "top level", []).append(f"{plain(rest)} {plain(short(value))}")
    yield from ("The same in all runs; what is not set is left out.", "")
    yield from (f"- {code(section)}: {'; '.join(values)}" for section, values in sections.items())
    yield ""
    if ranking.excluded:
        yield from ("Not ranked:", "")
        yield from (
            f"- {plain(run.name or run.strategy)} ({code(run.id)}) {plain(why)}" for run, why in ranking.excluded
        )
        yield ""


def short(value: str) -> str:
    """A param's value in a cell: a run of block numbers as `18-23`, what is long cut."""
    if re.fullmatch(r"\[\d+(, \d+)+\]", value):
        numbers = json.loads(value)
        if numbers == [*range(numbers[0], numbers[-1] + 1)]:
            return f"{numbers[0]}-{numbers[-1]}"
    return value if len(value) <= 60 else value[:57] + "..."
