"""Turns sections of the configuration into the values and objects that everything below takes: where config stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from trainer import launch
from trainer.budget import Budget, budget_from, schedule_from
from trainer.config.problems import place
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.config.zero import zero_settings
from trainer.data.loader import SampleCache, SampleSet
from trainer.data.template import Encoder
from trainer.datasets import Data, check_first_epoch, check_lengths, make_encoder, mix_from, read_data, unknown_mark
from trainer.engine import Engine
from trainer.fused.choice import ForwardPass, choose
from trainer.fused.features import Keep
from trainer.gpus import stand_ins
from trainer.metrics import Meter
from trainer.model import Tools, TrainedTensor, load_model, load_tools, parameter_shapes
from trainer.optim import Schedule
from trainer.raw_strategy import RawStrategy, raw_rules
from trainer.strategy import Lora, Method, ParameterPlan, Part, Shapes, Strategy, Target, make_plan, plan_rules


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of a run that needs no weights: what `plan` prints and `run` trains."""

    name: str
    """The arm: the strategy file's name, and what the command line has changed of it."""
    plan: ParameterPlan
    tools: Tools
    encoder: Encoder
    data: Data
    samples: SampleSet
    """What is trained on, epoch by epoch."""
    budget: Budget
    schedule: Schedule
    zero: dict[str, Any] | None
    """DeepSpeed's settings; None where it is off."""
    forward_pass: ForwardPass
    no_effect: tuple[str, ...]
    """A line for each setting that changes nothing with this model, on this machine, or in DeepSpeed's settings."""


def prepare(resolved: Resolved) -> Prepared:
    """Resolve the strategy against the model, check all records, count steps.

    Raises:
        UserError: whatever is wrong with configuration, strategy, records or model folder.
    """
    config = resolved.config
    zero, of_zero = zero_from(resolved)
    plan, of_plan = plan_from(resolved, parameter_shapes(config.model.model))
    data = read_data(config)
    no_effect = (*of_zero, *of_plan, *stand_ins(resolved), *unknown_mark(config, data))
    tools = load_tools(config.model.model)
    encoder = make_encoder(config, tools, data.taxonomy)
    data = check_lengths(config, data, encoder)
    samples = SampleSet(data.train.records, encoder, mix_from(config, training=True), cache=SampleCache())
    check_first_epoch(data.train.path, samples)
    count_tokens(config, samples)
    budget = budget_from(config, samples)
    schedule = schedule_from(config, budget)
    of, bf16 = config.model, computes_in_bf16(config)
    repeats = samples.mix.chain is None or bool(samples.mix.chain.bank)
    keep = Keep(int(config.data.feature_cache_gigabytes * 10**9), in_training=repeats)
    forward_pass = choose(plan, asked=of.fused, attn_impl=of.attn_impl, weights=of.torch_dtype, bf16=bf16, keep=keep)
    return Prepared(resolved.arm, plan, tools, encoder, data, samples, budget, schedule, zero, forward_pass, no_effect)


def count_tokens(config: Config, samples: SampleSet) -> None:
    """Measure the first epoch, which decides how many steps there are, with a progress bar; `samples` remembers it."""
    if config.pack_length is None:
        return
    console = Console(stderr=True, quiet=not launch.is_first())
    bar = partial(track, description="counting tokens", console=console, disable=not console.is_terminal)
    samples.lengths(0, watch=partial(bar, transient=True))


def zero_from(resolved: Resolved) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """DeepSpeed's settings, None where it is off, and what of them changes nothing.

    Raises:
        ConfigError: they cannot be read, or ask for what ZeRO-2 is not.
    """
    asked = resolved.config.deepspeed
    key = "deepspeed.config"
    return zero_settings(asked.config, place(resolved.origins[key], key)) if asked.enabled else (None, ())


