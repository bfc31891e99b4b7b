"""Promotes the winner of a comparison: its best checkpoint becomes a version in the Model Registry, with an alias."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from analysis.ended_early import EndedEarly, ended_early, sentences, told_apart
from analysis.ranking import Ranking, Reading, direction, nothing_ranked
from analysis.statistics import Difference
from analysis.store import Store
from analysis.verdict import pair_of, standing
from trainer import names
from trainer.checkpoint import file_sha256
from trainer.config.problems import shown
from trainer.errors import UserError

_TOLD = (names.EVAL_LOSS, names.BEST_LOSS, names.F1, names.GAP, names.VISION_GAIN)
"""Metrics that become tags of the version, as they were at its checkpoint."""


def promote(store: Store, ranking: Ranking, model: str, alias: str, *, anyway: bool) -> tuple[str, Reading]:
    """Register the winner's best checkpoint.

    Args:
        store: the store.
        ranking: of at least one arm.
        model: name in the registry.
        alias: set on the version.
        anyway: also where the winner cannot be told from the second. The only arm that was trained to its end is
            told from those that were ended because they were behind.

    Returns:
        The version, and the run that it is of: of the winner's seeds the one with the best value.

    Raises:
        UserError: MLflow does not take these names, the winner is not distinguishable from the second, or its
            checkpoint is not to be had or not whole.
    """
    _check_names(model, alias)
    finite = [row for row in ranking.rows if not math.isnan(row.estimates[ranking.by].mean)]
    if not finite:
        raise nothing_ranked(str(store))
    winner = finite[0]
    second = finite[1].label if len(finite) > 1 else ""
    pair = pair_of(ranking, winner, finite[1]) if second else None
    ended = ended_early(ranking)
    distinguishable = standing(ranking, finite[1]) == "ahead" if second else told_apart(ended)
    if not distinguishable and not anyway:
        what = _why_not(pair, ended)
        raise UserError(
            "promote",
            f"{winner.label} is not distinguishable from {second or 'any other'}: {what}",
            "a winner that is more than seed noise ahead of the second",
            "run more seeds (python -m analysis report says how many), or promote it --anyway",
        )
    worse = 1 if direction(ranking.by) == "lower" else -1
    went_well = [reading for reading in winner.readings if math.isfinite(reading.values[ranking.by])]
    best = min(went_well, key=lambda reading: worse * reading.values[ranking.by])
    folder, digest, step = _checkpoint(store, best)
    values = {name: store.curves([best.run.id], name)[best.run.id].at_or_before(step) for name in _TOLD}
    runs = [reading.run for row in ranking.rows for reading in row.readings]
    tags = {
        names.TAG_CHECKPOINT_DIGEST: digest,
        names.TAG_STRATEGY: best.run.strategy,
        names.TAG_SEED: best.run.seed,
        names.TAG_COMPARISON: store.comparison_run(runs)[0],
        "distinguishable": "yes" if distinguishable else "no, promoted anyway",
        **{name: f"{value:.6g}" for name, value in values.items() if not math.isnan(value)},
    }
    return store.promote(best.run.id, folder, model, alias, tags), best


def _check_names(model: str, alias: str) -> None:
    """Refuse what MLflow would, which tells it as if the store were at fault."""
    if not model.strip() or set(model) & set("/:"):
        raise UserError("--name", shown(model), "a name without / and :", "take one such as qwen3vl-vision")
    if not re.fullmatch(r"[\w-]+", alias, re.ASCII) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        allowed = "letters, digits, _ and -; not latest, nor v and a number"
        raise UserError("--alias", shown(alias), allowed, "take one such as champion")


def _why_not(pair: Difference | None, ended: Sequence[EndedEarly]) -> str:
    """Why the winner is not told apart from the second; None: there is none."""
    if pair is None:
        return " ".join(sentences(ended)) or "there is no second arm"
    if pair.method == "untested":
        return "too few seeds to test"
    return f"p = {pair.p_adjusted:.2g} after Holm, difference {abs(pair.estimate.mean):.4f}"


def _checkpoint(store: Store, reading: Reading) -> tuple[Path, str, int]:
    """The folder of a run's best checkpoint, whole as its manifest says; a digest of its files; its step."""
    run = reading.run
    known = store.artifact_json(run.id, names.ARTIFACT_CHECKPOINTS) or {}
    saved = known.get("best") or known.get("last")
    if saved is None:
        raise UserError(f"run {run.name} ({run.id})", "no checkpoint", "a run that saved one", "train it again")
    folder = Path(saved["path"])
    for name, of_file in saved["files"].items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != of_file["sha256"]:
            raise UserError(
                str(path),
                "not there" if not path.is_file() else "not the file that the run has written",
                f"the checkpoint of run {run.name} ({run.id}), as its manifest has it",
                "promote on the machine that trained it, or bring the folder back to this path",
            )
    return folder, hashlib.sha256(json.dumps(saved["files"], sort_keys=True).encode()).hexdigest(), int(saved["step"])
