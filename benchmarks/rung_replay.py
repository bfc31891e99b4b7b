"""Replays the rule that stops arms on curves of runs that all went to their ends: what it would have saved and lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pandas as pd

from analysis.statistics import all_differences
from benchmarks import recorded
from trainer import names
from trainer.halving import EVALUATIONS, Decision, Rule, decide, rung_loss

FOLDER = Path(__file__).parent / "results" / "halving"
GROUP = 3
"""Seeds that are compared at once."""
_APART = 0.02
"""Share of the training by which evaluations of two runs may lie apart and still count as after the same samples."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a run."""

    samples: float
    """Training samples seen."""
    loss: float
    """Nats per supervised token."""
    seconds: float
    """Of training and of all evaluations so far, this one too."""


Curves = Mapping[str, Mapping[int, Sequence[Evaluation]]]
"""Arm -> seed -> its evaluations in the order of training, the last one at the end of it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Runs that all went to their ends, every arm on every seed."""

    name: str
    curves: Curves
    least: int = EVALUATIONS
    """Evaluations that make a loss at a rung."""
    every: float | None = None
    """Training samples between evaluations (`training.eval_samples`); None where evaluations went by steps."""

    def rung(self, share: float, total: float) -> float:
        """Where a rung lies, in training samples: as in a comparison, a multiple of those between evaluations."""
        return share * total if self.every is None else self.every * max(2, round(share * total / self.every))

    def groups(self) -> list[tuple[int, ...]]:
        """All groups of three of its seeds."""
        seeds = sorted(set.intersection(*(set(of) for of in self.curves.values())))
        return list(combinations(seeds, min(GROUP, len(seeds))))


@dataclass(frozen=True, slots=True)
class Replay:
    """What the rule would have done with one group of seeds."""

    seeds: tuple[int, ...]
    decisions: Mapping[int, tuple[Decision, ...]]
    """Rung (from 0) -> what was decided there."""
    seconds: float
    """Training and evaluation, as a share of what all runs to their ends took."""
    samples: float
    """Training samples, likewise."""
    winner: str
    full_winner: str
    """Lowest mean of the final losses of all arms."""
    distinguishable: bool
    """Whether the full comparison tells these two apart."""
    regret: float
    """Final loss of the one minus that of the other, as a share of the other's."""
    premature: tuple[str, ...] = field(default=())
    """Arms that were stopped for what was not so at the end, by the same seeds' mean final losses."""

    def stopped(self, rung: int) -> str:
        """Which arms were stopped at a rung, and why."""
        found = [f"{one.arm} ({one.verdict})" for one in self.decisions.get(rung, ()) if one.stops]
        return ", ".join(found) or "-"


def aligned(curves: Curves) -> Curves:
    """Only evaluations that every run has after nearly the same samples, at the fewest that any of them had seen.

    Arms that accumulate more micro-batches take fewer steps, and where evaluation goes by steps they have fewer
    evaluations; losses fall too fast to compare others.
    """
    runs = [of_run for of_arm in curves.values() for of_run in of_arm.values()]
    coarsest = min(runs, key=len)
    near = _APART * coarsest[-1].samples

    def nearest(of_run: Sequence[Evaluation], samples: float) -> Evaluation:
        return min(of_run, key=lambda one: abs(one.samples - samples))

    kept = []
    for place in coarsest:
        all_here = [nearest(of_run, place.samples).samples for of_run in runs]
        if max(all_here) - min(all_here) <= near:
            kept.append((place.samples, min(all_here)))
    return {
        arm: {
            seed: [
                Evaluation(samples, one.loss, one.seconds)
                for place, samples in kept
                for one in (nearest(of_run, place),)
            ]
            for seed, of_run in of_arm.items()
        }
        for arm, of_arm in curves.items()
    }


