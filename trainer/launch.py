"""Starts the ranks of a run, a process each, and ends them together; joins them to one group."""

import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from trainer.errors import ConfigError, Interrupted
from trainer.hosts import network, scheduler
from trainer.signals import SAME_WISH_SECONDS, SIGNALS, pass_on

_STARTED_AS_RANK = scheduler.adopt(os.environ)  # at the start: `_alone` makes a lone process a rank of one
STATUSES, ROUND = "TRAINER_STATUSES", "TRAINER_ROUND"
"""Variables of ranks that may be started again: a folder for what each ends with, and the number of the start."""
_LOST = re.compile(
    r"gloo/transport|NCCL|(closed|reset) by peer|[Bb]roken pipe|[Ss]ocket (closed|[Tt]imeout)|Timed out waiting"
)
"""What libraries of groups say when another rank does not answer any more."""
_LOCK_SECONDS = 600.0
"""Age at which a lock is nobody's any more: the process that compiled was killed."""
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
"""The CPUs of Linux that are one core with this one."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
END_SECONDS = 300.0
"""What a run has to finish its step and write a resume point, once it was asked to end: gigabytes, of a large model."""
_LOOK_SECONDS, _LAST_SECONDS = 0.05, 30.0
"""Between two looks at the ranks, and what one has to end where another has failed: it may wait for that one."""


def is_rank() -> bool:
    """Whether this process is one rank of several that a launcher has started."""
    return _STARTED_AS_RANK


def is_first() -> bool:
    """Whether this process speaks for the run: the first rank, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def cores() -> int:
    """Physical cores that this process may run on: a second thread of a core computes little more."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        return len({Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii") for cpu in cpus})
    except (OSError, ValueError):
        return len(cpus)


def threads(nproc: int) -> int:
    """Threads of each rank: its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(said) if said.isdecimal() else max(1, cores() // nproc)


def may_have_gpus() -> bool:
    """Whether torch could find a GPU here; asked before it is imported, which takes a second."""
    try:
        ctypes.CDLL("libcuda.so.1")  # NVIDIA's driver, without which CUDA finds nothing
    except OSError:
        return Path("/dev/kfd").exists()  # AMD's
    return True


def start(nproc: int, arguments: Sequence[str]) -> int:
    """Run `python -m trainer ARGUMENTS` on `nproc` ranks of this machine, to their end.

    Ranks share the cores, see `threads`. When this process is asked to end, all are asked, and have as long as any run
    for it; when one of them dies, or Ctrl-C comes again, the others have half a minute. Who has not ended by then is
    killed. This process imports no torch: its ranks begin at once.

    Returns:
        The exit status of the rank that failed first, or 0.

    Raises:
        ConfigError: more ranks than GPUs, where there are GPUs.
        KeyboardInterrupt: the ranks were ended by it.
    """
    refuse_more_than_gpus(nproc, "launch.nproc")
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in heeded_signals()}
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    signal.signal(signal.SIGUSR1, lambda number, _: pass_on(number))
    try:
        status = _to_their_end(nproc, [sys.executable, "-m", "trainer", *arguments], asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and asked[0] == signal.SIGINT:
        raise KeyboardInterrupt
    return 128 + asked[0] if asked else status


def refuse_more_than_gpus(nproc: int, key: str) -> None:
    """Give every rank a GPU of its own, where there are GPUs; `key` has asked for so many ranks.

    Raises:
        ConfigError: there are fewer.
    """
    if not may_have_gpus():
        return
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise ConfigError(key, f"{nproc} on a machine with {gpus} GPUs", f"1 to {gpus}", f"set it to {gpus}")


def heeded_signals() -> list[signal.Signals]:
    """Those that ask for the end; what is ignored (nohup, a shell's background) stays so."""
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _to_their_end(nproc: int, command: Sequence[str], asked: list[int]) -> int:
    """Start a command as so many ranks and wait until the last has ended; the status of the one that failed first.

    Args:
        nproc: how many.
        command: what each runs.
        asked: signals that have come to this process, and come while it waits; each is passed on.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    status, passed_on, first_asked, until = 0, 0, math.inf, math.inf
    with _free_port() as port:
        for rank in range(nproc):
            ranks.append(subprocess.Popen(command, env=_environment(rank, nproc, port), start_new_session=True))
        while None in (states := [rank.poll() for rank in ranks]):
            now, tell = time.monotonic(), list(asked[passed_on:])
            passed_on += len(tell)
            if tell:
                first_asked = min(first_asked, now)
                at_once = signal.SIGINT in tell and now - first_asked > SAME_WISH_SECONDS  # Ctrl-C once more
                until = min(until, now + (_LAST_SECONDS if at_once else END_SECONDS))
            as_asked = {state for number in asked for state in (128 + number, -number)}
            failed = next((state for state in states if state and state not in as_asked), 0)
            if failed and not status:
                status, tell = failed, [*tell, signal.SIGTERM]
                until = min(until, now + _LAST_SECONDS)
            for number in tell if now < until else [signal.SIGKILL]:
                for process in ranks:
                    process.send_signal(number)
            time.sleep(_LOOK_SECONDS)
    status = status or next((state for state in states if state), 0)
    return status if status >= 0 else 128 - status


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What makes a process a rank, as torch's launcher says it."""
    mine = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {"OMP_NUM_THREADS": str(threads(nproc))} | os.environ | {name: str(value) for name, value in mine.items()}


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else is given while this lasts; the first rank listens on it."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: else two launchers may get the same
        yield kept.getsockname()[1]


def choose_network(interface: str | None) -> None:
    """Tell the libraries of groups which interface leads to the other ranks, where some are on other hosts."""
    if is_rank() and os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        network.use(interface, os.environ["MASTER_ADDR"])


def resume_of_this_start(asked: str) -> str:
    """Which run is gone on with: the one that was asked for; when ranks were started again, the one they trained."""
    if int(os.environ.get(ROUND, "1")) == 1:
        return asked
    path = Path(asked)
    if path.parent.name == "resume":  # one of its points, older than those of this run by now
        return str(path.parent.parent)
    return "auto" if asked == "never" else asked


def is_of_another(error: BaseException) -> bool:
    """Whether an error only says that another rank does not answer any more: that one says why, or was killed."""
    return isinstance(error, RuntimeError) and not isinstance(error, Interrupted) and bool(_LOST.search(str(error)))


def told_of_another(error: BaseException) -> str:
    """What such an error says, in a line: where every rank says so, it is the network or its library.

    NCCL says in the first line of several where it noticed, and in the last one why; torch's frames may follow.
    """
    lines = [line.strip() for line in str(error).partition("Exception raised from")[0].splitlines() if line.strip()]
    said = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or type(error).__name__
    return f"rank {os.environ.get('RANK', '0')}: another rank does not answer: {said}"


@contextmanager
def with_the_others() -> Iterator[None]:
    """While ranks train together: where another has ended, this one is interrupted, and can be gone on with.

    Raises:
        Interrupted: another rank has ended.
    """
    try:
        yield
    except BaseException as error:
        if is_rank():
            SIGNALS.ending()
            if is_of_another(error):
                print(told_of_another(error), file=sys.stderr)
                raise Interrupted("by the end of another rank, at the newest resume point") from error
        raise


def join(nproc: int, make_zero: Callable[[], Any] | None) -> Any:
    """The accelerator of this rank, in one group with the others.

    Args:
        nproc: ranks that the configuration asks for; the plan of the run has been made for so many.
        make_zero: makes an accelerator for DeepSpeed; None: without DeepSpeed.

    Raises:
        ConfigError: a launcher has started another number of ranks.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != nproc:
        raise ConfigError(
            "launch.nproc",
            f"{nproc}, and a launcher has started {started} ranks",
            "the same number, or one process that starts the ranks itself",
            f"set launch.nproc to {started}, or start without torchrun or accelerate launch",
        )
    if make_zero is not None:
        _alone()
        if is_first():
            _tell_of_locks()
        return make_zero()
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # SupervisedLoss computes in bf16 itself, whatever the environment says
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def on_first_rank(accelerator: Any, make: Callable[[], Any], *, elsewhere: Callable[[], Any] | None = None) -> Any:
    """What `make` returns on the first rank, on every rank; where it raises there, the others end quietly.

    Args:
        accelerator: of this rank.
        make: called on the first rank alone.
        elsewhere: makes what the other ranks get instead of a copy.
    """
    from accelerate.utils import broadcast_object_list

    value, box = None, [False, None]
    try:
        if accelerator.is_main_process:
            value = make()
            box = [True, value if elsewhere is None else None]
    finally:
        if accelerator.num_processes > 1:
            broadcast_object_list(box)
    if not box[0]:
        raise SystemExit(0)  # the first rank says what is wrong, with its exit status
    if accelerator.is_main_process:
        return value
    return box[1] if elsewhere is None else elsewhere()


def end(status: int) -> NoReturn:
    """End this process, the last thing it does; one with a group of ranks at once.

    Gloo's threads, left to the interpreter's end, now and then abort it; taken apart before, they now and then wait for
    ever: their destructor joins a thread that needs the interpreter's lock, and holds that lock.
    """
    if folder := os.environ.get(STATUSES) if is_rank() else None:
        with suppress(OSError):
            (Path(folder) / f"rank-{os.environ['RANK']}").write_text(str(status), encoding="ascii")
    if "torch" in sys.modules:  # else there is no group, and help needs no torch
        from torch import distributed

        if distributed.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def _tell_of_locks() -> None:
    """Torch waits, silently and for ever, for a process that compiles DeepSpeed's parts, also where that was killed.

    Compiling takes half a minute: a lock that is old is nobody's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > _LOCK_SECONDS:
                lock.unlink()
                said = f"removed {lock}, which a process has left that was killed while it compiled for DeepSpeed"
            else:
                said = f"another process compiles for DeepSpeed; if none does, it was killed: remove {lock}"
            print(said, file=sys.stderr)


def _alone() -> None:
    """DeepSpeed wants a group also for a single process: name this one the first of one."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if is_rank():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
