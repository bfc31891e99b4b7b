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

    def rate(self, part: str, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1.

        peak * step / warm-up while warming up (never 0), then floor + (peak - floor) * (1 + cos(pi * t)) / 2 with t the
        fraction of the remaining steps that is done (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts).
        """
        peak = self.peaks[part]
        if step <= self.warmup_steps:
            return peak * (step / self.warmup_steps)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.floor + (peak - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def parameter_groups(trained: Sequence[TrainedTensor], *, weight_decay: float) -> list[dict[str, Any]]:
    """One group for each part and for decay or no decay, none of them empty; every trained tensor is in exactly one.

    Biases and norm weights (tensors of one dimension) are not decayed.
    """
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for tensor in trained:
        groups.setdefault((tensor.part.value, tensor.parameter.ndim > 1), []).append(tensor.parameter)
    return [
        {"params": parameters, "part": part, "lr": 0.0, "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), parameters in sorted(groups.items())
    ]


def make_optimizer(trained: Sequence[TrainedTensor], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `parameter_groups`, betas 0.9 and 0.999."""
    return torch.optim.AdamW(parameter_groups(trained, weight_decay=weight_decay), betas=(0.9, 0.999), fused=True)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> dict[str, float]:
    """Set every group's rate for `step`; returns part -> the rate the optimizer now holds."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(group["part"], step)
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}
