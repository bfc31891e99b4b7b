"""What is written to MLflow about a run beside its metric rows: params, tags, datasets, description, artifacts."""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import names, provenance
from trainer.budget import Budget
from trainer.build import Prepared
from trainer.checkpoint import MANIFEST
from trainer.config.problems import counted
from trainer.config.resolved import Resolved
from trainer.curriculum import Course
from trainer.data.records import RecordSet
from trainer.events import CheckpointSaved, EvalDone
from trainer.generation import Caption
from trainer.inference.recipe import Recipe
from trainer.stages import Stage, spans
from trainer.strategy import Method, ParameterPlan
from trainer.tracker import Tracker

_PREVIEWED = 2
"""Epochs in which a run's own sheet shows each record."""


def rests_on(resolved: Resolved, prepared: Prepared) -> dict[str, str]:
    """What a training is made of beside its configuration: the arm's name, data, base weights, effective batch."""
    data, config = prepared.data, resolved.config
    return {
        names.TAG_STRATEGY: prepared.name,
        names.TAG_TRAIN_DIGEST: data_digest(data.train),
        names.TAG_VAL_DIGEST: data_digest(data.val),
        names.TAG_BASE_DIGEST: provenance.base_digest(config.model.model, config.training.seed),
        names.TAG_ORDER_DIGEST: order_digest(prepared.budget),
        names.EFFECTIVE_BATCH_PACKS: str(prepared.budget.effective_batch),
    }


def recipe_from(resolved: Resolved, prepared: Prepared, rests: Mapping[str, str], key: str) -> Recipe:
    """What every checkpoint says of how it was trained; `key` finds its run in MLflow."""
    config = resolved.config
    return Recipe(
        strategy=rests[names.TAG_STRATEGY],
        seed=config.training.seed,
        training_key=key,
        base_model=config.model.model,
        base_digest=rests[names.TAG_BASE_DIGEST],
        train_digest=rests[names.TAG_TRAIN_DIGEST],
        val_digest=rests[names.TAG_VAL_DIGEST],
        torch_dtype=config.model.torch_dtype,
        scheme=config.prompts.scheme,
        language=config.prompts.language,
        emit_norm=config.custom.emit_norm,
        taxonomy=prepared.data.taxonomy if config.prompts.scheme == "B" else None,
        max_length=config.max_length,
        max_pixels=config.template.max_pixels,
    )


def log_start(
    tracker: Tracker,
    resolved: Resolved,
    prepared: Prepared,
    dtypes: Mapping[str, str],
    rests: Mapping[str, str],
) -> None:
    """All that is known before the first step; `dtypes` is part -> number format of what trains of it."""
    config, plan, data, budget = resolved.config, prepared.plan, prepared.data, prepared.budget
    tracker.tags(
        {
            names.TAG_SEED: str(config.training.seed),
            names.TAG_PROFILE: resolved.profile or "none",
            names.TAG_GATE: "open",
            names.TAG_CODE_VERSION: provenance.code_version(),
            **{tag: rests[tag] for tag in (names.TAG_STRATEGY, *names.DIGESTS)},
        }
    )
    tracker.params(
        {
            **resolved.params(),
            **{names.TRAINABLE_PARAMETERS + key: str(count) for key, count in plan.trainable_parameters().items()},
            **{names.DTYPE + part: dtype for part, dtype in dtypes.items()},
            names.VISION_BLOCKS: json.dumps(plan.vision_blocks),
            **stages_param(prepared.stages),
            names.EFFECTIVE_BATCH_PACKS: str(budget.effective_batch),
            names.IMAGE_PROCESSOR: "Qwen2VLImageProcessorPil",
            **{names.SKIPPED_RECORDS + part: str(len(records.skipped)) for part, records in data.sets().items()},
        }
    )
    tracker.dataset("train", rests[names.TAG_TRAIN_DIGEST], str(data.train.path), "train")
    tracker.dataset("val", rests[names.TAG_VAL_DIGEST], str(data.val.path), "validation")
    if data.ood is not None:
        tracker.dataset("ood", data_digest(data.ood), str(data.ood.path), "out_of_domain")
    tracker.description(description(resolved, prepared))
    tracker.text(resolved.to_yaml(), names.ARTIFACT_CONFIG)
    if skipped := [message for records in data.sets().values() for message in records.skipped]:
        tracker.text("\n".join(skipped) + "\n", names.ARTIFACT_SKIPPED)
    if config.custom.dump_conversation_text:
        tracker.text(prepared.encoder.conversation(prepared.samples.record((0, 0))), names.ARTIFACT_CONVERSATION)
    if config.tracking.preview_records:
        log_preview(tracker, prepared, mode=config.custom.augmentation.mode, n_records=config.tracking.preview_records)
    tracker.text(json.dumps(plan_table(plan), indent=1), names.ARTIFACT_PLAN)
    tracker.text(json.dumps(provenance.environment(), indent=1), names.ARTIFACT_ENVIRONMENT)


