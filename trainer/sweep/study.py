"""The study that all workers of a sweep share: gives points out, each to one worker, and takes dead workers' back."""

import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from trainer.errors import ConfigError, reason_of
from trainer.sweep.space import Axis, Choices, Value, grid
from trainer.sweep.storage import MAX_RETRIES, OUTAGES, Heart, Storage, retry
from trainer.sweep.sweep_file import PRUNERS, SAMPLERS, Sweep

_WORKER, _STOPPED, _WHY = "worker", "stopped", "why"
"""User attributes of a trial: who has it; that its training stopped itself, which it would do again; why it failed."""
_SWEEP, _BASE, _PARENT, _KEY = "sweep", "base", "parent", "key"
"""User attributes of the study: what all workers must agree on, and where they log to."""
_PATIENCE_SECONDS, _AGAIN_SECONDS = 600.0, 5.0
"""How long an outcome waits for a database that has gone away, and between two attempts."""
_DIED = f"its workers died, the last of {MAX_RETRIES + 1} times"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """A point that was given to this worker, to be tried by it alone."""

    trial: Trial
    trial_id: int
    """Of the database."""
    number: int
    """Of this attempt."""
    first: int
    """Number of the first attempt, by which its folder is called."""
    point: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Tried:
    """What has become of a point so far, whoever tries it."""

    first: int
    """Number of its first attempt."""
    point: Mapping[str, Value]
    """Key of an axis -> value; empty as long as nobody has begun with a point that is drawn."""
    state: TrialState
    """Of its last attempt."""
    value: float | None
    """The metric, where it is complete; the last evaluation, where it was pruned."""
    why: str
    """Why it failed, where it has."""
    worker: str
    """Who has it, or had it last."""
    attempts: int


