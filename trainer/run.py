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
from trainer.metrics import Meter
from trainer.model import SupervisedLoss, apply_plan, load_model, load_tools, parameter_shapes, trained_tensors
from trainer.optim import make_optimizer
from trainer.reporter import Reporter
from trainer.strategy import make_plan
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
    build.refuse_unbuilt(resolved)
    config, training, tracking = resolved.config, resolved.config.training, resolved.config.tracking
    run_name = training.run_name or f"{resolved.name}-seed{training.seed}"

    # strategy -> plan, from names and shapes alone
    shapes = parameter_shapes(config.model.model)
    plan = make_plan(build.strategy_from(config), shapes, origins=resolved.origins)

    # data, checked before anything is loaded
    data = build.read_data(config)

    # model
    tools = load_tools(config.model.model)
    encoder = build.make_encoder(config, tools, data.taxonomy)
    data = build.check_lengths(config, data, encoder)
    base = load_model(
        config.model.model,
        tools,
        dtype=getattr(torch, config.model.torch_dtype),
        attn_impl=config.model.attn_impl,
        seed=training.seed,
    )
    model = apply_plan(base, plan, seed=training.seed)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(trained_tensors(model))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    # what the loop takes
    budget = build.budget_from(config, len(data.train.records))
    accelerator = Accelerator(mixed_precision=build.mixed_precision(config))
    loss, optimizer = accelerator.prepare(
        SupervisedLoss(model), make_optimizer(trained, weight_decay=training.weight_decay)
    )
    gate = Gate(trained, frozen, last_look=budget.gate_look)
    parts = Parts(
        accelerator=accelerator,
        model=loss,
        optimizer=optimizer,
        schedule=build.schedule_from(config, budget),
        trained=trained,
        gate=gate,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
    )
    eval_sets = build.eval_sets_from(config, data, encoder)
    steps = train_steps(
        SampleSet(data.train.records, encoder),
        seed=training.seed,
        micro_batch=budget.micro_batch,
        accumulation=budget.accumulation,
        workers=config.data.dataloader_num_workers,
    )
    meter = Meter(
        logging_steps=training.logging_steps,
        log_first=training.logging_first_step,
        total_steps=budget.total_steps,
        smoothing=tracking.smoothing_weight,
    )

    with open_run(run_name=run_name) as tracker, Display(budget.total_steps) as display:
        output = Path(training.output_dir) / f"{run_name}-{tracker.run_id[:8]}"
        facts.log_start(tracker, resolved, plan, data, encoder, budget, trained)
        reporter = Reporter(tracker, meter, display)
        try:
            fit(
                parts,
                steps,
                eval_sets,
                build.cadence_from(config, budget),
                Saver(model, output, keep=training.save_total_limit),
                reporter,
            )
        finally:
            facts.log_gate(tracker, gate)
        facts.log_end(tracker, reporter.evaluations, reporter.checkpoints)
        score_checkpoints(
            model,
            tools.tokenizer,
            encoder,
            data.val.records[: tracking.generate_records],
            reporter,
            tracker,
            batch_size=training.per_device_eval_batch_size,
        )
        return Outcome(tracker.run_id, output, dict(reporter.latest), gate.verdict.value)
