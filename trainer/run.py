"""Composition root of one training run: builds everything top to bottom in data-flow order, and holds no logic."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer import build, facts
from trainer.checkpoint import Saver
from trainer.config.resolved import Resolved
from trainer.data.loader import SampleSet, train_steps
from trainer.display import Display
from trainer.finish import score_checkpoints
from trainer.gate import Gate
from trainer.loop import Parts, fit
from trainer.model import SupervisedLoss, apply_plan, dtypes, load_model, trained_tensors
from trainer.optim import make_optimizer
from trainer.reporter import Reporter
from trainer.tracking import open_run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run leaves behind."""

    run_id: str
    output: Path
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
    config, training = resolved.config, resolved.config.training
    run_name = training.run_name or f"{prepared.name}-seed{training.seed}"
    output = build.make_output_folder(training.output_dir, run_name)

    # model, wrapped as the plan says
    base = load_model(
        config.model.model,
        prepared.tools,
        dtype=getattr(torch, config.model.torch_dtype),
        attn_impl=config.model.attn_impl,
        seed=training.seed,
    )
    model = apply_plan(base, prepared.plan, seed=training.seed)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(trained_tensors(model))

    # what the loop takes
    accelerator = build.one_process(Accelerator(mixed_precision=build.mixed_precision(config)))
    optimizer = make_optimizer(trained, weight_decay=training.weight_decay)
    loss, optimizer = accelerator.prepare(SupervisedLoss(model), optimizer)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    gate = Gate(trained, frozen, last_look=prepared.budget.gate_look)
    parts = Parts(accelerator, loss, optimizer, prepared.schedule, trained, gate, training.max_grad_norm, training.seed)
    steps = train_steps(
        SampleSet(prepared.data.train.records, prepared.encoder),
        seed=training.seed,
        micro_batch=prepared.budget.micro_batch,
        accumulation=prepared.budget.accumulation,
        workers=config.data.dataloader_num_workers,
    )
    eval_sets = build.eval_sets_from(config, prepared.data, prepared.encoder)

    total_steps = prepared.budget.total_steps
    with open_run(run_name=run_name) as tracker, Display(total_steps) as display:
        facts.log_start(tracker, resolved, prepared, dtypes(model))
        reporter = Reporter(tracker, build.meter_from(config, total_steps), display)
        tracker.at_end(lambda: facts.log_gate(tracker, gate))
        tracker.at_end(lambda: facts.log_checkpoints(tracker, reporter.checkpoints))
        cadence = build.cadence_from(config, prepared.budget)
        fit(parts, steps, eval_sets, cadence, Saver(model, output, keep=training.save_total_limit), reporter)
        facts.log_record_losses(tracker, reporter.evaluations)
        score_checkpoints(
            model,
            prepared.tools.tokenizer,
            prepared.encoder,
            prepared.data.val.records[: config.tracking.generate_records],
            reporter,
            tracker,
            batch_size=training.per_device_eval_batch_size,
        )
    return Outcome(tracker.run_id, output, dict(reporter.latest), gate.verdict.value)
