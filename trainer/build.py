"""Turns sections of the configuration into the values and objects that everything below takes: where config stops."""

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from trainer.config.problems import Problem, place, raise_if_any
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.data import loader
from trainer.data.digits import ensure_digits
from trainer.data.exchange import exchange_images
from trainer.data.loader import SampleSet, collate, eval_batches, steps_per_epoch
from trainer.data.prompts import Taxonomy
from trainer.data.records import Record, RecordSet, read_records
from trainer.data.template import Encoder
from trainer.errors import ConfigError, DataError
from trainer.events import EVAL, EXCHANGED, OOD, PROBE
from trainer.loop import Cadence, EvalSet
from trainer.metrics import Meter
from trainer.model import Tools, load_tools, parameter_shapes
from trainer.optim import Schedule
from trainer.strategy import Lora, Method, ParameterPlan, Part, Strategy, Target, make_plan


@dataclass(frozen=True, slots=True)
class Data:
    """The validated records of one run."""

    train: RecordSet
    val: RecordSet
    ood: RecordSet | None
    taxonomy: Taxonomy | None

    def sets(self) -> dict[str, RecordSet]:
        """`train`, `val` and, where there is one, `ood`."""
        return {"train": self.train, "val": self.val} | ({"ood": self.ood} if self.ood is not None else {})

    def probe(self, count: int) -> tuple[Record, ...]:
        """`count` training records evenly spread over the file: the same for every seed and arm."""
        records = self.train.records
        count = min(count, len(records))
        return tuple(records[i * len(records) // count] for i in range(count))


@dataclass(frozen=True, slots=True)
class Budget:
    """How long training is and what one step holds."""

    samples: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @property
    def effective_batch(self) -> int:
        """Samples (packs, when packing) in one optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def gate_look(self) -> int:
        """The step after which the gate looks at the weights: the end of warm-up or of training, but not before step 2,
        since LoRA's A stands still in the first.
        """
        return min(max(2, self.warmup_steps), self.total_steps)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of a run that needs no weights: what `plan` prints and `run` trains."""

    name: str
    """The arm: the strategy file's name, and what the command line has changed of it."""
    plan: ParameterPlan
    tools: Tools
    encoder: Encoder
    data: Data
    budget: Budget
    schedule: Schedule


def prepare(resolved: Resolved) -> Prepared:
    """Resolve the strategy against the model, check all records, count steps.

    Raises:
        UserError: whatever is wrong with configuration, strategy, records or model folder.
    """
    refuse_unbuilt(resolved)
    config = resolved.config
    shapes = parameter_shapes(config.model.model)
    plan = make_plan(strategy_from(config), shapes, origins=resolved.origins)
    data = read_data(config)
    tools = load_tools(config.model.model)
    encoder = make_encoder(config, tools, data.taxonomy)
    data = check_lengths(config, data, encoder)
    budget = budget_from(config, len(data.train.records))
    return Prepared(arm_name(resolved), plan, tools, encoder, data, budget, schedule_from(config, budget))


def arm_name(resolved: Resolved) -> str:
    """`last6_lora`; with `-P tuner.lora_rank=8`, `last6_lora+lora_rank=8`: another arm must not pass for this one."""
    params = resolved.params()
    changed = [
        f"+{key.rpartition('.')[2]}={params[key]}"
        for key, origin in resolved.origins.items()
        if origin == "-P" and key.startswith(("strategy.", "tuner."))
    ]
    return resolved.name + "".join(changed)


def make_output_folder(parent: str, run_name: str) -> Path:
    """A folder of its own for a run's checkpoints, made now: better to hear now that it cannot be written.

    Raises:
        ConfigError: it cannot be made.
    """
    safe = re.sub(r"[^\w.+=-]+", "-", run_name).strip(".-") or "run"
    folder = Path(parent) / f"{safe}-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            "training.output_dir", f"{folder}: {error.strerror}", "a folder that can be written", "choose another"
        ) from None
    return folder


def one_process(accelerator: Accelerator) -> Accelerator:
    """Refuse ranks that another launcher has started, and settings that its environment brings along.

    Raises:
        ConfigError: more than one process.
    """
    if accelerator.num_processes > 1:
        raise ConfigError(
            "the launcher", f"{accelerator.num_processes} ranks", "one rank (this version has nothing else yet)",
            "start one process, without torchrun or accelerate launch",
        )  # fmt: skip
    accelerator.gradient_accumulation_steps = 1  # we divide by the tokens of the whole step ourselves
    return accelerator


def refuse_unbuilt(resolved: Resolved) -> None:
    """Refuse settings that the schema knows and this version cannot do; better now than a run that ignores them.

    Raises:
        ConfigError: naming every such setting.
    """
    config = resolved.config
    training, augmentation = config.training, config.custom.augmentation
    unbuilt = {
        "training.packing": (training.packing, "false"),
        "training.early_stopping_patience": (training.early_stopping_patience is not None, "null"),
        "deepspeed.enabled": (config.deepspeed.enabled, "false"),
        "launch.nproc": (config.launch.nproc > 1, "1"),
        "custom.augmentation.enabled": (augmentation.enabled, "false"),
        "custom.images_per_user_turn": (config.custom.images_per_user_turn > 1, "1"),
        **{f"tuner.{key}": (True, "a strategy section instead") for key in config.raw_strategy},
    }
    raise_if_any(
        Problem(
            place(resolved.origins[key], key),
            json.dumps(resolved.params()[key]),
            f"{allowed} (this version has nothing else yet)",
            "write a strategy section" if key.startswith("tuner.") else f"override it: -P {key}={allowed}",
        )
        for key, (asked, allowed) in unbuilt.items()
        if asked
    )


def strategy_from(config: Config) -> Strategy:
    """The arm that a configuration describes."""
    assert config.strategy is not None  # noqa: S101  # refuse_unbuilt has seen to it
    vision, aligner, llm = config.strategy.vision, config.strategy.aligner, config.strategy.llm
    return Strategy(
        vision=Target(vision.blocks, Method(vision.method)),
        aligner=Target("all", Method(aligner.method)),
        llm=Target(llm.layers, Method(llm.method)),
        lora=Lora(config.tuner.lora_rank, config.tuner.lora_alpha, config.tuner.lora_dropout),
    )


def cache_folder() -> Path:
    """Where the built-in data is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-tower-experiments"


def mixed_precision(config: Config) -> str:
    """What accelerate computes in: trained tensors are float32, so a bf16 base needs autocast too."""
    return "bf16" if config.training.bf16 or config.model.torch_dtype == "bfloat16" else "no"


def read_data(config: Config) -> Data:
    """Read and validate all records; the built-in digits where no file is given.

    Raises:
        DataError: naming every bad record.
    """
    custom, digits = config.custom, config.custom.digits
    train, val, ood, taxonomy = custom.train_jsonl, custom.val_jsonl, custom.ood_jsonl, custom.taxonomy
    if train is None or val is None:
        try:
            paths = ensure_digits(
                cache_folder(), seed=digits.seed, n_train=digits.train, n_val=digits.val, n_ood=digits.ood
            )
        except OSError as error:
            raise DataError(
                "the built-in data",
                f"{cache_folder()}: {error.strerror}",
                "a folder that can be written",
                "set XDG_CACHE_HOME to one",
            ) from None
        train, val, taxonomy = str(paths.train), str(paths.val), taxonomy or str(paths.taxonomy)
        ood = str(paths.ood) if digits.ood else None
    return Data(
        train=read_records(Path(train), on_bad_record=custom.on_bad_record),
        val=read_records(Path(val), on_bad_record=custom.on_bad_record),
        ood=read_records(Path(ood), on_bad_record=custom.on_bad_record) if ood else None,
        taxonomy=Taxonomy.read(Path(taxonomy)) if taxonomy else None,
    )


def make_encoder(config: Config, tools: Tools, taxonomy: Taxonomy | None) -> Encoder:
    """What turns records into samples."""
    return Encoder(
        tools.tokenizer,
        tools.image_processor,
        scheme=config.prompts.scheme,
        language=config.prompts.language,
        emit_norm=config.custom.emit_norm,
        taxonomy=taxonomy,
        max_length=config.max_length,
        truncation=config.template.truncation_strategy,
        max_pixels=config.template.max_pixels,
    )


def check_lengths(config: Config, data: Data, encoder: Encoder) -> Data:
    """The records that can be encoded.

    Raises:
        DataError: naming every record that cannot, unless bad records are skipped.
    """
    skip = config.custom.on_bad_record
    return replace(
        data,
        train=loader.check_lengths(data.train, encoder, on_bad_record=skip),
        val=loader.check_lengths(data.val, encoder, on_bad_record=skip),
        ood=data.ood and loader.check_lengths(data.ood, encoder, on_bad_record=skip),
    )


def budget_from(config: Config, samples: int) -> Budget:
    """Optimizer steps and batch sizes for a number of training samples."""
    training = config.training
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    per_epoch = steps_per_epoch(samples, micro, accumulation)
    total = training.max_steps or _ceil(training.num_train_epochs * per_epoch)
    return Budget(samples, micro, accumulation, per_epoch, total, _ceil(training.warmup_ratio * total))


def _ceil(product: float) -> int:
    """Rounded up, but not for the last bit of a float product: 0.07 * 100 is 7, not 8."""
    return math.ceil(round(product, 9))


def cadence_from(config: Config, budget: Budget) -> Cadence:
    """When evaluating and saving are due; step 0 is evaluated too, so that every curve starts at the base model."""
    training, total = config.training, budget.total_steps
    saves = {
        "best": range(0),
        "steps": range(training.save_steps, total, training.save_steps),
        "epoch": range(budget.steps_per_epoch, total, budget.steps_per_epoch),
    }[training.save_strategy]
    return Cadence(
        total_steps=total,
        steps_per_epoch=budget.steps_per_epoch,
        eval_steps=frozenset(range(0, total, training.eval_steps)),
        save_steps=frozenset(step for step in saves if step >= training.save_delay_steps),
        save_best_from=max(1, min(training.save_delay_steps, total)),
    )


def schedule_from(config: Config, budget: Budget) -> Schedule:
    """Peaks and floor, each times `lr_scale`."""
    training = config.training
    peaks = {Part.VISION: training.vit_lr, Part.ALIGNER: training.aligner_lr, Part.LLM: training.learning_rate}
    return Schedule(
        peaks={part.value: peak * training.lr_scale for part, peak in peaks.items()},
        floor=training.lr_scheduler_kwargs.min_lr * training.lr_scale,
        warmup_steps=budget.warmup_steps,
        total_steps=budget.total_steps,
    )


def meter_from(config: Config, total_steps: int) -> Meter:
    """What turns events into metric rows."""
    return Meter(
        logging_steps=config.training.logging_steps,
        log_first=config.training.logging_first_step,
        total_steps=total_steps,
        smoothing=config.tracking.smoothing_weight,
    )


def eval_sets_from(config: Config, data: Data, encoder: Encoder) -> Mapping[str, EvalSet]:
    """The sets that are evaluated again and again; each is encoded once."""
    tracking, size = config.tracking, config.training.per_device_eval_batch_size

    def plain(records: tuple[Record, ...]) -> EvalSet:
        samples = SampleSet(records, encoder)
        return EvalSet(lambda: eval_batches(samples, batch_size=size))

    sets = {EVAL: plain(data.val.records)}
    if tracking.probe_records:
        sets[PROBE] = plain(data.probe(tracking.probe_records))
    if data.ood is not None:
        sets[OOD] = plain(data.ood.records)
    subset = data.val.records[: tracking.vision_gain_records]
    if exchanged := exchange_images(encoder.encode(record) for record in subset):
        batches = [collate(exchanged[i : i + size], encoder.pad_id) for i in range(0, len(exchanged), size)]
        sets[EXCHANGED] = EvalSet(lambda: batches, every=tracking.vision_gain_every)
    return sets
