"""The loop: token-exact loss over any layout, reproducible, frozen stays frozen, and it stops before harm is done."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ARMS, PAD_ID, MakeParts, take_step, tiny_batch, tiny_samples
from trainer.cadence import Cadence
from trainer.data.loader import Batch, collate
from trainer.errors import TrainingStopped
from trainer.events import CheckpointSaved, EvalDone, Event, GatePassed, RecordLosses, Seen, StepDone, StoppedEarly
from trainer.loop import EvalSet, Parts, evaluate, fit
from trainer.model import TrainedTensor
from trainer.seeds import derived_seed

LENGTHS = (7, 12, 20, 9)


def some(indices: list[int], *, packed: bool = False) -> Batch:
    """Some of four samples of unequal length, with images of three sizes, as a batch of their own."""
    samples = tiny_samples(LENGTHS, grids=[(2, 4), (4, 4), (6, 2)])
    return collate([samples[i] for i in indices], PAD_ID, packed=packed)


def gradients_of_one_step(parts: Parts, micro_batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one optimizer step, caught before clipping and update."""
    caught: list[torch.Tensor] = []

    def catch(step: int, gradient_of: Callable[[TrainedTensor], torch.Tensor | None]) -> None:
        caught.extend(g.clone() for t in parts.engine.trained if (g := gradient_of(t)) is not None)

    parts.gate.before_update = catch  # type: ignore[method-assign]
    return take_step(parts, micro_batches, 1).loss, caught


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]], ids=str)
@pytest.mark.parametrize("arm", ["all_lora", "all_full"])
def test_any_layout_of_a_step_gives_the_same_loss_and_gradients(
    make_parts: MakeParts, arm: str, layout: list[list[int]], packed: bool
) -> None:
    """1x4 = 2x2 = 3+1 = 4x1, padded = packed, at dropout 0: loss to 1e-6, every gradient to 1e-5 relative."""
    loss, reference = gradients_of_one_step(make_parts(arm), [some([0, 1, 2, 3])])
    micro_batches = [some(indices, packed=packed) for indices in layout]
    other_loss, other = gradients_of_one_step(make_parts(arm), micro_batches)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(reference, other, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_a_silent_batch_takes_part_and_changes_nothing(make_parts: MakeParts) -> None:
    """What a rank without a pack runs: gradients of zero, no sample, no token."""
    loss, reference = gradients_of_one_step(make_parts("all_full"), [some([0, 1], packed=True)])
    silent = some([2], packed=True).silent()
    assert (silent.n_samples, silent.n_tokens, silent.n_supervised) == (0, 0, 0)
    other_loss, other = gradients_of_one_step(make_parts("all_full"), [some([0, 1], packed=True), silent])
    assert other_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(reference, other, strict=True))


def test_the_loss_of_a_step_is_the_sum_over_tokens_divided_by_their_number(make_parts: MakeParts) -> None:
    """Against transformers' own mean over the labels of the whole step in one piece."""
    parts, batch = make_parts(), some([0, 1, 2, 3])
    labels = batch.input_ids.masked_fill(~batch.supervised, -100)
    with torch.no_grad():
        expected = parts.engine.loss.model(**batch.model_inputs(), labels=labels).loss.item()
    done = take_step(parts, [some([0, 1, 2], packed=True), some([3])], 1)
    assert done.loss == pytest.approx(expected, rel=1e-6)
    assert done.supervised_tokens == batch.n_supervised


def run_fit(parts: Parts, tmp: Path, total: int = 4, **cadence: object) -> list[Event]:
    """Fit on two micro-batches a step, and return all events."""
    events: list[Event] = []
    steps = ([tiny_batch([8, 9], seed=2 * i), tiny_batch([6], seed=2 * i + 1)] for i in itertools.count())
    held_out = [tiny_batch([8, 10, 7], seed=1000)]

    def save(seen: Seen, kind: str) -> CheckpointSaved:
        return CheckpointSaved(seen, kind, str(tmp / kind), 1)

    settings = {"eval_steps": frozenset({0, 2}), "save_best_from": 1} | cadence
    timing = Cadence(total_steps=total, n_samples=6, **settings)  # type: ignore[arg-type]
    sets = {"eval": EvalSet(lambda: held_out), "probe": EvalSet(lambda: held_out, every=2)}
    fit(parts, steps, sets, timing, save, events.append)
    return events


