"""Decides at a rung which arms of a comparison need not be trained further: the rule, its thresholds, its numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.margins import margins, shares

Verdict = Literal["leader", "behind", "equivalent", "goes on"]

EVALUATIONS = 2
"""How many evaluations are averaged into the loss at a rung: one alone is a noisy point."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When an arm may be stopped."""

    margin: float = 0.01
    """Share of the leader's loss that counts as no difference."""
    error: float = 0.05
    """Accepted chance that a comparison stops any arm wrongly, all rungs together."""
    rungs: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Where arms are looked at, as shares of the whole training in samples."""

    def __post_init__(self) -> None:
        """Check the thresholds.

        Raises:
            ValueError: they make no sense.
        """
        if not 0 < self.margin < 1:
            raise ValueError(f"margin is {self.margin:g}; it lies between 0 and 1 (1 % is 0.01)")
        if not 0 < self.error < 0.5:
            raise ValueError(f"error is {self.error:g}; it lies between 0 and 0.5 (5 % is 0.05)")
        rising = all(a < b for a, b in zip((0.0, *self.rungs), (*self.rungs, 1.0), strict=True))
        if not self.rungs or not rising:
            raise ValueError(f"rungs are {self.rungs}; they rise, and lie between 0 and 1")

    def spent(self, rung: int) -> float:
        """The part of the accepted error that a rung (from 0) spends: half of what is left, at the last the rest."""
        return shares(self.error, len(self.rungs))[rung]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one arm at a rung, and the numbers that it rests on."""

    arm: str
    verdict: Verdict
    """`behind` and `equivalent` end the arm's training; `leader` and `goes on` do not."""
    loss: float
    """Mean over seeds at the rung, nats per supervised token; nan where there is none."""
    difference: float
    """The arm's loss minus the leader's, mean over paired seeds; nan where it was not compared."""
    interval: tuple[float, float]
    """Of the difference; all arms' intervals hold together with probability 1 - `error`."""
    p: float
    """Of the better founded of the two verdicts that end an arm, corrected over both and over arms (Holm)."""
    margin: float
    """What counts as no difference here, in nats per supervised token."""
    error: float
    """The part of the accepted error that this rung spends: p up to it ends the arm."""
    seeds: int
    """Pairs of runs behind it."""

    @property
    def stops(self) -> bool:
        """Whether the arm's training ends here."""
        return self.verdict in ("behind", "equivalent")


def rung_loss(evaluations: Sequence[tuple[float, float]], samples: float, *, least: int = EVALUATIONS) -> float | None:
    """The loss of one run at a rung: the mean of its last two evaluations there.

    They are the first evaluation after `samples` training samples or more, and the one before it. That of step 0, which
    says nothing of the arm, is never among them. Runs can be compared at a rung only if they were evaluated after the
    same samples (`training.eval_samples`): losses fall too fast for anything else.

    Args:
        evaluations: (training samples seen, eval loss) in the order of training.
        samples: of the rung.
        least: fewer evaluations than these make no loss.

    Returns:
        Nats per supervised token; None: the run has not come so far, was not evaluated often enough, or is not finite.
    """
    trained = [(seen, loss) for seen, loss in evaluations if seen > 0]
    there = next((index for index, (seen, _) in enumerate(trained) if seen >= samples), None)
    if there is None:
        return None
    last = [loss for _, loss in trained[max(0, there + 1 - EVALUATIONS) : there + 1]]
    mean = math.fsum(last) / len(last)
    return mean if len(last) >= least and math.isfinite(mean) else None


def decide(losses: Mapping[str, Mapping[int, float]], *, rung: int, rule: Rule) -> tuple[Decision, ...]:
    """Say which arms stop at a rung.

    An arm is judged when it has a loss for every seed that any arm has. Of these the one with the lowest mean leads.
    Another one stops as `behind` when it is behind the leader by more than the margin, and as `equivalent` when it lies
    within the margin on both sides of the leader, at this rung's part of the accepted error. Everything else goes on:
    an arm of which a run is missing, and all of them where fewer than two seeds or two arms can be judged.

    Args:
        losses: arm -> seed -> loss at the rung (see `rung_loss`), of the arms that are still trained.
        rung: which of the rule's, from 0.
        rule: the thresholds.

    Returns:
        One decision for every arm, in the mapping's order.
    """
    finite = {arm: {seed: v for seed, v in of.items() if math.isfinite(v)} for arm, of in losses.items()}
    seeds = set().union(*finite.values()) if finite else set()
    judged = {arm: of for arm, of in finite.items() if of.keys() == seeds}
    means = {arm: math.fsum(of.values()) / len(of) for arm, of in finite.items() if of}
    error = rule.spent(rung)
    if len(judged) < 2 or len(seeds) < 2:
        return tuple(_undecided(arm, means.get(arm, math.nan), len(of), error) for arm, of in finite.items())
    leader = min(judged, key=lambda arm: means[arm])
    margin = rule.margin * means[leader]
    found = {of.arm: of for of in margins(judged, leader, margin, error)}
    decisions = []
    for arm, of in finite.items():
        if arm == leader:
            decisions.append(Decision(arm, "leader", means[arm], 0.0, (0.0, 0.0), math.nan, margin, error, len(of)))
        elif arm not in found:
            decisions.append(_undecided(arm, means.get(arm, math.nan), len(of), error, margin))
        else:
            test = found[arm]
            ends: Verdict = "behind" if test.p_behind < test.p_equivalent else "equivalent"
            verdict = ends if test.p <= error else "goes on"
            estimate = test.estimate
            interval = estimate.low, estimate.high
            decisions.append(
                Decision(arm, verdict, means[arm], estimate.mean, interval, test.p, margin, error, len(of))
            )
    return tuple(decisions)


def _undecided(arm: str, loss: float, seeds: int, error: float, margin: float = math.nan) -> Decision:
    return Decision(arm, "goes on", loss, math.nan, (math.nan, math.nan), math.nan, margin, error, seeds)
