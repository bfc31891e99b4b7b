"""What a comparison would do (`--dry_run`): its runs with their commands, steps, and hours where they can be known."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.compare.arms import Entered, arguments
from trainer.compare.asked import HALVING, Asked
from trainer.compare.children import Standing, standing
from trainer.compare.description import kind_of
from trainer.compare.tuning import SHARE
from trainer.runs import FREE, RUN_FILE

_NO_MATTER = {
    *FREE,
    "training.seed",
    "training.max_steps",
    "training.num_train_epochs",
    "training.vit_lr",
    "training.aligner_lr",
    "training.learning_rate",
    "tracking.arm",
}
"""Settings that do not change what a step takes."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one arm."""

    entered: Entered
    steps: int
    """Optimizer steps of a run."""
    samples: int
    """Training samples that a run sees."""
    seconds: float | None
    """Of a step, with its part of evaluations and of the run's beginning and end; None: not known."""
    known: int
    """Finished runs that this was measured on."""


def forecasts(asked: Asked) -> list[Forecast]:
    """Of each arm, by the plan of its first seed and what runs of the same settings have taken before.

    Raises:
        UserError: whatever `trainer run` would refuse.
    """
    from trainer import build  # torch, which takes seconds

    before = [*_finished_runs(asked.output_dir)]
    found = []
    for entered in asked.arms:
        budget = build.prepare(entered.resolved).budget
        samples = round(budget.total_steps * budget.samples / budget.plan.steps_in_epoch(0))
        seconds = [now.seconds / max(1, now.step) for now in before if _is_like(now, entered)]
        mean = sum(seconds) / len(seconds) if seconds else None
        found.append(Forecast(entered, budget.total_steps, samples, mean, len(seconds)))
    return found


def _finished_runs(output_dir: Path) -> Iterator[Standing]:
    """Runs that were trained in one go, anywhere below a folder: by themselves, or in other comparisons."""
    for file in output_dir.rglob(RUN_FILE):
        now = standing(file.parent)
        if now.state == "over" and now.total_steps and now.in_one_go:
            yield now


def _is_like(before: Standing, entered: Entered) -> bool:
    params = {**entered.resolved.params(), "launch.nproc": str(entered.ranks)}
    return all(before.params.get(key) == value for key, value in params.items() if key not in _NO_MATTER)


def show(asked: Asked, console: Console) -> None:
    """Print the table of arms, the commands, and the hours of all.

    Raises:
        UserError: whatever `trainer run` would refuse.
    """
    found = forecasts(asked)
    runs = len(asked.arms) * len(asked.seeds)
    room = asked.room(runs)
    table = Table(title=f"{len(asked.arms)} arms x {len(asked.seeds)} seeds, {room.why}", title_justify="left")
    for header in ("arm", "settings of its own", "rate", "steps", "samples", "hours a run"):
        table.add_column(header)
    for one in found:
        arm, entered = one.entered.arm, one.entered
        own = " ".join(f"{key}={value}" for key, value in arm.settings.items()) or "-"
        hours = "not known" if one.seconds is None else f"{one.seconds * one.steps / 3600:.3f} (by {one.known} runs)"
        rate = f"{entered.rate.rpartition('.')[2]} {entered.rate_now:g}"
        table.add_row(arm.name, own, rate, str(one.steps), str(one.samples), hours)
    console.print(table)
    console.print(f"{kind_of(asked)}\n".replace("**", ""), markup=False)
    for seed in asked.seeds:
        for entered in asked.arms:
            told = shlex.join(arguments(entered, seed, asked.profile, asked.common))
            console.print(f"python -m trainer run {told}", markup=False)
    console.print(f"\n{_hours(asked, found, room.jobs)}", markup=False)


def _hours(asked: Asked, found: list[Forecast], at_once: int) -> str:
    """The whole, where every arm is known."""
    unknown = [one.entered.arm.name for one in found if one.seconds is None]
    if unknown:
        return (
            f"hours: not known; no run like {', '.join(unknown)} has been finished in one go below {asked.output_dir}"
        )
    each = sum(one.steps * (one.seconds or 0.0) for one in found) / 3600
    whole = each * len(asked.seeds) + each * asked.tune * SHARE
    less = "; halving ends some of them earlier" if asked.policy == HALVING else ""
    return f"hours: {whole:.3f} of runs, about {whole / at_once:.3f} with {at_once} at once, as runs took before{less}"
