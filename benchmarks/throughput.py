"""Measures ours against plain transformers.Trainer + PEFT on the same work: in turn, each in a process of its own.

    python benchmarks/throughput.py FOLDER                      # train and eval, both arms, checkpointing off and on
    python benchmarks/throughput.py FOLDER --each               # each optimization alone, and all but each
    python benchmarks/throughput.py FOLDER --curves             # losses without dropout, step by step

FOLDER is the workload (see workload.py), written where it is not. Results go to benchmarks/results/performance/, and
`python benchmarks/table.py` puts them into docs/performance.md. A run beside which others kept more than 0.03 of a core
busy is measured again. `--prefix` runs every measured process under another command.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from machine import facts
from measured import HERE, Job, Switches, ask
from rich.progress import track
from stopwatch import LEFT_OUT, Measured

RESULTS = HERE / "results" / "performance"
DISTURBED, TRIES = 0.03, 4
COUNTED = 25
"""Steps whose operations are counted, behind those that are left out; counting is slow."""
ARMS = ("last6_lora", "all_full")
BASELINE = "Trainer + PEFT"


@dataclass(frozen=True, slots=True)
class Optimization:
    """One way in which ours is faster than its plain path."""

    on: dict[str, Any]
    """Switches that it is."""
    needs: str | None = None
    """The one without which it is nothing; it is measured alone beside that one."""
    at_first: bool = True
    """Whether it gains something the first time that an image is seen; `all` is measured then."""


OPTIMIZATIONS = {
    "own forward and backward": Optimization({"fused": True}),
    "products by oneDNN": Optimization({"onednn": True}, needs="own forward and backward"),
    "compiled kernels": Optimization({"native": True}, needs="own forward and backward"),
    "kept images": Optimization({"seen": True}, needs="own forward and backward", at_first=False),
    "packed": Optimization({"packed": True}),
    "a step in one micro-batch": Optimization({"one_batch": True}),
    "two ranks": Optimization({"ranks": 2}),
}
"""All that there is to switch."""


def with_only(*names: str) -> Switches:
    """Ours with some optimizations on."""
    on: dict[str, Any] = {}
    for name in names:
        on |= OPTIMIZATIONS[name].on
    return Switches(**on)


def all_but(name: str) -> Switches:
    """Ours with one optimization off, and what needs it."""
    return with_only(*(other for other, of in OPTIMIZATIONS.items() if of.at_first and name not in (other, of.needs)))


VARIANTS: dict[str, Switches] = {
    "plain": Switches(),
    "fused": with_only("own forward and backward", "products by oneDNN", "compiled kernels"),
    "all": all_but("kept images"),
    "all, images seen before": with_only(*OPTIMIZATIONS),
}


def contenders_of_each() -> dict[str, Switches]:
    """Name -> switches, of a table that says what each optimization is worth."""
    found = {"plain": Switches(), "all": VARIANTS["all"]}
    for name, optimization in OPTIMIZATIONS.items():
        found[f"alone: {name}"] = with_only(*filter(None, (optimization.needs, name)))
        if optimization.at_first:
            found[f"without: {name}"] = all_but(name)
    return found


def undisturbed(job: Job, script: str, prefix: Sequence[str]) -> Measured:
    """Measure until nobody else was busy, or as often as it makes sense; the least disturbed run.

    Without dropout it is losses that are asked for, and they are the same on a busy machine.
    """
    found: list[Measured] = []
    while len(found) < (TRIES if job.dropout else 1) and (not found or found[-1].others > DISTURBED):
        found.append(Measured(**ask(job, script, prefix)))
    return min(found, key=lambda one: one.others)


def run(
    jobs: Sequence[Job], contenders: dict[str, Switches], repeats: int, prefix: Sequence[str]
) -> list[dict[str, Any]]:
    """Every job by the baseline and by every contender in turn, and again; a row for each process."""
    turns = [(job, name) for job, _, name in product(jobs, range(repeats), (BASELINE, *contenders))]
    rows = []
    for job, name in track(turns, description="measuring"):
        if name == BASELINE:
            measured = undisturbed(job, "plain_trainer.py", prefix)
        else:
            measured = undisturbed(replace(job, switches=contenders[name]), "ours.py", prefix)
        rows.append({**_what(job), "contender": name, **asdict(measured)})
        print(rows[-1] | {"losses": len(measured.losses)}, flush=True)
    return rows


def _what(job: Job) -> dict[str, Any]:
    return {f.name: getattr(job, f.name) for f in fields(job) if f.name not in ("workload", "switches")}


def save(name: str, contenders: dict[str, Switches], rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result with all that it was measured on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    switches = {contender: asdict(of) for contender, of in contenders.items()}
    whole = {"facts": facts(), **more, "switches": switches, "runs": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--work", nargs="+", default=("train", "eval"), choices=("train", "eval"))
    parser.add_argument("--checkpointing", nargs="+", type=int, default=(0, 1), choices=(0, 1))
    parser.add_argument("--variants", nargs="+", default=("plain", "all"), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps of a process, five that are not counted")
    parser.add_argument("--ranks", type=int, help="of every variant, instead of its own")
    parser.add_argument("--each", action="store_true", help="what each optimization is worth")
    parser.add_argument("--curves", action="store_true", help="losses at dropout 0 instead of times")
    parser.add_argument("--prefix", default="", help="such as 'taskset -c 0,1'")
    asked = parser.parse_args()
    contenders = contenders_of_each() if asked.each else {name: VARIANTS[name] for name in asked.variants}
    if asked.ranks:
        contenders = {name: replace(switches, ranks=asked.ranks) for name, switches in contenders.items()}
    if asked.curves:
        contenders = {**contenders, "plain, sums in another order": with_only("a step in one micro-batch")}
    base = Job(str(asked.workload), "", steps=asked.steps, dropout=0.0 if asked.curves else 0.1)
    jobs = [
        replace(base, arm=arm, work=work, checkpointing=bool(on))
        for arm, work, on in product(asked.arms, ("train",) if asked.curves or asked.each else asked.work,
                                     (0,) if asked.curves or asked.each else asked.checkpointing)
        if work == "train" or not on  # nothing is kept in an evaluation
    ]  # fmt: skip
    prefix = shlex.split(asked.prefix)
    name = "curves" if asked.curves else "each" if asked.each else "throughput"
    more: dict[str, Any] = {}
    if name == "throughput":
        count = replace(base, work="count", steps=LEFT_OUT + COUNTED)
        more["gflop_a_sample"] = {
            a: ask(replace(count, arm=a), "plain_trainer.py", prefix)["gflop"] for a in asked.arms
        }
        told = subprocess.check_output([*prefix, sys.executable, str(HERE / "machine.py")])
        more["gemm_gflops"] = json.loads(told.splitlines()[-1])
    rows = run(jobs, contenders, 1 if asked.curves else asked.repeats, prefix)
    save(name, contenders, rows, **more)


if __name__ == "__main__":
    main()
