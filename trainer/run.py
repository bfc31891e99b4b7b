"""Composition root of one training run: builds everything top to bottom in data-flow order, and holds no logic."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer import build, facts, launch, resume
from trainer.addresses import Store
from trainer.begin import AUTO, Asked, begin_on_ranks, open_tracker, restored
from trainer.budget import cadence_from, meter_from
from trainer.checkpoint import Saver
from trainer.config.resolved import Resolved
from trainer.curriculum import Course
from trainer.data.loader import train_steps
from trainer.datasets import eval_sets_from, to_caption
from trainer.display import Display
from trainer.engines import join_ranks, make_engine, material_of
from trainer.finish import score_checkpoints
from trainer.hosts.agreement import agreed
from trainer.loop import Parts, fit
from trainer.model import apply_plan, dtypes
from trainer.position import Position
from trainer.reporter import Reporter
from trainer.runs import Identity
from trainer.signals import SIGNALS
from trainer.tracker import Tracker


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run leaves behind."""

    run_id: str
    """Empty where its store has been away all the time."""
    adapter: Path
    """The checkpoint that is the run's result."""
    metrics: dict[str, float]
    """Last value of every metric."""
    gate: str
    waiting: int
    """Entries that are not delivered yet."""


def run(
    resolved: Resolved, *, logs_to: Store | None = None, resume_from: str = AUTO, allow_drift: bool = False,
    pause_after: int | None = None,
) -> Outcome:  # fmt: skip
    """Train one configuration from records to checkpoints, and log it all.

    Args:
        resolved: the configuration.
        logs_to: the tracking store, on the first rank; None: that of the environment.
        resume_from: `auto`, `never`, or the folder of an interrupted run; see `begin`.
        allow_drift: whether that one may be gone on with under another configuration.
        pause_after: training samples after which it pauses, to be gone on with; None: it does not.

    Raises:
        UserError: before anything was started in MLflow.
        TrainingStopped: the gate failed or a number was not finite; the MLflow run is FAILED.
        Interrupted: somebody has asked for the end, or (`Paused`) for a pause; the run can be resumed.
    """
    if logs_to is None and launch.is_first():
        from trainer.tracking import reach_store  # MLflow, which no other rank needs

        logs_to = reach_store()
    prepared = build.prepare(resolved)
    config, training, budget = resolved.config, resolved.config.training, prepared.budget
    run_name = training.run_name or f"{prepared.name}-seed{training.seed}"
    accelerator = join_ranks(prepared.zero, prepared.plan, budget, config)
    rank, ranks, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    store = launch.on_first_rank(accelerator, lambda: logs_to)
    rests = agreed(accelerator, lambda: facts.rests_on(resolved, prepared), resolved.params())
    identity = Identity(run_name, {**resolved.params(), **rests}, store.name)
    asked = Asked(resume_from, allow_drift, budget.total_steps, training.early_stopping_patience)
    with begin_on_ranks(accelerator, identity, Path(training.output_dir), asked) as begun:
        model = apply_plan(build.load_base(config, prepared.tools), prepared.plan, seed=training.seed)
        start = begun.point.position if begun.point else Position()

        # what the loop takes
        course = Course(model, prepared.stages, step=start.seen.step)  # has to see how tensors start, resumed or not
        # the first rank's are those that all ranks start from
        load = partial(resume.load_weights, trained=course.trained)
        launch.on_first_rank(accelerator, lambda: restored(begun, load))
        material = material_of(model, course, prepared.forward_pass, accelerator, config)
        engine = make_engine(accelerator, material, course, config)
        restored(begun, lambda point: resume.load_moments(point, engine))
        switch = partial(course.switch, engine, make=material)
        parts = Parts(engine, prepared.schedule, course.gate, training.seed, switch)
        samples, workers, best = prepared.samples, config.data.dataloader_num_workers, training.load_best_model_at_end
        steps = train_steps(samples, budget.plan, rank=rank, workers=workers, first_step=start.seen.step)
        eval_sets = eval_sets_from(config, prepared.data, prepared.encoder, samples.cache, rank=rank, ranks=ranks)

        tracker = launch.on_first_rank(
            accelerator,
            lambda: open_tracker(begun, store, run_name=run_name, close_seconds=config.tracking.close_seconds),
            elsewhere=Tracker,
        )
        with tracker, Display(budget.total_steps, quiet=not first) as display, launch.with_the_others():
            for line in (*begun.lines, *prepared.no_effect):
                display.say(line)
            reporter = Reporter(tracker, meter_from(config, budget.total_steps), display, begun.path)
            remembers: dict[str, resume.Stateful] = {"gate": course, "reporter": reporter}
            restored(begun, lambda point: resume.restore_parts(point, remembers))
            if first and begun.point is None:
                facts.log_start(tracker, resolved, prepared, dtypes(model), rests)
            told, keep = facts.recipe_from(resolved, prepared, rests, begun.key).facts(), training.save_total_limit
            saver = Saver(model, begun.path, keep=keep, accelerator=accelerator, facts=told)
            keeper = resume.Keeper(begun.path, engine, remembers, accelerator, told=tracker, key=begun.key)
            tracker.at_end(lambda: facts.log_gate(tracker, course))
            tracker.at_end(lambda: facts.log_checkpoints(tracker, reporter.checkpoints, best))
            cadence = cadence_from(config, budget, pause_after)
            with SIGNALS.in_training():
                fit(parts, steps, eval_sets, cadence, saver, reporter, keep=keeper, start=start, wishes=SIGNALS)
            facts.log_record_losses(tracker, reporter.evaluations)
            captioned = to_caption(config, prepared.data, prepared.encoder)
            at_once = config.tracking.generate_batch_size
            score_checkpoints(model, engine, prepared.encoder, captioned, reporter, tracker, batch_size=at_once)
    accelerator.wait_for_everyone()  # no rank ends while another still waits for it
    result = facts.result_of(reporter.checkpoints, best)
    return Outcome(tracker.run_id, Path(result.path), dict(reporter.latest), course.verdict.value, tracker.waiting)
