"""Image files: their sizes checked in bulk without decoding, and one read the way it is meant to be seen."""

import hashlib
import os
import stat
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from io import BufferedReader, BytesIO, FileIO
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from trainer.data.geometry import Size
from trainer.errors import DataError

_THREADS = 8
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 4096  # bytes at the end in which an intact JPEG carries its end mark
_JPEG_START = 4096  # bytes of a JPEG's scan that are decoded, to see that its tables can be used

# What photos and drawings are kept in. Pillow's other formats are rare and little tested; EPS even starts a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

# Half a GiB as Pillow holds it, 4 bytes a pixel: pictures of 108-megapixel phones pass, bombs of a few kB do not.
_MAX_PIXELS = 2**27
# Pillow refuses above twice this number, from the header and before any decoder takes memory; above once it warns.
Image.MAX_IMAGE_PIXELS = _MAX_PIXELS // 2
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what cannot be used is told by record

_MAX_HEADER = 2**28  # bytes of what is not pixels, such as the layers that Photoshop keeps in a TIFF; all of a WebP
_BYTES_A_PIXEL = 8
_MAX_READS = 2**20  # a large GIF comes in half a million pieces of 255 bytes
_MAX_SCANS = 500  # of a progressive JPEG, in each of which all its pixels are gone over; cameras write about ten
_MAX_PLAIN_BYTES = 2**22  # of numbers written out as text, which Pillow reads in Python
_LARGE_PIXELS, _STRIP_PIXELS = 2**24, 2**20
_LARGE_BYTES = 2**26
_one_large = RLock()  # large images are looked at one at a time, else the threads together would hold gigabytes

SIDEWAYS = range(5, 9)
"""EXIF orientations that exchange width and height."""
_EXIF_ORIENTATION = 0x0112
# Pillow's exif_transpose also writes the rest of the EXIF data anew, and fails where a camera broke the rules there.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class _Unfit(Exception):
    """An image that can be opened but is nothing to train on; says why."""


