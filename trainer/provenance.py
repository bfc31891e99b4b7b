"""Fingerprints of what a run was made from: code, data, base weights, environment."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.checkpoint import file_sha256
from trainer.model import folder_of

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "mlflow", "numpy", "pillow", "safetensors")
DIGEST_LENGTH = 32
"""Hex characters; MLflow allows a dataset digest 36."""


@cache
def code_version() -> str:
    """The version of the code that this process runs (see `version_in`), looked up once: git takes its time."""
    return version_in(Path(__file__).resolve().parents[1])


def version_in(folder: Path) -> str:
    """The commit of the checkout that holds this package, `-dirty` when files differ from it; else the version.

    Args:
        folder: the checkout. A repository that merely lies around an installed package, whose files it does not track,
            is none.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "trainer/provenance.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        try:
            return metadata.version("vision-tower-experiments")
        except metadata.PackageNotFoundError:
            return "unknown"


def files_digest(files: Iterable[Path]) -> str:
    """One digest over the contents of files in the order given, 32 hex characters; names and places do not count."""
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(file_sha256, files))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:DIGEST_LENGTH]


def base_digest(model: str, seed: int) -> str:
    """Digest of the base weights: of their files, or of what a random initialisation is drawn from."""
    if model.startswith("random:"):
        return text_digest([model, seed])
    return files_digest(sorted(folder_of(model, weights=True).glob("*.safetensors")))


def text_digest(value: Any) -> str:
    """Digest of a JSON-able value, 32 hex characters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]


def environment() -> dict[str, Any]:
    """What the run ran on: packages, Python, system, processors. Nothing of the user's variables or paths."""
    import torch  # slow to import, and this is the only function that asks it

    cuda = torch.cuda.is_available()
    return {
        "packages": dict(_installed()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def made_with() -> dict[str, Any]:
    """What, beside the configuration, decides about the last bit of a number: code, torch, threads."""
    import torch

    return {"code": code_version(), "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def _installed() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
