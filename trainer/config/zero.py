"""DeepSpeed's settings: a name, or a JSON file of the user in which what this project decides itself is left out."""

import json
from pathlib import Path
from typing import Any

from trainer.config.problems import shown
from trainer.errors import ConfigError

ZERO_NAMES = {"zero1": 1, "zero2": 2}
"""What `deepspeed.config` may be besides a path, and the ZeRO stage that it means."""

_MAX_BYTES = 256 * 1024

OURS: dict[str, str] = {
    "train_batch_size": "training.per_device_train_batch_size decides",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size decides",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps decides",
    "gradient_clipping": "training.max_grad_norm decides",
    "optimizer": "training.optimizer decides",
    "scheduler": "training.lr_scheduler_type decides",
    "fp16": "what trains is float32",
    "amp": "training.bf16 decides",
    "data_types": "what trains is float32, and so are its gradients",
    "bf16": "what trains is float32, and training.bf16 decides in what it computes",
    "torch_autocast": "training.bf16 decides",
    "steps_per_print": "metrics go to MLflow",
    "wall_clock_breakdown": "metrics go to MLflow",
}
"""Keys of a DeepSpeed JSON that change nothing here, and why."""


def zero_settings(value: str, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read `deepspeed.config`.

    Args:
        value: one of `ZERO_NAMES`, or the path of a DeepSpeed JSON.
        where: file and line, or `-P`, with the key.

    Returns:
        DeepSpeed's settings without those of `OURS`, and a line for each that was left out although it says something.

    Raises:
        ConfigError: no such file, no JSON object, another ZeRO stage than 1 and 2, or states moved off the device.
    """
    if value in ZERO_NAMES:
        return {"zero_optimization": {"stage": ZERO_NAMES[value]}}, ()
    settings = _read(value, where)
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in ZERO_NAMES.values():
        raise ConfigError(
            where,
            f"{value}: zero_optimization.stage {shown(stage)}",
            "1 or 2 (3 splits the weights too, and stands still where ranks see unequal images)",
            "set the stage to 2, or use deepspeed.config: zero2",
        )
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):
        of_device = isinstance(zero.get(key, {}), dict)
        device = zero.get(key, {}).get("device", "none") if of_device else zero[key]
        if device not in ("none", None, False):
            raise ConfigError(
                where,
                f"{value}: zero_optimization.{key}{'.device' if of_device else ''} {shown(device)}",
                "none (optimizer state stays where the weights are)",
                "take it out",
            )
    ignored = [f"deepspeed.config {key}: {OURS[key]}" for key in settings if key in OURS and not _auto(settings[key])]
    kept = {key: settings[key] for key in settings if key not in OURS}
    kept["zero_optimization"] = {key: each for key, each in zero.items() if not _auto(each)}
    return kept, tuple(f"{line} ({value})" for line in ignored)


def _auto(value: Any) -> bool:
    """Whether a value, or every value of a section, is left to whoever reads the file."""
    return all([_auto(each) for each in value.values()]) if isinstance(value, dict) else value == "auto"


def _read(value: str, where: str) -> dict[str, Any]:
    try:
        with Path(value).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        tree = json.loads(data.decode("utf-8")) if len(data) <= _MAX_BYTES else None
        _auto(tree)  # goes deeper than whatever looks at it later
    except OSError as error:
        raise ConfigError(where, f"{value}: {error.strerror}", "a DeepSpeed JSON", "correct the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, f"{value}: broken JSON ({error})", "a DeepSpeed JSON", "correct the file") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(where, f"{value}: more than {_MAX_BYTES} bytes", "a DeepSpeed JSON", "correct the path")
    if not isinstance(tree, dict):
        raise ConfigError(where, f"{value}: {shown(tree)}", "a JSON object", "correct the file")
    return tree
