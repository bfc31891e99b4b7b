"""Turns sections of the configuration into the values and objects that everything below takes: where config stops."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration

from trainer.budget import Budget, budget_from, schedule_from
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.data.loader import SampleCache, SampleSet
from trainer.data.template import Encoder
from trainer.datasets import (
    Data,
    check_first_epoch,
    check_lengths,
    count_tokens,
    make_encoder,
    mix_from,
    read_data,
    unknown_mark,
    unused_taxonomy,
)
from trainer.engines import computes_in_bf16, zero_from
from trainer.fused.choice import ForwardPass, choose
from trainer.fused.features import Keep
from trainer.gpus import stand_ins
from trainer.model import Tools, load_model, load_tools, parameter_shapes
from trainer.optim import Schedule
from trainer.raw_strategy import RawStrategy, raw_rules
from trainer.stages import Stage, stages_from
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
    stages: tuple[Stage, ...]
    """What trains from when on."""
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
    plan, of_plan = plan_from(resolved, shapes := parameter_shapes(config.model.model))
    data = read_data(config)
    no_effect = (*of_zero, *of_plan, *stand_ins(resolved), *unknown_mark(config, data), *unused_taxonomy(config))
    tools = load_tools(config.model.model)
    encoder = make_encoder(config, tools, data.taxonomy)
    data = check_lengths(config, data, encoder)
    samples = SampleSet(data.train.records, encoder, mix_from(config, training=True), cache=SampleCache())
    check_first_epoch(data.train.path, samples)
    count_tokens(config, samples)
    budget = budget_from(config, samples)
    schedule = schedule_from(config, budget)
    stages = stages_from(resolved, plan, shapes, schedule, budget.gate_look)
    of, bf16 = config.model, computes_in_bf16(config)
    repeats = samples.mix.chain is None or bool(samples.mix.chain.bank)
    keep = Keep(int(config.data.feature_cache_gigabytes * 10**9), in_training=repeats)
    forward_pass = choose(plan, asked=of.fused, attn_impl=of.attn_impl, weights=of.torch_dtype, bf16=bf16, keep=keep)
    return Prepared(
        resolved.arm, plan, tools, encoder, data, samples, budget, schedule, stages, zero, forward_pass, no_effect
    )


def load_base(config: Config, tools: Tools) -> Qwen3VLForConditionalGeneration:
    """The base model, not wrapped yet.

    Raises:
        ModelError: it cannot be found or read.
    """
    of = config.model
    dtype = getattr(torch, of.torch_dtype)
    return load_model(of.model, tools, dtype=dtype, attn_impl=of.attn_impl, seed=config.training.seed)


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
    assert config.strategy is not None  # noqa: S101  # `plan_from` has looked
    vision, aligner, llm = config.strategy.vision, config.strategy.aligner, config.strategy.llm
    return Strategy(
        vision=Target(vision.stages[-1][1], Method(vision.method), "schedule" if vision.schedule else "blocks"),
        aligner=Target("all", Method(aligner.method)),
        llm=Target(llm.layers, Method(llm.method)),
        lora=lora_from(config),
    )


def lora_from(config: Config) -> Lora:
    """LoRA's numbers, common to both forms."""
    return Lora(config.tuner.lora_rank, config.tuner.lora_alpha, config.tuner.lora_dropout)
