"""Composition root of one training run: builds everything top to bottom in data-flow order, and holds no logic."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import build, facts, launch
from trainer.budget import cadence_from
from trainer.checkpoint import Saver
from trainer.config.resolved import Resolved
from trainer.data.loader import train_steps
from trainer.datasets import eval_sets_from, to_caption
from trainer.display import Display
from trainer.finish import score_checkpoints
from trainer.gate import Gate
from trainer.gradient_checkpointing import checkpoint_layers
from trainer.loop import Parts, fit
from trainer.model import SupervisedLoss, apply_plan, dtypes, load_model, trained_tensors
from trainer.optim import make_optimizer
from trainer.reporter import Reporter
from trainer.tracking import Tracker, open_run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run leaves behind."""

    run_id: str
    adapter: Path
    """The checkpoint that is the run's result."""
    metrics: dict[str, float]
    """Last value of every metric."""
    gate: str


def run(resolved: Resolved) -> Outcome:
    """Train one configuration from records to checkpoints, and log it all.

    Raises:
        UserError: before anything was started in MLflow.
        TrainingStopped: the gate failed or a number was not finite; the MLflow run is FAILED.
    """
    prepared = build.prepare(resolved)
    config, training, budget = resolved.config, resolved.config.training, prepared.budget
    run_name = training.run_name or f"{prepared.name}-seed{training.seed}"
    accelerator = build.join_ranks(prepared, config)
    rank, ranks, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    output: Path = launch.on_first_rank(accelerator, lambda: build.make_output_folder(training.output_dir, run_name))

    # model, wrapped as the plan says
    base = load_model(
        config.model.model,
        prepared.tools,
        dtype=getattr(torch, config.model.torch_dtype),
        attn_impl=config.model.attn_impl,
        seed=training.seed,
    )
    model = apply_plan(base, prepared.plan, seed=training.seed)
    checkpoint_layers(model, build.checkpointed_parts(config))
    trained = list(trained_tensors(model))

    # what the loop takes
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    gate = Gate(trained, frozen, last_look=budget.gate_look)
    optimizer = make_optimizer(trained, weight_decay=training.weight_decay)
    loss = SupervisedLoss(model, bf16=build.computes_in_bf16(config))
    engine = build.make_engine(accelerator, loss, optimizer, trained, config)
    parts = Parts(engine, prepared.schedule, gate, training.seed)
    samples = prepared.samples
    steps = train_steps(samples, budget.plan, rank=rank, workers=config.data.dataloader_num_workers)
    eval_sets = eval_sets_from(config, prepared.data, prepared.encoder, samples.cache, rank=rank, ranks=ranks)

    tracker = launch.on_first_rank(accelerator, lambda: open_run(run_name=run_name), elsewhere=Tracker)
    with tracker, Display(budget.total_steps, quiet=not first) as display:
        for line in prepared.no_effect:
            display.say(line)
        if first:
            facts.log_start(tracker, resolved, prepared, dtypes(model))
        reporter = Reporter(tracker, build.meter_from(config, budget.total_steps), display)
        saver = Saver(model, output, keep=training.save_total_limit, accelerator=accelerator)
        tracker.at_end(lambda: facts.log_gate(tracker, gate))
        tracker.at_end(lambda: facts.log_checkpoints(tracker, reporter.checkpoints, training.load_best_model_at_end))
        fit(parts, steps, eval_sets, cadence_from(config, budget), saver, reporter)
        facts.log_record_losses(tracker, reporter.evaluations)
        score_checkpoints(
            model,
            engine,
            prepared.encoder,
            to_caption(config, prepared.data, prepared.encoder),
            reporter,
            tracker,
            batch_size=config.tracking.generate_batch_size,
        )
    accelerator.wait_for_everyone()  # no rank ends while another still waits for it
    result = facts.result_of(reporter.checkpoints, training.load_best_model_at_end)
    return Outcome(tracker.run_id, Path(result.path), dict(reporter.latest), gate.verdict.value)
