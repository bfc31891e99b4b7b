"""Which network interface ranks of several hosts talk through: the one named, or that leads to the first host."""

import os
import socket

import psutil

from trainer.errors import ConfigError

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def use(interface: str | None, first: str) -> None:
    """Tell Gloo and NCCL which interface to use; what the environment says already is left as it is.

    Gloo would take the one that the host's own name leads to, which on many hosts is the loopback. NCCL finds its own,
    and is told only where one was named.

    Args:
        interface: its name; None: the one that leads to `first`.
        first: name of the first host.

    Raises:
        ConfigError: this host has no such interface.
    """
    there = psutil.net_if_addrs()
    if interface is None:
        if found := _towards(first):
            os.environ.setdefault(_VARIABLES[0], found)
        return
    if interface not in there:
        raise ConfigError(
            "launch.interface", f"{interface}, which this host does not have", ", ".join(there), "name one of these"
        )
    for variable in _VARIABLES:
        os.environ[variable] = interface


def _towards(host: str) -> str:
    """The interface through which a host is reached; empty where that cannot be told."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asked:
            asked.connect(address)  # sends nothing: the system only chooses a way
            mine = asked.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(str(entry.address).partition("%")[0] == mine for entry in addresses):
            return str(name)
    return ""
