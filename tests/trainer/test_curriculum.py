"""A run with stages: blocks wait to the bit, what trains goes on as it was, and the gate looks anew at every switch."""

import gc
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from tests.conftest import shapes_of, tiny_batch, tiny_model
from trainer.cadence import Cadence
from trainer.checkpoint import write_adapter
from trainer.curriculum import Course, Material
from trainer.data.loader import Batch
from trainer.engine import Engine
from trainer.events import CheckpointSaved, EvalDone, Event, GatePassed, Seen, StageBegun, StepDone
from trainer.fused.forward import FusedLoss
from trainer.gate import GateFailed, Verdict
from trainer.loop import EvalSet, Parts, fit
from trainer.model import SupervisedLoss, apply_plan
from trainer.optim import Schedule, make_optimizer
from trainer.position import Position
from trainer.resume import Keeper, load_moments, load_weights, read_point, restore_parts
from trainer.stages import Stage
from trainer.strategy import Lora, Method, Strategy, Target, make_plan

BLOCKS = [tuple(range(first, 24)) for first in (22, 20, 18)]
STAGES = (Stage(0, BLOCKS[0], 2), Stage(3, BLOCKS[1], 5), Stage(6, BLOCKS[2], 8))
TOTAL = 9
FROM_STEP = {**dict.fromkeys((22, 23), 0), **dict.fromkeys((20, 21), 3), **dict.fromkeys((18, 19), 6)}
POINTS = (3, 4, 6)
KINDS = [("plain", Method.LORA), ("fused", Method.LORA), ("fused", Method.FULL)]
HELD_OUT = tiny_batch([7, 9], seed=99)


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """A switch collects garbage, which takes a second among all that tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Silent:
    """A tracker that hears nothing."""

    last = 0

    def sync(self) -> None:
        """Nothing to make durable."""

    def need_from(self, number: int) -> None:
        """Nothing to keep."""


@dataclass
class Training:
    """A tiny model that is trained, with dropout, in stages."""

    model: PeftModel
    course: Course
    engine: Engine
    parts: Parts
    root: Path
    events: list[Event] = field(default_factory=list)
    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Optimizer steps -> every parameter by then."""
    moments: dict[int, list[dict[str, dict[str, Tensor]]]] = field(default_factory=dict)
    """Optimizer steps before a switch -> what the optimizer remembered of each tensor before it and after."""
    verdicts: list[str] = field(default_factory=list)
    """Of the gates, before each step."""
    towers: list[tuple[int, str]] = field(default_factory=list)
    """Of the fused pass, before each step: blocks that count as frozen, and the name of what they make of images."""

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [event.loss for event in self.events if isinstance(event, StepDone)]

    def go(self, start: Position | None = None, *, meddle: Callable[[int], None] = lambda _: None) -> "Training":
        """Train to the end; `meddle` is called before each step, in front of the switch."""
        first = start.seen.step if start else 0
        keep = Keeper(self.root, self.engine, {"gate": self.course}, Accelerator(cpu=True), told=Silent())
        switch = self.parts.switch

        def watched(step: int) -> object:
            if (point := self.root / "resume" / f"step-{step}").is_dir():
                point.rename(self.root / point.name)  # else newer ones take its place
            self.seen[step] = self.values()
            before = self.remembered() if step else {}
            meddle(step)
            if switched := switch(step):
                self.moments[step] = [before, self.remembered()]
            self.verdicts.append(self.course.verdict.value)
            if isinstance(self.engine.loss, FusedLoss):
                tower = self.engine.loss._tower
                self.towers.append((tower._frozen, tower._store_name()))
            return switched

        def save(seen: Seen, kind: str) -> CheckpointSaved:
            write_adapter(self.model, self.root / f"{kind}-{seen.step}", {})
            return CheckpointSaved(seen, kind, "", 1)

        cadence = Cadence(
            TOTAL, 3, eval_steps=frozenset({3, 4}), save_steps=frozenset({4}), resume_steps=frozenset(POINTS)
        )
        fit(replace(self.parts, switch=watched), batches(first), {"eval": EvalSet(lambda: [HELD_OUT])}, cadence, save,
            self.events.append, keep=keep, start=start)  # fmt: skip
        self.seen[TOTAL] = self.values()
        return self

    def values(self) -> dict[str, Tensor]:
        """All parameters as they are."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def remembered(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer remembers of the tensors that have had updates."""
        state = self.engine.optimizer.state
        trained = [tensor for tensor in self.engine.trained if tensor.parameter in state]
        return {t.name: {key: value.clone() for key, value in self.engine.moments(t).items()} for t in trained}


def batches(first: int) -> Iterator[list[Batch]]:
    """Two micro-batches a step, others in every step."""
    return ([tiny_batch([8, 9], seed=2 * step), tiny_batch([6], seed=2 * step + 1)] for step in itertools.count(first))