class _BoundedFile(BufferedReader):
    """A file of which no more is read, and no more often, than any image needs.

    Pillow looks for the parts of a JPEG or GIF byte by byte, and takes a chunk of a PNG or a whole WebP into memory,
    however long a broken or preallocated file makes them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(str(path)))
        self._bytes_left, self._reads_left = _MAX_HEADER, _MAX_READS

    def allow(self, pixels: int) -> None:
        """Let as much be read as the pixels of an image can take, twice: to check it and to decode it."""
        self._bytes_left = 2 * (_MAX_HEADER + _BYTES_A_PIXEL * pixels)

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        data = super().read(self._bytes_left if size is None or size < 0 else min(size, self._bytes_left))
        self._bytes_left, self._reads_left = self._bytes_left - len(data), self._reads_left - 1
        if self._bytes_left <= 0 or self._reads_left <= 0:
            raise _Unfit("cannot be read (it is far longer than an image, or in far more pieces)")
        return data


def outside(root: Path, paths: Iterable[Path]) -> dict[Path, Path]:
    """The paths that leave a folder once every symbolic link is followed, its own too; files need not exist.

    Args:
        root: the folder.
        paths: with the folder in front where they are relative to it.

    Returns:
        For each path outside where it leads.
    """
    inside = Path(os.path.realpath(root))
    resolved = cache(os.path.realpath)  # many images share a folder
    astray = {}
    for path in paths:
        linked = os.path.islink(path) or path.name == ".."  # Path.is_symlink raises where a name is too long
        real = Path(os.path.realpath(path) if linked else os.path.join(resolved(path.parent), path.name))
        if not real.is_relative_to(inside):
            astray[path] = real
    return astray


def read_image(path: Path) -> Image.Image:
    """The image in RGB, 8 bits a channel, as it is meant to be seen.

    Its EXIF orientation is applied, what is transparent lies over white, and 16-bit gray is scaled by its full range.
    The content decides on the format, whatever the file's name says. A JPEG that holds several pictures, as phones
    write them, is its first one.

    Raises:
        DataError: the file has gone, is broken or is refused by `image_sizes`.
    """
    try:
        with _opened(path) as image:
            return _seen(image)
    except Exception as error:  # Pillow's readers raise nearly any type on a broken file
        raise DataError(
            where=f"image {path}",
            got=_reason(error),
            allowed=f"one still picture of at most {_MAX_PIXELS:,} pixels in one of {', '.join(_FORMATS)}",
            do="restore or replace the file; all images were checked when the records were read",
        ) from error


def image_sizes(paths: Iterable[Path]) -> dict[Path, Size | str]:
    """Look at image files as `looked_at` does.

    Returns:
        For each path its size (width, height) in pixels with the EXIF orientation applied, or why it cannot be read.
    """
    return {path: found if isinstance(found, str) else found[0] for path, found in looked_at(paths).items()}


def looked_at(paths: Iterable[Path]) -> dict[Path, tuple[Size, int] | str]:
    """Look at image files, several at a time, for whatever `read_image` would refuse.

    From the header: the format, the number of pixels and of pictures, the kind of numbers. Then PNG checksums are
    verified, and a JPEG must begin well and have its end. Other formats are decoded to be sure, and so are a PNG with
    anything behind its pixels and a JPEG in doubt. What can slip through: a PNG with checksums that fit broken data, a
    JPEG that breaks off in its middle and goes on.

    Args:
        paths: image files.

    Returns:
        For each path its size (width, height) in pixels with the EXIF orientation applied, and that orientation: 1 to
        8, and 1 where Pillow itself turns the image as it decodes it, a TIFF; or why it cannot be read.
    """
    ordered = sorted(paths)
    Image.init()  # registers all formats once; the threads below must not race for it
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(ordered, pool.map(_looked_at, ordered), strict=True))


def equal_files(paths: Iterable[Path]) -> dict[Path, Path]:
    """Find image files of equal content, whatever their names; only files of equal length are read.

    Args:
        paths: files that can be read.

    Returns:
        For each path the first one (by name) of those with its content.
    """
    by_length: defaultdict[int, list[Path]] = defaultdict(list)
    for path in sorted(set(paths)):
        by_length[path.stat().st_size].append(path)
    to_read = [path for group in by_length.values() if len(group) > 1 for path in group]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests: dict[Path, object] = dict(zip(to_read, pool.map(_digest, to_read), strict=True))
    first: dict[object, Path] = {}
    return {path: first.setdefault(digests.get(path, path), path) for group in by_length.values() for path in group}


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _looked_at(path: Path) -> tuple[Size, int] | str:
    try:
        with _one_large if path.stat().st_size > _LARGE_BYTES else nullcontext(), _opened(path) as image:
            width, height = image.size
            with _one_large if width * height > _LARGE_PIXELS else nullcontext():
                seen = None if _is_whole(image) else _seen(image).size
            turn = _orientation(image)
            return seen or ((height, width) if turn in SIDEWAYS else (width, height)), turn if turn in _UPRIGHT else 1
    except Exception as error:  # noqa: BLE001  # Pillow's readers raise nearly any type on a broken file
        return _reason(error)


def _reason(error: Exception) -> str:
    match error:
        case _Unfit():
            return str(error)
        case FileNotFoundError():
            return "no such file"
        case Image.DecompressionBombError():
            return f"has more than {_MAX_PIXELS:,} pixels"
        case UnidentifiedImageError():
            return f"cannot be read (its content is none of {', '.join(_FORMATS)})"
        case OSError(strerror=str(reason)):
            return f"cannot be read ({reason})"
    return f"cannot be read ({error or type(error).__name__})"


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """An image file with its header read and found fit; no pixel is decoded yet."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _Unfit("is not a regular file")  # opening a pipe would wait for a writer for ever
    with _BoundedFile(path) as file, Image.open(file, formats=_FORMATS) as image:
        file.allow(image.width * image.height)
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise _Unfit(f"holds several pictures (animated {image.format} or pages); save the one that is meant")
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise _Unfit(f"holds signed or 32-bit numbers (mode {image.mode}); 8 or 16 bits a channel are needed")
        if image.mode == "P" and isinstance(image, PngImageFile) and image.palette is None:
            raise _Unfit("cannot be read (its palette is missing)")
        if image.tile and image.tile[0].codec_name == "ppm_plain" and path.stat().st_size > _MAX_PLAIN_BYTES:
            raise _Unfit(f"is a PPM in plain text of more than {_MAX_PLAIN_BYTES:,} bytes; save it in binary")
        if image.info.get("progressive") and _scans(path) > _MAX_SCANS:
            raise _Unfit(f"has more than {_MAX_SCANS} scans")
        yield image


