"""A sweep from its plan to its end: opens the study, works at it, and tells the run above all trials how it stands."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from trainer import launch, names
from trainer.addresses import Store
from trainer.compare.arms import on_one_host
from trainer.compare.children import Job
from trainer.compare.jobs import Board, Room, gpus_to_deal, room_for
from trainer.config.places import PATH_KEYS
from trainer.config.resolved import Resolved
from trainer.sweep import points
from trainer.sweep.axes import keys_of
from trainer.sweep.shared_run import Parent
from trainer.sweep.space import name_of
from trainer.sweep.storage import Storage
from trainer.sweep.study import Given, Study, Tried, opened
from trainer.sweep.sweep_file import Sweep, is_common
from trainer.sweep.worker import Worker


@dataclass(frozen=True, slots=True)
class Plan:
    """What this worker will do."""

    sweep: Sweep
    storage: Storage
    folder: Path
    """Of this sweep: its trials, and its study where no other storage is named."""
    room: Room
    """How many trials at once."""


def plan(sweep: Sweep, storage: Storage, folder: Path, jobs: int | None) -> Plan:
    """How a worker of this machine takes part in a sweep.

    A trial trains on one rank unless `launch.nproc` is a number: what dropout draws depends on the ranks, and trials
    of all workers are to be the same; more trials at once use the rest of a machine, and better.

    Args:
        sweep: what is tried.
        storage: of the study.
        folder: of this sweep.
        jobs: trials at once; None: as many as there is room for.

    Raises:
        ConfigError: more than there is room for.
    """
    resolved = sweep.resolved(sweep.first())
    on_one_host(resolved, "sweep")
    room = room_for(jobs, ranks=_ranks(resolved), gpus=gpus_to_deal(resolved.config.launch.gpus), runs=sweep.trials)
    return Plan(sweep, storage, folder, room)


def _ranks(resolved: Resolved) -> int:
    """Of each trial."""
    if resolved.config.launch.gpus is not None and launch.may_have_gpus():
        from trainer import gpus  # imports torch

        resolved = gpus.settled(resolved)
    return 1 if resolved.config.launch.nproc == "auto" else resolved.config.launch.ranks


def base_of(sweep: Sweep) -> dict[str, str]:
    """What all points have in common: the configuration of one of them, without what points change.

    Workers of other machines have the same, so paths and ranks are left out.

    Args:
        sweep: what is tried.
    """
    varied = {key for axis in sweep.axes for key in keys_of(axis)}
    params = sweep.resolved(sweep.first()).params()
    return {key: text for key, text in params.items() if is_common(key) and key not in {*PATH_KEYS, *varied}}


def job_of(plan: Plan, study: Study, given: Given, parent: str) -> Job:
    """The run that tries a point; every attempt has the same folder, and goes on with what is there.

    Args:
        plan: of this worker.
        study: of the sweep.
        given: the trial.
        parent: MLflow run that it is nested below.
    """
    strategy, changed = plan.sweep.of(given.point)
    profile = ("--profile", plan.sweep.profile) if plan.sweep.profile else ()
    settings = tuple(part for key, text in changed.items() for part in (f"--{key}", text))
    alone = () if "launch.nproc" in changed else ("--launch.nproc", str(_ranks(plan.sweep.resolved(given.point))))
    tags = {names.TAG_ROLE: names.TRIAL, names.TAG_SWEEP: plan.storage.name, names.TAG_TRIAL: str(given.first)}
    return Job(
        name=name_of(given.point),
        arguments=(strategy, *profile, *settings, *alone),
        folder=plan.folder / f"{given.first:04}-{study.key[:8]}",
        parent=parent,
        tags={**tags, **{names.TAG_POINT + key: str(value) for key, value in given.point.items()}},
    )


def conduct(plan: Plan, store: Store, board: Board) -> list[Tried]:
    """Take part in a sweep until all its points are over.

    Args:
        plan: of this worker.
        store: the tracking store, the same for all workers.
        board: shows what happens.

    Returns:
        What has become of every point.

    Raises:
        ConfigError: the study is of another sweep, or its database cannot be used.
        TrackingError: the store does not answer.
    """
    parent = Parent(store)
    with opened(plan.sweep, plan.storage, base_of(plan.sweep)) as study:
        if again := study.retry_failed():
            board.say(f"{again} points whose process had failed are tried again")
        over = study.is_over(study.tried())
        name, key = plan.storage.name, study.key
        run_id = study.parent(lambda known: parent.found_or_made(known, study=name, key=key, over=over))
        try:
            if over:
                board.say("this sweep is finished")
            else:
                Worker(study, lambda given: job_of(plan, study, given, run_id), plan.room, board).work()
        except BaseException:
            with suppress(Exception):  # what has ended this worker is what is told
                _tell(plan.sweep, study, parent)
            raise
        return _tell(plan.sweep, study, parent)


def _tell(sweep: Sweep, study: Study, parent: Parent) -> list[Tried]:
    """Write down how the sweep stands; where the study cannot be read, that this worker has left it."""
    try:
        tried = study.tried()
    except BaseException:
        parent.close("KILLED")
        raise
    parent.tell(points.markdown(sweep, tried), artifacts(sweep, tried), status=_status(study, tried))
    return tried


def artifacts(sweep: Sweep, tried: Sequence[Tried]) -> dict[str, str]:
    """Name -> text: every trial, and the points.

    Args:
        sweep: what was tried.
        tried: what has become of it.
    """
    return {
        names.ARTIFACT_TRIALS: points.as_csv(sweep, tried),
        names.ARTIFACT_POINTS: points.as_json(sweep, tried),
    }


def _status(study: Study, tried: list[Tried]) -> str | None:
    """How the run above the trials ends, when this worker does."""
    if study.is_over(tried):
        return "FINISHED"
    by_others = any(one.state == TrialState.RUNNING and one.worker != study.worker for one in tried)
    return None if by_others else "KILLED"
