"""The tables of "How fast" in docs/use.md, made from what predicting.py has measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "predicting"
PAGE = ROOT / "docs" / "use.md"
OURS, DRAWN, PLAIN = "predict", "predict, drawn", "generate"
COLD = "cold"


def table(result: Mapping[str, Any]) -> str:
    """A row a case: median and range of each contender, and how many texts are the same."""
    runs = {(run["batch"], run["by"]): run for run in result["runs"]}
    rows = []
    for batch in dict.fromkeys(run["batch"] for run in result["runs"]):
        of = [runs[batch, name] for name in (OURS, DRAWN, PLAIN)]
        answers = next((each for each in result["answers"] if each["batch"] == batch), None)
        same = f"{answers['same']} of {_total(answers)}" if answers else ""
        if batch == COLD:
            rows.append(["cold start, one image: s", *(_range(run["seconds"]) for run in of), same])
        elif batch == 1:
            rows.append(["one at a time: median ms", *(f"{1000 * median(run['seconds']):.0f}" for run in of), same])
            rows.append(["p95 ms", *(f"{1000 * _p95(run['seconds']):.0f}" for run in of), ""])
        else:
            rates = [[run["images"] / seconds for seconds in run["seconds"]] for run in of]
            rows.append([f"{batch} at once: images/s", *map(_range, rates), same])
    head = ("case", f"`{OURS}`", f"`{OURS}` with pictures", "plain `generate`", "same text")
    rule = ("---", *["---:"] * 4)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
    return "\n".join([_conditions(result), "", *lines])


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["facts"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    where = result.get("gpu") or f"{machine['processor']}, {machine['cores']} cores, {result['threads']} threads"
    width, height = result["image"]
    least, middle, most = result["answer_tokens"]
    turns = max(len(run["seconds"]) for run in result["runs"] if run["batch"] not in (1, COLD))
    alone = sum(run["by"] == OURS and len(run["seconds"]) for run in result["runs"] if run["batch"] == 1)
    others = max(run["others"] for run in result["runs"])
    return (
        f"{machine['date']}, {where}; {versions}; commit {machine['commit'][:12]}. {result['model']}, {result['arm']}, "
        f"{result['dtype']}; images of {width}x{height} pixels; answers of {least} to {most} tokens, median {middle}, "
        f"with room for {result['max_new_tokens']}. One at a time: {alone} images; at once: medians of {turns} turns, "
        f"lowest to highest. Others kept at most {others:.2f} of a core busy at a turn."
    )


def _range(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]


def _total(answers: Mapping[str, int]) -> int:
    return answers["same"] + answers["beginning"] + answers["other"]


TABLES = {"predicting": "pocket.json", "predicting_random_4b": "random_4b.json"}
"""Name of a table -> its file of results; one that has not been measured is left as it is."""


def filled(page: str) -> str:
    """A page with every table made anew."""

    def anew(match: re.Match[str]) -> str:
        path = RESULTS / TABLES[match.group(1)]
        if not path.exists():
            return match.group(0)
        made = table(json.loads(path.read_text(encoding="utf-8")))
        return f"<!-- {match.group(1)} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (predicting\w*) -->\n.*?<!-- end -->", anew, page, flags=re.DOTALL)
