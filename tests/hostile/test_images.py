"""Hostile images: mutated files of every format, and small or endless files that mean a lot of work."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.hostile.harness import ends_well, forget_peak, peak_megabytes, search
from tests.trainer.data.test_images import chunk, png
from trainer.data.images import image_sizes, read_image
from trainer.errors import DataError


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Colours that change all over, the same ones each time."""
    values = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    return (
        image.convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    )


def saved(form: str, mode: str = "RGB", **how: Any) -> bytes:
    """An image as Pillow writes it, with EXIF data where the format has them."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "maker", b"comment" * 9
    extra = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    picture(mode).save(file, form, **(extra | how))
    return file.getvalue()


@cache
def whole() -> list[bytes]:
    """One file of each kind; PNG and JPEG in several."""
    several = {"save_all": True, "append_images": [picture()]}
    return [
        saved("PNG"), saved("PNG", "RGBA"), saved("PNG", "P", transparency=3), saved("PNG", "I;16"), saved("PNG", "LA"),
        saved("PNG", "1"), saved("JPEG"), saved("JPEG", progressive=True), saved("JPEG", "CMYK"), saved("JPEG", "L"),
        saved("JPEG", quality=100, subsampling=0, comment=b"x" * 200), saved("MPO", **several), saved("PNG", **several),
        saved("WEBP"), saved("WEBP", "RGBA", lossless=True), saved("GIF", "P"), saved("GIF", **several), saved("BMP"),
        saved("TIFF"), saved("TIFF", compression="tiff_lzw"), saved("TIFF", compression="jpeg"), saved("TIFF", "I;16"),
        saved("PPM"), saved("JPEG2000"), saved("AVIF", quality=60), b"P3 4 2 255\n" + b"1 2 3 " * 8,
    ]  # fmt: skip


NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file with bytes flipped, set, left out, doubled or moved, cut short, or with a chunk mended afterwards."""
    data = bytearray(draw(st.sampled_from(whole())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(120, max(0, len(data) - 1))))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["bit", "bytes", "number", "out", "double", "move", "cut", "insert"])):
            case "bit" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                data[at : at + length] = draw(st.binary(max_size=length))
            case "number":
                order, kind = draw(st.sampled_from("<>")), draw(st.sampled_from("HI"))
                number = draw(st.sampled_from(NUMBERS)) & (0xFFFF if kind == "H" else 0xFFFFFFFF)
                data[at : at + struct.calcsize(kind)] = struct.pack(order + kind, number)
            case "out":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
            case "move":
                other = draw(st.integers(0, len(data)))
                data[other:other] = data[at : at + length]
            case "cut":
                del data[at:]
            case _:
                data[at:at] = draw(
                    st.sampled_from([b"\xff\xda", b"\xff\xd8", b"\xff\xd9", b"IEND", b"acTL", b"\0" * 64])
                )
    return with_checksums(bytes(data)) if draw(st.booleans()) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold, so that a decoder gets to see it."""
    at, parts = 8, [data[:8]]
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        parts.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + data[at:]


@search(1500)
@given(content=mutated())
def test_a_mutated_image_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    """What the bulk check passes is read in its size, or refused then; it may refuse more than reading does."""
    path = tmp_path / "image.bin"
    path.write_bytes(content)
    size = image_sizes([path])[path]
    image = ends_well("images", lambda: read_image(path))
    assert isinstance(size, tuple | str)
    if image is not None:
        assert image.mode == "RGB" and (isinstance(size, str) or image.size == size)
    assert [each.name for each in tmp_path.iterdir()] == ["image.bin"]


# --- much work in little ------------------------------------------------------------------------------------------

BOMB = zlib.compress(bytes(400 * 2**20), 9)  # 400 kB
LONG = "far longer than an image"


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG of four pixels with one chunk more."""
    return png((2, 2), 8, 0, [b"\0\1"] * 2, chunk(kind, data))


