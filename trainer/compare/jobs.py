"""Runs many jobs, a process each, so many at once as the machine has room for; what fails stops nothing else."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from trainer import launch
from trainer.compare.children import Child, Job, Standing, is_held, standing
from trainer.errors import ConfigError

MOST_ON_CORES = 8
"""Each holds a whole model in memory."""
_LOOK_SECONDS, _SHOW_SECONDS = 0.1, 2.0
"""Between two looks at whether a process has ended, and at how far its run has come."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine has room for at once."""

    jobs: int
    """Runs at once."""
    threads: int
    """Of each rank of a run."""
    gpus: tuple[str | None, ...]
    """`launch.gpus` of each of the runs at once; None: none is dealt out."""
    why: str
    """How it was found, for people."""


def room_for(asked: int | None, *, ranks: int, gpus: Sequence[str], runs: int) -> Room:
    """What to run at once.

    With GPUs, a run for each, or for as many as it has ranks. Without, a run for each core with one thread: a second
    thread makes a run of a small model little faster, and a second run makes two of them nearly twice as fast.

    Args:
        asked: runs at once; None: as many as there is room for.
        ranks: of each run.
        gpus: indices of the GPUs that may be used; empty: there are none.
        runs: how many there are in all.

    Raises:
        ConfigError: more runs at once than GPUs can be dealt out to.
    """
    cores = launch.cores()
    most = len(gpus) // ranks if gpus else max(1, min(cores // ranks, MOST_ON_CORES))
    if most == 0 or (gpus and asked is not None and asked > most):
        raise ConfigError(
            "--jobs", f"{asked or 1} runs of {ranks} GPUs each on {len(gpus)}", f"at most {most}", "name fewer"
        )
    at_once = asked or min(most, max(1, runs))
    dealt = [",".join(gpus[slot * ranks : (slot + 1) * ranks]) for slot in range(at_once)] if gpus else []
    threads = launch.threads(at_once * ranks)
    on = f"{len(gpus)} GPUs" if gpus else f"{cores} cores"
    each = f"{ranks} GPUs each" if gpus and ranks > 1 else f"{threads} threads each" if not gpus else "a GPU each"
    return Room(at_once, threads, tuple(dealt) or (None,) * at_once, f"{at_once} at once on {on}, {each}")


def gpus_to_deal(named: str | None) -> tuple[str, ...]:
    """Indices of the GPUs that runs may be dealt out to: those that are named, or all; empty where there are none.

    Args:
        named: `launch.gpus`.
    """
    if not launch.may_have_gpus():
        return ()
    from trainer import gpus  # imports torch

    here = gpus.count(None)
    return tuple(str(index) for index in range(here)) if not named or not here else tuple(named.split(","))


@dataclass(frozen=True, slots=True)
class Ended:
    """A job whose process has ended."""

    job: Job
    status: int
    """Exit status of the process, as a shell has it."""
    standing: Standing
    """How its run stands now."""


class Board:
    """One display for all: runs that are done, and how far each of the running ones has come."""

    def __init__(self, total: int, *, done: int = 0, what: str = "runs", console: Console | None = None) -> None:
        """Show so many jobs, of which some were done before."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        live = self._console.is_terminal
        shown = (*columns, TextColumn("{task.fields[loss]}"))
        self._progress = Progress(*shown, console=self._console, disable=not live)
        self._all = self._progress.add_task(what, total=total, completed=done, loss="")
        self._total, self._done = total, done
        self._tasks: dict[Path, TaskID] = {}  # by folder: a sweep that draws one point twice has two jobs of one name

    def started(self, job: Job) -> None:
        """Of a job's process."""
        self._tasks[job.folder] = self._progress.add_task(job.name, total=None, loss="")
        if not self._progress.live.is_started:
            self.say(f"started {job.name}")

    def came_to(self, job: Job, now: Standing) -> None:
        """Show how far a run has come."""
        last = now.evaluations[-1:]
        loss = f"eval {last[0].loss:.4f}" if last else ""
        self._progress.update(self._tasks[job.folder], completed=now.step, total=now.total_steps or None, loss=loss)

    def gone(self, job: Job) -> None:
        """Of a job's process, whatever became of it."""
        self._progress.remove_task(self._tasks.pop(job.folder))

    def stands_at(self, done: int) -> None:
        """So many are done now, whoever has done them."""
        self._done = done
        self._progress.update(self._all, completed=done)

    def ended(self, ended: Ended) -> None:
        """Say what became of a job, in one line."""
        self.gone(ended.job)
        self.stands_at(self._done + (ended.status == 0))
        last = ended.standing.evaluations[-1:]
        loss = f"  eval {last[0].loss:.4f} at step {last[0].step}" if last else ""
        well = "paused" if ended.standing.state == "paused" else "done"
        what = well if ended.status == 0 else f"FAILED with status {ended.status}, see {ended.job.log}"
        self.say(f"[{self._done}/{self._total}] {ended.job.name} {what}{loss}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()


def run_all(
    jobs: Iterable[Job], room: Room, board: Board, *, ended: Callable[[Ended], None] = lambda _: None
) -> list[Ended]:
    """Run jobs to their ends, in order, so many at once; a job that fails stops no other.

    Where this process is interrupted, all of them are asked to end, resumably, before it goes on to end itself; what
    has not ended five minutes later is killed. Where it dies without a word, they end by themselves.

    Args:
        jobs: each with a folder of its own.
        room: how many at once, and what each gets.
        board: shows them.
        ended: called with each, as soon as it has ended.

    Returns:
        All of them, in the order in which they have ended.
    """
    waiting, done = deque(jobs), list[Ended]()
    running: dict[int, Child] = {}
    held_since: dict[Path, float] = {}
    shown = 0.0

    def may_begin(job: Job) -> bool:
        """Whether no other process has its run, one that was told to end say, or has it still after all that time."""
        if not is_held(job.folder):
            return True
        since = held_since.setdefault(job.folder, time.monotonic())
        return time.monotonic() - since > launch.END_SECONDS  # then the run itself says who has it

    try:
        while waiting or running:
            for slot in set(range(room.jobs)) - set(running):
                if job := next(filter(may_begin, waiting), None):
                    waiting.remove(job)
                    running[slot] = Child(job, threads=room.threads, gpus=room.gpus[slot])
                    board.started(job)
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - shown > _SHOW_SECONDS:
                shown = time.monotonic()
                for child in running.values():
                    board.came_to(child.job, standing(child.job.folder))
            for slot, child in [*running.items()]:
                if (status := child.poll()) is not None:
                    del running[slot]
                    done.append(Ended(child.job, status, standing(child.job.folder)))
                    board.ended(done[-1])
                    ended(done[-1])
    finally:
        end_all([*running.values()])
    return done


def end_all(children: Sequence[Child]) -> None:
    """Ask processes to end and wait for them; whoever takes too long, or is waited for no longer, is killed."""
    try:
        for child in children:
            child.ask_to_end()
        until = time.monotonic() + launch.END_SECONDS
        for child in children:
            child.wait(max(0.0, until - time.monotonic()))
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                child.kill()
