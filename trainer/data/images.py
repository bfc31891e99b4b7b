"""Image files: their sizes checked in bulk without decoding, and one read the way it is meant to be seen."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps

from trainer.data.geometry import Size

_THREADS = 8
_EXIF_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)  # orientations 5 to 8 exchange width and height
_JPEG_TAIL = 4096  # bytes at the end in which an intact JPEG carries its end mark


def read_image(path: Path) -> Image.Image:
    """The image in RGB with its EXIF orientation applied.

    Raises:
        OSError: the file has gone or is broken.
    """
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def image_sizes(paths: Iterable[Path]) -> dict[Path, Size | str]:
    """Look at image files, several at a time.

    PNG checksums are verified and JPEG files must have their end; other formats are decoded to be sure.

    Args:
        paths: image files.

    Returns:
        For each path its size (width, height) in pixels with the EXIF orientation applied, or why it cannot be read.
    """
    ordered = sorted(paths)
    Image.init()  # registers all formats once; the threads below must not race for it
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(ordered, pool.map(_image_size, ordered), strict=True))


def _image_size(path: Path) -> Size | str:
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
            kind = image.format
            if kind != "PNG" and (kind != "JPEG" or not _has_jpeg_end(path)):
                image.load()
        if kind == "PNG":
            with Image.open(path) as image:
                image.verify()  # walks a PNG's checksums; must come directly after open, and does nothing elsewhere
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # noqa: BLE001  Pillow's readers raise nearly any type on a broken file
        return f"cannot be read ({error})"
    return (height, width) if sideways else (width, height)


def _has_jpeg_end(path: Path) -> bool:
    """Whether a JPEG's end mark is near its end; inside compressed data these two bytes cannot occur."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _JPEG_TAIL))
        return b"\xff\xd9" in file.read()
