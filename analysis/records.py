"""What the choice of validation records leaves open: a paired bootstrap over per-record losses, weights as they are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.ranking import At, Ranking, Row
from analysis.statistics import Estimate, paired_bootstrap
from trainer.events import EVAL

_SEED = 17
"""Of the one generator that all resamples are drawn from: the same runs give the same intervals."""
_AT = {"final": "last", "best": "best"}


@dataclass(frozen=True, slots=True)
class OverRecords:
    """Another arm minus the winner, over resampled validation records: nats per supervised token."""

    arm: str
    difference: Estimate
    """Its `n` is the number of records."""


def over_records(ranking: Ranking, losses_of: Callable[[str], pd.DataFrame | None]) -> list[OverRecords]:
    """Compare the winner with every other arm, record by record.

    A record's loss is its mean over an arm's seeds: seeds are taken as they are, records as a sample.

    Args:
        ranking: read at its end or at the best; elsewhere no losses of records are kept.
        losses_of: run id -> its per-record losses, as the store has them.

    Returns:
        Arms in the order of the ranking; those without losses of the same records are left out.
    """
    if len(ranking.rows) < 2 or ranking.at.kind not in _AT:
        return []
    winner, *others = ranking.rows
    first = _of_arm(winner, ranking.at, losses_of)
    if first is None:
        return []
    generator = np.random.default_rng(_SEED)
    found = []
    for row in others:
        second = _of_arm(row, ranking.at, losses_of)
        if second is not None and second.index.equals(first.index) and second.tokens.equals(first.tokens):
            shift = paired_bootstrap(first.loss_sum, second.loss_sum, first.tokens, generator)
            found.append(OverRecords(row.label, shift))
    return found


def _of_arm(row: Row, at: At, losses_of: Callable[[str], pd.DataFrame | None]) -> pd.DataFrame | None:
    """Validation records of an arm by id: mean loss_sum over seeds, tokens; None unless every seed has all of them."""
    frames = [losses_of(reading.run.id) for reading in row.readings]
    known = [frame[(frame["at"] == _AT[at.kind]) & (frame["set"] == EVAL)] for frame in frames if frame is not None]
    if len(known) < len(frames) or any(frame.empty for frame in known):
        return None
    together = pd.concat(known).groupby("record_id").agg(
        loss_sum=("loss_sum", "mean"), tokens=("tokens", "first"), n=("tokens", "size")
    )  # fmt: skip
    return together[["loss_sum", "tokens"]] if (together["n"] == len(known)).all() else None
