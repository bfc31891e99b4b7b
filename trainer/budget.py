"""How long training is and what one optimizer step holds: packs, steps, warm-up, and when things are due."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from trainer.cadence import Cadence
from trainer.config.schema import Config
from trainer.data.packing import Samples, StepPlan
from trainer.metrics import Meter
from trainer.optim import Schedule
from trainer.strategy import Part


@dataclass(frozen=True)
class Budget:
    """The steps of one run; every number of it follows from the plan and the length of training."""

    plan: StepPlan
    total_steps: int
    warmup_steps: int

    @property
    def samples(self) -> int:
        """Training samples of the first epoch; with weights other epochs hold a few more or less."""
        return self.plan.samples.count(0)

    @property
    def effective_batch(self) -> int:
        """Packs (samples, where they are not packed) in one optimizer step, over all ranks."""
        return self.plan.micro_batch * self.plan.accumulation * self.plan.ranks

    @property
    def gate_look(self) -> int:
        """The step after which the gate looks at the weights: the end of warm-up, but not before step 2, since LoRA's A
        stands still in the first.
        """
        return max(2, self.warmup_steps)

    @cached_property
    def epoch_ends(self) -> tuple[int, ...]:
        """The last step of each whole epoch that is trained."""
        epochs = math.ceil(self.total_steps / self.plan.steps_in_epoch(0)) + 1
        return tuple(end for end in self.plan.last_steps(epochs) if end <= self.total_steps)


def step_plan_from(config: Config, samples: Samples) -> StepPlan:
    """Which of these samples every step of a run holds."""
    training = config.training
    return StepPlan(
        samples=samples,
        seed=training.seed,
        micro_batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        ranks=config.launch.ranks,
        capacity=config.pack_length,
    )


def budget_from(config: Config, samples: Samples) -> Budget:
    """Steps and packs of a run over these samples."""
    training, plan = config.training, step_plan_from(config, samples)
    total = training.max_steps or plan.last_steps(training.num_train_epochs)[-1]
    # rounded up, but not for the last bit of a float product: 0.07 * 100 is 7, not 8
    return Budget(plan, total, math.ceil(round(training.warmup_ratio * total, 9)))


def cadence_from(config: Config, budget: Budget, pause_after: int | None = None) -> Cadence:
    """When evaluating and saving are due; step 0 is evaluated too, so that every curve starts at the base model.

    Args:
        config: of the run.
        budget: its length.
        pause_after: training samples after which it pauses; None: it does not.
    """
    training, total, between = config.training, budget.total_steps, config.training.resume_steps
    saves: Iterable[int] = ()
    if training.save_strategy == "steps":
        saves = range(training.save_steps, total, training.save_steps)
    elif training.save_strategy == "epoch":
        saves = budget.epoch_ends
    return Cadence(
        total_steps=total,
        n_samples=budget.samples,
        eval_steps=frozenset(range(0, total, training.eval_steps)),
        eval_samples=training.eval_samples,
        resume_steps=None if between is None else frozenset(range(between, total, between)),
        save_steps=frozenset(step for step in saves if training.save_delay_steps <= step < total),
        save_best_from=max(1, min(training.save_delay_steps, total)),
        patience=training.early_stopping_patience,
        pause_after=pause_after,
    )


def schedule_from(config: Config, budget: Budget) -> Schedule:
    """Peaks and floor, each times `lr_scale`."""
    training = config.training
    peaks = {Part.VISION: training.vit_lr, Part.ALIGNER: training.aligner_lr, Part.LLM: training.learning_rate}
    return Schedule(
        peaks={part.value: peak * training.lr_scale for part, peak in peaks.items()},
        floor=training.lr_scheduler_kwargs.min_lr * training.lr_scale,
        warmup_steps=budget.warmup_steps,
        total_steps=budget.total_steps,
    )


def meter_from(config: Config, total_steps: int) -> Meter:
    """What turns events into metric rows."""
    return Meter(
        logging_steps=config.training.logging_steps,
        log_first=config.training.logging_first_step,
        total_steps=total_steps,
        smoothing=config.tracking.smoothing_weight,
    )