def training(root: Path, kind: str = "fused", method: Method = Method.LORA, *, stages: tuple[Stage, ...] = STAGES,
             step: int = 0) -> Training:  # fmt: skip
    """A new one; `step` is where one stands that goes on."""
    base = tiny_model()
    of = Strategy(Target(f"{stages[-1].blocks[0]}-23", method), Target("all", Method.FULL),
                  Target("last-2", Method.LORA), Lora(rank=4, alpha=8, dropout=0.1))  # fmt: skip
    model = apply_plan(base, make_plan(of, shapes_of(base)), seed=1)
    course = Course(model, stages, step=step)

    def make() -> Material:
        optimizer = make_optimizer(course.trained, weight_decay=0.1)
        return (FusedLoss if kind == "fused" else SupervisedLoss)(model), optimizer

    engine = Engine(Accelerator(cpu=True), *make(), course.trained, max_grad_norm=0.5)
    schedule = Schedule(dict.fromkeys(("vision", "aligner", "llm"), 1e-2), 1e-4, 2, TOTAL)
    parts = Parts(engine, schedule, course.gate, 17, partial(course.switch, engine, make=make))
    return Training(model, course, engine, parts, root)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that went through, in either pass, by either method; its points are left as `step-N`."""
    run = training(tmp_path_factory.mktemp("whole"), *request.param).go()
    run.root.joinpath("kind").write_text(" ".join(request.param))
    return run


def again(run: Training, root: Path, **changes: Any) -> Training:
    """A new training of the same kind."""
    kind, method = (run.root / "kind").read_text().split()
    return training(root, kind, Method(method), **changes)


def block(name: str) -> int | None:
    """The vision block of a trained tensor."""
    return int(name.split(".blocks.")[1].split(".")[0]) if ".visual.blocks." in name else None


def test_blocks_wait_to_the_bit_and_then_train(whole: Training) -> None:
    """Every tensor of a block is as it began until its stage begins, and moves in its first two steps."""
    waited = 0
    for tensor in whole.course.trained:
        start = FROM_STEP.get(block(tensor.name) or 0, 0)
        waited += start > 0
        for step in range(start + 1):
            assert torch.equal(whole.seen[step][tensor.name], whole.seen[0][tensor.name]), (tensor.name, step)
        assert not torch.equal(whole.seen[start + 2][tensor.name], whole.seen[start][tensor.name])
    assert waited == 4 * (8 if any(".21." in t.name and "lora" in t.name for t in whole.course.trained) else 12)
    frozen = set(whole.seen[0]) - {tensor.name for tensor in whole.course.trained}
    assert all(torch.equal(whole.seen[0][name], whole.seen[TOTAL][name]) for name in frozen)
    assert whole.course.verdict is Verdict.PASSED


def test_until_the_first_switch_it_is_the_run_that_knows_nothing_of_later_blocks(
    whole: Training, tmp_path: Path
) -> None:
    """Losses to the bit, with dropout: blocks that wait draw no mask, add nothing, and have no gradient. To the fused
    pass they are frozen: images are kept up to the first block that trains, under the name that others have for them.
    """
    alone = again(whole, tmp_path, stages=(replace(STAGES[0], gate_look=5),)).go()
    assert whole.losses[:3] == alone.losses[:3] and whole.losses[3:] != alone.losses[3:]
    assert whole.towers[:3] == alone.towers[:3]
    if whole.towers:
        assert [frozen for frozen, _ in whole.towers] == [22] * 3 + [20] * 3 + [18] * 3
        assert len({name for _, name in whole.towers}) == 3


def test_the_loop_tells_of_each_stage_and_the_gate_of_each_passes(whole: Training) -> None:
    """Evaluated and saved before the switch; then new blocks, all that train, and two looks."""
    events = whole.events
    told = [(type(e).__name__, e.seen.step) for e in events if isinstance(e, StageBegun | GatePassed | EvalDone)]
    assert told == [
        ("GatePassed", 2), ("EvalDone", 3), ("StageBegun", 3), ("EvalDone", 4), ("GatePassed", 5), ("StageBegun", 6),
        ("GatePassed", 8), ("EvalDone", 9),
    ]  # fmt: skip
    begun = [(e.new, e.blocks) for e in events if isinstance(e, StageBegun)]
    assert begun == [((20, 21), BLOCKS[1]), ((18, 19), BLOCKS[2])]
    assert whole.verdicts == ["open", "open", "passed"] * 3
    report = whole.course.report()
    assert [len(stage["trained"]) for stage in (*report["stages_before"], report)] == sorted(
        len([t for t in whole.course.trained if t.start <= start]) for start in (0, 3, 6)
    )


def test_new_blocks_warm_up_by_themselves_and_the_rates_are_those_in_use(whole: Training) -> None:
    """Two warm-up steps of nine; what has six steps has ceil(4/3) = 2, what has three has one."""
    rates = [e.learning_rates for e in whole.events if isinstance(e, StepDone)]
    rate = whole.parts.schedule.rate
    assert [r["vision"] for r in rates] == [rate("vision", step) for step in range(1, 10)]
    assert ["vision_newest" in r for r in rates] == [False] * 3 + [True] * 6
    assert rates[3]["vision_newest"] == pytest.approx(rates[3]["vision"] / 2)
    assert [r["vision_newest"] for r in rates[4:]] == [r["vision"] for r in rates[4:]]
    groups = {(group["part"], group["start"]) for group in whole.engine.optimizer.param_groups}
    assert groups == {("vision", 0), ("vision", 3), ("vision", 6), ("aligner", 0), ("llm", 0)}


def test_the_optimizer_goes_on_by_name_and_knows_nothing_of_what_is_new(whole: Training) -> None:
    """Moments to the bit, and for each tensor the count of its own updates, by which Adam corrects them."""
    assert set(whole.moments) == {3, 6}
    for before, after in whole.moments.values():
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name][key], value) for name, of in before.items() for key, value in of.items())
    state = whole.engine.optimizer.state
    assert {t.start: state[t.parameter]["step"].item() for t in whole.course.trained} == {0: 9, 3: 6, 6: 3}


@pytest.mark.parametrize("step", POINTS)
def test_a_run_that_goes_on_is_the_one_that_was_left_alone(whole: Training, step: int, tmp_path: Path) -> None:
    """From a point at a switch, and within a stage: losses, weights, moments and the gate's report to the bit."""
    point = read_point(whole.root / f"step-{step}")
    resumed = again(whole, tmp_path, step=step)
    load_weights(point, resumed.course.trained)
    load_moments(point, resumed.engine)
    restore_parts(point, {"gate": resumed.course})
    resumed.go(point.position)
    assert resumed.losses == whole.losses[step:]
    ours, theirs = (read_point(run.root / "resume" / f"step-{TOTAL}") for run in (resumed, whole))
    assert ours.parts == theirs.parts
    assert (ours.folder / "tensors.safetensors").read_bytes() == (theirs.folder / "tensors.safetensors").read_bytes()
    assert resumed.course.report() == whole.course.report() and resumed.course.verdict is Verdict.PASSED


