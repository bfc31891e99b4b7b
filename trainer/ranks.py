"""How many ranks train together where `launch.nproc` is `auto`: looked up once, where ranks are started from.

Batch and accumulation are then those of a whole optimizer step, and ranks share its micro-batches: packs, steps and
what is learned are those of one rank, on any machine. A run that goes on keeps the ranks that it had, and the ranks
themselves are as many as were started.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import launch, names
from trainer.addresses import store_name, tracking_uri, without_credentials
from trainer.config.problems import counted, place
from trainer.config.resolved import Resolved
from trainer.config.schema import Launch
from trainer.errors import ConfigError
from trainer.hosts.hostfile import read
from trainer.redact import of_environment
from trainer.runs import RUN_FILE, Identity, read_facts, unfinished

_NPROC, _ACCUMULATION = "launch.nproc", "training.gradient_accumulation_steps"
MOST_ON_CORES = 8
"""Each rank holds the whole model, and all wait for each other in every step."""


def settled(resolved: Resolved, resume: str = "never") -> Resolved:
    """The configuration with a number of ranks, and with what each of them accumulates; as it is without `auto`.

    Args:
        resolved: as it was loaded.
        resume: which run is gone on with: `auto`, `never`, or a folder.

    Raises:
        ConfigError: a launcher has started ranks that do not share a step evenly.
    """
    if resolved.config.launch.hosts is not None and not launch.is_rank():
        return _on_hosts(resolved, resolved.config.launch)
    if resolved.config.launch.nproc != "auto":
        return resolved
    whole = resolved.config.training.gradient_accumulation_steps
    if launch.is_rank():
        ranks, why = _started(whole, place(resolved.origins[_NPROC], _NPROC)), "as its launcher has started"
    else:
        n_gpus = _visible_gpus(resolved)
        room = n_gpus or min(launch.cores(), MOST_ON_CORES)
        ranks, why = max(n for n in range(1, min(room, whole) + 1) if whole % n == 0), "chosen for this machine"
        before = _before(resolved, resume)
        # More of them than cores only take longer, and more than GPUs cannot be.
        if before and whole % before == 0 and before <= (n_gpus or max(room, MOST_ON_CORES)):
            ranks, why = before, "as the run had before"
    return _with(resolved, ranks, why)


def _on_hosts(resolved: Resolved, asked: Launch) -> Resolved:
    """The configuration for the ranks of a file of hosts.

    Raises:
        ConfigError: the file cannot be used, `launch.nproc` is another number, or they do not share a step evenly.
    """
    hosts = read(str(asked.hosts))
    ranks = sum(host.slots for host in hosts)
    whole, where = resolved.config.training.gradient_accumulation_steps, place(resolved.origins[_NPROC], _NPROC)
    if asked.nproc == "auto" and whole % ranks == 0:
        return _with(resolved, ranks, f"on {counted(len(hosts), 'host')}", here=max(host.slots for host in hosts))
    if asked.nproc == ranks:
        return resolved
    if asked.nproc == "auto":
        raise _uneven(where, f"{ranks} slots in {asked.hosts}", ranks, whole)
    raise ConfigError(
        where, f"{asked.nproc}, and {asked.hosts} has {ranks} slots", f"auto, or {ranks}",
        "leave it out, and the hosts share the steps of one rank; or correct the slots",
    )  # fmt: skip


def _with(resolved: Resolved, ranks: int, why: str, *, here: int | None = None) -> Resolved:
    """The same configuration for so many ranks, `here` of them on a host (all, unless it is said)."""
    whole, origins = resolved.config.training.gradient_accumulation_steps, resolved.origins
    each = whole // ranks
    settled = resolved.with_value("launch", "nproc", ranks, f"auto ({origins[_NPROC]}), {why}")
    if ranks > 1:
        shared = f"{whole} ({origins[_ACCUMULATION]}) / {ranks} ranks"
        settled = settled.with_value("training", "gradient_accumulation_steps", each, shared)
    threads = launch.threads(here or ranks)
    told = f"{counted(ranks, 'rank')} of {counted(threads, 'thread')}, {why}"
    return replace(settled, chosen=told + (f"; accumulation {whole} -> {each} each" if ranks > 1 else ""))


def _started(whole: int, where: str) -> int:
    """How many ranks a launcher has started.

    Raises:
        ConfigError: a step does not divide among them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if whole % started:
        raise _uneven(where, f"a launcher that has started {started} ranks", started, whole)
    return started


def _uneven(where: str, what: str, ranks: int, whole: int) -> ConfigError:
    return ConfigError(
        where,
        f"auto, {what}, and {_ACCUMULATION} {whole}",
        f"as many ranks as share {whole} micro-batches evenly",
        f"start as many, or set {_NPROC} to {ranks}: ranks then multiply the batch",
    )


def _visible_gpus(resolved: Resolved) -> int:
    """GPUs that a run may use."""
    if not launch.may_have_gpus():
        return 0
    from trainer import gpus  # imports torch

    return gpus.count(resolved.config.launch.gpus)


def _before(resolved: Resolved, resume: str) -> int | None:
    """Ranks of the run that is gone on with; None where there is none, which `begin` says if one was named."""
    match resume:
        case "never":
            return None
        case "auto" | "":
            path = unfinished(Path(resolved.config.training.output_dir), _identity(resolved), but_for=names.DIGESTS)
        case _:  # a run's folder, or one of its resume points
            named = Path(resume)
            path = next((path for path in (named, named.parent.parent) if (path / RUN_FILE).is_file()), None)
    return _ranks_of(read_facts(path)) if path else None


def _identity(resolved: Resolved) -> Identity:
    """As `begin` has it, but for what is not known before data and weights are read."""
    training = resolved.config.training
    rests = {
        names.TAG_STRATEGY: resolved.arm,
        names.EFFECTIVE_BATCH_PACKS: str(training.per_device_train_batch_size * training.gradient_accumulation_steps),
    }
    params: Mapping[str, str] = of_environment().tree({**resolved.params(), **rests})
    return Identity("", params, store_name(without_credentials(tracking_uri())))


def _ranks_of(facts: Mapping[str, Any]) -> int | None:
    text = str(facts["params"].get(_NPROC))
    return int(text) if text.isdecimal() and text.isascii() and int(text) else None
