"""The typed configuration: one frozen model per YAML section, the unit and meaning under each field.

`tuner` and `strategy`, which say what is trained, are in `parts`; augmentation has a module of its own.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.augmentation import Augmentation
from trainer.config.fields import Count, CountOrZero, Gpus, Impossible, Pixels, Ranks, Rate, Section, Share
from trainer.config.parts import RAW_STRATEGY_KEYS, Strategy, Tuner


class Model(Section):
    """Which base model, and how its numbers and its attention are computed."""

    model: Annotated[str, Field(min_length=1)] = "pocket"
    """Base model: `pocket` (built in), `random:2b|4b|8b|32b` (no weights), a folder, or a hub id `org/name`."""
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which frozen weights are held; what is trained is float32 in any case."""
    attn_impl: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation, by transformers' name; auto: flash_attention_2 where it can be, else sdpa."""
    fused: bool = True
    """Whether the layers' forward and backward pass are this project's fast ones; false: transformers' and PEFT's."""


class Template(Section):
    """How a record becomes token ids."""

    template: Literal["qwen3_vl"] = "qwen3_vl"
    """Chat template; the one that the base model carries."""
    truncation_strategy: Literal["raise", "right"] = "raise"
    """A sample longer than the limit: `raise` names it before training, `right` cuts the end of its answer."""
    max_pixels: Pixels | None = None
    """Pixels per image above which it is made smaller; null: images are never resized."""
    max_length: Count = 20000
    """Tokens per sample at most; `global_max_length` takes its place where that is given."""


class Prompts(Section):
    """What the model is told before it answers."""

    scheme: Literal["A", "B"] = "A"
    """A: the output format only. B: also the ordering rule, the taxonomy and the rules of the domain."""
    language: Literal["zh", "en"] = "zh"
    """Language of the prompts: Chinese or English."""


class Schedule(Section):
    """What the schedule needs beside peaks and warm-up."""

    min_lr: Annotated[float, Field(ge=0, le=1)] = 1.0e-6
    """Learning rate at the end of the cosine, absolute and equal for every group, before `lr_scale`."""


class Training(Section):
    """Batches, learning rates, length of the run, evaluation and saving."""

    output_dir: Annotated[str, Field(min_length=1)] = "output"
    """Folder for checkpoints, relative to the current directory; one folder a run is made inside."""
    run_name: str | None = None
    """Name of the MLflow run; null: strategy and seed."""
    per_device_train_batch_size: Count = 1
    """Samples (packs, when packing) in one micro-batch of one rank while training."""
    per_device_eval_batch_size: Count = 1
    """Samples (packs, when packing) that one rank evaluates at once."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of each rank in one optimizer step; with `launch.nproc: auto` of all ranks together."""
    packing: bool = False
    """Whether samples are laid end to end into packs of at most the length limit."""
    gradient_checkpointing: bool = False
    """Whether layers run again in the backward pass to save memory: never re-entrant, and not before what trains."""
    vit_gradient_checkpointing: bool | None = None
    """The same for the vision blocks alone; null: as `gradient_checkpointing` says."""
    bf16: bool = False
    """Whether forward and backward compute in bfloat16; they do in any case on a base held in bfloat16."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 17
    """Seed of data order, dropout, augmentation and new weights, each with its own generator."""
    optimizer: Literal["multimodal"] = "multimodal"
    """AdamW with one learning rate for each of vision, aligner and language model."""
    learning_rate: Rate = 1.0e-4
    """Peak learning rate of the language model, before `lr_scale`."""
    vit_lr: Rate = 1.0e-4
    """Peak learning rate of the vision blocks, before `lr_scale`."""
    aligner_lr: Rate = 1.0e-4
    """Peak learning rate of the aligner, before `lr_scale`."""
    lr_scale: Annotated[float, Field(gt=0, le=10**4)] = 1.0
    """Factor on every peak and on the floor, so that arms keep their ratios on a model that needs other rates."""
    weight_decay: Share = 0.1
    """Decoupled weight decay of matrices, times the learning rate per optimizer step; none on norms and biases."""
    max_grad_norm: Annotated[float, Field(gt=0, le=10**6)] = 0.5
    """Norm to which the gradient of all trainable parameters together is clipped."""
    warmup_ratio: Share = 0.2
    """Share of all optimizer steps in which the learning rates rise linearly to their peaks."""
    lr_scheduler_type: Literal["cosine_warmup_with_min_lr"] = "cosine_warmup_with_min_lr"
    """Linear warm-up, then a cosine from each peak to the floor."""
    lr_scheduler_kwargs: Schedule = Schedule()
    """The floor of the schedule."""
    num_train_epochs: Annotated[float, Field(gt=0, le=10**6)] = 3.0
    """Passes over the training set; a fraction ends inside an epoch."""
    max_steps: Count | None = None
    """Optimizer steps of the run, whatever the epochs say; null: the epochs decide."""
    early_stopping_patience: Count | None = None
    """Evaluations without a better eval loss after which training ends; null: never."""
    logging_steps: Count = 10
    """Optimizer steps between two rows of training metrics."""
    logging_first_step: bool = True
    """Whether optimizer step 1 gets a row too."""
    eval_strategy: Literal["steps"] = "steps"
    """Evaluation comes after whole optimizer steps, and once more at the end."""
    eval_steps: Count = 20
    """Optimizer steps between two evaluations."""
    eval_samples: Count | None = None
    """Training samples between two evaluations, for arms of any batch: each comes after the first step that has reached
    the next multiple; null: `eval_steps` decides."""
    save_strategy: Literal["best", "epoch", "steps"] = "best"
    """When a checkpoint is written: at a new best eval loss, after each epoch, or every `save_steps`."""
    save_steps: Count = 40
    """Optimizer steps between two checkpoints when `save_strategy` is `steps`."""
    save_total_limit: Count | None = 2
    """Checkpoints kept at most, the best always among them; null: all."""
    save_delay_steps: CountOrZero = 0
    """Optimizer step before which no checkpoint is written."""
    resume_steps: Count | None = None
    """Optimizer steps between two resume points, from which an interrupted run goes on; null: at evaluations."""
    metric_for_best_model: Literal["eval_loss"] = "eval_loss"
    """What `best` means: the eval loss in nats per supervised token."""
    load_best_model_at_end: bool = True
    """Which adapter is the run's result: the one at the lowest eval loss, or the last one; both are kept."""
    greater_is_better: Literal[False] = False
    """The lower eval loss is the better one."""

    @model_validator(mode="after")
    def _floor_below_peaks(self) -> "Training":
        floor = self.lr_scheduler_kwargs.min_lr
        lowest = min(self.learning_rate, self.vit_lr, self.aligner_lr)
        if floor > lowest:
            raise Impossible(
                f"a floor of {floor:g} above the lowest peak, {lowest:g}",
                f"a floor of at most {lowest:g}",
                "lower min_lr, or raise the peak that lies under it",
                "lr_scheduler_kwargs.min_lr",
            )
        return self


