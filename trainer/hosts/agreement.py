"""Whether all hosts train the same: settings, records, base weights, code and libraries, compared before a run starts.

Every host reads its own copy of data and weights, and is given the command by hand or by a scheduler. What of it
differs would not fail: the run would be another one than it says.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from trainer import launch, provenance
from trainer.config.places import PATH_KEYS
from trainer.errors import ConfigError
from trainer.runs import FREE

_OWN = {*FREE, *PATH_KEYS}
"""Settings that may be another on every host: what lies under the paths is compared by its digests."""
_TOLD = 10


@dataclass(frozen=True, slots=True)
class Said:
    """What one host trains."""

    host: str
    facts: Mapping[str, str]
    """Setting, digest or version -> its value there."""


def agreed(accelerator: Any, make: Callable[[], dict[str, str]], params: Mapping[str, str]) -> dict[str, str]:
    """What a training rests on beside its configuration, the same on every host; all ranks ask together.

    Args:
        accelerator: of this rank.
        make: finds it out, on the first rank of every host.
        params: the configuration here.

    Raises:
        ConfigError: on the first rank, where the hosts differ.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        alone: dict[str, str] = launch.on_first_rank(accelerator, make)
        return alone
    mine: list[Said] = []
    rests: dict[str, str] = {}
    if os.environ["LOCAL_RANK"] == "0":
        rests = make()
        with_what = {key: str(value) for key, value in provenance.made_with().items() if key != "threads"}
        settings = {key: value for key, value in params.items() if key not in _OWN}
        mine = [Said(socket.gethostname(), {**settings, **rests, **with_what})]
    said: list[Said] = gather_object(mine)
    launch.on_first_rank(accelerator, lambda: compare(said))
    agreed_on: dict[str, str] = launch.on_first_rank(accelerator, lambda: rests)
    return agreed_on


def compare(said: Sequence[Said]) -> None:
    """Hold what every host has said against the first.

    Raises:
        ConfigError: one differs; names what, with both values.
    """
    first, *others = said
    told = []
    for rank, other in enumerate(others, start=1):
        for key in sorted({*first.facts, *other.facts}):
            ours, theirs = (of.facts.get(key, "not there") for of in (first, other))
            if ours != theirs:
                told.append(f"{key}: {ours} on {first.host}, {theirs} on {other.host} (host {rank})")
    if told:
        more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
        listed = "".join(f"\n             {line}" for line in (*told[:_TOLD], *more))
        raise ConfigError(
            "launch.hosts", f"hosts that would not train the same:{listed}",
            "one command, and the same records, base weights, code and libraries, on every host",
            "make them the same, and start again on all hosts",
        )  # fmt: skip
