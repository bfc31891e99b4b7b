"""Prints what a run would do (`trainer plan`) and what a run has done, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer import build, names
from trainer.addresses import tracking_uri, without_password
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.estimate import estimate
from trainer.facts import batch_arithmetic
from trainer.optim import Schedule
from trainer.run import Outcome
from trainer.show_cost import cost_lines
from trainer.stages import Stage, spans
from trainer.strategy import Method, ParameterPlan


def show_plan(resolved: Resolved, console: Console | None = None) -> None:
    """Resolve everything short of loading weights, and print it.

    Raises:
        UserError: whatever `trainer run` would refuse.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    prepared = build.prepare(resolved)
    plan, config = prepared.plan, resolved.config

    console.print(Text(prepared.name, style="bold"), f" profile {resolved.profile or 'none'}\n")
    for line in (*resolved.lines(), *prepared.no_effect):
        console.print(line, markup=False)
    console.print()
    console.print(f"forward pass: {prepared.forward_pass.line}\n", markup=False)
    for line in _plan_lines(plan, prepared.schedule, config.training.weight_decay):
        console.print(line, markup=False)
    counts = plan.trainable_parameters()
    console.print(
        f"trainable {counts['total']:,} of {plan.total_parameters():,} parameters "
        f"({100 * counts['total'] / plan.total_parameters():.2f} %); vision blocks {spans(plan.vision_blocks)}\n"
    )
    for line in (*_budget_lines(prepared, config, resolved.chosen), *_stage_lines(prepared.stages, prepared.schedule)):
        console.print(line, markup=False)
    console.print()
    for line in cost_lines(estimate(resolved, prepared), total_steps=prepared.budget.total_steps):
        console.print(line, markup=False)


def show_outcome(outcome: Outcome, console: Console | None = None) -> None:
    """Print the result of a run, and how to look at it."""
    console = console or Console(highlight=False, soft_wrap=True)
    latest = outcome.metrics
    table = Table(title="result", show_header=False, title_justify="left")
    rows = {
        "eval loss, final": names.EVAL_LOSS,
        "eval loss, best": names.BEST_LOSS,
        "  at step": names.BEST_STEP,
        "train loss, smoothed": names.TRAIN_LOSS_SMOOTHED,
        "generalization gap": names.GAP,
        "generalization gap, clean": names.GAP_CLEAN,
        "vision gain": names.VISION_GAIN,
        "out-of-domain loss": names.OOD_LOSS,
        "F1, final": names.F1,
    }
    for word, key in rows.items():
        if key in latest:
            table.add_row(word, f"{latest[key]:g}" if key == names.BEST_STEP else f"{latest[key]:.4f}")
    table.add_row("training gate", outcome.gate)
    console.print(table)
    uri = tracking_uri()
    run_id = outcome.run_id or "(not made yet)"
    console.print(f"run {run_id} in {without_password(uri)}, result in {outcome.adapter}", markup=False)
    if outcome.waiting:
        console.print(
            f"{outcome.waiting} entries are not delivered: python -m trainer sync {outcome.adapter.parent}",
            markup=False,
        )
    where = f"mlflow ui --backend-store-uri {without_password(uri)}" if "://" in uri and "http" not in uri else uri
    console.print(f"look at it: {where}", markup=False)


def _plan_lines(plan: ParameterPlan, schedule: Schedule, weight_decay: float) -> list[str]:
    """One row for each part and rule, the rule itself below it: patterns are too long for a column."""
    lines = [f"{'part':<9}{'method':<8}{'tensors':>8}{'parameters':>14}  {'peak LR':<10}{'weight decay':<20}"]
    for part, rule, tensors in plan.by_rule():
        lora = rule.method is Method.LORA
        parameters = sum(plan.lora.rank * sum(t.shape) if lora else t.size for t in tensors)
        trained = rule.method is not Method.FROZEN
        rate = f"{schedule.peaks[part.value]:g}" if trained else "-"
        decay = f"{weight_decay:g}, matrices only" if trained else "-"
        lines.append(f"{part:<9}{rule.method:<8}{len(tensors):>8}{parameters:>14,}  {rate:<10}{decay:<20}")
        lines.append(f"         {rule.pattern}")
    return lines


def _stage_lines(stages: Sequence[Stage], schedule: Schedule) -> list[str]:
    """A line for each stage: its steps, the vision blocks that train, and how long those that are new warm up."""
    if len(stages) == 1:
        return []
    ends = [*(stage.start for stage in stages[1:]), schedule.total_steps]
    lines = [f"stages           steps 1-{ends[0]}: vision blocks {spans(stages[0].blocks)}"]
    for before, stage, end in zip(stages, stages[1:], ends[1:], strict=False):
        new = spans(tuple(block for block in stage.blocks if block not in before.blocks))
        lines.append(
            f"                 steps {stage.start + 1}-{end}: vision blocks {spans(stage.blocks)}; "
            f"{new} new, with {schedule.warmup_of(stage.start)} steps of warm-up"
        )
    return lines


def _budget_lines(prepared: build.Prepared, config: Config, ranks: str) -> list[str]:
    """Samples, packs, ranks where they were chosen, batch and steps, each with its arithmetic."""
    budget, data, encoder = prepared.budget, prepared.data, prepared.encoder
    plan, lengths = budget.plan, budget.plan.samples.lengths(0)
    mean = sum(lengths) / len(lengths)
    packs, batch = len(plan.packs(0)), budget.effective_batch
    others = f"{len(data.val.records)} validation" + (f", {len(data.ood.records)} out of domain" if data.ood else "")
    training = config.training
    by_epochs = f"{training.num_train_epochs:g} epochs = {budget.total_steps}"
    length = f"max_steps = {budget.total_steps}" if training.max_steps else by_epochs
    skipped = sum(len(records.skipped) for records in data.sets().values())
    left_out = [f"left out         {skipped} bad records (custom.on_bad_record: skip)"] if skipped else []
    if plan.capacity is None:
        packed = f"{packs} (no packing: one sample each)"
    else:
        full = 100 * sum(lengths) / (packs * plan.capacity)
        packed = (
            f"{budget.samples} samples in {packs} packs of at most {plan.capacity} tokens in the first epoch: "
            f"{budget.samples / packs:.1f} samples a pack, {full:.0f} % full"
        )
    return [
        *left_out,
        f"samples          {budget.samples} training, {others}; "
        f"{mean:.0f} tokens on average, {max(lengths)} at most (limit {encoder.max_length})",
        f"packs            {packed}",
        *([f"ranks            {ranks}"] if ranks else []),
        f"effective batch  {batch_arithmetic(budget)}; x {sum(lengths) / packs:,.0f} tokens "
        f"= {batch * sum(lengths) / packs:,.0f} tokens",
        f"optimizer steps  ceil({packs} / {batch}) = {plan.steps_in_epoch(0)} an epoch; {length} "
        f"in all, of which {budget.warmup_steps} warm-up",
    ]
