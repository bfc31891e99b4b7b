"""Every metric, param, tag and artifact name that reaches MLflow, with unit, better direction, and exact or measured.

An *exact* metric is a pure function of configuration, data, seed and layout: bit-identical when a run is repeated or
resumed. A *measured* one (seconds, throughput, memory) is not.
"""

from dataclasses import dataclass
from typing import Literal

EXPERIMENT = "stage_3_vision_comparison"
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"

PARTS = ("vision", "aligner", "llm")


@dataclass(frozen=True, slots=True)
class Metric:
    """What one metric means: its unit, whether lower or higher is better (None: neither), and whether it is exact."""

    unit: str
    better: Literal["lower", "higher"] | None = None
    exact: bool = True


TRAIN_LOSS = "train/loss"
TRAIN_LOSS_SMOOTHED = "train/loss_smoothed"
EVAL_LOSS = "eval/loss"
EVAL_LOSS_SMOOTHED = "eval/loss_smoothed"
EVAL_LOSS_BY_DOMAIN = "eval/loss_by_domain/"
OOD_LOSS = "ood/loss"
PROBE_LOSS = "probe/loss"
GAP = "generalization_gap"
GAP_CLEAN = "generalization_gap_clean"
VISION_GAIN = "eval/vision_gain"
F1 = "eval/f1"
PRECISION = "eval/precision"
RECALL = "eval/recall"
F1_ATTRIBUTES = "eval/f1_attributes"
CLASS_ACCURACY = "eval/class_accuracy"
BEST_LOSS = "eval/best_loss"
BEST_STEP = "eval/best_step"
SAMPLES_TO_BEST = "samples_to_best"
LEARNING_RATE = "learning_rate/"
GRAD_NORM = "grad_norm/"
LOSS_SPIKES = "loss_spikes"
EPOCH = "epoch"
SAMPLES_SEEN = "samples_seen"
TOKENS_SEEN = "tokens_seen"
SUPERVISED_TOKENS_SEEN = "supervised_tokens_seen"
TRAIN_SECONDS = "train_seconds"
SAMPLES_PER_SECOND = "throughput/samples_per_second"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
EVALUATION_SECONDS = "evaluation_seconds"
GENERATION_SECONDS = "generation_seconds"
PEAK_MEMORY = "memory/peak_bytes"
CHECKPOINT_BYTES = "checkpoint/bytes"
CPU_PERCENT = "system/cpu_percent"
MEMORY_BYTES = "system/memory_bytes"

_NATS = "nats per supervised token"

METRICS: dict[str, Metric] = {
    TRAIN_LOSS: Metric(_NATS, "lower"),
    TRAIN_LOSS_SMOOTHED: Metric(_NATS, "lower"),
    EVAL_LOSS: Metric(_NATS, "lower"),
    EVAL_LOSS_SMOOTHED: Metric(_NATS, "lower"),
    OOD_LOSS: Metric(_NATS, "lower"),
    PROBE_LOSS: Metric(_NATS, "lower"),
    GAP: Metric(_NATS, "lower"),
    GAP_CLEAN: Metric(_NATS, "lower"),
    VISION_GAIN: Metric(_NATS, "higher"),
    F1: Metric("fraction", "higher"),
    PRECISION: Metric("fraction", "higher"),
    RECALL: Metric("fraction", "higher"),
    F1_ATTRIBUTES: Metric("fraction", "higher"),
    CLASS_ACCURACY: Metric("fraction", "higher"),
    BEST_LOSS: Metric(_NATS, "lower"),
    BEST_STEP: Metric("optimizer steps"),
    SAMPLES_TO_BEST: Metric("samples", "lower"),
    LOSS_SPIKES: Metric("rows", "lower"),
    EPOCH: Metric("epochs"),
    SAMPLES_SEEN: Metric("samples"),
    TOKENS_SEEN: Metric("tokens"),
    SUPERVISED_TOKENS_SEEN: Metric("supervised tokens"),
    TRAIN_SECONDS: Metric("seconds", "lower", exact=False),
    EVALUATION_SECONDS: Metric("seconds, all evaluations so far", "lower", exact=False),
    GENERATION_SECONDS: Metric("seconds, captioning with one checkpoint", "lower", exact=False),
    SAMPLES_PER_SECOND: Metric("samples per second", "higher", exact=False),
    TOKENS_PER_SECOND: Metric("tokens per second", "higher", exact=False),
    PEAK_MEMORY: Metric("bytes, first rank", "lower", exact=False),
    CHECKPOINT_BYTES: Metric("bytes", "lower", exact=False),
    CPU_PERCENT: Metric("percent of one core, first rank", exact=False),
    MEMORY_BYTES: Metric("bytes, first rank", "lower", exact=False),
    GRAD_NORM + "total": Metric("norm before clipping"),
    **{GRAD_NORM + part: Metric("norm before clipping") for part in PARTS},
    **{LEARNING_RATE + part: Metric("per optimizer step") for part in PARTS},
}
"""What every run has."""