def stages_param(stages: Sequence[Stage]) -> dict[str, str]:
    """Optimizer steps before each stage, and the vision blocks that train in it; nothing where there is one stage."""
    told = [{"after_step": stage.start, "blocks": stage.blocks} for stage in stages]
    return {names.VISION_STAGES: json.dumps(told)} if len(stages) > 1 else {}


def log_preview(tracker: Tracker, prepared: Prepared, *, mode: str, n_records: int) -> None:
    """A small contact sheet of what is trained on."""
    from trainer.preview import save_preview  # matplotlib, which takes a second, and only here

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / names.ARTIFACT_PREVIEW
        name = prepared.data.train.path.name
        save_preview(prepared.samples, path, name=name, mode=mode, n_records=n_records, n_variants=_PREVIEWED)
        tracker.file(path)


def log_gate(tracker: Tracker, gate: Course) -> None:
    """The gates' verdict and the numbers behind it."""
    tracker.tags({names.TAG_GATE: gate.verdict.value})
    tracker.text(json.dumps(gate.report(), indent=1), names.ARTIFACT_GATE)


def log_record_losses(tracker: Tracker, evaluations: Mapping[str, EvalDone]) -> None:
    """Per-record losses of the best and the last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / names.ARTIFACT_RECORD_LOSSES
        path.write_bytes(record_losses_parquet(evaluations))
        tracker.file(path)


def result_of(checkpoints: Mapping[str, CheckpointSaved], best: bool) -> CheckpointSaved:
    """The checkpoint that a run hands on: the one at the lowest eval loss where `best` is wanted, else the last."""
    return checkpoints["best" if best and "best" in checkpoints else "last"]


def log_checkpoints(tracker: Tracker, checkpoints: Mapping[str, CheckpointSaved], best: bool) -> None:
    """Where the checkpoints are, their manifests, and which of them is the run's result."""
    if "last" in checkpoints:
        tracker.tags({names.TAG_RESULT: result_of(checkpoints, best).kind})
    folders = {kind: Path(saved.path).resolve() for kind, saved in checkpoints.items()}
    manifests = {
        kind: {"path": str(folder), **json.loads((folder / MANIFEST).read_text(encoding="utf-8"))}
        for kind, folder in folders.items()
        if (folder / MANIFEST).is_file()
    }
    tracker.text(json.dumps(manifests, indent=1), names.ARTIFACT_CHECKPOINTS)