class Data(Section):
    """Processes that prepare samples."""

    dataloader_num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that encode samples beside the training process; 0: the training process does it."""
    feature_cache_gigabytes: Annotated[float, Field(ge=0, le=10**6)] = 4.0
    """GB (10^9 bytes) on disk for what frozen vision blocks make of images, all runs together; 0: nothing is kept."""


class Deepspeed(Section):
    """Optimizer state split over ranks."""

    enabled: bool = False
    """Whether training runs under DeepSpeed."""
    config: Annotated[str, Field(min_length=1)] = "zero2"
    """`zero2`, `zero1`, or the path of a DeepSpeed JSON."""


_MOST_SCENES = 100_000  # each is drawn and written to a file before anything else happens: minutes, and 2 GB
Scenes = Annotated[int, Field(ge=1, le=_MOST_SCENES)]


class Digits(Section):
    """The built-in data, used where `custom.train_jsonl` is not given."""

    train: Scenes = 1024
    """Scenes to train on."""
    val: Scenes = 128
    """Scenes to validate on, drawn from other handwritten digits."""
    ood: Annotated[int, Field(ge=0, le=_MOST_SCENES)] = 64
    """Scenes of the look that is kept out of training; 0: none."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 17
    """Seed of the scenes; not `training.seed`, so that runs of different seeds see the same data."""


class Custom(Section):
    """Where the records are, and how objects become text."""

    train_jsonl: str | None = None
    """Training records, one JSON object a line; null: the built-in digits."""
    val_jsonl: str | None = None
    """Validation records."""
    ood_jsonl: str | None = None
    """Out-of-domain records, evaluated as `ood/loss`; null: none."""
    taxonomy: str | None = None
    """YAML file with types, attributes and rules for prompt scheme B; null: none."""
    emit_norm: Literal["norm1000", "norm100", "none"] = "norm1000"
    """Coordinates in the answer: thousandths or hundredths of width and height, or pixels."""
    images_per_user_turn: Count = 1
    """Images shown in one user turn at most: so many records share a sample, their objects in groups by image."""
    summary_ratio: Share = 0.0
    """Share of the records with a `summary` whose answer is the summary instead of the objects; 1: all of them."""
    max_records: Count | None = None
    """Records of each file at most, evenly spread over it; null: all."""
    dump_conversation_text: bool = False
    """Whether the first conversation is written out as text, to look at."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Bad records: all named before training starts, or left out and counted."""
    allow_outside_root: bool = False
    """Whether image paths may leave the folder of their JSONL file: absolute, by `..`, or through a link."""
    augmentation: Augmentation = Augmentation()
    """Random changes of training samples."""
    digits: Digits = Digits()
    """How much built-in data, where no file is given."""

    @model_validator(mode="after")
    def _files_come_together(self) -> "Custom":
        given = [key for key in ("train_jsonl", "val_jsonl", "ood_jsonl") if getattr(self, key) is not None]
        missing = [key for key in ("train_jsonl", "val_jsonl") if getattr(self, key) is None]
        if given and missing:
            raise Impossible(
                f"custom.{given[0]} without custom.{missing[0]}",
                "both custom.train_jsonl and custom.val_jsonl, or none of the files (built-in digits)",
                f"give custom.{missing[0]} too",
                given[0],
            )
        return self


