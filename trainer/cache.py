"""Where the project keeps what it can make again: built-in data, image features, compiled kernels."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Kept between runs; `XDG_CACHE_HOME` says where."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision-tower-experiments"
