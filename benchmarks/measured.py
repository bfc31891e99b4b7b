"""What one measured process is asked for, and how it is started."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from machine import cores

SAMPLES_A_STEP, MICRO_BATCH = 4, 2
EVAL_BATCH = 4
RATE, CLIP = 1e-4, 1.0
"""Learning rate of every step and part, and the norm to which gradients are clipped; weights do not decay."""
SEED = 42
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Switches:
    """What ours does differently from its plain path; each can be on alone."""

    fused: bool = False
    """Forward and backward of `trainer.fused`."""
    packed: bool = False
    """The samples of a micro-batch end to end in one row, without padding."""
    one_batch: bool = False
    """All of a rank's samples of a step in one micro-batch."""
    onednn: bool = False
    """The fused path's products by oneDNN where that is faster than MKL."""
    native: bool = False
    """The fused path's small operations by compiled kernels."""
    seen: bool = False
    """The fused path keeps what frozen vision blocks make of images, and has seen all before the clock runs."""
    ranks: int = 1
    """Processes that share the cores and the samples of a step."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures."""

    workload: str
    arm: str
    work: Literal["train", "eval", "count"] = "train"
    """`count` counts floating-point operations instead of seconds."""
    checkpointing: bool = False
    steps: int = 45
    """Optimizer steps, the first ones that are left out with them; an evaluation runs the samples of so many."""
    dropout: float = 0.1
    switches: Switches = field(default_factory=Switches)

    @classmethod
    def read(cls, text: str) -> "Job":
        """What `ask` has written on a command line."""
        values = json.loads(text)
        return cls(**values | {"switches": Switches(**values["switches"])})


def ask(job: Job, script: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Have a script of this folder measure a job in a process of its own, on all cores.

    Args:
        job: what to measure.
        script: file name, and what stands before the job on its command line.
        prefix: a command to run it under, as `taskset -c 0,1`.

    Returns:
        What it told (see `tell`).

    Raises:
        RuntimeError: it failed.
    """
    ranks = job.switches.ranks
    command = [*prefix, sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    file, *arguments = script.split()
    done = subprocess.run(
        [*command, str(HERE / file), *arguments, json.dumps(asdict(job))],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{script} {job} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def tell(found: dict[str, Any]) -> None:
    """What `ask` returns."""
    print(json.dumps(found), flush=True)


def indices(step: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Which samples a rank trains on in optimizer step `step`, from 0."""
    share = SAMPLES_A_STEP // ranks
    first = step * SAMPLES_A_STEP + rank * share
    return list(range(first, first + share))
