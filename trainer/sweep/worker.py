"""One worker of a sweep: takes points, trains each in a process of its own, tells what became of it."""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from trainer import names
from trainer.compare.children import Child, Job, Standing, is_held, last_words, standing
from trainer.compare.jobs import Board, Room, end_all
from trainer.errors import UserError
from trainer.runs import disk
from trainer.sweep.space import name_of
from trainer.sweep.storage import MAX_RETRIES
from trainer.sweep.study import Given, Study, Tried

_LOOK_SECONDS, _READ_SECONDS = 0.1, 2.0
"""Between two looks at whether a process has ended, and at what its run has logged."""
_ASK_SECONDS = 3.0
"""Before a worker that was given nothing asks again: others may have died, or been interrupted."""
_DONE, _STOPPED, _INTERRUPTED = 0, 3, (129, 130, 143)
"""Exit statuses of a run."""


class Start(Protocol):
    """Starts the process of a job."""

    def __call__(self, job: Job, *, threads: int, gpus: str | None) -> Child:
        """The process, running."""


@dataclass
class _Running:
    """A trial that this worker has."""

    given: Given
    job: Job
    child: Child | None = None
    """None as long as the process of an earlier attempt, told to end, is still at it."""
    told: set[int] = field(default_factory=set)
    """Steps of the evaluations that the study knows."""
    pruned: bool = False
    lost: bool = False
    """Whether others have taken it over."""
    ended: bool = False
    """Whether its process was seen to have ended."""


