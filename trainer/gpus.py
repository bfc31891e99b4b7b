"""Which GPUs of the machine a run uses: `launch.gpus`, held against what is there and set before CUDA starts.

torch counts GPUs through the driver's management library and starts CUDA only when something is computed; CUDA reads
CUDA_VISIBLE_DEVICES once, then. Indices count what is visible to this process already: a scheduler's choice is kept.
"""

import os
from dataclasses import replace

import torch

from trainer.config.places import experiments_dir, shown_path
from trainer.config.problems import place
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def settled(resolved: Resolved) -> Resolved:
    """The configuration as it holds on this machine: a rank for each GPU named, where `launch.nproc` is not written.

    Those ranks multiply the batch, as on the launch line of existing projects; with `auto` written, they share it.

    Raises:
        ConfigError: a GPU that the machine does not have, or more ranks than GPUs.
    """
    launch, key = resolved.config.launch, "launch.gpus"
    if launch.gpus is None:
        return resolved
    origin, there = resolved.origins[key], torch.cuda.device_count()
    if there == 0:
        return replace(resolved, no_effect=(*resolved.no_effect, f"{key}: there is no GPU here ({origin})"))
    named = _indices(launch.gpus)
    if max(named) >= there:
        last = there - 1
        raise ConfigError(
            place(origin, key),
            f"{launch.gpus} on a machine where {there} can be seen",
            f"indices from 0 to {last}" if last else "0",
            "name GPUs that are there, or take it out",
        )
    if launch.hosts is not None:
        return resolved  # the file of hosts says how many ranks are on each
    if not _written(resolved.origins["launch.nproc"]):
        return resolved.with_value("launch", "nproc", len(named), origin)
    if launch.ranks > len(named):
        raise ConfigError(
            place(resolved.origins["launch.nproc"], "launch.nproc"),
            f"{launch.ranks} ranks on {key} {launch.gpus}",
            "at most one rank a GPU",
            "name more GPUs, or fewer ranks",
        )
    return resolved


def stand_ins(resolved: Resolved) -> tuple[str, ...]:
    """A line for what is asked for, needs a GPU, and has something in its place because there is none."""
    from trainer.attention import needs_missing_gpu  # transformers, which only ranks need: seconds less to start them

    asked, key = resolved.config.model.attn_impl, "model.attn_impl"
    if not needs_missing_gpu(asked):
        return ()
    return (f"{key}: {asked} needs a GPU and there is none here, sdpa takes its place ({resolved.origins[key]})",)


def count(gpus: str | None) -> int:
    """How many GPUs a run may use: those that it names, or all that are visible; 0 where there is none.

    Args:
        gpus: indices that `settled` has accepted; None: all.
    """
    there = torch.cuda.device_count()
    return there if gpus is None else min(there, len(_indices(gpus)))


def see_only(gpus: str | None) -> None:
    """Hide all GPUs but these from CUDA in this process; nothing where there are none.

    Args:
        gpus: indices that `settled` has accepted; None: all.

    Raises:
        ConfigError: CUDA had been started before and does not look again.
    """
    if gpus is None or not (there := torch.cuda.device_count()):
        return
    visible = (os.environ.get(_VARIABLE) or ",".join(map(str, range(there)))).split(",")
    os.environ[_VARIABLE] = ",".join(visible[index].strip() for index in _indices(gpus))
    if torch.cuda.device_count() != len(_indices(gpus)):
        raise ConfigError(
            "launch.gpus",
            f"{gpus}, and the driver keeps showing {torch.cuda.device_count()}",
            f"a choice that is made in {_VARIABLE}",
            f"take it out, and start with {_VARIABLE}={os.environ[_VARIABLE]}",
        )


def _indices(gpus: str) -> list[int]:
    return [int(index) for index in gpus.split(",")]


def _written(origin: str) -> bool:
    """Whether somebody has written a value: `base.yaml` holds every key."""
    return origin != "default" and not origin.startswith(shown_path(experiments_dir() / "base.yaml") + ":")
