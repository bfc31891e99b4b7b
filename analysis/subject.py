"""A comparison as the careful reader takes it: arms with what is known of them, and what was printed about them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.ranking import STEP, Ranking, Row
from analysis.runs import Run
from analysis.settings import ACCUMULATION, BLOCKS, LORA_RANK, METHOD, VIT_LR, augmentation, number, setting
from trainer import names

NAN = math.nan

MUST_AGREE = {
    names.TAG_BASE_DIGEST: "base weights",
    names.TAG_TRAIN_DIGEST: "training data",
    names.TAG_VAL_DIGEST: "validation data",
    names.TAG_CODE_VERSION: "code",
    **{names.DTYPE + part: f"number format of what trains of the {part}" for part in names.PARTS},
    "tracking.smoothing_weight": "smoothing",
    "tracking.probe_records": "records behind the clean gap",
    "tracking.vision_gain_records": "records behind the vision gain",
    "tracking.generate_records": "records behind F1",
}
"""Tag or param -> what it is of; runs in one ranking should have the same."""


_ELSE = {names.TAG_BASE_DIGEST: "model.model"}
"""Param that stands for a tag where that one is missing."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What is known of one arm, from a report or from runs; nan, empty or None where it is not."""

    name: str
    n_seeds: int = 1
    """With a finite value."""
    n_diverged: int = 0
    """Seeds whose ranked value is nan or infinite."""
    ranked: float = NAN
    """The value that it is ranked by."""
    eval_loss: float = NAN
    eval_loss_smoothed: float = NAN
    train_loss: float = NAN
    train_loss_smoothed: float = NAN
    lowest: float = NAN
    """Lowest eval loss of the curve, nats per supervised token."""
    lowest_step: float = NAN
    final_step: float = NAN
    hours: float = NAN
    samples: float = NAN
    gap: float = NAN
    """As published: eval minus train loss, both smoothed."""
    f1: float = NAN
    vision_gain: float = NAN
    micro_batch: float = NAN
    accumulation: float = NAN
    blocks: str = ""
    """Vision blocks, as configured."""
    method: str = ""
    """Of the vision part: lora, full or frozen."""
    rank: str = ""
    """Of LoRA, as configured."""
    vit_lr: float = NAN
    stopped_early: bool = False
    augmentation: str = "off"
    """How training samples were changed: off, clean or published_noisy."""
    after_the_end: Mapping[int, float] = field(default_factory=dict)
    """Step -> eval loss that a report gives for a step which the run has not come to."""
    facts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Tags and params of its runs -> the values that occur."""
    gate: frozenset[str] = frozenset({"passed"})

    @property
    def micro_batches(self) -> float:
        """Micro-batches seen in all, on one rank."""
        return self.final_step * self.accumulation


@dataclass(frozen=True, slots=True)
class Subject:
    """A comparison to be read: its arms, and what was printed about them."""

    arms: Sequence[Arm]
    """In the order of the ranking."""
    margins: Mapping[str, float] = field(default_factory=dict)
    """Arm -> printed margin over the winner, percent."""
    effective_batch: tuple[float, float] | None = None
    """Smallest and largest as printed, in packs."""
    ranks: int = 1
    full_fits_better: bool = False
    """Whether it is claimed that full fine-tuning reaches lower training loss than LoRA."""
    full_needs_accumulation: float = NAN
    """Micro-batches a step that full fine-tuning is said to need."""


def subject_of(ranking: Ranking) -> Subject:
    """What a ranking of runs says, as the checks read it.

    Where all of them are published, also what was printed about them; margins only where the ranking is the one that
    they were printed for.
    """
    printed = [_printed(row.readings[0].run) for row in ranking.rows]
    at_end = ranking.at.kind == "final"
    claims: dict[str, Any] = printed[0].get("claims", {}) if printed and all(printed) else {}
    low, high = claims.get("effective_batch", (NAN, NAN))
    as_printed = bool(claims) and ranking.by == names.EVAL_LOSS_SMOOTHED and at_end
    margins = {row.label: of_arm["margin"] for row, of_arm in zip(ranking.rows, printed, strict=True) if as_printed}
    return Subject(
        arms=[_arm(row, ranking.by, of_arm, at_end=at_end) for row, of_arm in zip(ranking.rows, printed, strict=True)],
        margins={label: margin for label, margin in margins.items() if margin is not None},
        effective_batch=(low, high) if "effective_batch" in claims else None,
        ranks=claims.get("ranks", 1),
        full_fits_better=claims.get("full_fits_better", False),
        full_needs_accumulation=claims.get("full_needs_accumulation", NAN),
    )


def _printed(run: Run) -> dict[str, Any]:
    """What was printed about a published run; anybody can set tags, and what is not ours says nothing."""
    if names.TAG_SOURCE not in run.tags:
        return {}
    try:
        found = json.loads(run.tags.get(names.TAG_PRINTED, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _arm(row: Row, by: str, printed: Mapping[str, Any], *, at_end: bool) -> Arm:
    def mean(key: str) -> float:
        return row.estimates[key].mean

    runs = [reading.run for reading in row.readings]
    params = runs[0].params
    facts = {
        key: frozenset(v for run in runs if (v := run.tags.get(key) or run.params.get(_ELSE.get(key, key))))
        for key in MUST_AGREE
    }
    return Arm(
        name=row.label,
        n_seeds=row.estimates[by].n,
        n_diverged=row.estimates[by].excluded,
        ranked=mean(by),
        eval_loss=mean(names.EVAL_LOSS),
        eval_loss_smoothed=mean(names.EVAL_LOSS_SMOOTHED),
        train_loss=mean(names.TRAIN_LOSS),
        train_loss_smoothed=mean(names.TRAIN_LOSS_SMOOTHED),
        lowest=mean(names.BEST_LOSS),
        lowest_step=mean(names.BEST_STEP),
        # elsewhere than at the end these say how far an arm was read, and not what it was given
        final_step=mean(STEP) if at_end else NAN,
        hours=mean(names.TRAIN_SECONDS) / 3600 if at_end else NAN,
        samples=mean(names.SAMPLES_SEEN) if at_end else NAN,
        stopped_early=any(run.tags.get(names.TAG_STOPPED_EARLY) for run in runs),
        gap=mean(names.GAP),
        f1=mean(names.F1),
        vision_gain=mean(names.VISION_GAIN),
        micro_batch=number(params.get("training.per_device_train_batch_size")),
        accumulation=number(setting(params, ACCUMULATION)),
        blocks=params.get(BLOCKS, ""),
        method=params.get(METHOD, ""),
        rank=params.get(LORA_RANK, ""),
        vit_lr=number(params.get(VIT_LR)),
        augmentation=augmentation(params),
        after_the_end={int(step): loss for step, loss in printed.get("after_the_end", {}).items()},
        facts=facts,
        gate=frozenset(run.tags.get(names.TAG_GATE, "") for run in runs),
    )


def known(value: float) -> bool:
    """Whether there is a value."""
    return not math.isnan(value)