def _is_whole(image: ImageFile) -> bool:
    """Whether the file is known to be whole, and its orientation known, without decoding.

    Raises:
        Exception: it is known to be broken.
    """
    file = image.fp
    if file is None or not image.tile:
        return False
    if isinstance(image, PngImageFile) and image.png is not None:
        file.seek(image.tile[0].offset - 8)  # where the chunk of the first pixels begins
        return set(image.png.verify()) == {b"IDAT"}  # chunks behind the pixels may hold an orientation, or be broken
    if isinstance(image, JpegImageFile):
        if image.format == "MPO":  # Pillow has gone back to the beginning
            file.seek(0)
            JpegImageFile(file)
        # Pillow stops reading where the first scan's data begin: in them these two bytes cannot occur, in the thumbnail
        # before them they do.
        scan = file.tell()
        file.seek(max(scan, file.seek(0, os.SEEK_END) - _JPEG_TAIL))
        has_end = _JPEG_END in file.read()
        file.seek(0)
        return has_end and _begins_well(file.read(scan + _JPEG_START))
    return False


def _scans(path: Path) -> int:
    """Scans of a JPEG: in the data between them the two bytes that begin one cannot occur."""
    with path.open("rb") as file:
        return sum(block.count(b"\xff\xda") for block in islice(iter(partial(file.read, 2**20), b""), 1024))


def _begins_well(data: bytes) -> bool:
    """Whether the first rows of a JPEG decode, at an eighth of their size: then its kind and its tables are good."""
    try:
        with Image.open(BytesIO(data + _JPEG_END), formats=("JPEG",)) as rows:
            rows.draft("L", (1, 1))
            rows.load()
    except Exception:  # noqa: BLE001  # the cut may have done it; decoding the whole file decides
        return False
    return True


def _orientation(image: Image.Image) -> Any:
    # A PNG's own getexif decodes the pixels first, for what may stand behind them.
    return Image.Image.getexif(image).get(_EXIF_ORIENTATION)


def _seen(image: ImageFile) -> Image.Image:
    """Decode an opened image and turn it into RGB as it is meant to be seen."""
    encoding = image.tile[0].args if image.tile else None
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if "transparency" in image.info:
        image.info["transparency"] = _in_eight_bits(image.info["transparency"], encoding)
    picture = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # in strips: several copies of a large image would take gigabytes
        strip = image.crop((0, top, image.width, min(top + rows, image.height))) if rows < image.height else image
        picture.paste(_in_colour(_gray(strip, image) if image.mode.startswith("I") else strip), (0, top))
    return picture if turn is None else picture.transpose(turn)


def _in_colour(picture: Image.Image) -> Image.Image:
    """RGB, over white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    paper = Image.new("RGB", layer.size, "white")
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def _in_eight_bits(colour: Any, encoding: Any) -> Any:
    """The transparent colour of a PNG: Pillow leaves it in the depth of the file, beside pixels that it has scaled."""
    if encoding in ("L;2", "L;4"):
        return colour * 255 // (2 ** int(encoding[-1]) - 1)
    return tuple(value >> 8 for value in colour) if encoding == "RGB;16B" else colour


def _gray(strip: Image.Image, image: ImageFile) -> Image.Image:
    """16-bit gray scaled to 8 bits by its full range, with an alpha channel where one value is transparent."""
    values, full = np.asarray(strip).astype(np.uint32), 2**16 - 1
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if tags.get(_TIFF_BITS) == (12,):
        full = 2**12 - 1
    levels = ((values * 255 + full // 2) // full).astype(np.uint8)
    picture = Image.fromarray(255 - levels if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else levels)
    if "transparency" in image.info:
        picture.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return picture
