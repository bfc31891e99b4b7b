"""Parameter groups from the trained tensors, and the learning-rate schedule as a pure function of the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.model import TrainedTensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to each part's own peak, then cosine down to one absolute floor for all."""

    peaks: Mapping[str, float]
    """Part -> highest learning rate."""
    floor: float
    """Learning rate at the last step, in every part."""
    warmup_steps: int
    total_steps: int

    def warmup_of(self, start: int) -> int:
        """Warm-up steps of what begins to train after `start` steps: the same share of the steps that it has."""
        return math.ceil(round(self.warmup_steps * (1 - start / self.total_steps), 9))

    def rate(self, part: str, step: int, start: int = 0) -> float:
        """Learning rate of optimizer step `step`, counted from 1, of what trains since `start` steps were done.

        peak * step / warm-up while warming up (never 0; the first step has the peak where there is no warm-up), then
        floor + (peak - floor) * (1 + cos(pi * t)) / 2 with t the fraction of the remaining steps that is done
        (Loshchilov & Hutter 2017, arXiv:1608.03983). What begins later has it times (step - start) / its own warm-up.
        """
        if start and step - start < (own := self.warmup_of(start)):
            return self.rate(part, step) * ((step - start) / own)
        peak = self.peaks[part]
        if step <= self.warmup_steps:
            return peak * (step / self.warmup_steps)
        done = (step - max(1, self.warmup_steps)) / max(1, self.total_steps - max(1, self.warmup_steps))
        return self.floor + (peak - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def parameter_groups(trained: Sequence[TrainedTensor], *, weight_decay: float) -> list[dict[str, Any]]:
    """One group for each part, start and decay or no decay, none empty; every trained tensor is in exactly one.

    Biases and norm weights (tensors of one dimension) are not decayed.
    """
    groups: dict[tuple[str, int, bool], list[torch.nn.Parameter]] = {}
    for tensor in trained:
        groups.setdefault((tensor.part.value, tensor.start, tensor.parameter.ndim > 1), []).append(tensor.parameter)
    return [
        {"params": ps, "part": part, "start": start, "lr": 0.0, "weight_decay": weight_decay if decays else 0.0}
        for (part, start, decays), ps in sorted(groups.items())
    ]


def make_optimizer(trained: Sequence[TrainedTensor], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `parameter_groups`, betas 0.9 and 0.999."""
    return torch.optim.AdamW(parameter_groups(trained, weight_decay=weight_decay), betas=(0.9, 0.999), fused=True)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> dict[str, float]:
    """Set every group's rate for `step`; returns part -> the rate the optimizer now holds.

    Where a part has groups that began later, the newest one's is under `PART_newest`.
    """
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(group["part"], step, group["start"])
    return {
        group["part"] + ("_newest" if group["start"] else ""): float(group["lr"]) for group in optimizer.param_groups
    }
