"""Two hosts with a network of their own train one run: over a good line, a bad one, and when one of them is gone."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.namespaces import Pair, two_namespaces, why_not
from tests.running import SMALL, empty_store, environment, flags, runs_in, trainer
from trainer import names

pytestmark = pytest.mark.slow

SETTINGS = SMALL | {
    "training.max_steps": "4", "training.logging_steps": "1", "training.resume_steps": "1", "tuner.lora_dropout": "0",
    "deepspeed.enabled": "true", "launch.nproc": "auto", "training.gradient_accumulation_steps": "2",
}  # fmt: skip
SILENCE, GRACE = 5, 90
"""Seconds: after which a host is gone, and what a machine that is busy may take beside that."""


class TwoHosts:
    """The same command on two hosts, each in a folder of its own."""

    def __init__(self, pair: Pair, folder: Path, store: str, **more: str) -> None:
        """Start it on both."""
        hosts = folder / "hosts"
        hosts.write_text("".join(f"{address} slots=1\n" for address in pair.addresses))
        settings = SETTINGS | {"launch.hosts": str(hosts), "launch.interface": pair.interface}
        settings |= {"launch.silence_seconds": str(SILENCE)} | more
        self.logs, self.processes = [], []
        for host in (0, 1):
            own = folder / f"host{host}"
            own.mkdir(exist_ok=True)
            command = pair.inside(host, sys.executable, "-m", "trainer", "run", "last6_lora", *flags(settings))
            self.logs.append(own / "log")
            with self.logs[-1].open("a") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=own, env=environment(store), stdout=log, stderr=log)
                )

    def wait(self, timeout: float = 900) -> list[int]:
        """Exit statuses of both."""
        return [process.wait(timeout) for process in self.processes]

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Wait until the first host has said something."""
        until = time.monotonic() + timeout
        while text not in self.said():
            assert time.monotonic() < until and self.processes[0].poll() is None, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        """All that the hosts have said."""
        return "\n".join(log.read_text() for log in self.logs)


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    """They can be made here; looked at when a test is run, and not when it is only listed."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Every exact metric of the same run on two ranks of one host, step by step."""
    folder = tmp_path_factory.mktemp("one")
    store = empty_store(folder)
    two = SETTINGS | {"launch.nproc": "2", "training.gradient_accumulation_steps": "1"}
    done = trainer("run", "last6_lora", *flags(two), cwd=folder, store=store, timeout=900)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(store)
    return exact(store, run)


def exact(store: str, run: Run) -> dict[str, dict[int, float]]:
    """Metric -> step -> value, of those that come out the same whenever they are computed."""
    histories = {name: MlflowClient(store).get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: {m.step: m.value for m in found} for name, found in histories.items() if names.metric(name).exact}


def assert_equal(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]) -> None:
    """Every metric at every step to 1e-5."""
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two hosts and their line."""
    with two_namespaces(bad=getattr(request, "param", False)) as made:
        yield made


@pytest.mark.parametrize("pair", [False, True], ids=["a good line", "20 ms and 1 % loss"], indirect=True)
def test_two_hosts_give_the_losses_of_one(pair: Pair, tmp_path: Path, one_host: dict[str, dict[int, float]]) -> None:
    """Under ZeRO-2, the interface named; only the first host has the run's folder."""
    store = empty_store(tmp_path)
    started = time.monotonic()
    both = TwoHosts(pair, tmp_path, store)
    assert both.wait() == [0, 0], both.said()
    print(f"{pair.kind}: {time.monotonic() - started:.0f} s, frames passed on and lost {pair.relayed}")
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED" and run.data.tags[names.TAG_GATE] == "passed"
    assert_equal(exact(store, run), one_host)
    assert list((tmp_path / "host0" / "output").glob("*/best")) and not (tmp_path / "host1" / "output").exists()


@pytest.mark.parametrize("gone", [0, 1], ids=["the first", "the second"])
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_when_a_host_is_gone_the_run_ends_and_goes_on(
    pair: Pair, tmp_path: Path, one_host: dict[str, dict[int, float]], how: str, gone: int
) -> None:
    """The other host ends by itself; the same command on both goes on, to the losses of a run that never ended."""
    store = empty_store(tmp_path)
    both = TwoHosts(pair, tmp_path, store)
    both.wait_for("step 2/4  train")
    if how == "cut off":
        pair.cut()
    pair.kill(gone)
    started = time.monotonic()
    status = both.processes[1 - gone].wait(SILENCE + 60 + GRACE)
    print(f"{how}: ended with {status} after {time.monotonic() - started:.1f} s\n{both.said()}")
    assert status == 143, both.said()
    (run,) = runs_in(store)
    assert run.info.status == ("RUNNING" if gone == 0 else "KILLED")
    if how == "cut off":
        pair.mend()
    again = TwoHosts(pair, tmp_path, store)
    assert again.wait() == [0, 0], again.said()
    assert "going on with" in again.said()
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED"
    assert_equal(exact(store, run), one_host)


def test_a_rank_that_was_killed_is_started_again_with_all_others(
    pair: Pair, tmp_path: Path, one_host: dict[str, dict[int, float]]
) -> None:
    """`launch.restarts: 1`: nobody gives a command, and the run finishes as if nothing had been."""
    store = empty_store(tmp_path)
    both = TwoHosts(pair, tmp_path, store, **{"launch.restarts": "1"})
    both.wait_for("step 2/4  train")
    ranks = subprocess.run(["pgrep", "-P", str(both.processes[1].pid)], capture_output=True, text=True, check=True)
    subprocess.run(["kill", "-KILL", *ranks.stdout.split()], check=True)
    assert both.wait() == [0, 0], both.said()
    assert "going on with" in both.said()
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED"
    assert_equal(exact(store, run), one_host)