def test_events_come_in_a_fixed_order(make_parts: MakeParts, tmp_path: Path) -> None:
    """Evaluate, save, step; the gate looks before anything is saved; best and last are saved at the end."""
    events = run_fit(make_parts(), tmp_path)
    told = [(type(e).__name__ + getattr(e, "kind", ""), e.seen.step) for e in events]
    assert told == [
        ("EvalDone", 0),
        ("StepDone", 1),
        ("StepDone", 2),
        ("EvalDone", 2),
        ("GatePassed", 2),
        ("CheckpointSavedbest", 2),
        ("StepDone", 3),
        ("StepDone", 4),
        ("EvalDone", 4),
        ("CheckpointSavedbest", 4),
        ("CheckpointSavedlast", 4),
    ]


def test_a_set_with_an_interval_is_evaluated_at_every_kth_evaluation_and_the_last(
    make_parts: MakeParts, tmp_path: Path
) -> None:
    """Every second of three evaluations is the first and the third."""
    sets = [set(e.losses) for e in run_fit(make_parts(), tmp_path) if isinstance(e, EvalDone)]
    assert sets == [{"eval", "probe"}, {"eval"}, {"eval", "probe"}]
    five = run_fit(make_parts(), tmp_path, eval_steps=frozenset({0, 1, 2, 3}))
    assert ["probe" in e.losses for e in five if isinstance(e, EvalDone)] == [True, False, True, False, True]


def test_best_is_saved_only_when_better_and_not_before_its_first_step(make_parts: MakeParts, tmp_path: Path) -> None:
    """With a rate too high to learn anything nothing is better than the start, which is too early to save."""
    parts = make_parts(learning_rate=1e-2)
    events = run_fit(parts, tmp_path, save_best_from=3)
    assert [e.seen.step for e in events if isinstance(e, CheckpointSaved) and e.kind == "best"] == [4]


def test_checkpoints_are_saved_at_the_steps_that_are_due(make_parts: MakeParts, tmp_path: Path) -> None:
    """`step-N` at its steps, `last` at the end, no `best` when none is asked for."""
    events = run_fit(make_parts(), tmp_path, save_steps=frozenset({1, 3}), save_best_from=None)
    assert [e.kind for e in events if isinstance(e, CheckpointSaved)] == ["step-1", "step-3", "last"]


def test_counters_add_up(make_parts: MakeParts, tmp_path: Path) -> None:
    """Three samples a step; padding counts nowhere."""
    last = [e for e in run_fit(make_parts(), tmp_path) if isinstance(e, StepDone)][-1].seen
    assert (last.step, last.samples, last.epoch) == (4, 12, 2.0)
    assert last.tokens == 4 * (8 + 9 + 6 + 3 * 2)
    assert last.supervised_tokens == 4 * (4 + 4 + 3)


@pytest.mark.parametrize("arm", ARMS)
def test_after_training_exactly_the_planned_tensors_differ(make_parts: MakeParts, arm: str, tmp_path: Path) -> None:
    """Frozen means bit-identical, without gradient and without optimizer state."""
    parts = make_parts(arm)
    before = {name: p.detach().clone() for name, p in parts.engine.loss.named_parameters()}
    run_fit(parts, tmp_path, total=3)
    changed = {name for name, p in parts.engine.loss.named_parameters() if not torch.equal(p, before[name])}
    assert {name.removeprefix("model.") for name in changed} == {t.name for t in parts.engine.trained}
    assert all(p.grad is None for p in parts.engine.loss.parameters() if not p.requires_grad)
    assert len(parts.engine.optimizer.state) == len(parts.engine.trained)


