"""Fair tuning: the same number of learning rates is tried out for every arm, short and on a seed of its own."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from rich.console import Console

from trainer import names
from trainer.compare.arms import Entered, arguments, enter
from trainer.compare.asked import Asked
from trainer.compare.children import Job, Standing, standing
from trainer.compare.parent import Parent
from trainer.compare.stage import RATES_TRIED, Failed, is_over, run_stage, told

SHARE = 0.25
"""Of the length of training: how long a trial is. It is a whole training, warm-up and cosine in that time: a longer one
that is stopped there would still be at its peak, and tell of the rate there alone."""
_STOPPED_ITSELF = 3
"""Exit status of a run that a rate has driven out of what can be computed."""


def factors(trials: int) -> tuple[float, ...]:
    """So many factors in steps of two around 1: (0.5, 1, 2) of three."""
    return tuple(2.0 ** (place - trials // 2) for place in range(trials))


def trial_seed(seeds: Iterable[int]) -> int:
    """The seed of all trials, after those of the comparison: no rate is chosen on a seed that arms are compared on."""
    return max(seeds) + 1


def tuned(asked: Asked, of: Parent, console: Console) -> Asked:
    """Try out rates for every arm where that was not done before; the comparison with each arm's best.

    Raises:
        Failed: a trial has failed for another reason than its rate.
    """
    if of.known(RATES_TRIED) is None:
        of.note(**{RATES_TRIED: try_out(asked, of, console)})
    tried: Mapping[str, Mapping[str, float]] = of.known(RATES_TRIED)
    best = {arm: min(losses, key=lambda rate: (losses[rate], float(rate))) for arm, losses in tried.items()}
    for entered in asked.arms:
        rates = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in tried[entered.arm.name].items())
        said = f"{entered.arm.name}: {entered.rate} {best[entered.arm.name]} (eval loss of {rates})"
        console.print(said, markup=False)
    arms = [entered.arm.with_settings({entered.rate: best[entered.arm.name]}) for entered in asked.arms]
    return replace(asked, arms=enter(arms, asked.seeds[0], asked.profile, asked.common))


def try_out(asked: Asked, of: Parent, console: Console) -> dict[str, dict[str, float]]:
    """Arm -> rate -> eval loss at the end of its trial; infinite where training stopped itself.

    Raises:
        Failed: a trial has failed for another reason.
    """
    jobs = {
        (entered.arm.name, rate): job
        for entered in asked.arms
        for rate, job in _trials(entered, asked, of)
    }  # fmt: skip
    todo = [job for job in jobs.values() if not _has_answered(standing(job.folder))]
    failed = run_stage(todo, asked, of, console, what="trials of learning rates", total=len(jobs))
    if wrong := [one for one in failed if one.status != _STOPPED_ITSELF or one.standing.state != "stopped"]:
        raise Failed(told(wrong, len(jobs)))
    found: dict[str, dict[str, float]] = {}
    for (arm, rate), job in jobs.items():
        found.setdefault(arm, {})[rate] = _loss(standing(job.folder))
    if hopeless := [arm for arm, losses in found.items() if all(math.isinf(loss) for loss in losses.values())]:
        raise Failed(
            f"no learning rate that was tried trains {', '.join(hopeless)}: see the logs in {of.path / 'trials'}"
        )
    return found


def _trials(entered: Entered, asked: Asked, of: Parent) -> Iterable[tuple[str, Job]]:
    """(rate, job) of every rate that is tried out for an arm."""
    training, seed = entered.resolved.config.training, trial_seed(asked.seeds)
    if training.max_steps is None:
        length = {"training.num_train_epochs": f"{training.num_train_epochs * SHARE:.12g}"}
    else:
        length = {"training.max_steps": str(max(1, round(training.max_steps * SHARE)))}
    for factor in factors(asked.tune):
        rate, name = f"{entered.rate_now * factor:.6g}", f"{entered.arm.name}-x{factor:g}"
        arm = entered.arm.with_settings({entered.rate: rate, "tracking.generate_records": "0", **length})
        told_so = arguments(replace(entered, arm=arm), seed, asked.profile, asked.common)
        tags = {names.TAG_ROLE: names.TRIAL, names.TAG_ARM: entered.arm.name}
        yield rate, Job(name, told_so, of.path / "trials" / name, of.run_id, tags)


def _has_answered(now: Standing) -> bool:
    return is_over(now) or now.state == "stopped"


def _loss(now: Standing) -> float:
    last = now.evaluations[-1:]
    return last[0].loss if is_over(now) and last and math.isfinite(last[0].loss) else math.inf
