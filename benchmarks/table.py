"""Puts what was measured into docs/performance.md: every table there is made from a file of results/performance.

    python benchmarks/table.py

A table stands between `<!-- NAME -->` and `<!-- end -->`; names are those of `TABLES`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
BASELINE = "Trainer + PEFT"
FORMS_OF_PROMPT = ("shared", "repeated")
Result = dict[str, Any]
Run = dict[str, Any]


def throughput(result: Result) -> str:
    """A row for each kind of work and contender: medians over its processes."""
    peak = max(result["gemm_gflops"].values())
    rows = []
    for what, runs in _groups(result["runs"], "arm", "work", "checkpointing"):
        arm, work, checkpointing = what
        forward, whole = result["gflop_a_sample"][arm]
        rates = {name: _median(of, "samples_per_second") for (name,), of in _groups(runs, "contender")}
        for (name,), of in _groups(runs, "contender"):
            gflops = rates[name] * (whole if work == "train" else forward)
            rows.append([
                f"{arm}, {work}{', checkpointing' if checkpointing else ''}", name, f"{rates[name]:.2f}",
                f"{rates[name] / rates[BASELINE]:.2f}", f"{_median(of, 'supervised_per_second'):.0f}",
                f"{_median(of, 'peak_bytes') / 2**20:.0f}", f"{_median(of, 'proportional_bytes') / 2**20:.0f}",
                f"{gflops:.0f}", f"{100 * gflops / peak:.0f} %",
            ])  # fmt: skip
    head = ("work", "by", "samples/s", "ratio", "supervised tokens/s", "peak MiB", "shared once", "GFLOP/s", "of GEMM")
    gemm = ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm_gflops"].items())
    n = max(len(of) for _, of in _groups(result["runs"], "arm", "work", "checkpointing", "contender"))
    told = f"Medians of {n} processes. Matrix products, GFLOP/s: {gemm}."
    return f"{_machine(result)} {told}\n\n{_markdown(head, rows, left=2)}"


def each(result: Result) -> str:
    """A row for each optimization: what it gains alone, and what is lost without it."""
    rows = []
    for (arm,), runs in _groups(result["runs"], "arm"):
        rates = {name: _median(of, "samples_per_second") for (name,), of in _groups(runs, "contender")}
        on = result["switches"]
        for name in (n.removeprefix("alone: ") for n in rates if n.startswith("alone: ")):
            before = _beside(on, name)
            gain, without = rates[f"alone: {name}"] / rates[before], rates.get(f"without: {name}")
            loss = f"{rates['all'] / without:.2f}" if without else ""
            rows.append([arm, name, f"{gain:.2f}", before.removeprefix("alone: "), loss])
        rows.append([arm, "all", f"{rates['all'] / rates['plain']:.2f}", "plain", ""])
    return f"{_machine(result)}\n\n" + _markdown(
        ("arm", "optimization", "gain alone", "beside", "all : all without it"), rows, left=2
    )


def _beside(switches: dict[str, dict[str, Any]], name: str) -> str:
    """What an optimization is measured beside: plain, or the one that it needs, all of whose switches it has on."""
    plain = switches["plain"]

    def turned(contender: str) -> set[str]:
        return {key for key, value in switches[contender].items() if value != plain[key]}

    mine = turned(f"alone: {name}")
    smaller = [c for c in switches if c.startswith("alone: ") and turned(c) < mine]
    return max(smaller, key=lambda c: len(turned(c)), default="plain")


def curves(result: Result) -> str:
    """A row for each contender: how far its losses are from the baseline's at most."""
    rows = []
    for (arm,), runs in _groups(result["runs"], "arm"):
        losses = {run["contender"]: run["losses"] for run in runs}
        for name, of in losses.items():
            difference = max(abs(a - b) for a, b in zip(of, losses[BASELINE], strict=True))
            rows.append([arm, name, f"{of[0]:.6f}", f"{of[-1]:.6f}", f"{difference:.1e}" if difference else "–"])
    steps = len(result["runs"][0]["losses"])
    head = ("arm", "by", "loss, step 1", f"step {steps}", "largest difference")
    return f"{_machine(result)}\n\n{_markdown(head, rows, left=2)}"


def peers(result: Result) -> str:
    """A row for each kind of work, a column for each peer: samples a second with their range, and peak memory."""
    names = list(dict.fromkeys(run["name"] for run in result["runs"]))
    rows, counts = [], set()
    for (arm, checkpointing), runs in _groups(result["runs"], "arm", "checkpointing"):
        row = [f"{arm}{', checkpointing' if checkpointing else ''}"]
        cells = {name: of for (name,), of in _groups(runs, "name")}
        for name in names:
            of = cells.get(name, [])
            counts.add(len(of))
            rates = [run["samples_per_second"] for run in of]
            spread = f"{median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})" if of else ""
            row.append(f"{spread}, {_median(of, 'peak_bytes') / 2**20:.0f} MiB" if of else "–")
        rows.append(row)
    versions = "; ".join(f"{name}: {text}" for name, text in result["versions"].items())
    told = f"Medians of {min(counts - {0})} to {max(counts)} processes. {versions}."
    return f"{_machine(result)} {told}\n\n{_markdown(('samples/s (range), peak', *names), rows)}"