def test_the_same_seed_twice_is_bit_identical(make_parts: MakeParts, tmp_path: Path) -> None:
    """Losses, norms and weights, dropout on; and another seed is another run."""

    def once(seed: int) -> tuple[list[object], list[torch.Tensor]]:
        parts = replace(make_parts("all_lora", dropout=0.1), seed=seed)
        torch.rand(seed)  # a disturbed global generator must not matter
        events = run_fit(parts, tmp_path)
        numbers = [(e.loss, e.grad_norms) if isinstance(e, StepDone) else e.losses for e in events
                   if isinstance(e, StepDone | EvalDone)]  # fmt: skip
        return numbers, [t.parameter.detach() for t in parts.engine.trained]

    (first, weights), (second, again), (other, _) = once(17), once(17), once(18)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert first != other


def test_evaluation_neither_changes_the_model_nor_what_is_trained_after_it(
    make_parts: MakeParts, tmp_path: Path
) -> None:
    """With an evaluation before every step and with none, the same losses come out, dropout on."""

    def losses(**cadence: object) -> list[float]:
        events = run_fit(make_parts(dropout=0.1), tmp_path, **cadence)
        return [e.loss for e in events if isinstance(e, StepDone)]

    assert losses(eval_steps=frozenset(range(4))) == losses(eval_steps=frozenset())


def test_evaluation_gives_each_records_sum_whatever_the_batches(make_parts: MakeParts) -> None:
    """In eval mode, dropout on in training: three batches of one record equal one of three."""
    parts, batch = make_parts(dropout=0.5), some([0, 1, 2, 3])
    whole = evaluate(parts.engine, [batch])
    single = evaluate(parts.engine, [some([i]) for i in range(4)])
    packed = evaluate(parts.engine, [some([0, 1, 2, 3], packed=True)])
    assert whole.record_ids == single.record_ids == packed.record_ids
    assert whole.token_counts == packed.token_counts == tuple(batch.supervised.sum(1).tolist())
    assert whole.loss_sums == pytest.approx(single.loss_sums, rel=1e-5)  # float32 sums in other shapes
    assert packed.loss_sums == pytest.approx(single.loss_sums, rel=1e-5)


def poisoned(batch: Batch, record: int) -> Batch:
    """The batch with one record's image turned to NaN."""
    pixels = batch.pixel_values.clone().view(batch.n_samples, -1)
    pixels[record] = torch.nan
    return replace(batch, pixel_values=pixels.view_as(batch.pixel_values))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_records(make_parts: MakeParts) -> None:
    """Step, micro-batch and record; the weights are those of before."""
    parts = make_parts()
    before = [t.parameter.detach().clone() for t in parts.engine.trained]
    batches = [tiny_batch([8, 9]), poisoned(tiny_batch([8, 9], seed=7), 1)]
    with pytest.raises(TrainingStopped, match=r"step 3, micro-batch 1, in the records toy\.jsonl:701\."):
        take_step(parts, batches, 3)
    assert all(torch.equal(t.parameter, b) for t, b in zip(parts.engine.trained, before, strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_part(make_parts: MakeParts) -> None:
    """A finite loss can have an infinite gradient."""
    parts = make_parts()
    before = [t.parameter.detach().clone() for t in parts.engine.trained]
    victim = next(t for t in parts.engine.trained if t.part == "aligner")
    victim.parameter.register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingStopped, match=r"gradient of aligner is not finite at step 2 .*toy\.jsonl:0"):
        take_step(parts, [tiny_batch([8])], 2)
    assert all(torch.equal(t.parameter, b) for t, b in zip(parts.engine.trained, before, strict=True))


def test_an_evaluation_that_is_not_finite_stops_the_run_and_names_its_records(
    make_parts: MakeParts, tmp_path: Path
) -> None:
    """A model that gives NaN is lost; a run that went on would end well with it."""
    steps = iter([[tiny_batch([8])]] * 2)
    sets = {"eval": EvalSet(lambda: [poisoned(tiny_batch([8, 9], seed=7), 1)])}
    timing = Cadence(total_steps=2, n_samples=2, eval_steps=frozenset({0}))
    with pytest.raises(TrainingStopped, match=r"set eval is not finite after step 0, in 1 records: toy\.jsonl:701\."):
        fit(make_parts(), steps, sets, timing, lambda seen, kind: CheckpointSaved(seen, kind, "", 1), lambda _: None)


def test_clipping_scales_the_whole_gradient_to_the_limit_and_norms_are_those_before(make_parts: MakeParts) -> None:
    """A limit of 1e-3 against the same step without one: same direction, and the reported norm is unchanged."""
    free, tight = make_parts(), make_parts()
    free.engine.max_grad_norm, tight.engine.max_grad_norm = 1e9, 1e-3
    seen: list[list[torch.Tensor]] = []
    for parts in (free, tight):
        parts.engine.optimizer.step = lambda p=parts: seen.append([t.parameter.grad.clone() for t in p.engine.trained])  # type: ignore
    norms = [take_step(parts, [tiny_batch([8])], 1).grad_norms for parts in (free, tight)]
    assert norms[0] == norms[1]
    total = torch.sqrt(sum((g**2).sum() for g in seen[0]))
    assert norms[0]["total"] == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a * (1e-3 / total), rtol=1e-4, atol=0)  # the guard of 1e-6 in the divisor