def plain_zeros(start: bytes, size: int = 2**30) -> Callable[[Path], None]:
    """A file that begins like an image and goes on with zeros, as what a broken download leaves; no room on disk."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG of a few kilobytes that goes over all its pixels again and again."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    data = bytearray(file.getvalue())
    struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, side, side)
    last = bytes(data[data.rindex(b"\xff\xda") : -2])
    return bytes(data[:-2]) + last * count + b"\xff\xd9"


PNG_START = png((2, 2), 8, 0, [b"\0\1"] * 2)[:33]
MUCH: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "text": (with_chunk(b"zTXt", b"k\0\0" + BOMB), "too large"),
    "text in another form": (with_chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB), "too large"),
    "a colour profile": (with_chunk(b"iCCP", b"k\0\0" + BOMB), "too large"),
    "a chunk": (plain_zeros(PNG_START + struct.pack(">I", 2**30 - 100) + b"eXIf"), LONG),
    "a chunk of pixels": (plain_zeros(PNG_START + struct.pack(">I", 2**30 - 100) + b"IDAT"), LONG),
    "zeros after a JPEG's beginning": (plain_zeros(b"\xff\xd8\xff"), LONG),
    "zeros after a GIF's beginning": (plain_zeros(b"GIF89a\4\0\4\0\0\0\0"), LONG),
    "zeros after a WebP's beginning": (plain_zeros(b"RIFF\xff\xff\xff\x7fWEBPVP8 "), LONG),
    "zeros after an AVIF's beginning": (plain_zeros(b"\0\0\0 ftypavif\0\0\0\0avifmif1miafMA1A"), LONG),
    "scans": (scans(20_000, 8_000), "more than 500 scans"),
    "numbers as text": (b"P3 4000 4000 255\n" + b"1 " * 2_500_000, "plain text"),
    "comments in numbers as text": (b"P3 4000 4000 255\n" + b"#\n" * 2_500_000, "plain text"),
}


@pytest.mark.parametrize("case", MUCH)
def test_a_file_that_means_much_work_is_refused(tmp_path: Path, case: str) -> None:
    """In less than half a gigabyte, by the bulk check and when read."""
    make, words = MUCH[case]
    path = tmp_path / "image.bin"
    if callable(make):
        make(path)
    else:
        path.write_bytes(make)
    forget_peak()
    before = peak_megabytes()
    found = image_sizes([path])[path]
    assert isinstance(found, str) and words in found, found
    with pytest.raises(DataError, match=r"image\.bin"):
        read_image(path)
    assert peak_megabytes() - before < 600


def test_pixels_that_unpack_to_more_than_there_are_take_no_room(tmp_path: Path) -> None:
    """400 MB of zeros stand behind the four pixels of a PNG."""
    path = tmp_path / "a.png"
    path.write_bytes(png((2, 2), 8, 0, [], data=BOMB))
    forget_peak()
    before = peak_megabytes()
    assert read_image(path).size == (2, 2)
    assert peak_megabytes() - before < 50


LARGEST = (16384, 8192)
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


@pytest.mark.parametrize(("depth", "colour", "bytes_a_pixel"), [(8, 6, 4), (16, 0, 2)], ids=["RGBA", "16-bit gray"])
def test_the_largest_images_are_read_in_less_than_two_gigabytes(
    tmp_path: Path, depth: int, colour: int, bytes_a_pixel: int
) -> None:
    """134 million pixels, transparent and lying on their side: converted in strips, never copied as a whole."""
    packer = zlib.compressobj(1)
    row = bytes(1 + LARGEST[0] * bytes_a_pixel)
    data = b"".join([*(packer.compress(row) for _ in range(LARGEST[1])), packer.flush()])
    path = tmp_path / "large.png"
    path.write_bytes(png(LARGEST, depth, colour, [], chunk(b"eXIf", TURNED), data=data))
    del data
    forget_peak()
    before = peak_megabytes()
    assert read_image(path).size == LARGEST[::-1]
    assert peak_megabytes() - before < 1650


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_images_of_one_pixel_by_a_million_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    """That they are too thin for the model is told later."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert image_sizes([tmp_path / "a.png"]) == {tmp_path / "a.png": size}
    assert read_image(tmp_path / "a.png").size == size