class Launch(Section):
    """How many processes train together."""

    nproc: Ranks = "auto"
    """Ranks on this machine, which multiply the batch; `auto`: as many as it has cores or GPUs for, at most 8 on cores,
    and as share `gradient_accumulation_steps` evenly. As many as `gpus` names where that is given and this is not."""
    gpus: Gpus | None = None
    """Which GPUs of this machine are used: an index, or several split by commas; null: all that are visible."""

    @property
    def ranks(self) -> int:
        """How many train together; one process that nobody has asked the machine for more is one."""
        return 1 if self.nproc == "auto" else self.nproc


class Tracking(Section):
    """What the run is compared as, what is measured beside the losses, and on how much data."""

    arm: str | None = None
    """Name under which the run is compared; null: the strategy's, with what the command line changes of it."""
    probe_records: CountOrZero = 64
    """Training records of the probe behind `generalization_gap_clean`; 0: no probe."""
    vision_gain_records: CountOrZero = 64
    """Validation records whose images are exchanged for `eval/vision_gain`; 0: not measured."""
    vision_gain_every: Count = 5
    """`eval/vision_gain` is measured at every k-th evaluation, and at the last."""
    generate_records: CountOrZero | None = 64
    """Validation records for which answers are generated and scored (`eval/f1` ...); 0: none; null: all of them."""
    generate_batch_size: Count = 16
    """Records captioned at once by one rank."""
    preview_records: CountOrZero = 4
    """Training records on the sheet that is logged when a run starts, as on disk and in two epochs; 0: no sheet."""
    smoothing_weight: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Weight of the past in the smoothed losses, as in TensorBoard."""
    close_seconds: CountOrZero = 20
    """Seconds that a run's end waits at most for a tracker that does not answer; the rest goes with `sync`."""


class Config(Section):
    """A whole run's configuration; every key, its default, and what it means."""

    global_max_length: Count | None = None
    """Tokens per sample, and per pack, at most: the one length knob; null: `template.max_length` decides."""
    model: Model = Model()
    """Base model."""
    template: Template = Template()
    """Records to token ids."""
    prompts: Prompts = Prompts()
    """Prompt wording."""
    tuner: Tuner = Tuner()
    """LoRA and the raw form."""
    training: Training = Training()
    """The run."""
    data: Data = Data()
    """Data processes."""
    deepspeed: Deepspeed = Deepspeed()
    """DeepSpeed."""
    custom: Custom = Custom()
    """Records."""
    strategy: Strategy | None = Strategy()
    """What is trained; null only where `tuner` says it in the raw form."""
    launch: Launch = Launch()
    """Processes."""
    tracking: Tracking = Tracking()
    """Measurements."""

    @property
    def max_length(self) -> int:
        """Tokens per sample, and per pack, at most."""
        return self.global_max_length or self.template.max_length

    @property
    def pack_length(self) -> int | None:
        """Tokens per pack at most; None where samples are not packed."""
        return self.max_length if self.training.packing else None

    @property
    def raw_strategy(self) -> tuple[str, ...]:
        """The keys of `tuner` through which this configuration says what is trained; empty: `strategy` says it."""
        return tuple(key for key in RAW_STRATEGY_KEYS if getattr(self.tuner, key) not in (None, (), ""))

    @model_validator(mode="after")
    def _one_form_of_strategy(self) -> "Config":
        if bool(self.raw_strategy) == (self.strategy is None):
            return self
        raw = ", ".join(f"tuner.{key}" for key in self.raw_strategy)
        raise Impossible(
            f"strategy and {raw} together" if raw else "neither a strategy nor the raw form in tuner",
            "either the strategy section or tuner's raw keys (" + ", ".join(RAW_STRATEGY_KEYS) + ")",
            "keep the strategy section and take the raw keys out" if raw else "add a strategy section",
            f"tuner.{self.raw_strategy[0]}" if raw else "strategy",
        )
