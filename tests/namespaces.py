"""Two hosts on one machine: network namespaces with a line between them, good or bad, that can be cut."""

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
DELAY_SECONDS, LOSS = 0.02, 0.01
"""Of a bad line, each way."""


@dataclass
class Pair:
    """Two namespaces, joined by one line."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")
    interface: str = "line0"
    """Name of the network interface in both."""
    kind: str = "veth"
    """What the line is made of."""
    relayed: list[int] = field(default_factory=lambda: [0, 0])
    """Frames that a relay in Python has passed on, and lost."""

    def inside(self, host: int, *command: str) -> list[str]:
        """A command as it is run on a host: the process becomes the command."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def run(self, host: int, *command: str) -> None:
        """Run a command on a host, to its end."""
        subprocess.run(self.inside(host, *command), check=True, capture_output=True)

    def cut(self) -> None:
        """Cut the line: nothing arrives, and nobody is told."""
        self.run(1, "ip", "link", "set", self.interface, "down")

    def mend(self) -> None:
        """The line is there again."""
        self.run(1, "ip", "link", "set", self.interface, "up")

    def kill(self, host: int) -> None:
        """SIGKILL for every process of a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"try{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=False)
        return ""
    return f"no network namespaces: {tried.stderr.strip()}"


@contextmanager
def two_namespaces(*, bad: bool = False) -> Iterator[Pair]:
    """Two hosts; over a bad line 1 frame in 100 is lost, and all others take 20 ms, each way.

    The kernel does that (netem) where it can, else a relay between two TAP devices.
    """
    pair = Pair((f"host-a-{os.getpid()}", f"host-b-{os.getpid()}"))
    with _made(pair):
        _veth(pair)
        relay = _worsened(pair) if bad else None
        try:
            yield pair
        finally:
            for host in (0, 1):
                pair.kill(host)
            if relay is not None:
                relay.set()


@contextmanager
def _made(pair: Pair) -> Iterator[None]:
    for name in pair.names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield
    finally:
        for name in pair.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _veth(pair: Pair) -> None:
    ends = [f"v{host}-{os.getpid()}" for host in (0, 1)]
    subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
    for host, end in enumerate(ends):
        _move(pair, host, end)


def _move(pair: Pair, host: int, end: str) -> None:
    """Give a host one end of the line."""
    subprocess.run(["ip", "link", "set", end, "netns", pair.names[host]], check=True)
    pair.run(host, "ip", "link", "set", end, "name", pair.interface)
    pair.run(host, "ip", "address", "add", f"{pair.addresses[host]}/24", "dev", pair.interface)
    for interface in ("lo", pair.interface):
        pair.run(host, "ip", "link", "set", interface, "up")


def _worsened(pair: Pair) -> threading.Event | None:
    """Make the line bad; what ends the relay, where there is one."""
    netem = f"tc qdisc add dev {pair.interface} root netem delay {DELAY_SECONDS * 1000:g}ms loss {LOSS * 100:g}%"
    try:
        for host in (0, 1):
            pair.run(host, *netem.split())
    except (subprocess.CalledProcessError, FileNotFoundError):
        pair.run(0, "ip", "link", "del", pair.interface)
    else:
        pair.kind = "veth with netem"
        return None
    pair.kind = "TAP devices with a relay"
    taps = []
    for host in (0, 1):
        end = f"t{host}-{os.getpid()}"
        tap = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", end.encode(), _IFF_TAP | _IFF_NO_PI))
        _move(pair, host, end)
        taps.append(tap)
    ended = threading.Event()
    for source, target in (taps, taps[::-1]):
        _relay(pair, source, target, ended)
    return ended


def _relay(pair: Pair, source: int, target: int, ended: threading.Event) -> None:
    """Pass frames on, late, and not all of them."""
    waiting: deque[tuple[float, bytes]] = deque()
    drawn = random.Random(17)

    def take() -> None:
        while not ended.is_set():
            with suppress(OSError):  # the device is down
                frame = os.read(source, 65536)
                lost = drawn.random() < LOSS
                pair.relayed[lost] += 1
                if not lost:
                    waiting.append((time.monotonic() + DELAY_SECONDS, frame))

    def give() -> None:
        while not ended.is_set():
            if not waiting or (rest := waiting[0][0] - time.monotonic()) > 0:
                time.sleep(min(rest, 0.001) if waiting else 0.001)
                continue
            with suppress(OSError):
                os.write(target, waiting.popleft()[1])

    for work in (take, give):
        threading.Thread(target=work, daemon=True).start()
