"""What a sweep has found: its points, best first, each a mean over its seeds; as tables, CSV and JSON."""

import csv
import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from optuna.trial import TrialState

from trainer.sweep.space import SEED, Point, Value, short, without_seed
from trainer.sweep.study import Tried
from trainer.sweep.sweep_file import Sweep

_WORDS = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
"""Of a seed that was tried more than once, the first of these is what counts."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A point with all its seeds."""

    point: Point
    """Without the seed."""
    values: tuple[float, ...]
    """The metric of each seed that is complete."""
    states: tuple[str, ...]
    """Of each seed: complete, pruned, failed, running or waiting."""

    @property
    def mean(self) -> float:
        """Over the complete seeds; not a number where there is none."""
        return mean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the complete seeds; not a number below two."""
        return stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def is_whole(self) -> bool:
        """Whether every seed is complete, so that its mean may stand beside those of others."""
        return len(self.values) == len(self.states)


def ranked(sweep: Sweep, tried: Sequence[Tried]) -> list[Ranked]:
    """Points, best first; those that lack a seed come after all that are whole, and those without a value last.

    A sampler may draw a point again: on the same seed it computes the same, which is no second seed.

    Args:
        sweep: says which way the metric goes.
        tried: what has become of each point and seed.
    """
    of_point: dict[str, dict[Value | None, Tried]] = {}
    for one in tried:
        key = json.dumps(without_seed(one.point), sort_keys=True) if one.point else f"trial {one.first}"
        of_seed, seed = of_point.setdefault(key, {}), one.point.get(SEED)
        of_seed[seed] = min(of_seed.get(seed, one), one, key=lambda of_both: list(_WORDS).index(of_both.state))
    points = [
        Ranked(
            point=without_seed(ones[0].point),
            values=tuple(o.value for o in ones if o.state == TrialState.COMPLETE and o.value is not None),
            states=tuple(_WORDS[one.state] for one in ones),
        )
        for ones in (list(of_seed.values()) for of_seed in of_point.values())
    ]
    sign = 1 if sweep.lower_is_better else -1
    return sorted(points, key=lambda p: (not p.values, not p.is_whole, sign * p.mean if p.values else 0.0))


def header(sweep: Sweep) -> list[str]:
    """Names of the columns of `rows`."""
    keys = [axis.key for axis in sweep.axes if axis.key != SEED]
    return ["rank", *keys, sweep.metric, "sd", "seeds", "state"]


def rows(sweep: Sweep, points: Sequence[Ranked]) -> list[list[str]]:
    """A row a point, as text."""
    keys = [axis.key for axis in sweep.axes if axis.key != SEED]
    return [
        [
            str(place) if point.values else "",
            *(short(point.point[key]) if key in point.point else "" for key in keys),
            _number(point.mean),
            _number(point.spread),
            f"{len(point.values)}/{len(point.states)}",
            ", ".join(f"{point.states.count(state)} {state}" for state in _WORDS.values() if state in point.states),
        ]
        for place, point in enumerate(points, 1)
    ]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5f}"


def statement(points: Sequence[Ranked]) -> str:
    """What the order of the first two is worth, in a sentence."""
    whole = [point for point in points if point.values and point.is_whole]
    if len(whole) < 2:
        return "Fewer than two points are complete: there is nothing to compare."
    gap = abs(whole[1].mean - whole[0].mean)
    seeds = len(whole[0].values)
    if seeds < 2:
        return f"The best is {gap:.5f} ahead of the second, on one seed: that cannot be told from the noise of seeds."
    return (
        f"The best is {gap:.5f} ahead of the second, in means over {seeds} seeds; its seeds scatter by "
        f"{whole[0].spread:.5f}. The best of several noisy means looks better than it is: "
        "`python -m analysis rank` says which differences are more than noise."
    )


def command(sweep: Sweep, points: Sequence[Ranked]) -> str:
    """The command that trains the best point; empty where there is none."""
    if not points or not points[0].values:
        return ""
    strategy, changed = sweep.of({**sweep.first(), **points[0].point})
    if SEED in {axis.key for axis in sweep.axes}:
        changed.pop(SEED)
    profile = ["--profile", sweep.profile] if sweep.profile else []
    settings = [part for key, text in changed.items() for part in (f"--{key}", text)]
    return shlex.join(["python", "-m", "trainer", "run", strategy, *profile, *settings])


def markdown(sweep: Sweep, tried: Sequence[Tried]) -> str:
    """The description of the run that all trials are nested below."""
    points = ranked(sweep, tried)
    table = [header(sweep), ["---"] * len(header(sweep)), *rows(sweep, points)]
    over = sum(one.state.is_finished() for one in tried)
    lines = [f"Sweep `{sweep.name}`: {over} of {sweep.trials} trials are over.", ""]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines += ["", statement(points)]
    if best := command(sweep, points):
        lines += ["", "Train the best:", "", f"    {best}"]
    return "\n".join(lines)


def as_csv(sweep: Sweep, tried: Sequence[Tried]) -> str:
    """A line a point and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [axis.key for axis in sweep.axes]
    writer.writerow(["trial", *keys, sweep.metric, "state", "attempts", "worker", "why"])
    for one in tried:
        values = [one.point.get(key, "") for key in keys]
        metric = "" if one.value is None else repr(one.value)
        writer.writerow([one.first, *values, metric, _WORDS[one.state], one.attempts, one.worker, one.why])
    return text.getvalue()


def as_json(sweep: Sweep, tried: Sequence[Tried]) -> str:
    """What was asked for, and the points, best first."""
    points = [
        {"point": dict(p.point), "mean": p.mean if p.values else None, "values": p.values, "states": p.states}
        for p in ranked(sweep, tried)
    ]
    return json.dumps({"sweep": sweep.name, **sweep.facts(), "points": points}, indent=1, ensure_ascii=False) + "\n"
