"""Ranks strategies: columns pooled over seeds, margins over the winner, which differences are more than noise."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from analysis.curves import Curve
from analysis.runs import Run
from analysis.settings import AUGMENTATION, differing, number, setting
from analysis.statistics import Difference, Estimate, all_differences, estimate
from trainer import names
from trainer.config.problems import nearest
from trainer.errors import UserError

NAN = math.nan

STEP = "step"
"""Beside the metrics of `names.py`: the optimizer step at which a run was read."""
TRAINABLE = names.TRAINABLE_PARAMETERS + "total"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the ranking."""

    header: str
    key: str
    """A metric's name, `STEP`, or a param whose value is a number."""
    group: str
    digits: int = 4
    scale: float = 1.0
    """What a value is multiplied by before it is printed."""


LOSS, LEARNED, COST = "loss, nats per supervised token", "what was learned", "what it took"

COLUMNS = (
    Column("eval loss, smoothed", names.EVAL_LOSS_SMOOTHED, LOSS),
    Column("eval loss", names.EVAL_LOSS, LOSS),
    Column("train loss, smoothed", names.TRAIN_LOSS_SMOOTHED, LOSS),
    Column("train loss", names.TRAIN_LOSS, LOSS),
    Column("gap", names.GAP, LOSS),
    Column("clean gap", names.GAP_CLEAN, LOSS),
    Column("best eval loss", names.BEST_LOSS, LEARNED),
    Column("at step", names.BEST_STEP, LEARNED, 0),
    Column("samples to 1 % of best", names.SAMPLES_TO_BEST, LEARNED, 0),
    Column("F1", names.F1, LEARNED, 3),
    Column("vision gain", names.VISION_GAIN, LEARNED, 3),
    Column("loss spikes", names.LOSS_SPIKES, LEARNED, 1),
    Column("step", STEP, COST, 0),
    Column("samples", names.SAMPLES_SEEN, COST, 0),
    Column("tokens, k", names.TOKENS_SEEN, COST, 0, 1e-3),
    Column("hours", names.TRAIN_SECONDS, COST, 3, 1 / 3600),
    Column("checkpoint, MB", names.CHECKPOINT_BYTES, COST, 1, 1e-6),
    Column("trainable, M", TRAINABLE, COST, 3, 1e-6),
    Column("peak memory, GB", names.PEAK_MEMORY, COST, 2, 1e-9),
)

CURVES = (
    *(c.key for c in COLUMNS if c.key in names.METRICS and c.key not in (names.PEAK_MEMORY, names.CHECKPOINT_BYTES)),
)
"""Metrics whose value depends on when in a run they are read."""


@dataclass(frozen=True, slots=True)
class At:
    """Where in a run its values are read: at the end, at its lowest eval loss, or when it had seen or spent so much."""

    kind: str = "final"
    limit: float = NAN

    def __str__(self) -> str:
        """As on the command line."""
        return self.kind if self.kind in ("final", "best") else f"{self.kind}={self.limit:.15g}"

    @property
    def counter(self) -> str:
        """The metric that counts what the limit is in."""
        return {"samples": names.SAMPLES_SEEN, "tokens": names.TOKENS_SEEN, "seconds": names.TRAIN_SECONDS}[self.kind]


