"""Builds `kernels.cpp` with the C++ compiler of the machine, once, and calls it.

It is plain C++ without any header of torch's: a second to compile. Without a compiler, or with `VTE_NATIVE=0`, torch's
own operations do the same work, slower (docs/performance.md).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.cache import cache_folder

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors can be given to `library`, and there is one."""
    return all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors) and library() is not None


@cache
def library() -> Any:
    """The compiled functions; None where there is no compiler, or it fails."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if os.environ.get("VTE_NATIVE") == "0" or not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        built = cache_folder() / "kernels" / f"{_fingerprint(compiler)}.so"
        with suppress(OSError):  # not built yet, or damaged
            return ctypes.CDLL(str(built))
        _build(compiler, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a compiled function; a tensor is passed as its address, None as null, an int as long, a float as float."""
    getattr(library(), function)(*map(_as_c, arguments))


def _as_c(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p() if value is None else ctypes.c_long(value)


def _fingerprint(compiler: list[str]) -> str:
    """Of what the compiled file depends on: source, flags, compiler, and the processor that `native` means."""
    about = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        processor = platform.processor()
    parts = (_SOURCE.read_bytes(), repr(_FLAGS).encode(), about, processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _build(compiler: list[str], target: Path) -> None:
    """Compile, and put the file there in one step: ranks that start together may all do it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for openmp in (["-fopenmp"], []):  # threads, where the compiler has them
            command = [*compiler, *_FLAGS, *openmp, "-c", str(_SOURCE), "-o", str(compiled)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                break
        # Linked without OpenMP's runtime: torch has loaded one already, and two would fight over the cores.
        subprocess.run([*compiler, "-shared", str(compiled), "-o", str(linked)], capture_output=True, check=True)
        os.replace(linked, target)