def join_ranks(prepared: Prepared, config: Config) -> Accelerator:
    """This rank's accelerator, for DeepSpeed where that is on.

    Raises:
        ConfigError: another number of ranks was started than the configuration says.
    """

    def make_zero() -> Accelerator:
        from trainer.zero2 import deepspeed_accelerator  # seconds of imports that most runs do not need

        assert prepared.zero is not None  # noqa: S101
        return deepspeed_accelerator(
            prepared.zero,
            micro_batch=prepared.budget.plan.micro_batch,
            max_grad_norm=config.training.max_grad_norm,
            n_trained=prepared.plan.trainable_parameters()["total"],
        )

    accelerator: Accelerator = launch.join(config.launch.ranks, make_zero if prepared.zero is not None else None)
    return accelerator


def load_base(config: Config, tools: Tools) -> Qwen3VLForConditionalGeneration:
    """The base model, not wrapped yet.

    Raises:
        ModelError: it cannot be found or read.
    """
    of = config.model
    dtype = getattr(torch, of.torch_dtype)
    return load_model(of.model, tools, dtype=dtype, attn_impl=of.attn_impl, seed=config.training.seed)


def make_engine(
    accelerator: Accelerator,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: Sequence[TrainedTensor],
    config: Config,
) -> Engine:
    """What trains the model on this rank: with DeepSpeed, or without."""
    if not config.deepspeed.enabled:
        return Engine(accelerator, loss, optimizer, trained, max_grad_norm=config.training.max_grad_norm)
    from trainer.zero2 import ZeroEngine

    return ZeroEngine(accelerator, loss, optimizer, trained, max_grad_norm=config.training.max_grad_norm)


def plan_from(resolved: Resolved, shapes: Shapes) -> tuple[ParameterPlan, tuple[str, ...]]:
    """The plan of the arm, in whichever form it is written, and a line for each part of it that changes nothing.

    Raises:
        StrategyError: it cannot be resolved against the model.
    """
    config = resolved.config
    if config.strategy is not None:
        return make_plan(strategy_from(config), shapes, origins=resolved.origins), ()
    tuner = config.tuner
    raw = RawStrategy(
        tuner.target_regex,
        tuner.target_modules,
        tuner.modules_to_save or (),
        {Part.LLM: tuner.freeze_llm, Part.VISION: tuner.freeze_vit, Part.ALIGNER: tuner.freeze_aligner},
    )
    rules, no_effect = raw_rules(raw, shapes, origins=resolved.origins)
    return plan_rules(rules, shapes, lora_from(config)), no_effect


def strategy_from(config: Config) -> Strategy:
    """The arm that a configuration describes in its `strategy` section."""
    assert config.strategy is not None  # noqa: S101
    vision, aligner, llm = config.strategy.vision, config.strategy.aligner, config.strategy.llm
    return Strategy(
        vision=Target(vision.blocks, Method(vision.method)),
        aligner=Target("all", Method(aligner.method)),
        llm=Target(llm.layers, Method(llm.method)),
        lora=lora_from(config),
    )


def lora_from(config: Config) -> Lora:
    """LoRA's numbers, common to both forms."""
    return Lora(config.tuner.lora_rank, config.tuner.lora_alpha, config.tuner.lora_dropout)


def computes_in_bf16(config: Config) -> bool:
    """Whether forward and backward run under autocast: trained tensors are float32, so a bf16 base needs it too."""
    return config.training.bf16 or config.model.torch_dtype == "bfloat16"


def checkpointed_parts(config: Config) -> list[Part]:
    """The parts whose layers are run again in the backward pass."""
    training = config.training
    vision = training.vit_gradient_checkpointing
    wanted = {
        Part.VISION: training.gradient_checkpointing if vision is None else vision,
        Part.LLM: training.gradient_checkpointing,
    }
    return [part for part, on in wanted.items() if on]


def meter_from(config: Config, total_steps: int) -> Meter:
    """What turns events into metric rows."""
    return Meter(
        logging_steps=config.training.logging_steps,
        log_first=config.training.logging_first_step,
        total_steps=total_steps,
        smoothing=config.tracking.smoothing_weight,
    )