def test_each_purpose_has_its_own_stream() -> None:
    """Equal arguments, equal seeds; one different argument, another stream."""
    assert derived_seed(17, "dropout", 1, 0, 0) == derived_seed(17, "dropout", 1, 0, 0)
    others = {derived_seed(17, "dropout", s, m, r) for s in range(5) for m in range(5) for r in range(5)}
    assert len(others) == 125
    assert derived_seed(17, "dropout", 11, 0) != derived_seed(17, "dropout", 1, 10)


def test_the_gate_speaks_through_an_event(make_parts: MakeParts, tmp_path: Path) -> None:
    """Once, after the step that it waits for."""
    events = run_fit(make_parts(last_look=3), tmp_path)
    assert [e.seen.step for e in events if isinstance(e, GatePassed)] == [3]


def eval_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the evaluations of the set `eval` come out as these, one token each; other sets give 1."""
    values = iter(losses)

    def scripted(engine: object, batches: object, wishes: object) -> RecordLosses:
        return RecordLosses(("r",), (None,), (next(values) if batches == "eval" else 1.0,), (1,))

    monkeypatch.setattr("trainer.loop.evaluate", scripted)


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        (2, [5.0, 4.0, 4.5, 4.0, 3.0, 2.0, 1.0], 3),  # equal is not better: 4.5 and 4.0 use the patience up
        (2, [5.0, 4.0, 4.5, 3.9, 3.0, 2.0, 1.0], 6),  # at the patience's last moment it got better
        (1, [5.0, 6.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1),
        (None, [5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0], 6),
    ],
)
def test_patience_counts_evaluations_without_a_better_loss(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, patience: int | None, losses: list[float], ends: int
) -> None:
    """Evaluated at every step of six: where training ends, and that the end is complete: every set, gate, `last`."""
    eval_losses(monkeypatch, losses)
    events: list[Event] = []
    steps = ([tiny_batch([8], seed=i)] for i in itertools.count())
    sets = {"eval": EvalSet(lambda: "eval"), "probe": EvalSet(lambda: "probe", every=100)}  # type: ignore
    timing = Cadence(6, n_samples=1, eval_steps=frozenset(range(6)), save_best_from=1, patience=patience)
    parts = make_parts(total_steps=6, last_look=5)
    seen = fit(parts, steps, sets, timing, lambda seen, kind: CheckpointSaved(seen, kind, "", 1), events.append)
    assert seen.step == ends
    assert [e.seen.step for e in events if isinstance(e, StoppedEarly)] == ([ends] if ends < 6 else [])
    assert events[-1] == CheckpointSaved(seen, "last", "", 1)
    if ends < 6:  # said before the last evaluation's row, whose gap takes the train row that it brings
        assert [isinstance(e, StoppedEarly) for e in events if e.seen.step == ends].index(True) == 1
    evaluations = [e for e in events if isinstance(e, EvalDone)]
    assert [("probe" in e.losses) for e in evaluations] == [True, *[False] * (ends - 1), True]
    assert sum(isinstance(e, GatePassed) for e in events) == (ends >= 2)  # one step leaves LoRA's A open
    best = [e for e in events if isinstance(e, CheckpointSaved) and e.kind == "best"]
    assert best[-1].seen.step == min(range(1, ends + 1), key=lambda i: losses[i])
