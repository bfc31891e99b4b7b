"""Signals as wishes: to end after this step, to save now; and the death of the process that we work for."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from trainer.errors import Interrupted

SAME_WISH_SECONDS = 5.0
"""Signals that follow the first so soon ask for the same thing: under `mlflow run`, Ctrl-C reaches us from the terminal
and again from MLflow, and must not interrupt the closing of the run. A second Ctrl-C by hand is another wish."""

_STOPPING = "stopping after this optimizer step, with a resume point; Ctrl-C once more stops at once\n"
_LOOK_SECONDS = 1.0
STARTED_BY = "TRAINER_STARTED_BY"
"""Variable: number of the process that has started this one to train a run of several."""


class Signals:
    """What this process was asked for. Before and after training a signal ends it at once, in training after a step."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self.stop, self.save = False, False
        self.number = signal.SIGTERM
        """The signal that has asked for the end."""
        self._asked, self._in_training, self._is_rank, self._ending = -math.inf, False, False, False

    def install(self, *, is_rank: bool) -> None:
        """Listen. Signals that whoever started us ignores (nohup, a shell's background) stay ignored.

        Args:
            is_rank: whether a launcher has started this process; it passes a Ctrl-C on that the terminal sends too.
        """
        self._is_rank = is_rank
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)
        signal.signal(signal.SIGUSR1, self._ask_to_save)

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """While this lasts, the end is a wish that training fulfils after its current step.

        Raises:
            Interrupted: the wish came when no step was left to fulfil it.
        """
        self._in_training = True
        try:
            yield
        finally:
            self._in_training = False
        if self.stop:  # it came during the last save, where nobody asks any more
            raise Interrupted("after the last optimizer step, a resume point is written")

    def ending(self) -> None:
        """Say that this process closes its run and ends, in bounded time: who asks for the end has it.

        Where one rank dies, the launcher asks the others, which may have noticed before it; a signal would leave the
        MLflow run of the first one open.
        """
        self._ending = True

    @property
    def status(self) -> int:
        """Exit status of a process that was ended by the signal."""
        return 128 + self.number

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._ending and number == signal.SIGTERM:
            return
        before, self._asked = self._asked, time.monotonic()
        again = self._asked - before < SAME_WISH_SECONDS
        by_hand = number == signal.SIGINT and not self._is_rank
        if again and not (by_hand and self.number == signal.SIGINT):
            return
        if self._in_training and (not self.stop or number != signal.SIGINT):
            if not self.stop:
                self.stop, self.number = True, signal.Signals(number)
                if not self._is_rank:
                    os.write(sys.__stderr__.fileno(), _STOPPING.encode()) if sys.__stderr__ else None
            return
        self.number = signal.Signals(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(self.status)

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True


def pass_on(number: int) -> None:
    """Send a signal to the processes that this one has started."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.send_signal(number)


def is_started_by_us() -> bool:
    """Whether another process of this project has started this one to train a run of several."""
    return STARTED_BY in os.environ


def end_with_parent(*, under_mlflow: bool) -> None:
    """Ask this process to end, as SIGTERM does, when the one that it works for has died without a word.

    Args:
        under_mlflow: whether `mlflow run` has started it, perhaps through a shell that outlives MLflow; or we have,
            and then whoever has started it may be dead already.
    """
    if under_mlflow and is_started_by_us() and os.environ[STARTED_BY] != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGTERM)
    parents = psutil.Process().parents()
    watched = parents[:1] + [p for p in parents[1:4] if under_mlflow and _is_mlflow(p)][:1]

    def look() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        try:
            look()
        except psutil.Error:
            os.kill(os.getpid(), signal.SIGTERM)

    if watched and watched[0].pid > 1:
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _is_mlflow(process: psutil.Process) -> bool:
    try:
        return any("mlflow" in part for part in process.cmdline()[:3])
    except psutil.Error:
        return False


SIGNALS = Signals()
"""Of this process: there is one set of handlers in it."""
