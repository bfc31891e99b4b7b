"""Turns sections of the configuration into the values and objects that everything below takes: where config stops."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
from trainer.loop import Cadence, EvalSet
from trainer.model import Tools
from trainer.optim import Schedule
from trainer.strategy import Lora, Method, Part, Strategy, Target


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
        paths = ensure_digits(
            cache_folder(), seed=digits.seed, n_train=digits.train, n_val=digits.val, n_ood=digits.ood
        )
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
    by_epochs = math.ceil(training.num_train_epochs * per_epoch)
    total = min(by_epochs, training.max_steps or by_epochs)
    return Budget(samples, micro, accumulation, per_epoch, total, math.ceil(training.warmup_ratio * total))


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


def eval_sets_from(config: Config, data: Data, encoder: Encoder) -> Mapping[str, EvalSet]:
    """The sets that are evaluated again and again; each is encoded once."""
    tracking, size = config.tracking, config.training.per_device_eval_batch_size

    def plain(records: tuple[Record, ...]) -> EvalSet:
        samples = SampleSet(records, encoder)
        return EvalSet(lambda: eval_batches(samples, batch_size=size))

    sets = {"eval": plain(data.val.records)}
    if tracking.probe_records:
        sets["probe"] = plain(data.probe(tracking.probe_records))
    if data.ood is not None:
        sets["ood"] = plain(data.ood.records)
    subset = data.val.records[: tracking.vision_gain_records]
    if exchanged := exchange_images(encoder.encode(record) for record in subset):
        batches = [collate(exchanged[i : i + size], encoder.pad_id) for i in range(0, len(exchanged), size)]
        sets["exchanged_images"] = EvalSet(lambda: batches, every=tracking.vision_gain_every)
    return sets