OF_STAGES: dict[str, Metric] = {
    LEARNING_RATE + "vision_newest": Metric("per optimizer step, of the blocks that began last"),
}
"""What runs with `strategy.vision.schedule` have beside it, from their first switch on."""


def metric(name: str) -> Metric:
    """The meaning of one metric; names under `eval/loss_by_domain/` share one.

    Raises:
        KeyError: the name is not ours.
    """
    return Metric(_NATS, "lower") if name.startswith(EVAL_LOSS_BY_DOMAIN) else (METRICS | OF_STAGES)[name]


# Params beside the resolved configuration, which is logged whole under its dotted keys.
TRAINABLE_PARAMETERS = "trainable_parameters/"
DTYPE = "dtype/"
VISION_BLOCKS = "vision.blocks_resolved"
VISION_STAGES = "vision.stages_resolved"
EFFECTIVE_BATCH_PACKS = "effective_batch.packs"
IMAGE_PROCESSOR = "image_processor"
SKIPPED_RECORDS = "skipped_records/"

# Tags
TAG_NOTE = "mlflow.note.content"  # MLflow's own: the description that its UI renders
TAG_STRATEGY = "strategy"
TAG_SEED = "seed"
TAG_PROFILE = "profile"
TAG_GATE = "training_gate"
TAG_CODE_VERSION = "code.version"
TAG_TRAIN_DIGEST = "data.train_digest"
TAG_VAL_DIGEST = "data.val_digest"
TAG_BASE_DIGEST = "base_model.digest"
TAG_ORDER_DIGEST = "data.order_digest"  # of the order in which the samples of the first epoch are trained on
DIGESTS = (TAG_TRAIN_DIGEST, TAG_VAL_DIGEST, TAG_BASE_DIGEST, TAG_ORDER_DIGEST)
"""What a run rests on that lies outside its configuration."""
TAG_CONTINUED_IN = "continued_in"  # of a run that `mlflow run` made for a training which another run already held
TAG_KEY = "training_key"  # of one training, however often it is interrupted: how a run is found that was made before
TAG_RESUMED_AT = "resumed_at"  # optimizer steps
TAG_DRIFT = "param_drift"  # what was changed in the configuration when a run was resumed, as JSON
TAG_RESULT = "result_checkpoint"
TAG_STOPPED_EARLY = "stopped_early"
TAG_SOURCE = "source"  # of a run that we have not trained: published, tensorboard; it has no gate to pass
TAG_PRINTED = "printed"  # of a published run: what its report says about it, as JSON
TAG_IMPORTED = "imported_from"
TAG_IMPORTED_ROWS = "imported_rows"
TAG_COMPARISON = "comparison"  # of a run that holds the report on others: which others
TAG_ROLE = "comparison.role"  # parent, arm or trial; of runs that belong together, whatever started them
PARENT, ARM, TRIAL = "parent", "arm", "trial"
TAG_ARM = "comparison.arm"
TAG_RATES_TRIED = "comparison.rates_tried"  # of an arm: what was tried before, as JSON; absent where nothing was
TAG_HALVING = "halving"  # of a comparison that may end arms early: how it stands; of an arm: why it was ended
TAG_CHECKPOINT_DIGEST = "checkpoint.digest"  # of a version in the Model Registry
TAG_SWEEP = "sweep.study"  # of a trial, and of the run that its trials are nested below
TAG_TRIAL = "sweep.trial"  # number of its first attempt
TAG_POINT = "sweep.point."  # and the key of an axis: what was tried

# Variables by which a run is told what it belongs to. They are no part of its identity: a run is the same without them.
PARENT_VARIABLE = "TRAINER_PARENT_RUN"  # MLflow run to nest a new run below
TAGS_VARIABLE = "TRAINER_TAGS"  # tags of a new run, as JSON

# Artifacts
ARTIFACT_CONFIG = "resolved_config.yaml"
ARTIFACT_PLAN = "parameter_plan.json"
ARTIFACT_GATE = "training_gate.json"
ARTIFACT_RECORD_LOSSES = "eval_record_losses.parquet"
ARTIFACT_ENVIRONMENT = "environment.json"
ARTIFACT_CHECKPOINTS = "checkpoints.json"
ARTIFACT_PREDICTIONS = "predictions.jsonl"
ARTIFACT_SKIPPED = "skipped_records.txt"
ARTIFACT_PREVIEW = "preview.png"
ARTIFACT_CHAMPION = "champion"  # folder: the checkpoint of a run that was promoted
ARTIFACT_CONVERSATION = "first_conversation.txt"
ARTIFACT_TRACEBACK = "traceback.txt"
ARTIFACT_TRIALS = "sweep_trials.csv"
ARTIFACT_POINTS = "sweep_points.json"
