"""What a figure was measured on: processor, memory, versions, commit, and how fast this machine multiplies matrices.

python benchmarks/machine.py        # GFLOP/s of float32 matrix products
"""

import json
import os
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.provenance import PACKAGES, code_version


def facts() -> dict[str, Any]:
    """Hardware, versions, commit and date, JSON-able."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}" if names else "unknown",
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "commit": code_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def gemm_rates() -> dict[str, float]:
    """GFLOP/s of float32 matrix products on all cores, the best of several, by the library that makes them."""
    torch.set_num_threads(cores())
    makers = {"MKL": torch.nn.functional.linear}
    if torch.backends.mkldnn.is_available():
        makers["oneDNN"] = lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    rates = dict.fromkeys(makers, 0.0)
    for n in (1024, 2048):
        x, weight = torch.randn(n, n), torch.randn(n, n)
        for _ in range(7):
            for name, make in makers.items():
                started = time.perf_counter()
                for _ in range(4):
                    make(x, weight)
                rates[name] = max(rates[name], 4 * 2 * n**3 / (time.perf_counter() - started) / 1e9)
    return rates


if __name__ == "__main__":
    print(json.dumps(gemm_rates()))
