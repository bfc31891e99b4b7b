"""A server program in a process of its own: started, killed and started again on the same port."""

import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class ServerProcess:
    """A server on one port of this machine; `folder` is its current folder and keeps what it writes in log.txt.

    Attributes:
        command: the program with its arguments.
        folder: where it runs.
        port: where it listens.
        variables: its environment.
        user: the system user that it runs as; None is ours.
        ready: says whether it can be used; unset: when it takes connections.
        stop_signal: what ends it at once.
    """

    command: list[str]
    folder: Path
    port: int
    variables: dict[str, str]
    user: str | None = None
    ready: Callable[[], bool] | None = None
    stop_signal: signal.Signals = signal.SIGKILL
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def uri(self) -> str:
        """Its address for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process that was started, leader of its group."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What it has written so far, over all starts."""
        return (self.folder / "log.txt").read_text()

    def start(self, seconds: float = 120) -> None:
        """Start it and wait until it can be used; AssertionError with its log when it cannot."""
        assert self._process is None or self._process.poll() is not None, "it is running"
        ready = self.ready or (lambda: listens(self.port))
        with (self.folder / "log.txt").open("a") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
                group=pwd.getpwnam(self.user).pw_gid if self.user else None,
                extra_groups=[] if self.user else None,
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if ready():
                return
            time.sleep(0.1)
        self.kill()
        raise AssertionError(self.log())

    def kill(self) -> None:
        """End it and its group at once, as a crash would; nothing when it does not run."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, self.stop_signal)
        process.wait(200)
        deadline = time.monotonic() + 10
        while listens(self.port) and time.monotonic() < deadline:  # its children may take a moment longer
            time.sleep(0.02)


@contextmanager
def started(server: ServerProcess) -> Iterator[ServerProcess]:
    """A server from its start to the end of the block, whatever happens in it."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