class Worker:
    """Works at a study until all its points are over."""

    def __init__(
        self, study: Study, job_of: Callable[[Given], Job], room: Room, board: Board, *, start: Start = Child
    ) -> None:
        """Nothing is begun.

        Args:
            study: that is shared.
            job_of: the run that tries a point.
            room: how many at once.
            board: shows them.
            start: how a process is started.
        """
        self._study, self._job_of, self._room, self._board, self._start = study, job_of, room, board, start
        self._slots: dict[int, _Running] = {}
        self._interrupted = Counter[int]()  # number of a first attempt -> how often, without this worker having asked
        self._ask_at, self._read_at, self._mine_at = 0.0, 0.0, 0.0
        self._told_of_waiting = False

    def work(self) -> None:
        """Take points and try them, until there are none and nobody else is at one.

        Where it is interrupted, its trials are given back with resume points, for whoever comes next.

        Raises:
            ConfigError: the study's database has gone away, or the disk takes no folder of a trial.
        """
        try:
            while self._fill() or self._slots or not self._is_over():
                time.sleep(_LOOK_SECONDS)
                self._look()
        except BaseException:
            self._study.wait_no_longer()
            raise
        finally:
            self._leave()

    def _fill(self) -> bool:
        """Take what there is room for; whether anything was taken."""
        taken = False
        for slot in sorted(set(range(self._room.jobs)) - set(self._slots)):
            if time.monotonic() < self._ask_at:
                break
            given = self._study.take()
            if given is None:
                self._ask_at = time.monotonic() + _ASK_SECONDS
                break
            taken = True
            try:
                self._slots[slot] = _Running(given, self._job_of(given))
            except UserError as error:  # values that cannot go together: another attempt would find the same
                why = f"{error.where}: {error.got}; allowed: {error.allowed}"
                self._study.fail(given, why, stopped=True)
                self._board.say(f"{name_of(given.point)}: FAILED, {why}")
            except BaseException:  # a signal
                self._study.give_back(given, "its worker was interrupted")
                raise
        return taken

    def _count(self) -> list[Tried]:
        """Show how many trials are over, by all workers."""
        tried = self._study.tried()
        self._board.stands_at(sum(one.state.is_finished() for one in tried))
        return tried

    def _is_over(self) -> bool:
        tried = self._count()
        if self._study.is_over(tried):
            return True
        if not self._told_of_waiting:
            others = sorted({one.worker for one in tried if not one.state.is_finished() and one.worker})
            self._board.say(f"nothing is left to begin; waiting for {', '.join(others)}, or to take over what dies")
            self._told_of_waiting = True
        time.sleep(max(0.0, self._ask_at - time.monotonic()))
        return False

    def _look(self) -> None:
        """See what has become of this worker's trials."""
        now = time.monotonic()
        read, mine = now > self._read_at, now > self._mine_at
        self._read_at = now + _READ_SECONDS if read else self._read_at
        self._mine_at = now + self._study.beat_seconds if mine else self._mine_at
        for slot, running in [*self._slots.items()]:
            if running.child is None:
                self._begin(slot, running)
                continue
            if mine and not running.lost and not self._study.is_mine(running.given):
                running.lost = True
                running.child.ask_to_end()
            status = running.child.poll()
            if read and status is None:
                self._report(running, standing(running.job.folder))
            if status is not None:
                running.ended = True
                self._board.gone(running.job)
                self._end(running, status)
                del self._slots[slot]  # not before: a signal comes at any moment, and `_leave` ends what is in a slot
                self._count()
                self._ask_at = 0.0

    def _begin(self, slot: int, running: _Running) -> None:
        """Start the process, as soon as no other one has the run."""
        if is_held(running.job.folder):
            return
        before = standing(running.job.folder)
        if before.state == "over":  # its worker died between the end of the run and telling it
            self._outcome(running, before)
            del self._slots[slot]
            return
        with disk(running.job.folder):
            running.child = self._start(running.job, threads=self._room.threads, gpus=self._room.gpus[slot])
        self._board.started(running.job)

    def _report(self, running: _Running, now: Standing) -> None:
        """Tell the study of new evaluations, and end a run that its pruner gives up."""
        self._board.came_to(running.job, now)
        packs = int(now.params.get(names.EFFECTIVE_BATCH_PACKS, 1))
        for step, row in now.rows:
            value = row.get(self._study.sweep.metric)
            # before the first step, all points of a seed are equal
            if value is None or step == 0 or step in running.told or running.pruned or not math.isfinite(value):
                continue
            running.told.add(step)
            if self._study.report(running.given, step * packs, value) and running.child:
                running.pruned = True
                running.child.ask_to_end()

    def _end(self, running: _Running, status: int) -> None:
        """Tell the study what became of a trial whose process has ended."""
        given, job = running.given, running.job
        if running.lost:
            self._board.say(f"{job.name}: others have taken it over, because this worker was silent for long")
        elif status == _DONE:
            self._outcome(running, standing(job.folder))
        elif running.pruned:
            self._study.prune(given)
            self._board.say(f"{job.name}: pruned")
        elif status in _INTERRUPTED and self._interrupted[given.first] < MAX_RETRIES:
            self._interrupted[given.first] += 1
            self._study.give_back(given, f"interrupted with status {status}")
            self._board.say(f"{job.name}: interrupted from outside, given back")
        else:
            # one that came to other numbers than before, on another machine, has not stopped itself: it is tried again
            stopped = status == _STOPPED and standing(job.folder).state == "stopped"
            said = "; ".join(line.strip() for line in last_words(job.log)) or "it has said nothing"
            again = f", interrupted from outside {MAX_RETRIES + 1} times" if status in _INTERRUPTED else ""
            self._fail(running, f"status {status}{again}: {said}", stopped=stopped)

    def _outcome(self, running: _Running, now: Standing) -> None:
        """Tell the study the metric of a run that is over."""
        metric = self._study.sweep.metric
        value = next((row[metric] for _, row in reversed(now.rows) if metric in row), math.nan)
        if math.isnan(value):
            self._fail(running, f"the run is over and has no {metric}", stopped=True)
            return
        self._study.complete(running.given, value)
        self._board.say(f"{running.job.name}: {metric} {value:.5f}")

    def _fail(self, running: _Running, why: str, *, stopped: bool) -> None:
        self._study.fail(running.given, why, stopped=stopped)
        self._board.say(f"{running.job.name}: FAILED, {why} (see {running.job.log})")

    def _leave(self) -> None:
        """End what still runs, resumably, and give it back."""
        left = [*self._slots.values()]
        self._slots.clear()
        end_all([running.child for running in left if running.child])
        for running in left:
            status = running.child.poll() if running.child else None
            with suppress(UserError):  # the database is away: others take over what has fallen silent
                if status is not None and (running.ended or running.pruned or status == _DONE):
                    self._end(running, status)
                elif not running.lost:
                    self._study.give_back(running.given, "its worker was interrupted")
