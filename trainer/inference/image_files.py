"""Finds the images that a path names: a file, or all of a folder and its subfolders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.geometry import Size
from trainer.data.images import image_sizes
from trainer.errors import DataError

_ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2", ".avif"))
"""A folder's files that are looked at; a file that is named itself may be called anything."""


@dataclass(frozen=True, slots=True)
class Found:
    """Images of a path.

    Attributes:
        root: the folder that names are relative to.
        images: (path, (width, height) in pixels as it is meant to be seen), in the order of their names.
        faults: path -> why it cannot be read.
    """

    root: Path
    images: tuple[tuple[Path, Size], ...]
    faults: dict[Path, str]


def find_images(paths: Sequence[Path], *, but_below: Path | None = None) -> Found:
    """All images of files and folders.

    Args:
        paths: files, or folders with images.
        but_below: a folder whose files are no images that were meant: those that are drawn there.

    Raises:
        DataError: a path that is not there or cannot be looked at, or none that has an image.
    """
    files: dict[Path, None] = {}
    for path in paths:
        try:
            path.stat()
            is_folder, drawn = path.is_dir(), but_below and _below(path, but_below)
            # compared by name: to resolve each of a hundred thousand images takes seconds
            found = (e for e in path.rglob("*") if _is_image(e) and drawn not in e.parents) if is_folder else [path]
            files |= dict.fromkeys(sorted(found))
        except FileNotFoundError:
            raise _no_images(path, "no such file or folder") from None
        except OSError as error:
            raise _no_images(path, error.strerror or str(error)) from None
    if not files:
        raise _no_images(paths[0], f"no file that ends in {', '.join(sorted(_ENDINGS))}")
    sizes = image_sizes(files)
    images = tuple((path, size) for path in files if not isinstance(size := sizes[path], str))
    faults = {path: size for path in files if isinstance(size := sizes[path], str)}
    root = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
    return Found(root, images, faults)


def _below(folder: Path, other: Path) -> Path | None:
    """A folder as `rglob` names it where it lies in another one; None where it does not."""
    root, inner = folder.resolve(), other.resolve()
    return folder / inner.relative_to(root) if inner.is_relative_to(root) else None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and path.is_file() and not path.name.startswith(".")


def _no_images(path: Path, got: str) -> DataError:
    return DataError(f"{path}", got, "an image file, or a folder with some", "check the path")
