"""How often the rule stops an arm wrongly where the truth is known: simulated comparisons that the rule decides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.halving import Rule, decide

REPETITIONS = 2000
SEEDS = 3
LOSS = 0.6
"""Of the best arm, nats per supervised token."""
PERSISTS = 0.5
"""Share of a run's variance that it keeps from rung to rung; the rest is drawn anew."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is true of the arms, in margins."""

    name: str
    behind: tuple[float, ...]
    """Of each arm: how far it is behind the best."""
    scatter: tuple[float, ...]
    """Of each arm: standard deviation of a run, times the level of the comparison."""


EVEN = (1.0,) * 5
CASES = (
    Case("five equal arms", (0, 0, 0, 0, 0), EVEN),
    Case("one arm at the margin, three at three margins", (0, 1, 3, 3, 3), EVEN),
    Case("four arms at the margin", (0, 1, 1, 1, 1), EVEN),
    Case("four arms two margins behind", (0, 2, 2, 2, 2), EVEN),
    Case("two arms, one at the margin", (0, 1), EVEN[:2]),
    Case("unequal scatter, one wide arm at the margin", (0, 1, 3, 3, 3), (0.5, 2.0, 0.5, 0.5, 0.5)),
    Case("unequal scatter, equal arms", (0, 0, 0, 0, 0), (2.0, 1.0, 0.5, 0.5, 0.25)),
    Case("a wild leader, four arms at the margin", (0, 1, 1, 1, 1), (3.0, 1.0, 1.0, 1.0, 1.0)),
)
LEVELS = (0.25, 0.75, 2.0)
"""Standard deviation of a run in an arm of scatter 1, in margins."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What came of many repetitions; shares of all of them, or of all arms but the leader."""

    case: str
    level: float
    wrong: float
    """Comparisons with at least one wrong stop."""
    behind: float
    """Comparisons in which an arm was stopped as behind that is not, by more than the margin, behind who led then."""
    equivalent: float
    """Comparisons in which an arm was stopped as equivalent that is the margin or more away from who led then."""
    stopped: float
    """Arms that were stopped."""
    samples: float
    """Training samples, as a share of those of all arms to the end."""
    wrong_winner: float
    """Comparisons in which the arm that is lowest at the end is not the best, or one as good."""
    full_wrong_winner: float
    """The same of all arms to the end."""
    regret: float
    """How far that arm is behind the best in truth, in margins, on average."""
    full_regret: float
    """The same of all arms to the end."""


def rates(case: Case, level: float, rule: Rule, *, repetitions: int = REPETITIONS, seed: int = 0) -> Rates:
    """Simulate a case.

    The loss of arm a on seed s at a rung is LOSS (1 + margin (behind_a + c_s + level scatter_a z)): c_s is common to
    all arms, z has variance 1 and keeps half of it from rung to rung.
    """
    generator = np.random.default_rng([seed, round(1000 * level), *case.name.encode()])
    told = [_one(case, level, rule, generator) for _ in range(repetitions)]
    behind, equivalent, stopped, samples, regret, full_regret = np.array(told, dtype=np.float64).T
    found = (
        np.maximum(behind, equivalent), behind, equivalent, stopped / (len(case.behind) - 1), samples,
        regret > 0, full_regret > 0, regret, full_regret,
    )  # fmt: skip
    return Rates(case.name, level, *(float(values.mean()) for values in found))


def _one(case: Case, level: float, rule: Rule, generator: np.random.Generator) -> tuple[float, ...]:
    """One comparison: whether arms were wrongly stopped as behind, or as equivalent, how many were, its samples, and
    how far the winner is behind in truth, with the rule and without.
    """
    shape = len(case.behind), SEEDS
    truth, scatter = np.array(case.behind, dtype=np.float64), level * np.array(case.scatter)[:, None]
    kept, common = generator.standard_normal(shape), generator.standard_normal(SEEDS)
    alive, wrong, samples = list(range(len(case.behind))), {"behind": False, "equivalent": False}, 0.0

    def drawn() -> np.ndarray:
        z = np.sqrt(PERSISTS) * kept + np.sqrt(1 - PERSISTS) * generator.standard_normal(shape)
        return LOSS * (1 + rule.margin * (truth[:, None] + common + scatter * z))

    for rung, share in enumerate(rule.rungs):
        losses = drawn()
        found = decide({str(arm): dict(enumerate(losses[arm].tolist())) for arm in alive}, rung=rung, rule=rule)
        leader = next((int(one.arm) for one in found if one.verdict == "leader"), 0)
        for stop in (one for one in found if one.stops):
            arm = int(stop.arm)
            gap = truth[arm] - truth[leader]
            wrong[stop.verdict] |= bool(gap <= 1 if stop.verdict == "behind" else abs(gap) >= 1)
            alive.remove(arm)
            samples += share
    stopped = len(case.behind) - len(alive)
    final = drawn().mean(axis=1)
    winners = min(alive, key=lambda arm: final[arm]), int(final.argmin())
    shares = stopped, (samples + len(alive)) / len(case.behind)
    return wrong["behind"], wrong["equivalent"], *shares, *(float(truth[winner]) for winner in winners)


def simulated(rule: Rule, cases: Sequence[Case] = CASES, levels: Sequence[float] = LEVELS) -> list[Rates]:
    """All cases at all levels."""
    return [rates(case, level, rule) for case in cases for level in levels]
