"""How often hostile input is tried, how it may end, and a process whose time, memory and files are watched."""

import os
import resource
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from tests.running import environment
from trainer.errors import UserError

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "0"))
"""How many inputs each search tries; 0: as many as fit in a minute over all of them, always the same ones."""

SECONDS, MEGABYTES = 10, 2048
"""No input may take longer, or more memory."""

tally: Counter[tuple[str, str]] = Counter()
"""(search, how it ended) -> inputs."""


def search(examples: int) -> settings:
    """Settings of a search.

    Args:
        examples: inputs, where `HOSTILE_EXAMPLES` does not say another number.
    """
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=timedelta(seconds=SECONDS),
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def ends_well(name: str, use: Callable[[], Any]) -> Any:
    """Use an input; success is as good as one error with four parts that a terminal can show.

    Args:
        name: of the search, for the count.
        use: what a command does with the input.

    Returns:
        What `use` returns; None where it ended in a message.
    """
    try:
        result = use()
    except UserError as error:
        is_a_message(str(error))
        tally[name, "a message"] += 1
        return None
    tally[name, "success"] += 1
    return result


def is_a_message(told: str) -> None:
    """Check that a text is one message: what was got, what is allowed, what to do, and nothing that moves a cursor."""
    assert all(part in told for part in ("got:", "allowed:", "do:")), told
    assert len(told) < 30_000
    odd = {letter for letter in told if not (letter.isprintable() or letter == "\n" or _is_space(letter))}
    assert not odd, (odd, told)


def _is_space(letter: str) -> bool:
    return unicodedata.category(letter) == "Zs"


def forget_peak() -> None:
    """Let this process's peak memory count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes(pid: int | str = "self") -> int:
    """The most memory that a process has held."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: 0, or 2 for a mistake of the user's.
        told: what it wrote to standard error.
        seconds: of processor time.
        megabytes: at its peak.
        files: what it has made beside its caches, relative to its folder.
    """

    status: int
    told: str
    seconds: float
    megabytes: int
    files: list[str]


def command(*arguments: str, folder: Path, store: str | None = None) -> Ended:
    """`python -m trainer ARGUMENTS` in a folder, which is its home too, killed where it hangs.

    Args:
        arguments: the command line.
        folder: current directory; caches go to `home` in it.
        store: URI of an MLflow store.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    before = set(folder.rglob("*"))
    variables = {"HOME": str(home), "TMPDIR": str(home)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=folder, env=environment(store, **variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="backslashreplace",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (6 * SECONDS, 6 * SECONDS)),
    )  # fmt: skip
    megabytes, deadline = 0, time.monotonic() + 12 * SECONDS
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            megabytes = max(megabytes, _peak_of(process.pid))
            time.sleep(0.05)
    finally:
        process.kill()
    told, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    made = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
    return Ended(process.returncode, told, seconds, megabytes, [each for each in made if not each.startswith("home")])


def _peak_of(pid: int) -> int:
    try:
        return peak_megabytes(pid)
    except (OSError, IndexError):  # it has just ended
        return 0


def refused(ended: Ended) -> str:
    """What a command has told that ended as it should for hostile input: soon, small, leaving nothing behind."""
    assert ended.status == 2, (ended.status, ended.told[-2000:])
    assert ended.told.count("error: ") == 1 and "Traceback" not in ended.told, ended.told[-2000:]
    is_a_message(ended.told)
    assert ended.files == []
    assert ended.megabytes < MEGABYTES and ended.seconds < 2 * SECONDS, (ended.megabytes, ended.seconds)
    return ended.told
