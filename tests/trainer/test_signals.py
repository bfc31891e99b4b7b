"""Signals are wishes while training goes on; what counts as the same wish, and what ends the process at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT, environment
from trainer import launch
from trainer.errors import Interrupted
from trainer.signals import SAME_WISH_SECONDS, Signals

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture
def signals() -> Iterator[Signals]:
    """Handlers of a process that trains by itself; those of the tests come back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    made = Signals()
    made.install(is_rank=False)
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    """To this process; Python's handlers run before the call returns."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(INT, 130), (TERM, 143), (signal.SIGHUP, 129)])
def test_in_training_a_signal_asks_for_the_end_and_says_so(
    signals: Signals, number: int, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The step goes on; the exit status will be the signal's. Where training ends before it has looked, it ends so."""
    with pytest.raises(Interrupted), signals.in_training():
        send(number)
    assert signals.stop and not signals.save and signals.status == status
    assert "stopping after this optimizer step" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "error"), [(INT, KeyboardInterrupt), (TERM, SystemExit)])
def test_before_and_after_training_a_signal_ends_at_once(
    signals: Signals, number: int, error: type[BaseException]
) -> None:
    """There is no step to be finished."""
    with pytest.raises(error):
        send(number)


@pytest.mark.parametrize("others", [[TERM], [TERM, TERM]])
def test_what_mlflow_sends_along_with_ctrl_c_is_the_same_wish(signals: Signals, others: list[int]) -> None:
    """Within five seconds."""
    with pytest.raises(Interrupted), signals.in_training():
        send(INT, *others)
    assert signals.status == 130


def test_a_second_ctrl_c_ends_at_once(signals: Signals) -> None:
    """By hand it is another wish, however soon it comes."""
    with pytest.raises(Interrupted), signals.in_training():
        send(INT)
        with pytest.raises(KeyboardInterrupt):
            send(INT)


def test_a_scheduler_may_repeat_itself(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM again and again, also later, asks for the same end."""
    now = time.monotonic()
    with pytest.raises(Interrupted), signals.in_training():
        send(TERM)
        monkeypatch.setattr("trainer.signals.time.monotonic", lambda: now + 2 * SAME_WISH_SECONDS)
        send(TERM)
    assert signals.status == 143


def test_on_a_rank_ctrl_c_of_terminal_and_launcher_is_one(monkeypatch: pytest.MonkeyPatch, signals: Signals) -> None:
    """The terminal sends it to all, and the launcher passes its own on."""
    signals.install(is_rank=True)
    with pytest.raises(Interrupted), signals.in_training():
        send(INT, INT)
    assert signals.stop


def test_a_rank_that_has_lost_another_closes_the_run_whatever_its_launcher_asks(
    monkeypatch: pytest.MonkeyPatch, signals: Signals
) -> None:
    """The launcher's SIGTERM may come while the run's end is delivered; a Ctrl-C still ends that."""
    monkeypatch.setattr(launch, "is_rank", lambda: True)
    monkeypatch.setattr(launch, "SIGNALS", signals)
    with pytest.raises(Interrupted), launch.with_the_others(), signals.in_training():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    send(TERM)
    with pytest.raises(KeyboardInterrupt):
        send(INT)


def test_usr1_asks_for_a_resume_point_at_any_time(signals: Signals) -> None:
    """Its own effect, to end the process, would lose a run."""
    send(signal.SIGUSR1)
    assert signals.save and not signals.stop


def test_a_process_notices_that_the_one_it_works_for_has_died(tmp_path: Path) -> None:
    """As SIGTERM; also behind a shell that outlives it. The parent here is called mlflow, and is killed."""
    child = (
        "import time; from trainer.signals import SIGNALS, end_with_parent\n"
        "SIGNALS.install(is_rank=False); end_with_parent(under_mlflow=True)\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "try: time.sleep(60)\n"
        f"except SystemExit as end: open({str(tmp_path / 'ended')!r}, 'w').write(str(end.code))\n"
    )
    (tmp_path / "child.py").write_text(child)
    (tmp_path / "mlflow").write_text(
        f"import subprocess; subprocess.run(['bash', '-c', '{sys.executable} {tmp_path}/child.py; true'])\n"
    )
    parent = subprocess.Popen([sys.executable, str(tmp_path / "mlflow")], env=environment(None, PYTHONPATH=str(ROOT)))
    try:
        wait_until((tmp_path / "up").exists)
    finally:
        parent.kill()
        parent.wait(200)
    wait_until((tmp_path / "ended").exists)
    assert (tmp_path / "ended").read_text() == "143"


def wait_until(there: object) -> None:
    """Two minutes at most."""
    deadline = time.monotonic() + 120
    while not there() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)
