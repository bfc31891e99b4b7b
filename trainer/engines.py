"""Makes what trains a model on this rank, as configured: accelerator, loss and optimizer, the engine around them."""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from trainer import launch
from trainer.budget import Budget
from trainer.config.problems import place
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.config.zero import zero_settings
from trainer.curriculum import Course, Material
from trainer.engine import Engine
from trainer.fused.choice import ForwardPass
from trainer.optim import make_optimizer
from trainer.strategy import ParameterPlan, Part


def zero_from(resolved: Resolved) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """DeepSpeed's settings, None where it is off, and what of them changes nothing.

    Raises:
        ConfigError: they cannot be read, or ask for what ZeRO-2 is not.
    """
    asked = resolved.config.deepspeed
    key = "deepspeed.config"
    return zero_settings(asked.config, place(resolved.origins[key], key)) if asked.enabled else (None, ())


def join_ranks(zero: Mapping[str, Any] | None, plan: ParameterPlan, budget: Budget, config: Config) -> Accelerator:
    """This rank's accelerator, for DeepSpeed where that is on.

    Raises:
        ConfigError: another number of ranks was started than the configuration says.
    """

    def make_zero() -> Accelerator:
        from trainer.zero2 import deepspeed_accelerator  # seconds of imports that most runs do not need

        assert zero is not None  # noqa: S101  # else this is not called
        return deepspeed_accelerator(
            zero,
            micro_batch=budget.plan.micro_batch,
            max_grad_norm=config.training.max_grad_norm,
            n_trained=plan.trainable_parameters()["total"],
        )

    accelerator: Accelerator = launch.join(config.launch.ranks, make_zero if zero is not None else None)
    return accelerator


def material_of(
    model: PeftModel, course: Course, forward_pass: ForwardPass, accelerator: Accelerator, config: Config
) -> Callable[[], Material]:
    """Makes the loss, and an optimizer over what trains by then."""

    def make() -> Material:
        optimizer = make_optimizer(course.trained, weight_decay=config.training.weight_decay)
        again, bf16 = checkpointed_parts(config), computes_in_bf16(config)
        return forward_pass.of(model.to(accelerator.device), bf16=bf16, checkpointed=again), optimizer

    return make


def make_engine(accelerator: Accelerator, material: Callable[[], Material], course: Course, config: Config) -> Engine:
    """What trains the model on this rank: with DeepSpeed, or without."""
    kind = Engine
    if config.deepspeed.enabled:
        from trainer.zero2 import ZeroEngine  # seconds of imports that most runs do not need

        kind = ZeroEngine
    return kind(accelerator, *material(), course.trained, max_grad_norm=config.training.max_grad_norm)


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
