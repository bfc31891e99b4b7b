"""The proxy does to a request what its mode says: what the client sees, and whether the server has done it."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from tests.faults.proxy import Fault, FaultProxy, Mode
from tests.running import empty_store, mlflow_server, without_mlflow_variables
from tests.server_process import listens

ANSWER = b"done " * 2000


class Server(ThreadingHTTPServer):
    """Keeps the bodies of what it was asked to do."""

    daemon_threads = True
    request_queue_size = 64  # else many at once wait a second for another try

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.done: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    """Takes a body, says `ANSWER`."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        """Keep the body, answer."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.done.append(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is said."""


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that does what it is asked."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy in front of it."""
    with FaultProxy(server.server_port) as proxy:
        yield proxy


def ask(proxy: FaultProxy, body: bytes = b"a job", timeout: float = 5) -> requests.Response:
    """One request through the proxy, on a connection of its own."""
    return requests.post(f"{proxy.uri}/jobs", data=body, timeout=timeout)


def test_pass_changes_nothing(proxy: FaultProxy, server: Server) -> None:
    """Small bodies and large ones, in one piece or in chunks; one connection of the client after another."""
    large = bytes(range(256)) * 40_000
    with requests.Session() as session:
        for body in (b"", b"a job", large, iter([b"in ", large])):
            assert session.post(f"{proxy.uri}/jobs", data=body, timeout=60).content == ANSWER
    assert server.done == [b"", b"a job", large, b"in " + large]
    assert proxy.counts == {Mode.PASS: 4}
    assert proxy.requests[0].line == "POST /jobs HTTP/1.1"


def test_refuse_closes_the_port_and_the_next_mode_opens_it_again(proxy: FaultProxy, server: Server) -> None:
    """The same port; whoever is refused is not counted."""
    assert ask(proxy).ok
    port = proxy.port
    for _ in range(3):
        proxy.set(Mode.REFUSE)
        assert not listens(port)
        with pytest.raises(requests.ConnectionError, match="refused"):
            ask(proxy)
        proxy.set(Mode.PASS)
        assert proxy.port == port and ask(proxy).ok
    assert len(server.done) == 4 and proxy.counts == {Mode.PASS: 4}


def test_drop_closes_without_an_answer(proxy: FaultProxy, server: Server) -> None:
    """The server hears nothing of it."""
    proxy.set(Mode.DROP)
    with pytest.raises(requests.ConnectionError, match="closed connection without response"):
        ask(proxy)
    assert server.done == [] and proxy.counts == {Mode.DROP: 1}


def test_reset_is_a_reset(proxy: FaultProxy, server: Server) -> None:
    """Before the server is asked."""
    proxy.set(Mode.RESET)
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        ask(proxy)
    assert server.done == [] and proxy.counts == {Mode.RESET: 1}


def test_reset_in_the_middle_of_an_answer(proxy: FaultProxy, server: Server) -> None:
    """The server has done it; the head and the beginning of its answer arrive."""
    proxy.set(Mode.RESET, size=3000)
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), match="reset by peer"):
        ask(proxy)
    assert server.done == [b"a job"] and proxy.counts == {Mode.RESET: 1}


def test_hang_never_answers(proxy: FaultProxy, server: Server) -> None:
    """Until the client gives up; others are held too; the next mode serves who comes after."""
    proxy.set(Mode.HANG)
    with pytest.raises(requests.ReadTimeout):
        ask(proxy, timeout=0.3)
    proxy.set(Mode.PASS)
    assert ask(proxy).ok
    assert server.done == [b"a job"] and proxy.counts == {Mode.HANG: 1, Mode.PASS: 1}


def test_closing_the_proxy_ends_what_hangs(server: Server) -> None:
    """A patient client is let go at once."""
    with FaultProxy(server.server_port) as proxy:
        proxy.set(Mode.HANG)
        ended: list[str] = []

        def wait() -> None:
            try:
                requests.get(proxy.uri, timeout=60)
            except requests.ConnectionError as error:
                ended.append(str(error))

        client = threading.Thread(target=wait, daemon=True)
        client.start()
        while not proxy.requests:
            time.sleep(0.01)
        assert client.is_alive()
    client.join(60)
    assert len(ended) == 1


def test_delay_answers_late(proxy: FaultProxy, server: Server) -> None:
    """As long as it was told, and truly; who waits less has no answer, and the server does it all the same."""
    proxy.set(Mode.DELAY, seconds=0.4)
    began = time.monotonic()
    assert ask(proxy).content == ANSWER
    assert 0.4 <= time.monotonic() - began < 30
    with pytest.raises(requests.ReadTimeout):
        ask(proxy, b"late", timeout=0.1)
    deadline = time.monotonic() + 60
    while len(server.done) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.done == [b"a job", b"late"] and proxy.counts == {Mode.DELAY: 2}


