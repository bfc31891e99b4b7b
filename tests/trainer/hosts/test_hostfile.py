"""The file of hosts: what stands in it, which line is this host's, and how a mistake is told."""

import socket
from pathlib import Path

import pytest

from trainer import launch, ranks
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.hosts import hostfile
from trainer.hosts.hostfile import Host, hosts_from, is_own, read


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pod, no rank of a launcher, and a name that no file has."""
    for variable in ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(launch, "_STARTED_AS_RANK", False)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere.example.org")
    monkeypatch.setattr(hostfile, "is_own", lambda name: name.startswith("127."))  # whatever this machine has beside it


def written(folder: Path, text: str) -> str:
    """The path of a file of hosts."""
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_a_line_is_a_host_with_its_ranks(tmp_path: Path) -> None:
    """Comments and empty lines are passed over; the first host is the meeting point."""
    file = written(tmp_path, "# two nodes\nnode1 slots=8\n\n  10.0.0.2   slots=4   # the small one\n")
    assert read(file) == (Host("node1", 8), Host("10.0.0.2", 4))
    hosts = hosts_from(file, 1)
    assert (hosts.first, hosts.rank, hosts.slots, hosts.ranks) == ("node1", 1, 4, 12)


@pytest.mark.parametrize(
    ("text", "where", "got"),
    [
        ("node1 slots=8\nnode2\n", ":2", "node2"),
        ("node1 slots=0\n", ":1", "slots=0"),
        ("node1 slots=two\n", ":1", "slots=two"),
        ("node1 slots=2 slots=3\n", ":1", "slots=2 slots=3"),
        ("node1 slots=1\nnode1 slots=1\n", ":2", "node1 a second time"),
        ("# nobody\n", "", "no host"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, where: str, got: str) -> None:
    """And with the form of a line."""
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        hosts_from(file, 0)
    assert caught.value.where == file + where and got in caught.value.got


def test_a_host_finds_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, whole or short; else by an address; a pod of an Indexed Job by its number; or it is told."""
    assert hosts_from(written(tmp_path, "a slots=1\nelsewhere slots=1\n"), None).rank == 1
    assert hosts_from(written(tmp_path, "elsewhere.example.org slots=1\na slots=1\n"), None).rank == 0
    assert hosts_from(written(tmp_path, "192.0.2.1 slots=1\n127.0.0.1 slots=1\n"), None).rank == 1
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    file = written(tmp_path, "job-0.svc slots=1\njob-1.svc slots=1\n")
    assert hosts_from(file, None).rank == 1
    assert hosts_from(file, 0).rank == 0


@pytest.mark.parametrize(
    ("text", "asked", "said"),
    [
        ("192.0.2.1 slots=1\n192.0.2.2 slots=1\n", None, "none of them is this host"),
        ("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", None, "127.0.0.1 and 127.0.0.2 is this host"),
        ("192.0.2.1 slots=1\n", 1, "1, and"),
    ],
)
def test_a_host_that_is_none_of_them_or_several_is_told(
    tmp_path: Path, text: str, asked: int | None, said: str
) -> None:
    """All of 127.0.0.0/8 is every host's own."""
    with pytest.raises(ConfigError) as caught:
        hosts_from(written(tmp_path, text), asked)
    assert said in caught.value.got and "launch.host_rank" in str(caught.value)


def test_an_address_is_own_where_something_can_be_bound_to_it() -> None:
    """Also a name that leads to it; a name that nobody has is not."""
    assert is_own("127.0.0.1") and is_own("127.0.0.2") and is_own("localhost")
    assert not is_own("no such name") and not is_own("")


def test_ranks_of_the_hosts_share_the_step_of_one_or_multiply_it(tmp_path: Path) -> None:
    """`launch.nproc` is the number on all hosts: `auto` divides the accumulation, the number itself does not."""
    file = written(tmp_path, "127.0.0.1 slots=3\n127.0.0.2 slots=1\n")

    def settled(accumulation: int, nproc: str) -> tuple[object, int]:
        given = {"launch.hosts": file, "launch.host_rank": "1", "launch.nproc": nproc}
        given |= {"training.gradient_accumulation_steps": str(accumulation)}
        config = ranks.settled(load("last6_lora", overrides=given)).config
        return config.launch.nproc, config.training.gradient_accumulation_steps

    assert settled(8, "auto") == (4, 2)
    assert settled(8, "4") == (4, 8)
    with pytest.raises(ConfigError, match="4 slots") as caught:
        settled(8, "2")
    assert "auto, or 4" in str(caught.value)
    with pytest.raises(ConfigError, match="as many ranks as share 2 micro-batches evenly"):
        settled(2, "auto")


def test_a_file_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    """With the places that were tried, like any path of the configuration."""
    with pytest.raises(ConfigError, match=r"launch\.hosts"):
        load("last6_lora", overrides={"launch.hosts": str(tmp_path / "none")})
