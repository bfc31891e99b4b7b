"""Params of runs as settings: which of them make an arm, when two values are the same, where runs differ."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

from analysis.runs import Run
from trainer import names
from trainer.config.load import SHORT_NAMES

BLOCKS, METHOD = "strategy.vision.blocks", "strategy.vision.method"
SCHEDULE = "strategy.vision.schedule"
SEED, VIT_LR, LORA_RANK = "training.seed", "training.vit_lr", "tuner.lora_rank"
AUGMENTATION = "custom.augmentation.mode"
ACCUMULATION, _RANKS = "training.gradient_accumulation_steps", "launch.nproc"
_SWITCH = "custom.augmentation.enabled"
"""On in every mode but `off`; of older runs, which have no mode, all that is known."""

_MAKE_NO_ARM = (
    SEED, "training.run_name", "training.output_dir", "tracking.", "launch.", "data.dataloader_num_workers",
)  # fmt: skip
"""Settings that may differ between runs of one arm."""

DERIVED = (
    names.TRAINABLE_PARAMETERS, names.DTYPE, names.VISION_BLOCKS, names.VISION_STAGES, names.SKIPPED_RECORDS,
    names.IMAGE_PROCESSOR,
)  # fmt: skip
"""Params that follow from the settings and are none themselves."""

_FIRST = ("strategy.", AUGMENTATION, "tuner.", "training.", "custom.augmentation.", "model.", "prompts.")

_BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


@cache
def is_setting(key: str) -> bool:
    """Whether a param says how a run was meant to be; `mlflow run` logs its short names (`seed`, `model`) as well."""
    return not key.startswith((*_MAKE_NO_ARM, *DERIVED)) and key not in _TWICE


_TWICE = {*SHORT_NAMES, "profile", "config", "resume", "allow_drift"}
"""Parameters of entry points, which `mlflow run` logs as typed; what they set stands under dotted keys, if anywhere."""


def differing(runs: Sequence[Run], *, derived: bool = False) -> list[str]:
    """Settings in which runs differ, those first that comparisons are usually about.

    Args:
        runs: any number.
        derived: whether params that follow from settings are listed too.
    """
    keys = sorted({key for run in runs for key in run.params}, key=lambda key: (_section(key), key))
    wanted = [key for key in keys if is_setting(key) or (derived and key.startswith(DERIVED))]
    wanted = [key for key in wanted if key != _SWITCH or any(AUGMENTATION not in run.params for run in runs)]
    return [key for key in wanted if len({setting(run.params, key) for run in runs}) > 1]


def setting(params: Mapping[str, str], key: str) -> str | None:
    """A param in one spelling for equal values; accumulation over all ranks: how they share a step makes no arm."""
    if key == ACCUMULATION and not math.isnan(whole := number(params.get(key)) * number(params.get(_RANKS, "1"))):
        return repr(whole)
    return same(params.get(key))


def augmentation(params: Mapping[str, str]) -> str:
    """`off`, or how training samples were changed: `clean` or `published_noisy`."""
    mode = params.get(AUGMENTATION, "null")
    if mode != "null":
        return mode
    return "clean" if same(params.get(_SWITCH)) == "true" else "off"


def is_idle(key: str, params: Mapping[str, str]) -> bool:
    """Whether a setting does nothing in a run: the switch beside a mode, and how to augment where nothing is."""
    if key == _SWITCH:
        return AUGMENTATION in params
    return key.startswith("custom.augmentation.") and key != AUGMENTATION and augmentation(params) == "off"


def _section(key: str) -> int:
    return next((place for place, start in enumerate(_FIRST) if key.startswith(start)), len(_FIRST))


@lru_cache(maxsize=100_000)
def same(text: str | None) -> str | None:
    """One spelling for equal values: what is given to `mlflow run` as 1e-4 or no is logged so, and not as 0.0001."""
    value = number(text)
    if not math.isnan(value):
        return repr(value)
    return _BOOLEANS.get(text.lower(), text) if text is not None else None


def number(text: str | None) -> float:
    """A param as a number; nan where it is none."""
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan
