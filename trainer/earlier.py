"""How fast earlier runs of the same work were on this machine, read from the folders that they left."""

from dataclasses import dataclass
from pathlib import Path

from trainer import names
from trainer.config.resolved import Resolved
from trainer.runs import FREE, SPOOL, is_of_this_host, runs_below
from trainer.spool import entry_of

_DECIDES = ("model.", "strategy.", "tuner.", "prompts.", "custom.augmentation.", "launch.", "deepspeed.", "data.")
_DECIDE_TOO = (
    "global_max_length",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.packing",
    "training.bf16",
    "training.gradient_checkpointing",
    "training.vit_gradient_checkpointing",
)
"""Settings on which the speed of a step depends."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What an earlier run has measured."""

    tokens_per_second: float
    """Of all ranks together, over its whole training; evaluations are not in it."""
    run: str
    """Name of its folder."""
    tokens: int
    """So many it was measured over."""


def earlier_pace(resolved: Resolved) -> Pace | None:
    """The newest run in `training.output_dir` that did the same work on this host; None where there is none.

    Learning rates, seed, length of training and evaluations may differ: they do not change what a step costs.
    """
    own = {k: v for k, v in resolved.params().items() if k not in FREE and (k.startswith(_DECIDES) or k in _DECIDE_TOO)}
    for path, facts in runs_below(Path(resolved.config.training.output_dir)):  # the newest first
        same = all(facts["params"].get(key) == value for key, value in own.items())
        if same and is_of_this_host(facts) and (row := _last_row(path / SPOOL)):
            tokens, seconds = row[names.TOKENS_SEEN], row[names.TRAIN_SECONDS]
            return Pace(tokens / seconds, path.name, int(tokens))
    return None


def _last_row(spool: Path) -> dict[str, float] | None:
    """The newest metric row of a spool that says how long training took; damaged lines are passed over."""
    for segment in sorted(spool.glob("*.jsonl"), reverse=True):
        try:
            lines = segment.read_bytes().splitlines(keepends=True)
        except OSError:
            continue
        for line in reversed(lines):
            entry = entry_of(line)
            values = entry.body.get("values", {}) if entry is not None else {}
            if isinstance(values, dict) and values.get(names.TRAIN_SECONDS) and values.get(names.TOKENS_SEEN):
                return values
    return None
