"""What halving saves and how often it errs: replays of recorded runs and simulations, as the tables of docs/halving.md.

    python -m benchmarks.deciding_sooner simulate             # a minute or two; writes results/halving/simulation.json
    python -m benchmarks.deciding_sooner extract NAME RUN...  # the runs below comparisons' parents RUN, all finished,
                                                              # as results/halving/NAME.parquet
    python -m benchmarks.deciding_sooner tables               # fills the page from these, and from results/five_arms

A table stands between `<!-- NAME -->` and `<!-- end -->`; names are those of `TABLES`.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from analysis.margins import pooled_spread
from analysis.ranking import why_excluded
from analysis.runs import PARENT
from analysis.store import Store
from benchmarks.rung_replay import FOLDER, Recording, Replay, five_arms, fresh, replay
from benchmarks.wrong_stops import REPETITIONS, SEEDS, Rates, simulated
from trainer import names
from trainer.halving import Rule

RULE = Rule()
SIMULATION = FOLDER / "simulation.json"
LIVE = FOLDER / "live.json"
"""The artifact `halving.json` of a comparison under halving on the first of the fresh seeds."""
PAGE = Path(__file__).parents[1] / "docs" / "halving.md"
_ARM = "comparison.arm"
"""Tag of a run: its arm, where that is not the strategy's name."""
_EVERY = "training.eval_samples"
"""Param of a run: training samples between its evaluations."""
_ROLE = "comparison.role"
"""Tag of a run: `arm`, or `trial` where it only tried a learning rate."""


def thresholds() -> str:
    """The rule's numbers."""
    rungs = ", ".join(f"{rung:.3f}" for rung in RULE.rungs)
    errors = ", ".join(f"{RULE.spent(rung):g}" for rung in range(len(RULE.rungs)))
    rows = [
        ("margin, of the leader's loss", f"{RULE.margin:g}"),
        ("error, all rungs and arms together", f"{RULE.error:g}"),
        ("rungs, of all training samples", rungs),
        ("error spent at each", errors),
    ]
    return _markdown(("threshold", "value"), rows)


def of_smoothing() -> str:
    """What one evaluation and the mean of two say, of the recorded arms that were evaluated most often."""
    curves = five_arms().curves
    most = max(len(run) for of in curves.values() for run in of.values())
    losses = {
        arm: {seed: [one.loss for one in run] for seed, run in of.items()}
        for arm, of in curves.items()
        if all(len(run) == most for run in of.values())
    }
    a_run = next(iter(curves[next(iter(losses))].values()))
    rows = []
    for index in range(2, most - 1):
        row = [f"{a_run[index].samples / a_run[-1].samples:.2f}"]
        for first in (index, index - 1):
            here = {
                arm: {seed: math.fsum(run[first : index + 1]) / (index + 1 - first) for seed, run in of.items()}
                for arm, of in losses.items()
            }
            means = sorted(math.fsum(of.values()) / len(of) for of in here.values())
            row += [f"{means[1] - means[0]:.4f}", f"{pooled_spread(here)[0]:.4f}"]
        rows.append(row)
    head = (
        "share of samples",
        "one evaluation: second behind first",
        "spread",
        "mean of two: second behind first",
        "spread",
    )
    return f"{', '.join(sorted(losses))}; five seeds.\n\n{_markdown(head, rows, left=1)}"


def of_recorded() -> str:
    """Every group of three seeds of the recorded five arms."""
    return _of_recordings([five_arms()])


def of_fresh() -> str:
    """The same for what was recorded since."""
    found = fresh()
    return _of_recordings(found) if found else "Nothing is recorded yet."


def _of_recordings(recordings: Iterable[Recording]) -> str:
    parts = []
    for recording in recordings:
        replays = [replay(recording, seeds, RULE) for seeds in recording.groups()]
        parts.append(f"`{recording.name}`: {_summary(replays)}\n\n{_markdown(_HEAD, map(_row, replays))}")
    return "\n\n".join(parts)