def replay(recording: Recording, seeds: Sequence[int], rule: Rule) -> Replay:
    """Let the rule decide at each rung, as it would have done while these runs trained."""
    curves = {arm: {seed: of[seed] for seed in seeds} for arm, of in aligned(recording.curves).items()}
    total = max(of_run[-1].samples for of in curves.values() for of_run in of.values())
    alive, ended, looked, decisions = dict(curves), {}, -1, {}
    for rung, share in enumerate(rule.rungs):
        samples = recording.rung(share, total)
        places = [index for index, one in enumerate(_any_run(curves)) if one.samples >= samples]
        if len(alive) < 2 or places[0] == looked:  # a winner is left, or nothing has been seen since the rung before
            continue
        looked = places[0]
        losses = {
            arm: {seed: loss for seed, run in of.items() if (loss := _loss(run, samples, recording)) is not None}
            for arm, of in alive.items()
        }
        decisions[rung] = decide(losses, rung=rung, rule=rule)
        for stop in (one for one in decisions[rung] if one.stops):
            ended[stop.arm] = looked
            del alive[stop.arm]
    finals = {arm: {str(seed): run[-1].loss for seed, run in of.items()} for arm, of in curves.items()}
    return _judged(tuple(seeds), curves, ended, decisions, finals, rule)


def _loss(run: Sequence[Evaluation], samples: float, recording: Recording) -> float | None:
    return rung_loss([(one.samples, one.loss) for one in run], samples, least=recording.least)


def _any_run(curves: Curves) -> Sequence[Evaluation]:
    """Aligned runs are evaluated at the same places."""
    return next(iter(next(iter(curves.values())).values()))


def _judged(
    seeds: tuple[int, ...],
    curves: Curves,
    ended: Mapping[str, int],
    decisions: Mapping[int, tuple[Decision, ...]],
    finals: Mapping[str, Mapping[str, float]],
    rule: Rule,
) -> Replay:
    """Compare what the rule has done with what the whole curves say; `ended` is arm -> its last evaluation."""
    means = {arm: math.fsum(of.values()) / len(of) for arm, of in finals.items()}
    best_first = sorted(means, key=lambda arm: means[arm])
    full_winner = best_first[0]
    winner = next(arm for arm in best_first if arm not in ended)
    pairs = all_differences({arm: finals[arm] for arm in best_first})
    between = [pair for pair in pairs if {pair.first, pair.second} == {winner, full_winner}]
    runs = [(run[ended.get(arm, -1)], run[-1]) for arm, of in curves.items() for run in of.values()]
    shares = {
        what: sum(getattr(here, what) for here, _ in runs) / sum(getattr(end, what) for _, end in runs)
        for what in ("seconds", "samples")
    }
    margin = rule.margin * means[full_winner]
    behind = {arm: means[arm] - means[full_winner] > margin for arm in means}
    stops = [one for found in decisions.values() for one in found if one.stops]
    return Replay(
        seeds=seeds,
        decisions=decisions,
        **shares,
        winner=winner,
        full_winner=full_winner,
        distinguishable=any(pair.distinguishable for pair in between),
        regret=(means[winner] - means[full_winner]) / means[full_winner],
        premature=tuple(one.arm for one in stops if behind[one.arm] != (one.verdict == "behind")),
    )


def five_arms() -> Recording:
    """The recorded five arms on seeds 17 to 21, which were evaluated every 24 steps, whatever a step held."""
    curves: dict[str, dict[int, list[Evaluation]]] = {}
    metrics = (names.EVAL_LOSS, names.SAMPLES_SEEN, names.TRAIN_SECONDS, names.EVALUATION_SECONDS)
    of_runs = recorded.curves(metrics)
    for run in recorded.runs():
        loss, *counters = (of_runs[run.id][metric] for metric in metrics)
        samples, training, evaluating = (dict(zip(c.steps, c.values, strict=True)) for c in counters)
        curves.setdefault(run.strategy, {})[int(run.seed)] = [
            Evaluation(float(samples[step]), float(value), float(training[step] + evaluating[step]))
            for step, value in zip(loss.steps, loss.values, strict=True)
        ]
    return Recording("five_arms", curves, least=1)


def fresh(folder: Path = FOLDER) -> list[Recording]:
    """What was recorded since, a file each; none where nothing was."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        curves: dict[str, dict[int, list[Evaluation]]] = {}
        table = pd.read_parquet(path).sort_values(["arm", "seed", "samples"])
        for row in table.itertuples(index=False):
            one = Evaluation(float(row.samples), float(row.loss), float(row.seconds))
            curves.setdefault(str(row.arm), {}).setdefault(int(row.seed), []).append(one)
        found.append(Recording(path.stem, curves, every=float(table.every.iloc[0]) if "every" in table else None))
    return found
