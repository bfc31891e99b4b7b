"""Puts the tables into docs/scaling.md: what the cost model computes, and beside it what was measured.

    python benchmarks/scaling.py

Measured are `results/scaling/pocket_memory.json` (`peak_memory.py`) and `results/performance/gpu_last6_lora.json`
(`gpu.py`); all else is computed here from shapes. A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from trainer import build
from trainer.config.load import load
from trainer.cost.anatomy import Anatomy, anatomy_of
from trainer.cost.duration import CARDS, Card, Rates, busy_seconds, exchanged
from trainer.cost.layer_memory import Format
from trainer.cost.memory import Layout, Memory, peak_memory
from trainer.cost.microbatch import MicroBatch
from trainer.cost.operations import operations_of, small_bytes, total
from trainer.model import parameter_shapes, read_config
from trainer.strategy import Part, make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
SIZES = ("2b", "4b", "8b", "32b")
ARMS = ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")
BOTH = frozenset({Part.VISION, Part.LLM})
PACK = 10
"""Samples of 2,000 tokens in a pack of 20,000."""
ROOM = 0.93
"""Of a card's memory, what is taken as usable: the rest is for CUDA, the allocator's gaps and the model's own error."""
PEAK = 989e12
"""Dense operations a second in bfloat16 of an H200, as its maker says; MFU is of it."""


def samples(count: int, shared: int = 0) -> MicroBatch:
    """Samples of the published profile as `gpu.py` has them: 600 words, an image of 64x64 patches, 376 supervised."""
    return MicroBatch((2000,) * count, (4096,) * count, 376 * count, shared)


@cache
def anatomy(model: str, arm: str) -> Anatomy:
    """A model under a strategy, from shapes."""
    plan = make_plan(build.strategy_from(load(arm).config), parameter_shapes(model))
    return anatomy_of(read_config(model), plan)


@cache
def pocket_runs() -> tuple[dict[str, Any], ...]:
    """What was measured on pocket."""
    return tuple(_read("scaling/pocket_memory.json")["runs"])


def pocket_layout(run: dict[str, Any]) -> Layout:
    """How a measured cell was laid out."""
    parts = {"none": frozenset(), "vision": frozenset({Part.VISION}), "both": BOTH}[run["checkpointed"]]
    return Layout(
        4, Format(4, gpu=False), ranks=run["ranks"], zero=2 * run["zero"], accumulation=run["accumulation"],
        checkpointed=parts,
    )  # fmt: skip


def pocket_pairs() -> Iterator[tuple[dict[str, Any], Memory]]:
    """Each measured cell with what is computed for it."""
    for run in pocket_runs():
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in run["batch"].items()}
        yield run, peak_memory(anatomy("pocket", run["arm"]), MicroBatch(**lists), pocket_layout(run))


