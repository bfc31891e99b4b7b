"""The hosts that train together: a file with a line `NAME slots=N` for each, and which of them this one is."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9][0-9]{0,3})", re.ASCII)
_FORM = "a line `NAME slots=N` for each host, N its ranks; # begins a comment"
_INDEX = "JOB_COMPLETION_INDEX"
"""What tells a pod of a Kubernetes Indexed Job which one it is."""


@dataclass(frozen=True, slots=True)
class Host:
    """One line of the file."""

    name: str
    """Name or address under which the other hosts reach it."""
    slots: int
    """Ranks on it."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """All hosts of a run, as one of them sees them."""

    all: tuple[Host, ...]
    rank: int
    """Of this host: the first, 0, has the first rank, the run's folder and the meeting point."""

    @property
    def first(self) -> str:
        """Name of the host where all meet."""
        return self.all[0].name

    @property
    def slots(self) -> int:
        """Ranks on this host."""
        return self.all[self.rank].slots

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.all)


def hosts_from(file: str, asked: int | None) -> Hosts:
    """The hosts of a file, and which of them this one is.

    Args:
        file: its path.
        asked: the line of this host, from 0; None: that of a Kubernetes Indexed Job's pod, else the one with this
            host's name, else the one with one of its addresses.

    Raises:
        ConfigError: the file cannot be read, or does not say which line is this host's.
    """
    hosts = read(file)
    if asked is None:
        asked = _index_of_pod(os.environ)
    if asked is None:
        return Hosts(hosts, _own_line(file, hosts))
    if asked >= len(hosts):
        raise ConfigError(
            "launch.host_rank", f"{asked}, and {file} has {len(hosts)} hosts", f"0 to {len(hosts) - 1}",
            "give each host its own line of the file",
        )  # fmt: skip
    return Hosts(hosts, asked)


def read(file: str) -> tuple[Host, ...]:
    """All lines of a file of hosts.

    Raises:
        ConfigError: it cannot be read, a line is not as it should be, or a host stands there twice.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("launch.hosts", f"{file}: {error}", _FORM, "name a file that can be read") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(f"{file}:{number}", text[:100], _FORM, "correct the line")
        if any(host.name == found["name"] for host in hosts):
            raise ConfigError(
                f"{file}:{number}", f"{found['name']} a second time", "each host once", "add its slots up in one line"
            )
        hosts.append(Host(found["name"], int(found["slots"])))
    if not hosts:
        raise ConfigError(file, "no host", _FORM, "write one")
    return tuple(hosts)


def _index_of_pod(environment: Mapping[str, str]) -> int | None:
    text = environment.get(_INDEX, "")
    return int(text) if text.isdecimal() else None


def _own_line(file: str, hosts: Sequence[Host]) -> int:
    """The line of this host: by its name, else by its addresses.

    Raises:
        ConfigError: there is none, or there are several.
    """
    mine = socket.gethostname()
    named = [rank for rank, host in enumerate(hosts) if host.name in (mine, mine.partition(".")[0])]
    found = named or [rank for rank, host in enumerate(hosts) if is_own(host.name)]
    if len(found) == 1:
        return found[0]
    told = " and ".join(hosts[rank].name for rank in found) or "none of them"
    raise ConfigError(
        "launch.hosts", f"{file}, of which {told} is this host ({mine})", "one line with this host's name or address",
        "correct the file, or say which line it is with launch.host_rank (from 0)",
    )  # fmt: skip


def is_own(name: str) -> bool:
    """Whether a name or address is one of this host's: then, and only then, something can be bound to it."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.bind((address[0], 0))
        except OSError:
            continue
        return True
    return False
