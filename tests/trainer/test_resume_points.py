"""Resume points: training goes on from one to the bit, and nothing that lies in a point can do harm."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.conftest import MakeParts, tiny_batch
from trainer.begin import Begun, restored
from trainer.cadence import Cadence
from trainer.checkpoint import MANIFEST, file_sha256, verify, write_folder
from trainer.data.loader import Batch
from trainer.errors import ConfigError, Interrupted, Paused
from trainer.events import CheckpointSaved, EvalDone, Event, Seen, StepDone
from trainer.loop import EvalSet, Parts, fit
from trainer.metrics import Meter
from trainer.position import NoWishes, Position
from trainer.resume import (
    Keeper,
    Point,
    load_moments,
    load_weights,
    newest_first,
    newest_good,
    read_point,
    restore_best,
    restore_parts,
)

TOTAL = 6


class Told:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.last, self.synced, self.needed = 7, 0, 0

    def sync(self) -> None:
        """Make it durable."""
        self.synced += 1

    def need_from(self, number: int) -> None:
        """Keep from there on."""
        self.needed = number


def batches(first_step: int = 0) -> Iterator[list[Batch]]:
    """Two micro-batches a step, others in every step."""
    step = first_step
    while True:
        yield [tiny_batch([8, 10], seed=2 * step), tiny_batch([9], seed=2 * step + 1)]
        step += 1


class Training:
    """A tiny model that is trained with dropout; its numbers, and its resume points below a folder."""

    def __init__(self, make_parts: MakeParts, root: Path) -> None:
        self.parts: Parts = make_parts("last6_full", dropout=0.1, total_steps=TOTAL, last_look=5)
        self.meter = Meter(logging_steps=2, log_first=True, total_steps=TOTAL, smoothing=0.6)
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.events: list[Event] = []
        self.told, self.root = Told(), root
        self.remembers = {"gate": self.parts.gate, "meter": self.meter}
        self.keep = Keeper(root, self.parts.engine, self.remembers, Accelerator(cpu=True), told=self.told)

    def take_up(self, point: Point) -> Position:
        """Become what the training was at a point."""
        load_weights(point, self.parts.engine.trained)
        load_moments(point, self.parts.engine)
        restore_parts(point, self.remembers)
        return point.position

    def go(
        self,
        start: Position | None = None,
        *,
        wishes: NoWishes | None = None,
        listen: Callable[[Event], None] | None = None,
        **cadence: Any,
    ) -> None:
        """Train to the end, or as far as is wished."""

        def emit(event: Event) -> None:
            self.events.append(event)
            if isinstance(event, StepDone | EvalDone) and (row := self.meter.rows(event)):
                exact = {k: v for k, v in row.items() if "second" not in k}
                self.rows.append((event.seen.step, exact))
            if listen:
                listen(event)

        def save(seen: Seen, kind: str) -> CheckpointSaved:
            write_folder(self.root / kind, lambda aside: (aside / "a").write_text(str(seen.step)), {"step": seen.step})
            return CheckpointSaved(seen, kind, str(self.root / kind), 1)

        due = {"eval_steps": frozenset({0, 2, 4}), "resume_steps": frozenset({2, 4}), "save_best_from": 1} | cadence
        timing = Cadence(TOTAL, n_samples=3, **due)
        sets = {"eval": EvalSet(lambda: [tiny_batch([7, 9], seed=99)])}
        steps = batches(start.seen.step if start else 0)
        fit(self.parts, steps, sets, timing, save, emit, keep=self.keep, start=start, wishes=wishes)

    def weights(self) -> dict[str, bytes]:
        """Everything that trains, and what the optimizer remembers of it."""
        engine = self.parts.engine
        found = {t.name: engine.weight(t) for t in engine.trained}
        for tensor in engine.trained:
            found |= {f"{name}/{tensor.name}": value for name, value in engine.moments(tensor).items()}
        return {name: value.numpy().tobytes() for name, value in found.items()}


MakeTraining = Callable[[str], Training]


@pytest.fixture
def training(make_parts: MakeParts, tmp_path: Path) -> MakeTraining:
    """Makes trainings, each in a folder of its own."""
    return lambda name: Training(make_parts, tmp_path / name)


@pytest.fixture
def whole(training: MakeTraining) -> Training:
    """The training that nobody interrupts."""
    made = training("whole")
    made.go()
    return made


@pytest.mark.parametrize("step", [4, 6])
def test_training_goes_on_from_a_point_to_the_bit(training: MakeTraining, whole: Training, step: int) -> None:
    """Weights, optimizer, rows and events; from the last point nothing is left to do."""
    resumed = training("resumed")
    point = read_point(whole.root / "resume" / f"step-{step}")
    resumed.go(resumed.take_up(point))
    assert resumed.weights() == whole.weights()
    assert resumed.rows == [row for row in whole.rows if row[0] > step]
    assert resumed.parts.gate.report() == whole.parts.gate.report()


@pytest.mark.parametrize("moment", ["while a step is taken", "while it is evaluated"])
def test_a_wish_to_end_is_fulfilled_after_the_step_with_a_point_that_loses_nothing(
    training: MakeTraining, whole: Training, moment: str
) -> None:
    """An evaluation is given up, and made whole when training goes on; no event comes twice."""
    wishes = NoWishes()
    first = training("first")

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.seen.step == 4 and moment == "while a step is taken":
            wishes.stop = True

    if moment == "while it is evaluated":
        evaluate, number = first.parts.engine.evaluate, 0

        def asked_meanwhile(batch: Batch) -> torch.Tensor:
            nonlocal number
            number += 1
            wishes.stop = number == 3  # at step 4
            return evaluate(batch)

        first.parts.engine.evaluate = asked_meanwhile  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="after optimizer step 4, a resume point is written"):
        first.go(wishes=wishes, listen=listen)
    again = training("again")
    again.go(again.take_up(read_point(first.root / "resume" / "step-4")))
    assert first.rows + again.rows == whole.rows
    assert again.weights() == whole.weights()


BY_SAMPLES = {"eval_samples": 6, "resume_steps": None}  # a step holds three


@pytest.mark.parametrize(
    ("cadence", "samples", "step", "evaluated"),
    [({}, 9, 3, False), ({}, 10, 4, True), (BY_SAMPLES, 6, 2, True), (BY_SAMPLES, 7, 3, False)],
)
def test_a_pause_comes_after_the_step_that_reaches_it_and_costs_nothing(
    training: MakeTraining, cadence: dict[str, Any], samples: int, step: int, evaluated: bool
) -> None:
    """What was due there was done, an evaluation of its own was not; asked for the same again it trains nothing."""
    whole, first, same, rest = (training(name) for name in ("whole", "first", "same", "rest"))
    whole.go(**cadence)
    with pytest.raises(Paused, match=f"after optimizer step {step}, a resume point is written"):
        first.go(**cadence, pause_after=samples)
    assert any(isinstance(event, EvalDone) and event.seen.step == step for event in first.events) == evaluated
    assert not any(isinstance(event, CheckpointSaved) and event.kind == "last" for event in first.events)
    point = newest_first(first.root)[0]
    with pytest.raises(Paused):
        same.go(same.take_up(read_point(point)), **cadence, pause_after=samples)
    assert same.events == []
    rest.go(rest.take_up(read_point(point)), **cadence, pause_after=18)  # the end is no pause
    assert first.rows + rest.rows == whole.rows
    assert rest.weights() == whole.weights()


def test_the_two_newest_points_are_kept_and_what_was_told_is_durable_before(whole: Training) -> None:
    """At 2, 4 and 6 points were due; the spool may forget what comes before the older of the two."""
    assert [folder.name for folder in newest_first(whole.root)] == ["step-6", "step-4"]
    assert (whole.told.synced, whole.told.needed) == (3, 8)
    assert read_point(newest_first(whole.root)[0]).spool == 7


def test_best_is_what_it_was_at_the_point(whole: Training) -> None:
    """A later checkpoint has taken its place, or it is damaged; the point has kept the one of its time."""
    point, best = read_point(whole.root / "resume" / "step-4"), whole.root / "best"
    at_point = (point.folder / "best" / "a").read_text()
    write_folder(best, lambda aside: (aside / "a").write_text("later"), {"step": 5})
    restore_best(whole.root, point)
    assert (best / "a").read_text() == at_point and verify(best)["step"] == int(at_point)
    (best / "a").write_text("damaged")
    restore_best(whole.root, point)
    assert (best / "a").read_text() == at_point


def test_a_point_has_no_room_and_those_before_stay(whole: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is returned; nothing half written is left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.resume.save_file", full)
    failed = whole.keep(Position(Seen(step=8)))
    assert failed is not None and (failed.what, failed.reason) == ("resume point", "No space left on device")
    assert sorted(path.name for path in (whole.root / "resume").iterdir()) == ["step-4", "step-6"]


@pytest.mark.parametrize("left", ["step-6.writing", "step-6.old"])
def test_what_a_killed_save_left_is_put_right(whole: Training, left: str) -> None:
    """Killed before the new point took its name, or between the two renames."""
    point = whole.root / "resume" / "step-6"
    point.rename(point.with_name(left))
    found, lines = newest_good(whole.root)
    assert found is not None and lines == []
    assert found.position.seen.step == (6 if left.endswith(".old") else 4)
    assert not list((whole.root / "resume").glob("*.*"))


# --- hostile points -----------------------------------------------------------------------------------------------


def signed(folder: Path) -> None:
    """Make a changed point's manifest true again, as somebody would who wants to do harm."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        file = folder / name
        manifest["files"][name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    path.write_text(json.dumps(manifest))


def change_state(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of a point, and sign it."""
    path = folder / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    signed(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a point, and sign it."""
    path = folder / "tensors.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    signed(folder)


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    """Change what the manifest says."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first_of(tensors: dict[str, torch.Tensor]) -> str:
    """The name of some tensor."""
    return next(iter(tensors))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "a manifest that is a list": lambda p: (p / MANIFEST).write_text("[]"),
    "a manifest nested too deep": lambda p: (p / MANIFEST).write_text("[" * 100_000),
    "a name that leaves the folder": lambda p: change_manifest(
        p, lambda m: m["files"].update({"../../../../etc/passwd": {"sha256": "0", "bytes": 0}})
    ),
    "an absolute name": lambda p: change_manifest(
        p, lambda m: m["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 0}})
    ),
    "a link instead of a file": lambda p: (
        shutil.move(p / "state.json", p / "elsewhere"), (p / "state.json").symlink_to(p / "elsewhere"),
    ),
    "another format": lambda p: change_manifest(p, lambda m: m.update(format=99)),
    "a size that is no number": lambda p: change_manifest(p, lambda m: m["files"]["state.json"].update(bytes="x")),
    "no state": lambda p: ((p / "state.json").write_text(""), signed(p)),
    "a state that is text": lambda p: ((p / "state.json").write_text('"x"'), signed(p)),
    "a state in another encoding": lambda p: ((p / "state.json").write_bytes(b"\xff\xfe{}"), signed(p)),
    "a negative step": lambda p: change_state(p, lambda s: s["position"]["seen"].update(step=-1)),
    "a step of a trillion": lambda p: change_state(p, lambda s: s["position"]["seen"].update(step=10**12)),
    "a step that is text": lambda p: change_state(p, lambda s: s["position"]["seen"].update(step="4")),
    "an unknown key in the position": lambda p: change_state(p, lambda s: s["position"]["seen"].update(other=1)),
    "a missing part": lambda p: change_state(p, lambda s: s["parts"].pop("meter")),
    "a part that is a number": lambda p: change_state(p, lambda s: s["parts"].update(gate=3)),
    "text where the gate has numbers": lambda p: change_state(
        p, lambda s: s["parts"]["gate"].update(gradient_norms={"x": "y"})
    ),
    "a gate of another model": lambda p: change_state(
        p, lambda s: s["parts"]["gate"].update(gradient_norms={"x": 1.0})
    ),
    "rows that are no rows": lambda p: change_state(p, lambda s: s["parts"]["meter"].update(evals=[[1, 2, 3]])),
    "no tensors": lambda p: ((p / "tensors.safetensors").write_bytes(b""), signed(p)),
    "a header of an exabyte": lambda p: (
        (p / "tensors.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"), signed(p),
    ),
    "a pickle under the name of tensors": lambda p: (torch.save({"a": 1}, p / "tensors.safetensors"), signed(p)),
    "a tensor of another shape": lambda p: change_tensors(
        p, lambda t: t.update({first_of(t): torch.zeros(3, 3, 3)})
    ),
    "a tensor turned round": lambda p: change_tensors(
        p, lambda t: t.update({n: v.T.contiguous() for n, v in t.items() if v.ndim == 2 and v.shape[0] != v.shape[1]})
    ),
    "a tensor of other numbers": lambda p: change_tensors(p, lambda t: t.update({first_of(t): t[first_of(t)].half()})),
    "an unknown tensor": lambda p: change_tensors(p, lambda t: t.update({"weight/../../x": torch.zeros(1)})),
    "a missing tensor": lambda p: change_tensors(p, lambda t: t.pop(first_of(t))),
}  # fmt: skip


@pytest.fixture
def victim(training: MakeTraining) -> Callable[[Path], None]:
    """Takes up a point as a run does, and trains one step if it could."""

    def take_up(folder: Path) -> None:
        fresh = training("fresh")
        before = {t.name: t.parameter.detach().clone() for t in fresh.parts.engine.trained}
        point = read_point(folder)
        begun = Begun(folder.parent.parent, point)
        try:
            restored(begun, lambda p: load_weights(p, fresh.parts.engine.trained))
            restored(begun, lambda p: load_moments(p, fresh.parts.engine))
            restored(begun, lambda p: restore_parts(p, fresh.remembers))
        except ConfigError as error:
            assert str(folder) in error.got and error.do
            if "tensors" in error.got:
                assert all(torch.equal(t.parameter, before[t.name]) for t in fresh.parts.engine.trained)
            raise

    return take_up


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_point_that_was_tampered_with_is_told_in_one_message(
    whole: Training, victim: Callable[[Path], None], fault: str
) -> None:
    """Also where its manifest was made to fit: nothing in it runs, leads elsewhere, or changes the model half."""
    point = whole.root / "resume" / "step-6"
    HOSTILE[fault](point)
    with pytest.raises((ConfigError, ValueError)) as raised:
        victim(point)
    assert type(raised.value).__name__ in ("ConfigError", "BadCheckpoint")
    found, lines = newest_good(whole.root)
    if type(raised.value).__name__ == "BadCheckpoint":  # found without the model: the one before is taken
        assert found is not None and found.position.seen.step == 4 and len(lines) == 1


def test_mutated_points_are_found_or_harmless(whole: Training, victim: Callable[[Path], None], tmp_path: Path) -> None:
    """A hundred and twenty, with bytes flipped, cut, doubled or overwritten anywhere, half of them signed anew."""
    draw = random.Random(6)
    source = whole.root / "resume" / "step-6"
    outcomes = {"sound": 0, "told": 0}
    for number in range(120):
        folder = tmp_path / str(number) / "resume" / "step-6"
        shutil.copytree(source, folder)
        file = folder / draw.choice(["state.json", "tensors.safetensors", MANIFEST])
        content = bytearray(file.read_bytes())
        at = draw.randrange(min(len(content), draw.choice([200, 20_000, len(content)])))
        match draw.randrange(4):
            case 0:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at:]
            case 2:
                content[at:at] = content[at : at + draw.randrange(1, 100)]
            case _:
                content[at : at + 8] = draw.randbytes(8)
        file.write_bytes(content)
        if number % 2 and file.name != MANIFEST:
            signed(folder)
        try:
            victim(folder)
            outcomes["sound"] += 1
        except ValueError as error:
            assert type(error).__name__ in ("ConfigError", "BadCheckpoint"), (number, error)
            outcomes["told"] += 1
        shutil.rmtree(folder)
    assert outcomes["told"] > 60, outcomes  # a flipped bit in a number that is signed anew is another sound point
