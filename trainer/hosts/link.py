"""A connection between the launchers of two hosts: short messages, signs of life, and notice of its end."""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

_BEAT: Message = {"alive": True}
_LONGEST = 65536
"""Bytes of a message: what is longer was not sent by a launcher."""


class Link:
    """One end of a connection; a thread reads it and another says every now and then that this host is alive.

    A store of torch's would wait for ever on a line that was cut: nothing here waits longer than `silence`.
    """

    def __init__(self, connection: socket.socket, *, silence: float) -> None:
        """Use a connection that is open.

        Args:
            connection: to the other host.
            silence: seconds without a sign of life after which the other host is gone.
        """
        self._connection, self._silence = connection, silence
        self._closed, self._sending = threading.Event(), threading.Lock()
        connection.settimeout(silence)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = connection.makefile("rb")

    def listen(self, heard: Callable[[Message], None], gone: Callable[[str], None]) -> None:
        """Begin to read: `heard` gets every message, and `gone`, once, the reason why no more can come."""
        threading.Thread(target=self._read, args=(heard, gone), name="link", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def receive(self) -> Message:
        """The next message that is no sign of life.

        Raises:
            OSError: nothing came for too long (TimeoutError), or the other end has closed, or speaks otherwise.
        """
        while True:
            line = self._lines.readline(_LONGEST)
            if not line.endswith(b"\n"):
                raise ConnectionError("it has closed the connection")
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise ConnectionError("it is no launcher of this version")
            if message != _BEAT:
                return message

    def send(self, message: Message) -> None:
        """Send a message; where the line is cut, `gone` tells it."""
        with suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Close the connection; what was sent arrives."""
        self._closed.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, heard: Callable[[Message], None], gone: Callable[[str], None]) -> None:
        try:
            while True:
                heard(self.receive())
        except TimeoutError:
            reason = f"nothing was heard of it for {self._silence:g} s"
        except (OSError, ValueError) as error:  # ValueError: closed here meanwhile
            reason = str(error)
        if not self._closed.is_set():
            gone(reason)

    def _beat(self) -> None:
        while not self._closed.wait(self._silence / 5):
            self.send(_BEAT)