def h200_peaks() -> Iterator[tuple[str, float, Memory]]:
    """(what, measured bytes, computed) of every peak that was recorded on an H200."""
    found = _read("performance/gpu_last6_lora.json")
    of, card = anatomy("random:4b", "last6_lora"), CARDS[0].memory
    layout = Layout(2, Format(2, gpu=True), card=card, checkpointed=BOTH)
    for key, name, kept in (("memory", "", layout), ("memory_inputs_kept", ", inputs alone kept", None)):
        for row in found[key]:
            how = kept or replace(layout, inputs_only=True)
            computed = peak_memory(of, samples(row["tokens"] // 2000), how)
            yield f"{row['tokens']:,} tokens{name}", row["peak_gb"] * 1e9, computed
    shared = peak_memory(of, samples(20, 500), layout)
    yield "40,000 tokens, 500 words shared", found["ours_shared_prompt"]["peak_gb"] * 1e9, shared
    zero = peak_memory(of, samples(20), replace(layout, zero=2))
    yield "40,000 tokens, ZeRO-2 on one rank", found["ours_zero2"]["peak_gb"] * 1e9, zero


def calibrated() -> Rates:
    """The rates of an H200, from the profile of one step and from its seconds."""
    found = _read("performance/gpu_last6_lora.json")
    of, batch, form = anatomy("random:4b", "last6_lora"), samples(20), Format(2, gpu=True)
    remade = peak_memory(of, batch, Layout(2, form, card=CARDS[0].memory, checkpointed=BOTH)).remade
    done = total(operations_of(of, batch, remade))
    kinds = {name: milliseconds / 1e3 for name, milliseconds in found["profile"]["kinds"].items()}
    rest = found["ours"]["step_seconds"] - kinds["products"] - kinds["attention"]
    small = small_bytes(of, batch, remade, form) / rest
    return Rates(done.products / kinds["products"], done.attention / kinds["attention"], small, 0.0)


def h200_steps() -> Iterator[tuple[str, float, float]]:
    """(what, measured seconds, computed) of the steps that were recorded; the first one made the rates."""
    found = _read("performance/gpu_last6_lora.json")
    of, form = anatomy("random:4b", "last6_lora"), Format(2, gpu=True)
    layout = Layout(2, form, card=CARDS[0].memory, checkpointed=BOTH)
    for what, key, batch, inputs_only in (
        ("two packs (made the rates)", "ours", samples(20), False),
        ("one pack", "ours_one_pack", samples(10), False),
        ("two packs, inputs alone kept", "ours_inputs_kept", samples(20), True),
        ("two packs, 500 words shared", "ours_shared_prompt", samples(20, 500), False),
    ):
        remade = peak_memory(of, batch, replace(layout, inputs_only=inputs_only)).remade
        computed = busy_seconds(of, batch, remade, form, CARDS[0].rates)
        yield what, found[key]["step_seconds"], sum(computed.values())


@cache
def accumulation_of(arm: str) -> int:
    """Micro-batches of a step, as the strategy's file says."""
    return load(arm).config.training.gradient_accumulation_steps


@cache
def on(size: str, arm: str, packs: int, *, gpus: int = 1, card: Card = CARDS[0], checkpointed: bool = True) -> Memory:
    """Peak memory of a GPU at the published profile; on several the packs of a step are not accumulated."""
    accumulation = accumulation_of(arm) if gpus == 1 else 1
    layout = Layout(
        2, Format(2, gpu=True), card=int(ROOM * card.memory), ranks=gpus, zero=2, accumulation=accumulation,
        checkpointed=BOTH if checkpointed else frozenset(),
    )  # fmt: skip
    return peak_memory(anatomy(f"random:{size}", arm), samples(packs * PACK), layout)


def seconds(size: str, arm: str, packs: int, gpus: int, card: Card = CARDS[0]) -> float:
    """Of a micro-batch on every GPU, with the exchange where there are several."""
    of, remade = anatomy(f"random:{size}", arm), on(size, arm, packs, gpus=gpus, card=card).remade
    busy = busy_seconds(of, samples(packs * PACK), remade, Format(2, gpu=True), card.rates)
    return sum(busy.values()) + exchanged(of, ranks=gpus, zero=2) / card.rates.exchange


def packs_that_fit(size: str, arm: str, gpus: int, card: Card) -> int:
    """Packs of a micro-batch that a card has room for: 2, 1 or 0."""
    fits = [n for n in (2, 1) if on(size, arm, n, gpus=gpus, card=card).total <= ROOM * card.memory]
    return fits[0] if fits else 0


def h200_memory_table() -> str:
    """A row for each recorded peak."""
    rows = [[what, _gb(got), _gb(of.total), _off(of.total, got)] for what, got, of in h200_peaks()]
    return _markdown(("micro-batch", "measured GB", "computed GB", "off"), rows)


def h200_time_table() -> str:
    """A row for each recorded step."""
    rows = [[what, f"{got:.2f}", f"{of:.2f}", _off(of, got)] for what, got, of in h200_steps()]
    return _markdown(("step", "measured s", "computed s", "off"), rows)


def pocket_table() -> str:
    """A row for each measured cell."""
    rows = []
    for run, of in pocket_pairs():
        rows.append([
            run["arm"], str(sum(run["batch"]["lengths"])), run["checkpointed"], str(run["accumulation"]),
            f"{run['ranks']}{', ZeRO-2' if run['zero'] else ''}", f"{run['peak_bytes'] / 1e6:.1f}",
            f"{of.total / 1e6:.1f}", _off(of.total, run["peak_bytes"]),
        ])  # fmt: skip
    head = ("arm", "tokens", "checkpointed", "accumulation", "ranks", "measured MB", "computed MB", "off")
    facts = _read("scaling/pocket_memory.json")["facts"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
    told = f"{facts['date']}, {facts['processor']}; {versions}; commit {facts['commit'][:12]}."
    return f"{told}\n\n{_markdown(head, rows)}"


def parts_table() -> str:
    """What one GPU holds, part by part, at one pack with all that can be made again left out."""
    names = ("base", "trained", "gradients", "moments", "exchange", "inputs", "activations", "working")
    rows = []
    for size in SIZES:
        for arm in ARMS:
            of = anatomy(f"random:{size}", arm)
            layout = Layout(
                2, Format(2, gpu=True), accumulation=accumulation_of(arm), checkpointed=BOTH, inputs_only=True
            )  # fmt: skip
            memory = peak_memory(of, samples(PACK), layout)
            numbers = [f"{memory.parts[name] / 1e9:.1f}" for name in names]
            rows.append([size.upper(), arm, f"{of.all_trained / 1e6:,.0f}", *numbers, _gb(memory.total)])
    return _markdown(("model", "arm", "M trained", *names, "in all"), rows, left=2)


def memory_table() -> str:
    """A row for each size and arm: what a GPU holds with two packs and with one."""
    rows = []
    for size in SIZES:
        for arm in ARMS:
            bare = on(size, arm, 2, checkpointed=False, gpus=1)
            cells = [on(size, arm, packs, gpus=gpus) for gpus in (1, 8) for packs in (2, 1)]
            rows.append([size.upper(), arm, _gb(bare.total), *(_held(memory, CARDS[0]) for memory in cells)])
    head = ("model", "arm", "2 packs, no checkpointing", "1 GPU, 2 packs", "1 GPU, 1 pack", "8 GPUs, 2", "8 GPUs, 1")
    return _markdown(head, rows, left=2)


def time_table() -> str:
    """A row for each size and arm: seconds a sample, samples a second, and hours for 10,000 samples."""
    rows = []
    for size in SIZES:
        for arm in ARMS:
            row = [size.upper(), arm]
            for gpus in (1, 8):
                packs = packs_that_fit(size, arm, gpus, CARDS[0])
                row += _speed(size, arm, packs, gpus) if packs else ["–", "–", "–", "–"]
            rows.append(row)
    of_each = ("packs", "samples/s", "MFU", "h for 10,000")
    return _markdown(("model", "arm", *(f"{name}, {n} GPU" for n in (1, 8) for name in of_each)), rows, left=2)


def operations_table() -> str:
    """TFLOP of a sample of the 4B, by arm and part."""
    rows = []
    for arm in ARMS:
        of = anatomy("random:4b", arm)
        remade = on("4b", arm, 2).remade
        for where, ops in operations_of(of, samples(20), remade).items():
            ways = (ops.forward, ops.inputs, ops.weights, ops.again)
            if ops.done:
                rows.append([arm, where.value, *(f"{way / 20e12:.2f}" for way in ways), f"{ops.done / 20e12:.2f}"])
    head = ("arm", "part", "forward", "to inputs", "to weights", "again", "in all")
    return _markdown(head, rows, left=2)


def cards_table() -> str:
    """The most packs of a micro-batch, by size, arm, card and number of GPUs."""
    rows = []
    for size in SIZES:
        for arm in ARMS:
            counts = [packs_that_fit(size, arm, gpus, card) for card in CARDS[:2] for gpus in (1, 8)]
            rows.append([size.upper(), arm, *(str(count) if count else "–" for count in counts)])
    head = ("model", "arm", "H200, 1 GPU", "H200, 8", "80 GB, 1 GPU", "80 GB, 8")
    return _markdown(head, rows, left=2)


TABLES: dict[str, Callable[[], str]] = {
    "h200_memory": h200_memory_table,
    "h200_time": h200_time_table,
    "pocket": pocket_table,
    "cards": cards_table,
    "memory": memory_table,
    "parts": parts_table,
    "time": time_table,
    "operations": operations_table,
}


def filled(page: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match.group(1)} -->\n{TABLES[match.group(1)]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _speed(size: str, arm: str, packs: int, gpus: int) -> list[str]:
    taken = seconds(size, arm, packs, gpus)
    useful = total(operations_of(anatomy(f"random:{size}", arm), samples(packs * PACK), {})).useful
    rate = gpus * packs * PACK / taken
    return [str(packs), f"{rate:.1f}", f"{100 * useful / taken / PEAK:.0f} %", f"{10_000 / rate / 3600:.2f}"]


def _held(memory: Memory, card: Card) -> str:
    return _gb(memory.total) if memory.total <= ROOM * card.memory else f"({_gb(memory.total)})"


@cache
def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _off(computed: float, measured: float) -> str:
    return f"{100 * (computed / measured - 1):+.1f} %"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
