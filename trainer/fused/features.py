"""What the frozen beginning of the vision tower makes of an image: kept on disk, and never computed twice.

A block that stands before everything trained gives the same rows for the same pixels in every step, epoch, run and arm
with the same boundary. An image is run through these blocks alone, not in its batch, so that the rows are the same to
the last bit whether they were kept or not.
"""

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.cache import cache_folder

# Shapes: P patches of one image of D numbers; k places in the tower whose rows are kept.


@dataclass(frozen=True, slots=True)
class Keep:
    """What of images is kept."""

    max_bytes: int
    """Of all stores together; 0: nothing."""
    in_training: bool
    """Whether training images repeat unchanged; those of evaluations always do."""


NOTHING = Keep(0, in_training=False)

_TRIED = 32  # images, after which reading must have been faster than computing


class FeatureStore:
    """Rows of images by what is in them, in one folder for all runs of this base, boundary and number format."""

    def __init__(self, name: str, max_bytes: int, say: Callable[[str], None] | None = None) -> None:
        """Open it.

        Args:
            name: says which rows these are; others have another name.
            max_bytes: of all stores together; the files that are longest unused go first. 0: nothing is kept.
            say: gets a line when nothing more can be kept, or when keeping does not pay.
        """
        self._root = cache_folder() / "features"
        self._folder = self._root / name
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._free = max_bytes
        self._on = max_bytes > 0
        self._seconds: dict[str, list[float]] = {"compute": [], "read": []}
        if self._on:
            self._make_room(max_bytes)

    def get(self, image: tuple[Tensor, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The rows of an image, (k, P, D), on its device.

        Args:
            image: pixels, (P, numbers of a patch), and grid, (1, 3); all else that rows depend on is in the name.
            compute: makes them.
        """
        if not self._on:
            return compute()
        started = time.perf_counter()
        path = self._folder / f"{content_digest(image)}.npy"
        if (kept := _read(path)) is not None:
            rows = kept.to(image[0].device)
            self._measure("read", started)
            return rows
        rows = compute()
        storable = _storable(rows)  # waits for a GPU, so that the time is that of the work
        self._measure("compute", started)
        self._keep(path, storable)
        return rows

    def _measure(self, what: str, started: float) -> None:
        seconds = self._seconds[what]
        if len(seconds) == _TRIED:
            return
        seconds.append(time.perf_counter() - started)
        compute, read = self._seconds["compute"], self._seconds["read"]
        if len(compute) >= _TRIED // 4 and len(read) == _TRIED and np.median(read) > np.median(compute):
            self._on = False
            self._say(
                f"image features: reading one takes {1e3 * np.median(read):.1f} ms, computing it "
                f"{1e3 * np.median(compute):.1f} ms: not read any more (data.feature_cache_gigabytes: 0 is faster)"
            )

    def _keep(self, path: Path, rows: NDArray[Any]) -> None:
        if rows.nbytes > self._free:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                np.save(file, rows)
            os.replace(file.name, path)
            self._free -= rows.nbytes
        except OSError as error:
            self._free = 0
            self._say(f"image features: {path.parent}: {error.strerror}: no more are kept")

    def _make_room(self, max_bytes: int) -> None:
        """Remove what was longest unused, down to nine tenths of what is allowed, where there is more than that."""
        files = sorted(_files(self._root), key=lambda entry: entry[1])
        used = sum(size for _, _, size in files)
        for path, _, size in files if used > max_bytes else ():
            if used <= 0.9 * max_bytes:
                break
            try:
                path.unlink(missing_ok=True)
                used -= size
            except OSError:
                continue
        self._free = max(0, max_bytes - used)


def content_digest(tensors: Iterable[Tensor]) -> str:
    """32 hex characters of what is in tensors, and how it lies."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:32]


def _files(folder: Path) -> list[tuple[Path, float, int]]:
    """(path, last use, bytes) of all files in a folder of folders."""
    found = []
    for path in folder.glob("*/*"):
        try:
            stat = path.stat()
        except OSError:  # another run has removed it
            continue
        found.append((path, max(stat.st_atime, stat.st_mtime), stat.st_size))
    return found


def _read(path: Path) -> Tensor | None:
    """Rows that were kept; None where there are none, or they are damaged."""
    try:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        rows = torch.from_numpy(np.array(kept))
    except (OSError, ValueError, TypeError, EOFError):
        return None
    return rows.view(torch.bfloat16) if rows.dtype is torch.int16 else rows


def _storable(rows: Tensor) -> NDArray[Any]:
    """Numpy has no bfloat16: its bits are kept as whole numbers."""
    on_cpu = rows.detach().cpu().contiguous()
    numbers: NDArray[Any] = (on_cpu.view(torch.int16) if rows.dtype is torch.bfloat16 else on_cpu).numpy()
    return numbers