def of_live() -> str:
    """What a comparison under halving decided while it trained; beside it how arms ended where all went on."""
    told = json.loads(LIVE.read_text(encoding="utf-8"))
    seeds = sorted(int(seed) for seed in next(iter(told["rungs"][0]["losses"].values())))
    ends = {arm: [run[-1].loss for seed, run in of.items() if seed in seeds] for arm, of in fresh()[0].curves.items()}
    finals = {arm: math.fsum(losses) / len(losses) for arm, losses in ends.items()}
    best = min(finals.values())
    head = ("arm", "loss at the rung", "behind the leader", "interval", "p", "verdict", "behind at the end")
    parts = []
    for rung in told["rungs"]:
        rows = []
        for one in sorted(rung["decisions"], key=lambda one: one["loss"]):
            low, high = one["interval"]
            leads = one["verdict"] == "leader"
            numbers = (
                ["-"] * 3 if leads else [f"{one['difference']:.4f}", f"{low:.4f} to {high:.4f}", f"{one['p']:.2g}"]
            )
            rows.append(
                [one["arm"], f"{one['loss']:.4f}", *numbers, one["verdict"], _percent(finals[one["arm"]] / best - 1)]
            )
        parts.append(f"Rung {rung['rung']}, {rung['samples']} samples:\n\n{_markdown(head, rows)}")
    share = f"It took {told['share_of_full']:.3f} of the seconds of all runs to their ends."
    return "\n\n".join(
        [f"Seeds {', '.join(map(str, seeds))}, evaluated every {told['every']} samples. {share}", *parts]
    )


_HEAD = ("seeds", "seconds", "samples", "winner", "of all to the end", "regret", *(f"rung {r:.2f}" for r in RULE.rungs))


def _row(one: Replay) -> list[str]:
    """Of one group; a stop that the end does not bear out has a star."""
    stops = [one.stopped(rung) for rung in range(len(RULE.rungs))]
    for arm in one.premature:
        stops = [text.replace(f"{arm} (", f"{arm}* (") for text in stops]
    seeds = ", ".join(map(str, one.seeds))
    return [
        seeds,
        f"{one.seconds:.2f}",
        f"{one.samples:.2f}",
        one.winner,
        one.full_winner,
        _percent(one.regret),
        *stops,
    ]


def _summary(replays: Sequence[Replay]) -> str:
    """Cost, winners and regret in a sentence or two."""
    n, regrets = len(replays), [one.regret for one in replays]
    others = [one for one in replays if one.winner != one.full_winner]
    told_apart = sum(one.distinguishable for one in others)
    seconds, samples = ([getattr(one, what) for one in replays] for what in ("seconds", "samples"))
    stops = [stop for one in replays for found in one.decisions.values() for stop in found if stop.stops]
    verdicts = Counter(stop.verdict for stop in stops)
    counted = ", ".join(f"{count} as {verdict}" for verdict, count in sorted(verdicts.items())) or "none"
    return (
        f"{n} {'group' if n == 1 else 'groups'} of seeds. Same winner in {n - len(others)}; "
        f"another one in {len(others)}, told apart from it by the full comparison in {told_apart}. "
        f"Regret {_percent(sum(regrets) / n)} on average, {_percent(max(regrets))} at most. "
        f"Share of the full comparison's seconds {sum(seconds) / n:.2f} ({min(seconds):.2f} to {max(seconds):.2f}), "
        f"of its samples {sum(samples) / n:.2f}. Arms stopped: {counted}; "
        f"not borne out by the end: {sum(len(one.premature) for one in replays)}."
    )


