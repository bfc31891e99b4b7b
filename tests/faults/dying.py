"""The trainer in a process that kills itself by SIGKILL at a chosen place: `python -m tests.faults.dying FAULT ...`.

FAULT is JSON: the place, how many times it is passed unharmed, and how many seconds after it the process dies. A real
SIGKILL: nothing is caught, closed or flushed. Resume points are left lying when the run is over, for the tests to read.
"""

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import trainer.begin
import trainer.checkpoint
import trainer.curriculum
import trainer.loop
import trainer.resume
import trainer.run
import trainer.spool
from trainer.__main__ import main


def die() -> None:
    """Now."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(module: Any, name: str, unharmed: int, seconds: float) -> None:
    """Replace a function by one that, called for the n-th time, dies so many seconds after it was entered."""
    function: Callable[..., Any] = getattr(module, name)
    calls = 0

    @functools.wraps(function)
    def dying(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == unharmed + 1:
            threading.Timer(seconds, die).start()
        return function(*arguments, **keywords)

    setattr(module, name, dying)


def die_in_a_write(unharmed: int, share: float) -> None:
    """Die in the middle of a line of the spool: a part of it is on disk."""
    write, calls = os.write, 0

    def dying(handle: int, data: bytes) -> int:
        nonlocal calls
        if data[8:9] == b" " and data.endswith(b"]\n"):
            calls += 1
            if calls == unharmed + 1:
                write(handle, data[: int(share * len(data))])
                die()
        return write(handle, data)

    trainer.spool.os.write = dying  # type: ignore[attr-defined]


PLACES: dict[str, Callable[[int, float], None]] = {
    "the start": lambda _, seconds: die_in(trainer.run, "open_tracker", 0, seconds),
    "the first step": lambda _, seconds: die_in(trainer.loop, "train_step", 0, seconds),
    "a later step": lambda n, seconds: die_in(trainer.loop, "train_step", n + 1, seconds),
    "a switch of stages": lambda n, seconds: die_in(trainer.curriculum.Course, "switch", n, seconds),
    "an evaluation": lambda n, seconds: die_in(trainer.loop, "evaluate", n, seconds),
    "the save of a resume point": lambda n, seconds: die_in(trainer.resume, "write_folder", n, seconds),
    "the save of an adapter": lambda n, seconds: die_in(trainer.checkpoint, "write_folder", n, seconds),
    "a spool write": die_in_a_write,
    "after the last step": lambda _, seconds: die_in(trainer.facts, "log_record_losses", 0, seconds),
}
"""Place -> arranges for a death there: how often it is passed unharmed, and seconds (of a write: the share of it)."""


def start() -> None:
    """Arrange for the fault, and be the trainer."""
    fault = json.loads(sys.argv.pop(1))
    setattr(trainer.begin, "forget_points", lambda _: None)  # noqa: B010  # not its own name
    if fault:
        PLACES[fault["place"]](fault["unharmed"], fault["seconds"])
    main()


if __name__ == "__main__":
    start()
