"""When evaluations, checkpoints and resume points are due, and where training pauses, by steps and samples."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things are due, by optimizer steps and samples; all of it known before training starts."""

    total_steps: int
    n_samples: int
    """Training samples of an epoch."""
    eval_steps: frozenset[int]
    eval_samples: int | None = None
    """Training samples between two evaluations, in place of `eval_steps`."""
    save_steps: frozenset[int] = frozenset()
    resume_steps: frozenset[int] | None = frozenset()
    """Where a resume point is written, None: after every evaluation but that of step 0; one is in any case at the last
    step, and where somebody asks for it."""
    save_best_from: int | None = None
    """First step from which the lowest eval loss gets a `best` checkpoint (step 0 has no adapter); None: never."""
    patience: int | None = None
    """Evaluations without a new lowest eval loss after which training ends; None: it does not end early."""
    pause_after: int | None = None
    """Training samples after which it pauses; None: it does not."""

    def evaluates(self, step: int, samples: int, evaluated_at: int) -> bool:
        """Whether an evaluation is due, beside that of the last step.

        By samples it is so at step 0 and at the first step that has reached the next multiple of `eval_samples`: packs
        hold a varying number of samples, so that a step hardly ever ends on it.

        Args:
            step: updates done.
            samples: training samples they have seen.
            evaluated_at: samples that had been seen at the evaluation before; -1: there was none.
        """
        if self.eval_samples is None:
            return step in self.eval_steps
        return samples // self.eval_samples > evaluated_at // self.eval_samples

    def keeps(self, step: int, *, evaluated: bool) -> bool:
        """Whether a resume point is due, beside that of the last step."""
        return evaluated and step > 0 if self.resume_steps is None else step in self.resume_steps

    def saves_best(self, step: int, loss: float, lowest: float) -> bool:
        """Whether an eval loss gets a checkpoint of its own: one below the lowest that has one."""
        return loss < lowest and self.save_best_from is not None and step >= self.save_best_from