def parse_at(text: str) -> At:
    """`best`, `final`, `samples=N`, `tokens=N` or `seconds=N`.

    Raises:
        UserError: anything else.
    """
    kind, _, number = text.partition("=")
    if text in ("best", "final"):
        return At(text)
    try:
        limit = float(number)
    except ValueError:
        limit = NAN
    if kind in ("samples", "tokens", "seconds") and 0 < limit < math.inf:
        return At(kind, limit)
    raise UserError(
        "--at", text, "best, final, samples=N, tokens=N or seconds=N", "give one of these, such as --at samples=2000"
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """One run and its values where they were read."""

    run: Run
    values: Mapping[str, float]
    """Column key -> value; nan where the run has none."""

    @property
    def block(self) -> str:
        """Runs of one block saw the same batches: the same seed over the same training data."""
        return f"{self.run.seed} {self.run.tags.get(names.TAG_TRAIN_DIGEST, '')}" if self.run.seed else self.run.id


@dataclass(frozen=True, slots=True)
class Row:
    """An arm, its seeds pooled; or a single run."""

    label: str
    strategy: str
    readings: tuple[Reading, ...]
    estimates: Mapping[str, Estimate]
    """Column key -> mean over seeds."""
    margin: float
    """How much worse than the winner, in percent of the winner's value; 0 for the winner."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What `rank` prints."""

    by: str
    at: At
    rows: tuple[Row, ...]
    """The best first."""
    differences: tuple[Difference, ...]
    """Of every pair of arms, in the ranked metric."""
    excluded: tuple[tuple[Run, str], ...]
    """Runs that are not ranked, and why."""
    n_not_finite: int = 0
    """Points of the curves read that were nan or infinite."""
    each: bool = False
    """Whether a row is a run and not an arm."""


def why_excluded(run: Run) -> str | None:
    """The reason for which a run is not ranked, or None."""
    if next_run := run.tags.get(names.TAG_CONTINUED_IN):
        return f"was continued in {next_run}"
    if run.status != "FINISHED":
        ended = run.tags.get(names.TAG_HALVING)
        return f"was ended early: {ended}" if ended else f"is {run.status}"
    if run.tags.get(names.TAG_ROLE) == names.TRIAL and names.TAG_SWEEP not in run.tags:
        return "has only tried out a learning rate"
    gate = run.tags.get(names.TAG_GATE)
    if gate != "passed" and (gate or names.TAG_SOURCE not in run.tags):
        return f"its training gate is {gate}" if gate else "has no training gate"
    return None


def read(run: Run, by: str, at: At, curves: Mapping[str, Curve]) -> Reading | str:
    """A run's values at one place, or the reason for which it has none there.

    Args:
        run: to read.
        by: the ranked metric, without which a run is not ranked.
        at: where.
        curves: metric -> curve, of the metrics in `CURVES`; not needed at the end.
    """
    values = {column.key: run.metrics.get(column.key, NAN) for column in COLUMNS} | {by: run.metrics.get(by, NAN)}
    values[TRAINABLE] = number(run.params.get(TRAINABLE))
    values[STEP] = float(run.last_step)
    if by not in run.metrics:
        return f"has no {by}"
    if at.kind == "final":
        return Reading(run, values)
    losses = by if by == names.EVAL_LOSS_SMOOTHED else names.EVAL_LOSS
    step = _step_at(at, curves[losses], curves)
    if isinstance(step, str):
        return step
    if by in curves and not (curves[by].steps <= step).any():
        return f"has no {by} at {at} or before"
    values |= {metric: curves[metric].at_or_before(step) for metric in {*CURVES, by} & curves.keys()}
    values[STEP] = step
    return Reading(run, values)


def _step_at(at: At, evaluations: Curve, curves: Mapping[str, Curve]) -> float | str:
    """The evaluation that `at` means: the lowest one, or the last within the limit."""
    lowest = evaluations.lowest()
    if lowest is None:
        return f"has no finite {names.EVAL_LOSS}"
    if at.kind == "best":
        return float(evaluations.steps[lowest])
    counter = curves[at.counter]
    if not len(counter) or counter.values[-1] < at.limit:
        return f"ended before {at}" + (f", at {counter.values[-1]:g}" if len(counter) else "")
    reached = [
        step for step in evaluations.steps[np.isfinite(evaluations.values)] if counter.at_or_before(step) <= at.limit
    ]
    return float(reached[-1]) if reached else f"has no evaluation before {at}"


def nothing_ranked(store: str) -> UserError:
    """What is said where a ranking is needed that has an arm, and the store has no run for it."""
    return UserError(store, "no run that can be ranked", "at least one", "see why: python -m analysis rank")


def rank(
    readings: Sequence[Reading],
    by: str,
    at: At,
    excluded: Sequence[tuple[Run, str]] = (),
    *,
    each: bool = False,
    n_not_finite: int = 0,
) -> Ranking:
    """Rank arms by one metric.

    Args:
        readings: of all runs to be ranked.
        by: the metric; lower or higher is better as `names.py` has it.
        at: where they were read, to be told.
        excluded: runs that are not ranked, to be told.
        each: a row a run, instead of a row an arm.
        n_not_finite: points left out, to be told.

    Raises:
        UserError: the metric has no better direction.
    """
    worse = 1 if direction(by) == "lower" else -1
    if each:
        groups = {f"{r.run.name or r.run.strategy} {r.run.id}": [r] for r in readings}
    else:
        groups, repeats = without_repeats(arms(readings))
        excluded = [*excluded, *repeats]
    rows = []
    for label, members in groups.items():
        keys = {key for reading in members for key in reading.values}
        estimates = {key: estimate([r.values.get(key, NAN) for r in members]) for key in keys}
        rows.append(Row(label, members[0].run.strategy, tuple(members), estimates, NAN))
    # a row without a value, which is nan, comes last
    rows.sort(key=lambda row: (math.isnan(m := row.estimates[by].mean), worse * m, row.label))
    best = rows[0].estimates[by].mean if rows else NAN
    rows = [replace(row, margin=_percent_worse(worse * (row.estimates[by].mean - best), best)) for row in rows]
    values = {row.label: {reading.block: reading.values[by] for reading in row.readings} for row in rows}
    differences = () if each else tuple(all_differences(values))
    return Ranking(by, at, tuple(rows), differences, tuple(excluded), n_not_finite, each)


def _percent_worse(by_how_much: float, best: float) -> float:
    return 100 * by_how_much / abs(best) + 0.0 if best else NAN  # + 0.0: never -0.0


def direction(metric: str) -> str:
    """`lower` or `higher`, whichever is better.

    Raises:
        UserError: the metric is not ours, or neither is better.
    """
    known = [name for name, meaning in names.METRICS.items() if meaning.better]
    try:
        better = names.metric(metric).better
    except KeyError:
        near = nearest(metric, known)
        raise UserError(
            "--by", metric, "a metric of ours, such as " + ", ".join(known[:4]),
            f"did you mean {near}?" if near else "see the metrics of a run in the MLflow UI",
        ) from None  # fmt: skip
    if better is None:
        raise UserError("--by", f"{metric}, where neither lower nor higher is better", ", ".join(known), "take another")
    return better


_TOLD_SETTINGS = 3
"""So many settings stand in an arm's name; what else differs is counted there and told in the report."""

_LONGEST_VALUE = 40
"""Letters of a value that stands in an arm's name as it is."""

_TOLD_AS = {AUGMENTATION: "augmentation"}
"""Setting -> what it is called in an arm's name, where the end of its key does not say what it is of."""


def arms(readings: Iterable[Reading]) -> dict[str, list[Reading]]:
    """Runs by strategy and source; where those were configured differently, by what differs as well."""
    by_strategy: dict[str, list[Reading]] = {}
    for reading in readings:
        source = reading.run.tags.get(names.TAG_SOURCE)
        by_strategy.setdefault(reading.run.strategy + (f" ({source})" if source else ""), []).append(reading)
    groups: dict[str, list[Reading]] = {}
    for strategy, members in by_strategy.items():
        keys = differing([member.run for member in members])
        alike: dict[tuple[str | None, ...], list[Reading]] = {}
        for member in members:
            alike.setdefault(tuple(setting(member.run.params, key) for key in keys), []).append(member)
        for of_arm in alike.values():
            label = _label(strategy, keys, of_arm[0].run)
            numbered = (f"{label} #{n}" for n in count(2))
            groups[label if label not in groups else next(name for name in numbered if name not in groups)] = of_arm
    return groups


def _label(strategy: str, keys: Sequence[str], run: Run) -> str:
    """`last6_lora (lora_rank 8, vit_lr 0.0002)`."""
    named = [(_TOLD_AS.get(key, key.rpartition(".")[2]), _short(run.params.get(key, "-"))) for key in keys]
    told = [f"{name} {value}" for name, value in named[:_TOLD_SETTINGS]]
    if len(keys) > _TOLD_SETTINGS:
        told.append(f"{len(keys) - _TOLD_SETTINGS} more")
    return f"{strategy} ({', '.join(told)})" if told else strategy


def _short(value: str) -> str:
    """A value as part of a label; a long one (a list of operations, a path) by four letters that stand for it."""
    return value if len(value) <= _LONGEST_VALUE else "~" + hashlib.blake2b(value.encode(), digest_size=2).hexdigest()


def without_repeats(groups: Mapping[str, list[Reading]]) -> tuple[dict[str, list[Reading]], list[tuple[Run, str]]]:
    """The newest run of each seed of an arm, and the rest with the reason: a repeated seed is no second replication."""
    kept: dict[str, list[Reading]] = {}
    repeats = []
    for label, members in groups.items():
        newest: dict[str, Reading] = {}
        for reading in sorted(members, key=lambda r: r.run.started, reverse=True):
            if reading.block in newest:
                repeats.append((reading.run, f"was repeated with the same seed in {newest[reading.block].run.id}"))
            else:
                newest[reading.block] = reading
        kept[label] = sorted(newest.values(), key=lambda reading: (number(reading.run.seed), reading.run.seed))
    return kept, repeats
