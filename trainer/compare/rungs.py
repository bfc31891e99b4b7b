"""Halving: trains all arms to rungs, asks `trainer.halving` which need not go on, ends those, and keeps all numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from rich.console import Console

from trainer import names
from trainer.compare.arms import Entered
from trainer.compare.asked import Asked
from trainer.compare.children import Job, Standing, standing
from trainer.compare.jobs import Ended
from trainer.compare.parent import Parent
from trainer.compare.stage import HALVING_LINES, Jobs, is_over, missing, run_stage
from trainer.halving import Rule, decide, rung_loss
from trainer.runs import Busy, disk, held

COURSE, RUNGS = "halving_course", "halving_rungs"
"""What a comparison knows of its halving: where its rungs are, and what was decided at each."""
ARTIFACT = "halving.json"


def length_of(entered: Entered) -> tuple[int, int, int]:
    """Optimizer steps of a run, the training samples that it sees, and how many of these lie between evaluations.

    Raises:
        UserError: whatever `trainer run` would refuse.
    """
    from trainer import build  # torch, which takes seconds

    budget, training = build.prepare(entered.resolved).budget, entered.resolved.config.training
    a_step = budget.samples / budget.plan.steps_in_epoch(0)
    return (
        budget.total_steps,
        round(budget.total_steps * a_step),
        training.eval_samples or round(training.eval_steps * a_step),
    )


def planned_rungs(asked: Asked, rule: Rule) -> dict[str, Any]:
    """Where all arms are evaluated and looked at: after the same training samples, whatever they accumulate.

    Returns:
        total: training samples of the shortest run; every: between evaluations; rungs: multiples of that.
    """
    lengths = [length_of(entered) for entered in asked.arms]
    total = min(samples for _, samples, _ in lengths)
    given = [entered.resolved.config.training.eval_samples for entered in asked.arms]
    evaluations = max(rule.evaluations, *(math.ceil(total / between) for _, _, between in lengths))
    every = min((n for n in given if n), default=max(1, total // evaluations))
    rungs = [every * max(2, round(share * total / every)) for share in rule.rungs]
    return {"total": total, "every": every, "rungs": rungs}


def halve(jobs: Jobs, asked: Asked, of: Parent, console: Console) -> list[Ended]:
    """Train all arms from rung to rung, and end those that need not go on; the runs that have failed.

    An arm of which a run has failed is not judged, and goes on.
    """
    rule = Rule(margin=asked.margin, error=asked.error)
    if of.known(COURSE) is None:
        of.note(**{COURSE: planned_rungs(asked, rule)})
    where = of.known(COURSE)
    own = ("--training.eval_samples", str(where["every"]))
    jobs = {key: replace(job, arguments=(*job.arguments, *own)) for key, job in jobs.items()}
    failed: dict[str, Ended] = {}
    for rung, samples in enumerate(where["rungs"]):
        if rung < len(of.known(RUNGS) or []):  # decided by this command before it was interrupted
            _end_stopped(jobs, of)
            continue
        alive = _alive(asked.names, of)
        if len(alive) < 2:
            break
        here = [job for (arm, _), job in jobs.items() if arm in alive and job.name not in failed]
        todo = [_pausing(job, samples) for job in here if not _has_come(standing(job.folder), samples)]
        what = f"runs to rung {rung + 1}"
        failed |= {one.job.name: one for one in run_stage(todo, asked, of, console, what=what, total=len(here))}
        _decide(jobs, alive, rung, samples, rule, of)
        _end_stopped(jobs, of)
        for line in lines_of_rung(of.known(RUNGS)[rung]):
            console.print(line, markup=False)
    alive = _alive(asked.names, of)
    last = [job for (arm, _), job in jobs.items() if arm in alive and job.name not in failed]
    ended = run_stage(missing(last), asked, of, console, what="runs to the end", total=len(last))
    _publish(jobs, asked, of)
    return [*failed.values(), *ended]


def _pausing(job: Job, samples: int) -> Job:
    return replace(job, arguments=(*job.arguments, "--pause_after_samples", str(samples)))


def _has_come(now: Standing, samples: int) -> bool:
    """Whether a run has come to a rung, and rests there or further on."""
    return is_over(now) or (now.state == "paused" and any(one.samples >= samples for one in now.evaluations))


def _alive(arms: Sequence[str], of: Parent) -> list[str]:
    ended = {found["arm"] for rung in of.known(RUNGS) or [] for found in rung["decisions"] if found["stops"]}
    return [arm for arm in arms if arm not in ended]


def _decide(jobs: Jobs, alive: Sequence[str], rung: int, samples: int, rule: Rule, of: Parent) -> None:
    """Decide once, and write the numbers down before anything follows from them."""
    losses: dict[str, dict[int, float]] = {arm: {} for arm in alive}
    for (arm, seed), job in jobs.items():
        evaluations = [(float(one.samples), one.loss) for one in standing(job.folder).evaluations]
        if arm in losses and (loss := rung_loss(evaluations, samples)) is not None:
            losses[arm][seed] = loss
    found = [{**asdict(one), "stops": one.stops} for one in decide(losses, rung=rung, rule=rule)]
    here = {"rung": rung + 1, "samples": samples, "losses": losses, "decisions": found}
    of.note(**{RUNGS: [*(of.known(RUNGS) or []), json.loads(json.dumps(here))]})


def _end_stopped(jobs: Jobs, of: Parent) -> None:
    """Close the runs of arms that were ended: they stay KILLED, say why, and keep checkpoints and resume points.

    Such a run can be gone on with where it is named: `--resume FOLDER`.
    """
    for rung in of.known(RUNGS):
        why = {one["arm"]: one["verdict"] for one in rung["decisions"] if one["stops"]}
        for (arm, _), job in jobs.items():
            now = standing(job.folder)
            if arm in why and now.path is not None and now.state == "paused":
                try:
                    folder = held(now.path)
                except Busy:
                    continue
                step = f"step {now.evaluations[-1].step}" if now.evaluations else ""
                said = f"{why[arm]} at {rung['samples']} samples"
                try:
                    with disk(now.path):
                        folder.spool.append("tags", values={names.TAG_HALVING: said, names.TAG_STOPPED_EARLY: step})
                        folder.write(state="stopped")
                finally:
                    folder.release()


def _publish(jobs: Jobs, asked: Asked, of: Parent) -> None:
    """All decisions and their numbers, as an artifact and a tag of the parent, and for its description."""
    rungs, saved = of.known(RUNGS) or [], share_of_full(jobs)
    told = {"margin": asked.margin, "error": asked.error, **of.known(COURSE), "share_of_full": saved, "rungs": rungs}
    of.tracker.text(json.dumps(_without_nan(told), indent=1) + "\n", ARTIFACT)
    ended = len(asked.names) - len(_alive(asked.names, of))
    of.tracker.tags({names.TAG_HALVING: f"{ended} of {len(asked.names)} arms ended early"})
    cost = "" if saved is None else f" It took {saved:.0%} of the time that all runs to their ends would have taken."
    lines = chain.from_iterable(["", *lines_of_rung(rung)] for rung in rungs)
    of.note(**{HALVING_LINES: [*lines, "", cost.strip()]})


def share_of_full(jobs: Jobs) -> float | None:
    """Seconds of training and evaluation so far, over what all runs to their ends would take; None: nothing is known.

    A run that was ended early would have gone on at its own pace.
    """
    spent = full = 0.0
    for job in jobs.values():
        now = standing(job.folder)
        latest: dict[str, float] = {}
        for _, row in now.rows:
            latest |= row
        seconds = latest.get(names.TRAIN_SECONDS, 0.0) + latest.get(names.EVALUATION_SECONDS, 0.0)
        spent += seconds
        full += seconds if is_over(now) or not now.step else seconds * now.total_steps / now.step
    return spent / full if full else None


def lines_of_rung(rung: Mapping[str, Any]) -> list[str]:
    """What was decided at a rung, as a Markdown table that can be read on a terminal too."""
    lines = [f"Rung {rung['rung']}, {rung['samples']} training samples:", ""]
    lines += ["| arm | loss | behind the leader | interval | p | verdict |", "| --- | --- | --- | --- | --- | --- |"]
    for one in rung["decisions"]:
        low, high = one["interval"]
        leads = one["verdict"] == "leader" or math.isnan(one["difference"])
        numbers = ["-"] * 3 if leads else [f"{one['difference']:.4f}", f"{low:.4f} to {high:.4f}", f"{one['p']:.3g}"]
        lines.append(f"| {one['arm']} | {one['loss']:.4f} | {' | '.join(numbers)} | {one['verdict']} |")
    first = rung["decisions"][0]
    return [*lines, "", f"Margin {first['margin']:.4f}, error spent here {first['error']:.3g}."]


def _without_nan(value: Any) -> Any:
    """The same with null for what is no number: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