def breakdown(result: Result) -> str:
    """A row for each part of a step, a column for each contender: milliseconds, and their share."""
    rows = []
    columns = result["runs"]
    for part in columns[0]["parts"]:
        cells = [f"{c['parts'][part]:.1f} ({100 * c['parts'][part] / c['step']:.0f} %)" for c in columns]
        rows.append([part, *cells])
    rows.append(["a step", *(f"{c['step']:.1f}" for c in columns)])
    head = ("ms of a step", *(f"{c['arm']}, {c['contender']}" for c in columns))
    return f"{_machine(result)}\n\n{_markdown(head, rows)}"


def kernels(result: Result) -> str:
    """The operations that take most time of their own."""
    rows = [
        [f"{run['arm']}, {run['contender']}", name, f"{100 * share:.1f} %", f"{calls:.0f}", f"{microseconds:.1f}"]
        for run in result["runs"]
        for name, share, calls, microseconds in run["kernels"]
    ]
    head = ("step of", "operation", "time", "calls a step", "us a call")
    return f"{_machine(result)}\n\n{_markdown(head, rows, left=2)}"


def startup(result: Result) -> str:
    """A row for each number of ranks: medians of the seconds from the start of a process to each moment."""
    runs = _groups(result["runs"], "ranks")
    moments = [moment for moment in result["runs"][0] if moment != "ranks"]
    rows = [[str(ranks), *(f"{_median(of, moment):.1f}" for moment in moments)] for (ranks,), of in runs]
    return f"{_machine(result)} {result['arm']}, pocket.\n\n{_markdown(('ranks', *moments), rows)}"


def whole_run(result: Result) -> str:
    """A row for each form: medians of seconds to the loss and to the end of the process."""
    rows = []
    for (form,), runs in _groups(result["runs"], "form"):
        of = [run for run in runs if run["seconds_to_loss"]]
        reached = f"{_median(of, 'seconds_to_loss'):.0f}" if of else "–"
        rows.append([form, reached, f"{_median(runs, 'seconds'):.0f}", str(len(runs))])
    head = ("form", f"seconds to eval loss {result['loss']:g}", "to the end", "runs")
    return f"{_machine(result)} {result['arm']}, pocket.\n\n{_markdown(head, rows)}"


def shared_prompt(result: Result) -> str:
    """A row for each length: seconds shared and repeated, each beside those without any words."""
    rows = []
    for (model,), runs in _groups(result["runs"], "model"):
        bare = runs[0]["shared"]
        for run in runs:
            attention = [f"{run[key]:.3f}" if (key := f"{form}, attention") in run else "" for form in FORMS_OF_PROMPT]
            seconds = [f"{run[form]:.3f} ({run[form] / bare:.2f})" for form in FORMS_OF_PROMPT]
            rows.append([model, str(run["words"]), str(run["tokens"]), *seconds, *attention])
    head = ("model", "words", "tokens", *FORMS_OF_PROMPT, *(f"attention of {form}" for form in FORMS_OF_PROMPT))
    return f"{_machine(result)} Seconds, and how many times those without words.\n\n{_markdown(head, rows)}"


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "throughput": ("throughput", throughput),
    "each": ("each", each),
    "curves": ("curves", curves),
    "peers": ("peers", peers),
    "breakdown": ("breakdown", breakdown),
    "kernels": ("breakdown", kernels),
    "startup": ("startup", startup),
    "whole_run": ("whole_run", whole_run),
    "shared_prompt": ("shared_prompt", shared_prompt),
}
"""Name of a table -> its file of results, and what makes it."""


def filled(page: str) -> str:
    """A page with every table made anew; one whose results are not there is left as it is."""

    def table(match: re.Match[str]) -> str:
        file, make = TABLES[match.group(1)]
        path = RESULTS / f"{file}.json"
        if not path.exists():
            return match.group(0)
        return f"<!-- {match.group(1)} -->\n{make(json.loads(path.read_text(encoding='utf-8')))}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _groups(runs: Iterable[Run], *keys: str) -> list[tuple[tuple[Any, ...], list[Run]]]:
    """Runs by the values of some keys, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    return list(found.items())


def _median(runs: Sequence[Run], key: str) -> float:
    return float(median(run[key] for run in runs))


def _machine(result: Result) -> str:
    facts = result["facts"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
    memory = facts["memory_bytes"] / 2**30
    return (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, {memory:.0f} GiB; {versions}; "
        f"commit {facts['commit'][:12]}."
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
