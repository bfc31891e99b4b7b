"""A worker of a sweep with trainings that are only folders: what it tells the study of each, and how it leaves."""

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from trainer import names
from trainer.addresses import Store
from trainer.compare.children import Child, Job
from trainer.compare.jobs import Board, Room
from trainer.errors import ConfigError
from trainer.runs import Identity as RunIdentity
from trainer.runs import RunFolder, State, new_run
from trainer.sweep import conduct, points, worker
from trainer.sweep.conduct import Plan, job_of
from trainer.sweep.storage import MAX_RETRIES, Storage, default_url
from trainer.sweep.study import Given, Study, Tried, opened
from trainer.sweep.sweep_file import Sweep, read_sweep
from trainer.sweep.worker import Worker

PACKS = 4
"""Of an optimizer step."""


@dataclass
class Course:
    """What the training of one point will do."""

    losses: tuple[float, ...] = (1.0, 0.9)
    """Evaluations, after one step each; that before the first step comes beside them."""
    status: int = 0
    says: str = ""
    interrupts: bool = False
    """Whether the worker gets a Ctrl-C while it runs."""


class Training(Child):
    """In place of a process: it writes a run's folder step by step, one a look."""

    def __init__(self, job: Job, course: Course) -> None:
        """Begin; the first evaluation is there at once."""
        self.job, self._course, self._left, self._asked = job, course, [2.0, *course.losses], False
        self._status: int | None = None
        job.folder.mkdir(parents=True, exist_ok=True)
        job.log.write_text(course.says)
        self._folder: RunFolder = new_run(job.folder, RunIdentity("run", {names.EFFECTIVE_BATCH_PACKS: str(PACKS)}, ""))
        self._row()

    def _row(self) -> None:
        step, best = len(self._course.losses) + 1 - len(self._left), self._left.pop(0)
        values = {names.EVAL_LOSS: best, names.BEST_LOSS: best, names.SAMPLES_SEEN: 8.0 * step}
        self._folder.spool.append("metrics", step=step, values=values)

    def _end(self, status: int, state: State) -> None:
        self._folder.write(state=state)
        self._folder.release()
        self._status = status

    def poll(self) -> int | None:
        """One more step, or the end."""
        if self._course.interrupts and not self._asked:
            raise KeyboardInterrupt
        if self._status is None and self._asked:
            self._end(143, "interrupted")
        elif self._status is None and self._left:
            self._row()
        elif self._status is None:
            status = self._course.status
            self._end(status, "over" if status == 0 else "stopped" if status == 3 else "interrupted")
        return self._status

    def ask_to_end(self) -> None:
        """At the next look."""
        self._asked = True

    def kill(self) -> None:
        """It has ended."""
        self.poll()

    def wait(self, seconds: float) -> int | None:
        """It ends at once."""
        return self.poll()


@dataclass
class Place:
    """A folder in which sweeps are worked at."""

    folder: Path
    courses: Mapping[str, Course] = field(default_factory=dict)
    """Learning rate -> what its training does."""
    started: list[str] = field(default_factory=list)

    @contextmanager
    def study(self, sweep: Sweep) -> Iterator[Study]:
        """The study, opened as one command does."""
        with opened(sweep, Storage(default_url(self.folder), "s", grace_seconds=60), {}) as study:
            study.retry_failed()
            yield study

    def work(self, sweep: Sweep, jobs: int = 2) -> list[Tried]:
        """One worker to its end; what has become of every point."""
        with self.study(sweep) as study:
            plan = Plan(sweep, Storage(default_url(self.folder), "s", grace_seconds=60), self.folder, None)  # type: ignore[arg-type]

            def start(job: Job, *, threads: int, gpus: str | None) -> Child:
                rate = job.arguments[job.arguments.index("--training.vit_lr") + 1]
                self.started.append(rate)
                return Training(job, self.courses.get(rate, Course()))

            def run_of(given: Given) -> Job:
                return job_of(plan, study, given, "f" * 32)

            Worker(study, run_of, Room(jobs, 1, (None,) * jobs, ""), Board(0), start=start).work()
            return study.tried()