def test_an_adapter_of_any_stage_loads_with_peft_alone(whole: Training) -> None:
    """All blocks of the last stage are in it; those that wait are as they began, and change nothing."""
    loaded = PeftModel.from_pretrained(tiny_model(), whole.root / "step-4-4")
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[tensor.name], whole.seen[4][tensor.name]) for tensor in whole.course.trained)
    waiting = [t.name for t in whole.course.trained if t.start > 4 and ".lora_A." not in t.name]
    for name in waiting:
        original = re.sub(r"modules_to_save\.default", "original_module", name)
        assert not found[name].any() if ".lora_B." in name else torch.equal(found[name], found[original])
    assert waiting


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "step"), [(21, 4), (23, 4)], ids=str)
def test_a_gradient_of_zero_after_a_switch_is_caught(tmp_path: Path, which: int, step: int) -> None:
    """Of what is new and of what goes on, which a ZeRO-2 engine that is taken apart too late would silence."""
    run = training(tmp_path)
    (name,) = (n for n, _ in run.model.named_parameters() if f"blocks.{which}.attn.proj.lora_B" in n)

    def mute(at: int) -> None:
        if at == step - 1:
            gradient = run.engine.gradient
            run.engine.gradient = lambda t: gradient(t) * (t.name != name)  # type: ignore[method-assign]

    with pytest.raises(GateFailed, match=rf"(?s)gradients of step {step} .*gradient is zero"):
        run.go(meddle=mute)
    assert list(run.course.report()["faults"]) == [name] and run.course.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("name", "at", "found"), [("blocks.21.attn.qkv.lora_A", 3, 3), ("language_model.embed_tokens", 4, 5)]
)
def test_what_is_frozen_and_changes_is_caught_in_any_stage(tmp_path: Path, name: str, at: int, found: int) -> None:
    """A block that waited, by one number, at its switch; the base, by digests of the beginning, at the next look."""
    run = training(tmp_path)
    (parameter,) = (p for n, p in run.model.named_parameters() if name in n)

    def change(step: int) -> None:
        if step == at:
            parameter.data.view(-1)[0] += 1

    with pytest.raises(GateFailed, match=rf"(?s)weights of step {found} .*bytes have changed"):
        run.go(meddle=change)
    (fault,) = run.course.report()["faults"]
    assert name in fault


def test_a_tensor_that_goes_on_and_stands_still_is_caught(tmp_path: Path) -> None:
    """An optimizer of the new stage that does not hold it: it had moved in the stage before."""
    run = training(tmp_path)

    take_over = run.engine.take_over

    def without(loss: Any, optimizer: Any, trained: Any) -> None:
        lost = next(t for t in trained if "blocks.23.attn.qkv.lora_B" in t.name)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not lost.parameter]
        take_over(loss, optimizer, trained)

    run.engine.take_over = without  # type: ignore[method-assign]
    with pytest.raises(GateFailed, match=r"blocks\.23\.attn\.qkv.*left it as it was"):
        run.go()
