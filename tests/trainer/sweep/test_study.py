"""The study that workers share: no point twice, what dead workers had is given out again, outcomes count once."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState

from tests.running import ROOT, empty_store, environment
from trainer.errors import ConfigError
from trainer.sweep.storage import Heart, Storage, default_url
from trainer.sweep.study import Given, Study, opened
from trainer.sweep.sweep_file import Named, Sweep, read_sweep

# A worker without trainings: it says what it was given, and each point's outcome is its number.
WORKER = """
import sys, time
from pathlib import Path
from trainer.sweep.storage import Storage, default_url
from trainer.sweep.study import opened
from trainer.sweep.sweep_file import read_sweep
sweep = read_sweep(sys.argv[1], seeds="1,2")
with opened(sweep, Storage(default_url(Path(sys.argv[2])), "s", grace_seconds=60), {}) as study:
    while given := study.take():
        print(given.number, flush=True)
        if sys.argv[3] == "holds":
            time.sleep(600)
        study.complete(given, float(given.number))
"""

Open = Callable[..., Study]


@pytest.fixture
def open_study(tmp_path: Path, empty_database: Path) -> Open:
    """Opens the study of a sweep, as another worker each time."""
    shutil.copy(empty_database, tmp_path)

    def open_it(sweep: Sweep, *, grace: int = 60, base: dict[str, str] | None = None) -> Study:
        return opened(sweep, Storage(default_url(tmp_path), "s", grace_seconds=grace), base or {})

    return open_it


def drawn(folder: Path, trials: int, **more: str) -> Sweep:
    """A sweep whose points are drawn."""
    lines = ["strategy: last6_lora", "space: {training.vit_lr: {log_uniform: [1.0e-5, 1.0e-3]}}", f"trials: {trials}"]
    (folder / "drawn.yaml").write_text("\n".join([*lines, *(f"{key}: {text}" for key, text in more.items())]))
    return read_sweep(str(folder / "drawn.yaml"))


def worker(folder: Path, what: str) -> subprocess.Popen[str]:
    """A worker in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, "vit_lr", str(folder), what],
        cwd=ROOT, env=environment(None), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def taken(study: Study) -> Given:
    """A point that there must be."""
    given = study.take()
    assert given
    return given


def taken_soon(study: Study) -> Given:
    """A point that there will be when somebody counts as dead."""
    until = time.monotonic() + 120
    while (given := study.take()) is None:
        assert time.monotonic() < until
        time.sleep(0.2)
    return given