@pytest.mark.parametrize(("size", "seen"), [(5, requests.ConnectionError), (3000, "IncompleteRead")])
def test_truncate_cuts_the_answer(
    proxy: FaultProxy, server: Server, size: int, seen: type[requests.ConnectionError] | str
) -> None:
    """In its first line or in its body; the end is an orderly one."""
    proxy.set(Mode.TRUNCATE, size=size)
    with pytest.raises(requests.RequestException) as raised:
        ask(proxy)
    assert seen in str(raised.value) if isinstance(seen, str) else isinstance(raised.value, seen)
    assert "reset" not in str(raised.value)
    assert server.done == [b"a job"] and proxy.counts == {Mode.TRUNCATE: 1}


def test_an_answer_cut_between_two_headers_looks_like_an_empty_success(proxy: FaultProxy, server: Server) -> None:
    """Python's own client takes the end of the stream for the end of the head: 200, and no body."""
    proxy.set(Mode.TRUNCATE, size=30)
    answer = ask(proxy)
    assert (answer.status_code, answer.content) == (200, b"")
    assert server.done == [b"a job"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_error_answers_for_the_server(proxy: FaultProxy, server: Server, status: int) -> None:
    """Also where the request is large; the server hears nothing of it."""
    proxy.set(Mode.ERROR, status=status)
    assert ask(proxy).status_code == status
    assert ask(proxy, b"x" * 5_000_000).status_code == status
    assert server.done == [] and proxy.counts == {Mode.ERROR: 2}


def test_lost_answers_are_of_work_that_is_done(proxy: FaultProxy, server: Server) -> None:
    """So who tries again does it twice."""
    proxy.set(Mode.LOSE_ANSWERS)
    with pytest.raises(requests.ConnectionError, match="closed connection without response"):
        ask(proxy)
    assert server.done == [b"a job"]
    proxy.set(Mode.PASS)
    assert ask(proxy).ok
    assert server.done == [b"a job", b"a job"] and proxy.counts == {Mode.LOSE_ANSWERS: 1, Mode.PASS: 1}


def test_a_mode_counts_from_the_next_request_on_whatever_the_client_keeps_open(
    proxy: FaultProxy, server: Server
) -> None:
    """A session would use its connection again, and the old mode with it."""
    with requests.Session() as session:
        assert session.post(proxy.uri, data=b"first", timeout=60).ok
        proxy.set(Mode.ERROR, status=500)
        assert session.post(proxy.uri, data=b"second", timeout=60).status_code == 500
    assert server.done == [b"first"]


def test_a_dead_server_is_a_reset(proxy: FaultProxy, server: Server) -> None:
    """Not an answer that the proxy makes up."""
    server.shutdown()
    server.server_close()
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        ask(proxy)


def test_random_faults_come_as_their_seed_says(proxy: FaultProxy, server: Server) -> None:
    """The same sequence again from the same seed, about as often as asked for; nothing is lost that was passed."""
    weights = {Fault(Mode.PASS): 0.6, Fault(Mode.ERROR, status=500): 0.2, Fault(Mode.DROP): 0.1, Fault(Mode.RESET): 0.1}

    def sequence(seed: int) -> list[Mode]:
        proxy.set_random(seed, weights)
        before = len(proxy.requests)
        for _ in range(100):
            with suppress(requests.ConnectionError):
                ask(proxy)
        return [request.mode for request in proxy.requests[before:]]

    first = sequence(1)
    assert sequence(1) == first != sequence(2)
    assert 45 <= first.count(Mode.PASS) <= 75 and set(first) == {fault.mode for fault in weights}
    assert len(server.done) == proxy.counts[Mode.PASS]
    with pytest.raises(ValueError, match="cannot be refused"):
        proxy.set_random(1, {Fault(Mode.REFUSE): 1.0})


def test_many_clients_at_once(proxy: FaultProxy, server: Server) -> None:
    """Each gets its own answer; none is lost or counted twice."""
    numbers = count()
    clients = [threading.Thread(target=lambda: ask(proxy, b"%d" % next(numbers))) for _ in range(40)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    assert sorted(server.done, key=int) == [b"%d" % number for number in range(40)]
    assert proxy.counts == {Mode.PASS: 40}


def test_a_client_of_mlflow_works_through_it(tmp_path: Path) -> None:
    """A real server: rows, and an artifact in both directions."""
    with (
        without_mlflow_variables(),
        mlflow_server(tmp_path, empty_store(tmp_path)) as address,
        FaultProxy(int(address.rpartition(":")[2])) as proxy,
    ):
        client = MlflowClient(proxy.uri)
        run = client.create_run(client.create_experiment("e")).info.run_id
        client.log_metric(run, "loss", 1.0)
        client.log_text(run, "text" * 100_000, "t.txt")
        copy = client.download_artifacts(run, "t.txt", str(tmp_path))
        assert Path(copy).read_text() == "text" * 100_000
        assert client.get_run(run).data.metrics == {"loss": 1.0}
        assert proxy.counts.keys() == {Mode.PASS}
