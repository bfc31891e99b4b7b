"""What the loop tells the outside: frozen events, emitted in order, that tracking, display and tests listen to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EVAL, PROBE, OOD, EXCHANGED = "eval", "probe", "ood", "exchanged_images"
"""The evaluation sets: validation, a part of training, out of domain, validation with images exchanged."""


@dataclass(frozen=True, slots=True)
class Seen:
    """How much training has happened so far, cumulative."""

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    """Seconds in training steps: evaluation and saving are not in it."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step was taken."""

    seen: Seen
    loss: float
    """Nats per supervised token over the whole step."""
    supervised_tokens: int
    learning_rates: Mapping[str, float]
    """Part -> the rate the optimizer used in this step."""
    grad_norms: Mapping[str, float]
    """`total` and each part, before clipping."""


@dataclass(frozen=True, slots=True)
class RecordLosses:
    """Summed loss and number of supervised tokens of each record of one evaluation set, in the order of its ids."""

    record_ids: tuple[str, ...]
    domains: tuple[str | None, ...]
    loss_sums: tuple[float, ...]
    """Nats."""
    token_counts: tuple[int, ...]

    def mean(self) -> float:
        """Nats per supervised token over the whole set; the same in whatever order the records stand."""
        return math.fsum(self.loss_sums) / sum(self.token_counts)

    def mean_by_domain(self) -> dict[str, float]:
        """Nats per supervised token of each domain that occurs."""
        sums: dict[str, tuple[list[float], int]] = {}
        for domain, loss, count in zip(self.domains, self.loss_sums, self.token_counts, strict=True):
            if domain is not None:
                losses, tokens = sums.setdefault(domain, ([], 0))
                sums[domain] = ([*losses, loss], tokens + count)
        return {domain: math.fsum(losses) / count for domain, (losses, count) in sorted(sums.items())}


@dataclass(frozen=True, slots=True)
class EvalDone:
    """The evaluation sets that were due have been run."""

    seen: Seen
    losses: Mapping[str, RecordLosses]
    """Evaluation set (`EVAL`, `PROBE`, `OOD`, `EXCHANGED`) -> its losses."""
    seconds: float


def eval_done_of(tree: Mapping[str, Any]) -> EvalDone:
    """The event that `dataclasses.asdict` has made a tree of.

    Raises:
        KeyError, TypeError, ValueError: it is another tree.
    """
    losses = {
        name: RecordLosses(
            tuple(map(str, of_set["record_ids"])),
            tuple(None if domain is None else str(domain) for domain in of_set["domains"]),
            tuple(map(float, of_set["loss_sums"])),
            tuple(map(int, of_set["token_counts"])),
        )
        for name, of_set in tree["losses"].items()
    }
    return EvalDone(Seen(**tree["seen"]), losses, float(tree["seconds"]))


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A checkpoint could not be written, of lack of room for example; what was there before is untouched."""

    seen: Seen
    what: str
    """`best`, `step-N`, or `resume point`."""
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    seen: Seen
    kind: str
    """`best` or `last`, or `step-N`."""
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GatePassed:
    """The training gate has seen everything it asks for, and all of it held."""

    seen: Seen


@dataclass(frozen=True, slots=True)
class StageBegun:
    """More vision blocks train from the next step on."""

    seen: Seen
    new: tuple[int, ...]
    """The blocks that begin."""
    blocks: tuple[int, ...]
    """All that train."""


@dataclass(frozen=True, slots=True)
class StoppedEarly:
    """Training ends here: for `evaluations` evaluations the eval loss has not become better."""

    seen: Seen
    evaluations: int


Event = StepDone | EvalDone | CheckpointSaved | SaveFailed | GatePassed | StageBegun | StoppedEarly
