"""How launchers of several hosts meet: rounds that all begin together, a host that is gone, and how it has ended."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from trainer.errors import ConfigError
from trainer.hosts.agreement import Said, compare
from trainer.hosts.link import Link, Message
from trainer.hosts.meeting import First, Meeting, NoMeeting, Other, Place, Round
from trainer.hosts.rounds import Rounds

NAMES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
LONG = 60.0
"""Seconds that nothing here takes, also on a busy machine."""

Make = Callable[..., Meeting]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes hosts of one meeting, and lets them leave at the end."""
    made: list[Meeting] = []
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def build(rank: int, *, hosts: int = 2, ranks: int = 2, join: float = LONG, silence: float = LONG) -> Meeting:
        place = Place(NAMES[:hosts], rank, ranks, port, join, silence)
        made.append(First(place) if rank == 0 else Other(place))
        return made[-1]

    yield build
    for meeting in made:
        with suppress(OSError):
            meeting.end(0, "")


@pytest.fixture
def at_once() -> Iterator[ThreadPoolExecutor]:
    """Runs hosts side by side."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def asks(pool: ThreadPoolExecutor, meeting: Meeting, store: int = 1) -> Future[Round]:
    """A host asks for a round; the store of the launchers is on port `store`."""
    return pool.submit(meeting.next_round, lambda: store)


def ends_of_a_line() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        ours = socket.create_connection(door.getsockname())
        return ours, door.accept()[0]


def kill(meeting: Meeting) -> None:
    """Close all that a host has open, as the system does for a process that was killed."""
    if isinstance(meeting, First):
        meeting._door.shutdown(socket.SHUT_RDWR)
        meeting._door.close()
        for link in meeting._links.values():
            link.close()
    elif isinstance(meeting, Other) and meeting._link is not None:
        meeting._link.close()


def changed(meeting: Meeting) -> str:
    """What has changed at a meeting, once something has."""
    with meeting._news:
        assert meeting._news.wait_for(lambda: meeting.changed, LONG)
    return meeting.changed


def test_a_round_begins_when_all_hosts_are_there(make: Make, at_once: ThreadPoolExecutor) -> None:
    """Whoever comes first waits; all are told the same ports, and other ones in the next round."""
    others = [make(rank, hosts=3) for rank in (2, 1)]
    early = asks(at_once, others[0])
    first = make(0, hosts=3)
    waiting = asks(at_once, first, store=11)
    assert not early.done() and not waiting.done()
    rounds = [waiting.result(LONG), early.result(LONG)] if asks(at_once, others[1]).result(LONG) else []
    assert rounds[0] == rounds[1] and rounds[0].store_port == 11
    again = [asks(at_once, meeting, store=12) for meeting in (first, *others)]
    assert len({done.result(LONG) for done in again}) == 1
    assert again[0].result().store_port == 12


def test_a_host_that_starts_anew_brings_all_others_to_it(make: Make, at_once: ThreadPoolExecutor) -> None:
    """Whether it is the first or another; nothing has changed any more when they have met."""
    first, other = make(0), make(1)
    for begins, hears in ((other, first), (first, other)):
        for met in [asks(at_once, meeting) for meeting in (first, other)]:
            met.result(LONG)
        assert (first.changed, other.changed) == ("", "")
        waiting = asks(at_once, begins)
        assert "starts its ranks anew" in changed(hears)
        asks(at_once, hears).result(LONG)
        waiting.result(LONG)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_is_gone_is_noticed_and_may_come_again(make: Make, at_once: ThreadPoolExecutor, gone: int) -> None:
    """It closes without a word; the others wait for it, and a round begins when it is there again."""
    both = [make(0), make(1)]
    for met in [asks(at_once, meeting) for meeting in both]:
        met.result(LONG)
    kill(both[gone])
    assert f"{NAMES[gone]} is gone" in changed(both[1 - gone])
    both[gone] = make(gone)  # its machine has started again: another process, which knows nothing
    for met in [asks(at_once, meeting) for meeting in both]:
        met.result(LONG)
    assert both[0].changed == ""


def test_a_line_that_is_cut_is_noticed_by_its_silence() -> None:
    """Nothing is closed, nothing comes: after the time that was set, and not for ever."""
    ours, theirs = ends_of_a_line()
    with theirs:
        gone: Future[str] = Future()
        link = Link(ours, silence=0.2)
        link.listen(lambda _: None, gone.set_result)
        assert "nothing was heard of it for 0.2 s" in gone.result(LONG)
        link.close()


def test_signs_of_life_are_sent_and_are_no_messages() -> None:
    """Several within the time after which silence means the end; whoever hears them is told nothing."""
    ours, theirs = ends_of_a_line()
    link, heard = Link(ours, silence=1.0), Future[Message]()
    link.listen(heard.set_result, lambda _: None)
    with theirs:
        theirs.settimeout(LONG)
        signs = theirs.makefile("rb")
        assert [json.loads(signs.readline()) for _ in range(3)] == [{"alive": True}] * 3
    link.close()

    ours, theirs = ends_of_a_line()
    link = Link(ours, silence=LONG)
    link.listen(heard.set_result, lambda _: None)
    with theirs:
        theirs.sendall(b'{"alive": true}\n{"alive": true}\n{"ready": true}\n')
        assert heard.result(LONG) == {"ready": True}
    link.close()


@pytest.mark.parametrize("speaks", [0, 1])
def test_how_a_host_has_ended_is_heard_by_the_other(make: Make, at_once: ThreadPoolExecutor, speaks: int) -> None:
    """Badly: no round follows. Well: nothing has happened."""
    both = [make(0), make(1)]
    for met in [asks(at_once, meeting) for meeting in both]:
        met.result(LONG)
    both[speaks].end(3, "the gate failed")
    hears = both[1 - speaks]
    assert changed(hears) and hears.over is not None
    assert (hears.over.status, hears.over.reason) == (3, "the gate failed")
    with pytest.raises(NoMeeting, match="the gate failed"):
        hears.next_round(lambda: 1)


def test_who_does_not_come_is_named(make: Make) -> None:
    """By the first host, and the first host by the others, with the reason."""
    with pytest.raises(NoMeeting, match=r"waited 0\.1 s for 127\.0\.0\.2, 127\.0\.0\.3"):
        make(0, hosts=3, join=0.1).next_round(lambda: 1)
    port = make(1, join=0.1)
    port.place = Place(NAMES[:2], 1, 2, 1, 0.1, LONG)  # where nobody listens
    with pytest.raises(NoMeeting, match=r"127\.0\.0\.1, port 1: "):
        port.next_round(lambda: 1)


def test_another_file_of_hosts_is_refused(make: Make) -> None:
    """Ranks of hosts that count otherwise would wait for each other for ever."""
    make(0)
    with pytest.raises(NoMeeting, match="another file of hosts"):
        make(1, ranks=3).next_round(lambda: 1)


def test_what_is_no_launcher_does_not_disturb(make: Make, at_once: ThreadPoolExecutor) -> None:
    """Somebody who looks for open ports, say."""
    first = make(0)
    waiting = asks(at_once, first)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"host": "x"}\n', b"\xff" * 70000):
        with socket.create_connection(("127.0.0.1", first.place.port)) as somebody, suppress(OSError):
            somebody.sendall(noise)
            somebody.shutdown(socket.SHUT_WR)
            somebody.recv(1)
    other = asks(at_once, make(1))
    assert waiting.result(LONG) == other.result(LONG)


def test_a_port_that_is_taken_is_the_users_to_change(make: Make) -> None:
    """Two runs that begin on the same hosts."""
    make(0)
    with pytest.raises(ConfigError, match=r"launch\.port"):
        make(0)


def test_rounds_of_the_agent_have_fresh_stores_and_an_end(make: Make, at_once: ThreadPoolExecutor) -> None:
    """What was written in one round is not there in the next; after so many restarts no other follows."""
    both = [Rounds(make(rank), restarts=1, may_begin=lambda: True) for rank in (0, 1)]
    for number in (1, 2):
        met = [at_once.submit(rounds.next_rendezvous) for rounds in both]
        first, other = (done.result(LONG) for done in met)
        assert [(of.rank, of.world_size) for of in (first, other)] == [(0, 2), (1, 2)]
        assert first.store.add("a key of every round", 1) == 1
        assert other.store.add("a key of every round", 1) == 2
        assert both[0].begun == number and both[0].num_nodes_waiting() == 0
    with pytest.raises(Exception, match="a rank has died"):
        both[0].next_rendezvous()


def test_no_round_follows_a_mistake(make: Make) -> None:
    """It would be made again."""
    rounds = Rounds(make(0, hosts=1), restarts=5, may_begin=lambda: False)
    rounds.next_rendezvous()
    with pytest.raises(Exception, match="a rank has died"):
        rounds.next_rendezvous()


def test_hosts_that_would_not_train_the_same_are_named() -> None:
    """What differs, where, and how; what is equal is not told."""
    same = {"training.seed": "17", "data.val_digest": "c"}
    first = Said("node1", same | {"data.train_digest": "a"})
    compare([first, first])
    with pytest.raises(ConfigError) as caught:
        compare([first, Said("node2", same | {"data.train_digest": "b"})])
    assert "data.train_digest: a on node1, b on node2" in caught.value.got and "seed" not in caught.value.got
