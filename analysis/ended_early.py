"""Arms that a comparison ended before their time, which is no failure: which, why, and how the rest stands to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.ranking import Ranking
from analysis.runs import PARENT, Run
from trainer import names

BEHIND = "behind"
"""An arm that was behind the leader by more than the margin; any other word: it was as good as the leader."""


@dataclass(frozen=True, slots=True)
class EndedEarly:
    """One arm of the winner's comparison that halving has ended."""

    arm: str
    verdict: str
    """`behind` or `equivalent`, as `trainer.halving` has it."""
    where: str
    """`518 samples`."""
    run: Run
    """One of its runs."""


def ended_early(ranking: Ranking) -> list[EndedEarly]:
    """Arms that were ended below the parent run of the winner's runs, in the order of their names."""
    if not ranking.rows:
        return []
    parents = {reading.run.tags.get(PARENT) for reading in ranking.rows[0].readings} - {None}
    found = {}
    for run, _ in ranking.excluded:
        why = run.tags.get(names.TAG_HALVING)
        if why and run.tags.get(PARENT) in parents:
            verdict, _, where = why.partition(" at ")
            arm = run.tags.get(names.TAG_ARM, run.strategy)
            found[arm] = EndedEarly(arm, verdict, where, run)
    return [found[arm] for arm in sorted(found)]


def told_apart(found: Sequence[EndedEarly]) -> bool:
    """Whether the arm that is left was told apart from every one that was ended: more than the margin ahead of all."""
    return bool(found) and all(one.verdict == BEHIND for one in found)


def sentences(found: Sequence[EndedEarly]) -> list[str]:
    """What is said of them in a verdict."""
    lines = []
    for behind, text in ((True, "behind by more than the margin"), (False, "within the margin of the leader")):
        told = [f"{one.arm} at {one.where}" for one in found if (one.verdict == BEHIND) == behind]
        if told:
            lines.append(f"Ended early by halving, {text}: {', '.join(told)}.")
    return lines