def of_simulation() -> str:
    """Errors where the truth is known."""
    told = json.loads(SIMULATION.read_text(encoding="utf-8"))
    rows = []
    for one in (Rates(**row) for row in told["rates"]):
        shares = (one.wrong, one.behind, one.equivalent, one.stopped, one.samples)
        winner = f"{_percent(one.wrong_winner)} / {_percent(one.full_wrong_winner)}"
        regret = f"{one.regret:.3f} / {one.full_regret:.3f}"
        rows.append([one.case, f"{one.level:g}", *map(_percent, shares), winner, regret])
    head = (
        "case", "scatter", "any wrong stop", "as behind", "as equivalent", "arms stopped", "samples",
        "wrong winner", "regret",
    )  # fmt: skip
    return f"{told['repetitions']} comparisons a row, {told['seeds']} seeds.\n\n{_markdown(head, rows, left=1)}"


TABLES: dict[str, Callable[[], str]] = {
    "thresholds": thresholds,
    "smoothing": of_smoothing,
    "simulation": of_simulation,
    "recorded": of_recorded,
    "live": of_live,
    "fresh": of_fresh,
}
"""Name of a table -> what makes it."""


def filled(page: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match.group(1)} -->\n{TABLES[match.group(1)]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def simulate() -> None:
    """Run all cases and write down what came, with the rule that it is of."""
    told = {"rule": asdict(RULE), "repetitions": REPETITIONS, "seeds": SEEDS}
    told["rates"] = [asdict(one) for one in simulated(RULE)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    SIMULATION.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def extract(name: str, parents: Sequence[str]) -> Path:
    """Record the finished runs below comparisons' parent runs: samples, loss and seconds of each evaluation.

    Args:
        name: of the file.
        parents: ids of the parents' MLflow runs, in the store of `MLFLOW_TRACKING_URI`: more than one where seeds were
            added later.

    Raises:
        SystemExit: a run is missing, is not finished, or is there twice: a replay needs whole curves of all.
    """
    store = Store()
    below = [run for parent in parents for run in store.runs(where=f"tags.{PARENT} = '{parent}'")]
    runs = [run for run in below if run.tags.get(_ROLE, "arm") == "arm"]
    arms = {(run.tags.get(_ARM, run.strategy), int(run.seed)): run for run in runs}
    seeds = {seed for _, seed in arms}
    bad = [f"{run.name}: {why}" for run in runs if (why := why_excluded(run))]
    if not runs or bad or len(arms) != len(runs) or len(arms) != len({arm for arm, _ in arms}) * len(seeds):
        said = "; ".join(bad) or "one finished run for every arm and seed is needed"
        sys.exit(f"{len(runs)} runs below {', '.join(parents)}: {said}")
    between = {run.params.get(_EVERY, "") for run in runs}
    if len(between) > 1 or not all(text.isdigit() for text in between):
        sys.exit(
            f"{_EVERY} is {between} in the runs below {', '.join(parents)}: one number is needed, as halving sets it"
        )
    wanted = (names.EVAL_LOSS, names.SAMPLES_SEEN, names.TRAIN_SECONDS, names.EVALUATION_SECONDS)
    curves = {metric: store.curves([run.id for run in runs], metric) for metric in wanted}
    rows = []
    for (arm, seed), run in sorted(arms.items()):
        loss, *counters = (curves[metric][run.id] for metric in wanted)
        samples, training, evaluating = (dict(zip(c.steps, c.values, strict=True)) for c in counters)
        for step, value in zip(loss.steps, loss.values, strict=True):
            seconds = training[step] + evaluating[step]
            rows.append({"arm": arm, "seed": seed, "samples": samples[step], "loss": value, "seconds": seconds})
    path = FOLDER / f"{name}.parquet"
    pd.DataFrame(rows).assign(every=int(between.pop())).to_parquet(path, compression="zstd", index=False)
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 99) -> str:
    rule = ["---"] * min(left, len(head)) + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("simulate", help="how often the rule errs")
    commands.add_parser("tables", help="fill docs/halving.md")
    recording = commands.add_parser("extract", help="record a comparison whose runs all went to their ends")
    recording.add_argument("name", help="of the recording")
    recording.add_argument(
        "parents", nargs="+", help="ids of MLflow runs: of the comparison, and of others of the same arms"
    )
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        simulate()
    elif arguments.command == "extract":
        print(extract(arguments.name, arguments.parents))
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
