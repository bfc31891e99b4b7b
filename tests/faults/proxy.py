"""A proxy between a client and an HTTP server that fails on demand: one fault for each connection, counted."""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedReader
from typing import Self

_REASONS = {429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}
_CHUNK = 65536


class Mode(StrEnum):
    """What becomes of a connection, which carries one request here."""

    PASS = "pass"  # nothing is wrong
    REFUSE = "refuse"  # nobody listens on the port
    DROP = "drop"  # the request is read and the connection closed; the server is not asked
    RESET = "reset"  # as a crash: RST; in the middle of the answer where `size` is given, else the server is not asked
    HANG = "hang"  # the request is read and never answered; the server is not asked
    DELAY = "delay"  # passed on after `seconds`
    TRUNCATE = "truncate"  # the server is asked; the first `size` bytes of its answer arrive, head included
    ERROR = "error"  # answered with HTTP `status`; the server is not asked
    LOSE_ANSWERS = "lose_answers"  # the server has done what was asked, and its answer is dropped


@dataclass(frozen=True)
class Fault:
    """A mode with what it needs to know."""

    mode: Mode
    seconds: float = 1.0
    size: int = 0
    status: int = 503


@dataclass(frozen=True)
class Request:
    """A request that has come: its first line, as `POST /path HTTP/1.1`, and what became of it."""

    line: str
    mode: Mode


class FaultProxy:
    """Listens on a free port of this machine and passes on to another; a context manager.

    Each connection carries one request: the server is told to close it, so that a change of mode counts from the next
    request on, whatever a client keeps open.
    """

    def __init__(self, target_port: int) -> None:
        """Pass on to a port of this machine, without faults at first."""
        self._target = ("127.0.0.1", target_port)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._fault = Fault(Mode.PASS)
        self._draw: tuple[random.Random, list[Fault], list[float]] | None = None
        self._requests: list[Request] = []
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self.port = 0

    @property
    def uri(self) -> str:
        """Where clients come to."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """All requests that came, in order of their arrival."""
        with self._lock:
            return list(self._requests)

    @property
    def counts(self) -> Counter[Mode]:
        """How many requests met each mode; what was refused never came."""
        return Counter(request.mode for request in self.requests)

    def set(self, mode: Mode, *, seconds: float = 1.0, size: int = 0, status: int = 503) -> None:
        """Change what happens to requests from now on; those on their way end as they began.

        Args:
            mode: what becomes of them.
            seconds: how long DELAY waits.
            size: how many bytes of the answer TRUNCATE and RESET let through.
            status: what ERROR answers.
        """
        with self._lock:
            self._fault, self._draw = Fault(mode, seconds, size, status), None
        if mode is Mode.REFUSE:
            self._stop_listening()
        else:
            self._listen()

    def set_random(self, seed: int, weights: Mapping[Fault, float]) -> None:
        """Draw a fault for each request from now on.

        Args:
            seed: the same seed draws the same sequence.
            weights: how often each comes, in relation to the others.

        Raises:
            ValueError: REFUSE is among them, which is a state of the port and not of a connection.
        """
        faults = list(weights)
        if any(fault.mode is Mode.REFUSE for fault in faults):
            raise ValueError("a connection that was taken cannot be refused; RESET is the nearest")
        with self._lock:
            self._draw = (random.Random(seed), faults, [weights[fault] for fault in faults])
        self._listen()

    def __enter__(self) -> Self:
        """Listen."""
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything, also what hangs."""
        self._closed.set()
        self._stop_listening()
        with self._lock:
            left = list(self._open)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self.port = self._listener.getsockname()[1]
            self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            self._acceptor.start()

    def _stop_listening(self) -> None:
        if self._listener is not None and self._acceptor is not None:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor, which close alone does not
            self._acceptor.join()
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection from its first byte to its end."""
        with client, client.makefile("rb") as stream, suppress(OSError):  # whichever side has gone: this is its end
            with self._lock:
                self._open.add(client)
            try:
                if head := _read_head(stream):
                    self._meet(self._next_fault(head), client, head, stream)
            finally:
                with self._lock:
                    self._open.discard(client)

    def _next_fault(self, head: bytes) -> Fault:
        """The fault of a request that has come; it is counted."""
        with self._lock:
            if self._draw is not None:
                generator, faults, weights = self._draw
                fault = generator.choices(faults, weights)[0]
            else:
                fault = self._fault
            self._requests.append(Request(head.split(b"\r\n", 1)[0].decode("latin-1"), fault.mode))
            return fault

    def _meet(self, fault: Fault, client: socket.socket, head: bytes, stream: BufferedReader) -> None:
        """Do to a request what its fault says."""
        if _header(head, "expect") == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_body(stream, head)  # a client cut off while it sends would see now this error, now that
        if fault.mode is Mode.RESET and not fault.size:
            _reset(client)
        elif fault.mode is Mode.HANG:
            while client.recv(_CHUNK):  # until it has given up, or the proxy is closed
                pass
        elif fault.mode is Mode.ERROR:
            client.sendall(_error(fault.status))
        elif fault.mode is not Mode.DROP:
            if fault.mode is Mode.DELAY:
                self._closed.wait(fault.seconds)
            self._ask(fault, client, _closing(head) + body)

    def _ask(self, fault: Fault, client: socket.socket, request: bytes) -> None:
        """Let the server answer; pass on as much of that as the fault leaves."""
        left = fault.size if fault.mode in (Mode.TRUNCATE, Mode.RESET) else None
        try:
            with socket.create_connection(self._target, timeout=600) as server:
                server.sendall(request)
                with server.makefile("rb") as answer:
                    chunk = _closing(_read_head(answer))  # so that the client does not use its connection again
                    while chunk:
                        if fault.mode is not Mode.LOSE_ANSWERS:
                            client.sendall(chunk if left is None else chunk[:left])
                        if left is not None and (left := left - len(chunk)) <= 0:
                            break
                        chunk = answer.read1(_CHUNK)
        except ConnectionError:
            fault = Fault(Mode.RESET)  # the server is not there, or has died: so it seems to the client too
        if fault.mode is Mode.RESET:
            _reset(client)


def _read_head(stream: BufferedReader) -> bytes:
    """The head of a request or an answer, with its empty line; nothing where it did not come to that."""
    head = b""
    while line := stream.readline():
        head += line
        if line == b"\r\n":
            return head
    return b""


def _read_body(stream: BufferedReader, head: bytes) -> bytes:
    """A request's body as it was sent, chunks with their sizes."""
    if "chunked" not in _header(head, "transfer-encoding"):
        return _read(stream, int(_header(head, "content-length") or 0))
    body = bytearray()
    while line := stream.readline():
        body += line
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            return bytes(body + _read_head(stream))  # the trailer is laid out as a head
        body += _read(stream, size + 2)
    raise ConnectionError("the client left in the middle of its request")


def _read(stream: BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionError("the client left in the middle of its request")
    return data


def _header(head: bytes, name: str) -> str:
    """The value of a header in lower case; empty where it is not there."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return ""


def _closing(head: bytes) -> bytes:
    """A head that says that the connection ends with this request."""
    if not head:
        raise ConnectionError("the server left before its answer")
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"keep-alive:", b"expect:"))]
    return b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n"


def _error(status: int) -> bytes:
    """An answer as a gateway in front of a server gives it."""
    reason = _REASONS.get(status, "Error")
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(reason)}\r\n"
    return f"{head}Connection: close\r\n\r\n{reason}".encode()


def _reset(client: socket.socket) -> None:
    """Let it be closed without a farewell: RST, and what was not yet sent is lost."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