@pytest.fixture
def place(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Without waiting between two looks."""
    shutil.copy(empty_database, tmp_path)
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker, "_READ_SECONDS", 0.0)
    return lambda **courses: Place(
        tmp_path, {f"0.{rate.removeprefix('r')}": course for rate, course in courses.items()}
    )


def states(tried: list[Tried]) -> list[str]:
    """In the order of first attempts."""
    return [one.state.name for one in tried]


def rates() -> Sweep:
    """Four learning rates, one seed."""
    return read_sweep("vit_lr", seeds="1")


def test_every_point_is_trained_once_and_has_the_last_value_of_its_metric(place: Callable[..., Place]) -> None:
    """Two at once; the best is the first of the ranking, with the command that trains it."""
    here = place(r0001=Course((0.9, 0.8)), r00012=Course((0.5, 0.4)), r00015=Course((0.7,)), r0002=Course((0.6, 0.5)))
    tried = here.work(rates())
    assert sorted(here.started) == ["0.0001", "0.00012", "0.00015", "0.0002"]
    assert [one.value for one in tried] == [0.8, 0.4, 0.7, 0.5]
    best, *_ = ranked = points.ranked(rates(), tried)
    assert (best.point, best.mean) == ({"training.vit_lr": "0.00012"}, 0.4)
    assert points.command(rates(), ranked) == "python -m trainer run last6_lora --training.vit_lr 0.00012"


def test_a_point_that_is_drawn_twice_is_tried_twice_at_once(place: Callable[..., Place], tmp_path: Path) -> None:
    """In two jobs of one name; both compute the same on the one seed, so that its value counts once."""
    (tmp_path / "one.yaml").write_text(
        "strategy: last6_lora\nspace: {training.vit_lr: [0.0001]}\nsampler: random\ntrials: 2\n"
    )
    sweep = read_sweep(str(tmp_path / "one.yaml"))
    tried = place().work(sweep)
    assert states(tried) == ["COMPLETE"] * 2
    assert points.rows(sweep, points.ranked(sweep, tried)) == [
        ["1", "0.0001", "0.90000", "", "1/1", "1 complete"],
    ]  # fmt: skip


def test_what_fails_stops_nothing_and_is_told_with_its_last_words(place: Callable[..., Place]) -> None:
    """The next command tries it again, but for what stopped itself."""
    crashes, diverges = (
        Course(status=1, says="...\nRuntimeError: no memory\n"),
        Course(status=3, says="x\nstopped: loss is not finite\n  at step 3\n\n"),
    )
    here = place(r0001=crashes, r00012=diverges)
    tried = here.work(rates())
    assert states(tried) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert tried[0].why == "status 1: RuntimeError: no memory"
    assert tried[1].why == "status 3: stopped: loss is not finite; at step 3"
    again = Place(here.folder)
    assert states(again.work(rates())) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert again.started == ["0.0001"]


def test_an_interrupted_worker_gives_back_what_runs_and_the_next_one_goes_on_in_the_same_folder(
    place: Callable[..., Place],
) -> None:
    """No point is lost, and none that is complete comes again."""
    here = place(r00015=Course(interrupts=True))
    with pytest.raises(KeyboardInterrupt):
        here.work(rates(), jobs=1)
    with here.study(rates()) as study:
        assert states(study.tried()) == ["COMPLETE", "COMPLETE", "WAITING", "WAITING"]
    (folder,) = here.folder.glob("0002-*")
    again = Place(here.folder)
    assert states(again.work(rates())) == ["COMPLETE"] * 4
    assert sorted(again.started) == ["0.00015", "0.0002"]
    assert len(list(folder.glob("*/run.json"))) == 2 and len(list(here.folder.glob("000*"))) == 4


def test_a_training_that_was_interrupted_from_outside_is_gone_on_with(place: Callable[..., Place]) -> None:
    """By whoever asks next."""
    here = place(r0001=Course(status=143))
    outcomes = iter([Course(status=143), Course()])

    class Changing(dict[str, Course]):
        def get(self, rate: str, default: Course | None = None) -> Course:  # type: ignore[override]
            return next(outcomes) if rate == "0.0001" else Course()

    here.courses = Changing()
    tried = here.work(rates())
    assert states(tried) == ["COMPLETE"] * 4
    assert [one.attempts for one in tried] == [2, 1, 1, 1]


def test_a_training_that_is_interrupted_from_outside_again_and_again_fails(place: Callable[..., Place]) -> None:
    """After as many attempts as one whose workers die."""
    here = place(r0001=Course(status=143, says="RuntimeError: a collective timed out"))
    tried = here.work(rates())
    assert states(tried) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert here.started.count("0.0001") == tried[0].attempts == MAX_RETRIES + 1
    assert "interrupted from outside" in tried[0].why and "a collective timed out" in tried[0].why


def test_a_point_that_cannot_be_trained_fails_alone_and_is_not_tried_again(
    place: Callable[..., Place], tmp_path: Path
) -> None:
    """Each of its values goes with others, so that only the draw shows it."""
    (tmp_path / "parts.yaml").write_text(
        "strategy: last6_lora\nsampler: random\ntrials: 6\n"
        "settings: {training.vit_lr: 0.0001, strategy.llm.method: frozen, strategy.llm.layers: none}\n"
        "space:\n  strategy.aligner.method: [full, frozen]\n  vision:\n"
        "    - {name: lora, set: {strategy.vision.method: lora}}\n"
        "    - {name: frozen, set: {strategy.vision.method: frozen, strategy.vision.blocks: none}}\n"
    )
    sweep = read_sweep(str(tmp_path / "parts.yaml"))
    tried = place().work(sweep)
    frozen = [set(one.point.values()) == {"frozen"} for one in tried]
    assert any(frozen) and not all(frozen)
    assert states(tried) == ["FAIL" if alone else "COMPLETE" for alone in frozen]
    assert {one.why.partition(";")[0] for one in tried} == {"", "-P strategy: three frozen parts"}
    again = Place(tmp_path)
    assert states(again.work(sweep)) == states(tried) and not again.started


def test_a_full_disk_is_one_message_and_all_trials_are_given_back(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes when there is room again goes on."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    here = place()
    monkeypatch.setattr(Training, "__init__", full)
    with pytest.raises(ConfigError, match=r"training.output_dir[\s\S]*0000-\w+: No space left on device"):
        here.work(rates())
    with here.study(rates()) as study:
        assert states(study.tried()) == ["WAITING"] * 4


def test_a_signal_at_any_moment_leaves_no_trial_running(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a point was just given, and when its training has just ended."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    here = place()
    for where, name, first in ((Sweep, "resolved", "WAITING"), (Board, "gone", "COMPLETE")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, interrupt)
            here.work(rates(), jobs=1)
        with here.study(rates()) as study:
            assert states(study.tried()) == [first, *["WAITING"] * 3]


def test_a_run_that_is_over_is_not_trained_again_where_its_worker_died_before_telling(
    place: Callable[..., Place],
) -> None:
    """Its value is read from its folder."""
    here = place()
    with here.study(rates()) as study:
        plan = Plan(rates(), Storage(default_url(here.folder), "s", grace_seconds=60), here.folder, None)  # type: ignore[arg-type]
        given = study.take()
        assert given
        training = Training(job_of(plan, study, given, ""), Course((0.3,)))
        while training.poll() is None:
            pass
        study.give_back(given, "stands for: its worker was killed here")
    tried = here.work(rates())
    assert (tried[0].state, tried[0].value, tried[0].attempts) == (TrialState.COMPLETE, 0.3, 2)
    assert "0.0001" not in here.started


def test_a_pruner_ends_a_training_that_is_behind(place: Callable[..., Place], tmp_path: Path) -> None:
    """It is fed while trainings run; what it ends is asked to end, and keeps its resume point."""
    (tmp_path / "pruned.yaml").write_text(
        "strategy: last6_lora\nspace: {training.vit_lr: [0.0001, 0.0002]}\nseeds: [1]\n"
        "pruner: {name: median, n_startup_trials: 1}\n"
    )
    here = place(r0001=Course((0.9, 0.8, 0.7, 0.6)), r0002=Course((1.2, 1.1, 1.0, 0.9, 0.8, 0.7)))
    tried = here.work(read_sweep(str(tmp_path / "pruned.yaml")), jobs=1)
    assert states(tried) == ["COMPLETE", "PRUNED"]
    assert tried[1].value is not None and tried[1].value >= 0.8
    ranked = points.ranked(rates(), tried)
    assert [point.states for point in ranked] == [("complete",), ("pruned",)]


def test_a_worker_that_is_interrupted_while_the_database_is_away_ends_at_once_and_closes_its_parent(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How the sweep stands, the next worker tells."""
    closed = list[str]()

    class Parent:
        def __init__(self, store: Store) -> None:
            pass

        def found_or_made(self, known: str | None, **_: object) -> str:
            return "f" * 32

        def close(self, status: str) -> None:
            closed.append(status)

    def away(*_: object, **__: object) -> None:
        raise StorageInternalError("away")

    def interrupted(_: Study) -> None:
        monkeypatch.setattr(optuna.Study, "get_trials", away)
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.sweep.study._PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(Study, "take", interrupted)
    monkeypatch.setattr(conduct, "Parent", Parent)
    here = place()
    plan = conduct.plan(rates(), Storage(default_url(here.folder), "s", grace_seconds=60), here.folder, 1)
    with pytest.raises(KeyboardInterrupt):
        conduct.conduct(plan, Store("sqlite:///mlflow.db", ""), Board(0))
    assert closed == ["KILLED"] and "trying again" not in capsys.readouterr().err


def test_a_job_is_a_run_with_the_settings_of_its_point_on_one_rank(place: Callable[..., Place]) -> None:
    """Dropout depends on ranks, and machines differ; its tags say which trial of which sweep it is."""
    here = place()
    with here.study(rates()) as study:
        plan = Plan(rates(), Storage(default_url(here.folder), "s", grace_seconds=60), here.folder, None)  # type: ignore[arg-type]
        given = study.take()
        assert given
        job = job_of(plan, study, given, "f" * 32)
        study.give_back(given, "")
    assert job.arguments == (
        "last6_lora", "--training.vit_lr", "0.0001", "--training.seed", "1", "--launch.nproc", "1",
    )  # fmt: skip
    assert (job.name, job.parent) == ("vit_lr=0.0001, seed=1", "f" * 32)
    assert job.tags == {
        "comparison.role": "trial", "sweep.study": "s", "sweep.trial": "0",
        "sweep.point.training.vit_lr": "0.0001", "sweep.point.training.seed": "1",
    }  # fmt: skip


def test_the_ranking_puts_points_that_lack_a_seed_after_those_that_have_all() -> None:
    """A mean over fewer seeds may be low by luck; what has no value comes last, and says why."""
    sweep = read_sweep("vit_lr", seeds="1,2")

    def one(first: int, rate: str, seed: str, state: TrialState, value: float | None) -> Tried:
        return Tried(first, {"training.vit_lr": rate, "training.seed": seed}, state, value, "", "", 1)

    done, failed = TrialState.COMPLETE, TrialState.FAIL
    tried = [
        one(0, "0.0001", "1", done, 0.5), one(1, "0.00012", "1", done, 0.3), one(2, "0.00015", "1", failed, None),
        one(3, "0.0001", "2", done, 0.7), one(4, "0.00012", "2", failed, None), one(5, "0.00015", "2", failed, None),
    ]  # fmt: skip
    rows = points.rows(sweep, points.ranked(sweep, tried))
    assert rows == [
        ["1", "0.0001", "0.60000", "0.14142", "2/2", "2 complete"],
        ["2", "0.00012", "0.30000", "", "1/2", "1 complete, 1 failed"],
        ["", "0.00015", "", "", "0/2", "2 failed"],
    ]
    assert "Fewer than two points are complete" in points.statement(points.ranked(sweep, tried))
    assert points.as_csv(sweep, tried).splitlines()[1] == "0,0.0001,1,0.5,complete,1,,"
    assert '"mean": null' in points.as_json(sweep, tried)
    assert "| 1 | 0.0001 | 0.60000 |" in points.markdown(sweep, tried)


def test_of_a_seed_that_was_tried_twice_the_ranking_takes_what_has_come_furthest() -> None:
    """A complete one before all others: what is drawn twice, and fails once, is no point that lacks a seed."""
    point = {"training.vit_lr": "0.0001"}
    outcomes = (TrialState.FAIL, None), (TrialState.COMPLETE, 0.5), (TrialState.RUNNING, None)
    tried = [Tried(number, point, state, value, "", "", 1) for number, (state, value) in enumerate(outcomes)]
    (ranked,) = points.ranked(read_sweep("vit_lr", seeds="1"), tried)
    assert (ranked.values, ranked.states) == ((0.5,), ("complete",))