def test_two_workers_try_every_point_of_a_grid_once(tmp_path: Path, open_study: Open) -> None:
    """In processes of their own, at the same time; database and study are made by whichever comes first."""
    (tmp_path / "study.db").unlink()
    workers = [worker(tmp_path, "goes on") for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    assert sorted(int(number) for numbers in said for number in numbers) == list(range(8))
    with open_study(read_sweep("vit_lr", seeds="1,2")) as study:
        tried = study.tried()
        assert len({str(one.point) for one in tried}) == 8
        assert [(one.state, one.value) for one in tried] == [(TrialState.COMPLETE, float(n)) for n in range(8)]
        assert study.is_over(tried) and study.take() is None


def test_the_trial_of_a_worker_that_was_killed_is_given_out_again(tmp_path: Path, open_study: Open) -> None:
    """By the next command, where nobody else is alive; the attempt knows the first one, whose folder it goes on in."""
    process = worker(tmp_path, "holds")
    assert process.stdout and process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep = read_sweep("vit_lr", seeds="1,2")
    with open_study(sweep, grace=1) as study:
        point = study.tried()[0].point
        for _ in range(7):
            study.complete(taken(study), 1.0)
        assert not study.is_over(study.tried())
        again = taken_soon(study)
        assert (again.first, again.number, again.point) == (0, 8, point)
        assert study.complete(again, 0.5)
        tried = study.tried()
        assert study.is_over(tried)
        assert [(one.first, one.state, one.attempts) for one in tried] == [
            (first, TrialState.COMPLETE, 2 if first == 0 else 1) for first in range(8)
        ]


def test_a_worker_that_is_interrupted_gives_its_trial_back_at_once(open_study: Open) -> None:
    """As often as it takes."""
    with open_study(read_sweep("vit_lr", seeds="1")) as study:
        for number in (1, 2):
            study.complete(taken(study), float(number))
        first = taken(study)
        study.give_back(first, "interrupted")
    with open_study(read_sweep("vit_lr", seeds="1")) as study:
        seen = []
        while given := study.take():
            seen.append(given.first)
            study.complete(given, 0.0)
        assert first.first in seen and len(seen) == 2
        assert [one.state for one in study.tried()] == [TrialState.COMPLETE] * 4


def test_a_worker_does_not_keep_alive_what_it_was_given_when_the_database_went_away(
    open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands there as its own, and nobody tries it: silent, it is taken back like a dead worker's."""
    monkeypatch.setattr("trainer.sweep.study._AGAIN_SECONDS", 0.0)
    written, kept, dropped = Trial.set_user_attr, list[int](), list[int]()

    def then_away(trial: Trial, key: str, value: object) -> None:
        written(trial, key, value)
        if trial.number == 0:
            raise StorageInternalError("the answer is lost")

    monkeypatch.setattr(Trial, "set_user_attr", then_away)
    monkeypatch.setattr(Heart, "keep", lambda _, trial_id: kept.append(trial_id))
    monkeypatch.setattr(Heart, "drop", lambda _, trial_id: dropped.append(trial_id))
    with open_study(read_sweep("vit_lr", seeds="1")) as study:
        assert taken(study).number == 1
    assert len(kept) == 2 and dropped == kept[:1]


def test_an_outcome_of_a_worker_that_was_taken_for_dead_does_not_count(open_study: Open) -> None:
    """Whoever has taken the trial over tells it; one COMPLETE a point."""
    sweep = read_sweep("vit_lr", seeds="1")
    with open_study(sweep) as slow, open_study(sweep) as other:
        given = taken(slow)
        other.give_back(given, "stands for: it was silent for long")
        assert not slow.is_mine(given)
        assert not slow.report(given, 1, 0.3)
        assert not slow.complete(given, 0.3)
        assert not slow.fail(given, "no", stopped=False)
        assert slow.tried()[0].state == TrialState.WAITING


def test_a_point_that_failed_is_tried_again_by_the_next_command_unless_its_training_stopped_itself(
    open_study: Open,
) -> None:
    """What stopped itself would do so again."""
    sweep = read_sweep("vit_lr", seeds="1")
    with open_study(sweep) as study:
        study.fail(taken(study), "status 1", stopped=False)
        study.fail(taken(study), "not finite", stopped=True)
        for _ in range(2):
            study.complete(taken(study), 1.0)
        assert study.is_over(study.tried())
    with open_study(sweep) as study:
        assert study.retry_failed() == 1
        assert study.retry_failed() == 0
        again = taken(study)
        assert again.first == 0
        study.complete(again, 1.0)
        assert [(one.state.name, one.why) for one in study.tried()] == [
            ("COMPLETE", ""), ("FAIL", "not finite"), ("COMPLETE", ""), ("COMPLETE", ""),
        ]  # fmt: skip


def test_another_sweep_under_the_same_name_is_refused(open_study: Open, tmp_path: Path) -> None:
    """It says what differs; more trials of the same are no other sweep, nor are other ranks."""
    with open_study(drawn(tmp_path, 2, sampler="random"), base={"tuner.lora_rank": "16"}):
        pass
    with open_study(drawn(tmp_path, 3, sampler="random"), base={"tuner.lora_rank": "16"}):
        pass
    with pytest.raises(ConfigError, match=r"tuner.lora_rank: 16 before, 8 now[\s\S]*--study NAME"):
        open_study(drawn(tmp_path, 3, sampler="random"), base={"tuner.lora_rank": "8"})
    with pytest.raises(ConfigError, match="sampler"):
        open_study(drawn(tmp_path, 3, sampler="tpe"), base={"tuner.lora_rank": "16"})


def test_a_study_that_was_not_made_to_its_end_is_finished_by_the_next_worker(
    open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point is there once."""
    sweep = read_sweep("vit_lr", seeds="1")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "facts", dies)
        with pytest.raises(KeyboardInterrupt):
            open_study(sweep)
    with open_study(sweep) as study:
        assert len(study.tried()) == 4


def test_drawn_points_are_as_many_as_were_asked_for_and_no_two_workers_draw_the_same(
    open_study: Open, tmp_path: Path
) -> None:
    """Each draw has a seed of its own; a worker that comes later draws what the same one would have."""
    sweep = drawn(tmp_path, 6, sampler="{name: tpe, seed: 3, n_startup_trials: 2}")
    with open_study(sweep) as one, open_study(sweep) as two:
        points = []
        for number in range(6):
            study = (one, two)[number % 2]
            given = taken(study)
            points.append(given.point["training.vit_lr"])
            study.complete(given, abs(float(points[-1]) - 1e-4))
        assert one.take() is None and two.take() is None
        assert len(set(points)) == 6 and all(1e-5 <= float(point) <= 1e-3 for point in points)
        assert one.is_over(one.tried())


def test_a_pruner_gives_up_a_point_that_is_behind(open_study: Open, tmp_path: Path) -> None:
    """By what others had after as many packs; its last evaluation stays."""
    sweep = drawn(tmp_path, 3, sampler="random", pruner="{name: median, n_startup_trials: 1}")
    with open_study(sweep) as study:
        good = taken(study)
        assert not any(study.report(good, packs, 1.0 - packs / 100) for packs in (10, 20, 30))
        assert study.complete(good, 0.7)
        bad = taken(study)
        assert study.report(bad, 10, 2.0)
        assert study.prune(bad)
        assert [(one.state, one.value) for one in study.tried()] == [
            (TrialState.COMPLETE, 0.7), (TrialState.PRUNED, 2.0),
        ]  # fmt: skip


def test_a_point_may_go_either_way(open_study: Open, tmp_path: Path) -> None:
    """Of a metric of which more is better, the pruner wants more."""
    sweep = drawn(tmp_path, 2, sampler="random", metric="eval/f1", pruner="{name: median, n_startup_trials: 1}")
    assert not sweep.lower_is_better and sweep.pruner == Named("median", {"n_startup_trials": 1})
    with open_study(sweep) as study:
        first, second = taken(study), taken(study)
        assert not study.report(first, 10, 0.5)
        study.complete(first, 0.5)
        assert study.report(second, 10, 0.4)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("study.db", ["sqlite:///FILE"]),
        ("sqlite://", ["sqlite:///FILE"]),
        ("oracle://me:secret@db/x", ["oracle://db/x", "postgresql+psycopg2"]),
        ("postgresql+psycopg2://me:secret@127.0.0.1:1/x", ["postgresql+psycopg2://127.0.0.1:1/x", "refused"]),
        ("sqlite:////proc/nowhere/study.db", ["/proc/nowhere"]),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_message_without_its_password(url: str, parts: list[str]) -> None:
    """Where it was given, and what can be."""
    with pytest.raises(ConfigError) as caught:
        opened(read_sweep("vit_lr", seeds="1"), Storage(url, "s", grace_seconds=60), {})
    assert "secret" not in str(caught.value) and "--storage" in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_database_of_mlflow_is_no_place_for_a_study_and_stays_as_it_is(tmp_path: Path) -> None:
    """Both keep the versions of their tables in a table of one name."""
    store = empty_store(tmp_path)
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(ConfigError, match="a database of its own"):
        opened(read_sweep("vit_lr", seeds="1"), Storage(store, "s", grace_seconds=60), {})
    assert (tmp_path / "mlflow.db").read_bytes() == before
