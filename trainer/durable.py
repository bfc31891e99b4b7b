"""Makes what was written survive a machine that loses power."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file's content, or the names that a folder has, to the disk.

    Raises:
        OSError: the disk does not take it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