class Study:
    """The study, seen from one worker."""

    def __init__(self, sweep: Sweep, storage: Storage, study: optuna.Study, rdb: optuna.storages.RDBStorage) -> None:
        """Use `opened`."""
        self.sweep, self._storage, self._study, self._rdb = sweep, storage, study, rdb
        self._study_id = rdb.get_study_id_from_name(study.study_name)
        self._heart = Heart(rdb, storage.beat_seconds)
        self._patience_seconds = _PATIENCE_SECONDS
        self.beat_seconds = storage.beat_seconds
        self.key = str(study.user_attrs[_KEY])
        """Of this study, everywhere; another one of the same name has another."""
        self.worker = f"{socket.gethostname()}:{os.getpid()}"

    def __enter__(self) -> Self:
        """It is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Say nothing more."""
        self._heart.end()
        self._rdb.engine.dispose()

    def parent(self, make: Callable[[str | None], str]) -> str:
        """The MLflow run that all trials are nested below.

        Args:
            make: called with the run that is known so far, or None; returns it or a new one. One worker at a time.
        """
        with self._storage.told(), self._storage.alone():
            known = self._study.user_attrs.get(_PARENT)
            run_id = make(known)
            if run_id != known:
                self._study.set_user_attr(_PARENT, run_id)
            return run_id

    def retry_failed(self) -> int:
        """Let points be tried again whose process failed; not those whose training stopped itself. How many."""
        with self._storage.told(), self._storage.alone():
            trials = self._trials()
            again = {number for trial in trials for number in _history(trial)}
            failed = [t for t in trials if t.state == TrialState.FAIL and t.number not in again]
            for trial in failed:
                if not trial.user_attrs.get(_STOPPED):
                    retry(self._study, trial, most=None)
            return sum(not trial.user_attrs.get(_STOPPED) for trial in failed)

    def take(self) -> Given | None:
        """A point for this worker; None where there is none to give at the moment, or no more at all.

        Raises:
            ConfigError: the database has gone away for long.
        """
        return self._patiently(self._take)

    def _take(self) -> Given | None:
        with self._storage.alone():
            self._take_back()
            trials = self._trials()
            waits = any(trial.state == TrialState.WAITING for trial in trials)
            begun = sum(not _history(trial) for trial in trials)
            if not waits and (self.sweep.is_grid or begun >= self.sweep.trials):
                return None
            self._study.sampler = _sampler(self.sweep, len(trials))
            with warnings.catch_warnings():  # that heartbeats are for Study.optimize: ours are sent by `Heart`
                warnings.simplefilter("ignore")
                trial = self._study.ask()
            point = {axis.key: _suggested(trial, axis) for axis in self.sweep.axes}
            trial_id = self._rdb.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
            self._heart.keep(trial_id)
            try:
                trial.set_user_attr(_WORKER, self.worker)
                history = _history(self._rdb.get_trial(trial_id))
            except BaseException:  # it may stand there as this worker's, which will not try it
                self._heart.drop(trial_id)
                raise
            return Given(trial, trial_id, trial.number, history[0] if history else trial.number, point)

    def _take_back(self) -> None:
        """What dead workers had can be given out again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._trials():
            # Who takes one says so before anybody else comes in here: whoever has not is dead, and sends no heartbeats.
            if trial.state == TrialState.RUNNING and _WORKER not in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.FAIL)
                retry(self._study, trial, most=None)

    def report(self, given: Given, step: int, value: float) -> bool:
        """Tell of an evaluation while a trial runs; whether Optuna's pruner wants it to end.

        Args:
            given: the trial.
            step: what trials are compared after: packs seen.
            value: the metric.
        """
        try:
            given.trial.report(value, step)
            return given.trial.should_prune()
        except (*OUTAGES, UpdateFinishedTrialError):  # it is away, or the trial no longer ours: `is_mine` says which
            return False

    def is_mine(self, given: Given) -> bool:
        """Whether a trial is still this worker's: others take over what was silent for long."""
        try:
            return self._rdb.get_trial(given.trial_id).state == TrialState.RUNNING
        except OUTAGES:
            return True

    def complete(self, given: Given, value: float) -> bool:
        """Tell the outcome of a trial; whether it counts, because nobody else has taken the trial over meanwhile."""
        return self._tell(given, TrialState.COMPLETE, value)

    def prune(self, given: Given) -> bool:
        """Tell that a trial was ended early; whether it counts."""
        return self._tell(given, TrialState.PRUNED)

    def fail(self, given: Given, why: str, *, stopped: bool) -> bool:
        """Tell that a trial has failed; whether it counts.

        Args:
            given: the trial.
            why: in a line.
            stopped: whether its training stopped itself, and would do so again.
        """
        self._patiently(lambda: self._note(given, {_WHY: why, _STOPPED: stopped}))
        return self._tell(given, TrialState.FAIL)

    def give_back(self, given: Given, why: str) -> None:
        """Let somebody else go on with a trial at once; where the database is away, that is when it counts as dead."""
        self._heart.drop(given.trial_id)
        with suppress(*OUTAGES), self._storage.alone():
            self._note(given, {_WHY: why})
            if self._end(given, TrialState.FAIL):
                retry(self._study, self._rdb.get_trial(given.trial_id), most=None)

    def _note(self, given: Given, values: Mapping[str, Any]) -> None:
        if self._rdb.get_trial(given.trial_id).state == TrialState.RUNNING:
            for key, value in values.items():
                given.trial.set_user_attr(key, value)

    def _tell(self, given: Given, state: TrialState, value: float | None = None) -> bool:
        counts = self._patiently(lambda: self._end(given, state, value))
        self._heart.drop(given.trial_id)
        return counts

    def _end(self, given: Given, state: TrialState, value: float | None = None) -> bool:
        if self._rdb.get_trial(given.trial_id).state != TrialState.RUNNING:
            return False
        told = self._study.tell(given.number, value, state=state, skip_if_finished=True)
        return told.state == state

    def wait_no_longer(self) -> None:
        """From here on a database that is away is asked once: whoever ends this worker is not kept waiting for it."""
        self._patience_seconds = 0.0

    def _patiently(self, call: Callable[[], T]) -> T:
        """Wait for a database that has gone away: what was trained for hours is not given up for a restart of it.

        Raises:
            ConfigError: it has not come back.
        """
        until, told = time.monotonic() + self._patience_seconds, False
        while True:
            try:
                return call()
            except OUTAGES as error:
                with self._storage.told():
                    if time.monotonic() >= until:
                        raise
                if not told:
                    sys.stderr.write(f"{self._storage.shown} does not answer ({reason_of(error)}); trying again\n")
                told = True
                time.sleep(_AGAIN_SECONDS)

    def tried(self) -> list[Tried]:
        """Every point that was begun or, in a grid, will be; in the order of their first attempts.

        Raises:
            ConfigError: the database cannot be read.
        """
        trials = self._patiently(self._trials)
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in trials:
            attempts.setdefault((*_history(trial), trial.number)[0], []).append(trial)
        return [_tried(self.sweep, first, of_point) for first, of_point in sorted(attempts.items())]

    def is_over(self, tried: list[Tried]) -> bool:
        """Whether all points were tried, and nobody is at one."""
        open_states = (TrialState.WAITING, TrialState.RUNNING)
        return len(tried) >= self.sweep.trials and not any(one.state in open_states for one in tried)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def opened(sweep: Sweep, storage: Storage, base: Mapping[str, str]) -> Study:
    """Open the study of a sweep; the first worker makes it, with every point of a grid.

    Args:
        sweep: what is to be tried.
        storage: where the study is kept.
        base: what all points have in common: key -> value of the configuration that they change.

    Raises:
        ConfigError: the database cannot be used, or has another sweep under this name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage.told(), storage.alone():
        rdb = storage.open()
        study = optuna.create_study(
            storage=rdb,
            study_name=storage.name,
            direction="minimize" if sweep.lower_is_better else "maximize",
            pruner=PRUNERS[sweep.pruner.name](**sweep.pruner.options),
            load_if_exists=True,
        )
        if _SWEEP in study.user_attrs:
            _check_same(study, sweep, base, storage)
        else:
            _fill(study, sweep)
            study.set_user_attr(_KEY, uuid.uuid4().hex)
            study.set_user_attr(_BASE, dict(base))
            study.set_user_attr(_SWEEP, sweep.facts())  # last: a study without it was not made to its end
    return Study(sweep, storage, study, rdb)


def _fill(study: optuna.Study, sweep: Sweep) -> None:
    """Give every point of a grid a trial, once: a worker that was killed here has made some of them."""
    there = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
    for point in grid(sweep.axes) if sweep.is_grid else ():
        if point not in there:
            study.enqueue_trial(point)


def _check_same(study: optuna.Study, sweep: Sweep, base: Mapping[str, str], storage: Storage) -> None:
    """All workers try the same points of the same configuration.

    Raises:
        ConfigError: this one would not.
    """
    pairs = [*_differences(study.user_attrs[_SWEEP], sweep.facts()), *_differences(study.user_attrs[_BASE], base)]
    if pairs:
        told = "".join(f"\n             {key}: {before} before, {now} now" for key, before, now in pairs[:10])
        raise ConfigError(
            "sweep", f"a study {storage.name!r} in {storage.shown} that is of another sweep:{told}",
            "the same file and settings for all workers of a study, also when it is gone on with",
            "use those, or begin another study with --study NAME",
        )  # fmt: skip


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted({*before, *now})
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _history(trial: FrozenTrial) -> list[int]:
    """Numbers of the attempts before this one."""
    return list(trial.system_attrs.get("retry_history", []))


def _sampler(sweep: Sweep, so_far: int) -> optuna.samplers.BaseSampler:
    """A sampler whose draws depend on its seed and how many trials there are, whichever worker asks.

    With one seed for all, the workers would draw the same points.
    """
    if sweep.is_grid:  # every trial has its point already
        return optuna.samplers.RandomSampler(seed=0)
    options = {"seed": 0, **sweep.sampler.options}
    return SAMPLERS[sweep.sampler.name](**{**options, "seed": 1000 * options["seed"] + so_far})


def _suggested(trial: Trial, axis: Axis) -> Value:
    if isinstance(axis, Choices):
        return str(trial.suggest_categorical(axis.key, axis.labels))
    if axis.whole:
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)


def _tried(sweep: Sweep, first: int, attempts: list[FrozenTrial]) -> Tried:
    last = attempts[-1]
    known = [t.params or t.system_attrs.get("fixed_params", {}) for t in attempts]
    point: Mapping[str, Value] = next((params for params in reversed(known) if params), {})
    workers = [str(trial.user_attrs[_WORKER]) for trial in attempts if _WORKER in trial.user_attrs]
    return Tried(
        first=first,
        point={axis.key: point[axis.key] for axis in sweep.axes if axis.key in point},
        state=last.state,
        value=last.values[0] if last.values else None,
        why="" if last.state != TrialState.FAIL else str(last.user_attrs.get(_WHY, "")) or _DIED,
        worker=workers[-1] if workers else "",
        attempts=len(attempts),
    )