def description(resolved: Resolved, prepared: Prepared) -> str:
    """The run in Markdown, as the MLflow UI shows it: what trains, on what, for how long."""
    plan, data, budget = prepared.plan, prepared.data, prepared.budget
    counts, total = plan.trainable_parameters(), plan.total_parameters()
    staged = [f"- after step {s.start}: vision blocks {spans(s.blocks)}" for s in prepared.stages]
    rows = [
        f"| {part} | {rule.method} | `{rule.pattern}` | {len(tensors)} |"
        for part, rule, tensors in plan.by_rule()
        if rule.method is not Method.FROZEN
    ]
    return "\n".join(
        [
            f"**{prepared.name}**, seed {resolved.config.training.seed}, profile {resolved.profile or 'none'}, "
            f"base `{resolved.config.model.model}`",
            "",
            f"{counts['total']:,} of {total:,} parameters train ({100 * counts['total'] / total:.2f} %).",
            "",
            "| part | method | rule | tensors |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            *([*staged, ""] if len(staged) > 1 else []),
            f"{budget.samples} training and {len(data.val.records)} validation records; {budget.total_steps} optimizer "
            f"steps of {batch_arithmetic(budget)}.",
        ]
    )


def batch_arithmetic(budget: Budget) -> str:
    """`2 packs a micro-batch x 2 accumulated x 1 rank = 4 packs`."""
    plan = budget.plan
    noun = "sample" if plan.capacity is None else "pack"
    return (
        f"{counted(plan.micro_batch, noun)} a micro-batch x {plan.accumulation} accumulated "
        f"x {counted(plan.ranks, 'rank')} = {counted(budget.effective_batch, noun)}"
    )


def log_base(tracker: Tracker, folder: Path) -> None:
    """The figures of a newly trained built-in base; its run carries no `strategy` tag, so no comparison takes it."""
    card = folder / "pocket.json"
    figures = json.loads(card.read_text(encoding="utf-8"))["figures_after_rounding_to_bf16"]
    tracker.file(card)
    tracker.metrics(
        {
            names.EVAL_LOSS: figures["eval_loss"],
            names.VISION_GAIN: figures["vision_gain"],
            names.F1: figures["f1"],
            names.F1_ATTRIBUTES: figures["f1_attributes"],
            names.CLASS_ACCURACY: figures["class_accuracy"],
        },
        step=0,
    )


def captions_text(captions: Iterable[Caption]) -> str:
    """Generated captions beside the truth, one JSON object a line."""
    return "".join(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in captions)


def record_losses_parquet(evaluations: Mapping[str, EvalDone]) -> bytes:
    """One row per evaluation (`best`, `last`), set and record: summed loss in nats, number of supervised tokens."""
    rows: dict[str, list[Any]] = {key: [] for key in ("at", "step", "set", "record_id", "domain", "loss_sum", "tokens")}
    for at, evaluation in evaluations.items():
        for set_name, losses in evaluation.losses.items():
            count = len(losses.record_ids)
            rows["at"] += [at] * count
            rows["step"] += [evaluation.seen.step] * count
            rows["set"] += [set_name] * count
            rows["record_id"] += losses.record_ids
            rows["domain"] += losses.domains
            rows["loss_sum"] += losses.loss_sums
            rows["tokens"] += losses.token_counts
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer, compression="zstd")
    return buffer.getvalue()


def data_digest(records: RecordSet) -> str:
    """Digest of a JSONL file and all images it names, in order: 32 hex characters."""
    images = dict.fromkeys(picture.path for record in records.records for picture in record.images)
    return provenance.files_digest([records.path, *images])


def order_digest(budget: Budget) -> str:
    """Digest of the packs of the first epoch in the order in which they are trained on: 32 hex characters.

    Of one seed it is the same for all arms, whatever they accumulate: no arm has the luck of better batches.
    """
    return hashlib.sha256(json.dumps(budget.plan.packs(0)).encode()).hexdigest()[:32]


def plan_table(plan: ParameterPlan) -> dict[str, Any]:
    """The plan as data: counts, and every tensor with part, method and the rule that caught it."""
    return {
        "vision_blocks": plan.vision_blocks,
        "trainable_parameters": plan.trainable_parameters(),
        "total_parameters": plan.total_parameters(),
        "lora": asdict(plan.lora),
        "tensors": [asdict(tensor) for tensor in plan.tensors],
    }
