"""Images: what each kind of file looks like when read, what is refused in which words, and what the bulk check sees."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.images import image_sizes, outside, read_image
from trainer.errors import DataError

# Lossless kinds show exactly these pixels: shape (2, 3, 3), rows x columns x RGB.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [255, 255, 255], [0, 0, 0]]], dtype=np.uint8
)
GRAYS = np.array([[0, 64, 255], [1, 254, 128]], dtype=np.uint8)
DEEP = np.array([[0, 257, 32768], [65535, 300, 65534]], dtype=np.uint16)
DEEP_IN_8_BITS = [[0, 1, 128], [255, 1, 255]]  # times 255 / 65535; clipping would give [[0, 255, 255], ...]
BLOCK = (40, 24)  # width, height of images with loss, in large areas that it leaves alone


def grays(levels: Any) -> np.ndarray[Any, Any]:
    """(H, W) gray levels as (H, W, 3) RGB."""
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=2)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int], depth: int, colour: int, rows: list[bytes], before: bytes = b"", data: bytes | None = None
) -> bytes:
    """A PNG of a kind that Pillow does not write: bits a sample, colour type, bytes of each row, chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **how: Any) -> bytes:
    """An image as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def plain(form: str, mode: str = "RGB", **how: Any) -> bytes:
    """The colours, in some mode and format."""
    return saved(Image.fromarray(COLOURS).convert(mode, palette=Image.Palette.ADAPTIVE), form, **how)


def block(mode: str, colour: Any, form: str, **how: Any) -> bytes:
    """One colour all over."""
    return saved(Image.new(mode, BLOCK, colour), form, **how)


def tagged(tiff: bytes, tag: int, value: int) -> bytes:
    """An uncompressed TIFF with one small number in its directory replaced."""
    changed = bytearray(tiff)
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    (at,) = [p for p in range(start + 2, start + 2 + 12 * count, 12) if struct.unpack_from("<H", tiff, p)[0] == tag]
    struct.pack_into("<H", changed, at + 8, value)
    return bytes(changed)


def turned(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_alpha(mode: str) -> Image.Image:
    """Three pixels of one colour: transparent, half transparent, opaque."""
    image = Image.new("RGBA", (3, 1), (200, 100, 0, 255)) if mode == "RGBA" else Image.new("LA", (3, 1), (100, 255))
    image.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
    return image


def palette(transparency: Any) -> bytes:
    """A palette PNG of red, green, blue, with what Pillow takes for its transparency."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, "PNG", transparency=transparency)


def palette_with_alpha() -> bytes:
    """A TIFF of mode PA: red, green, blue under alpha 0, 128, 255."""
    image = Image.new("PA", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (x, alpha))
    return saved(image, "TIFF")


def deep(form: str, order: str = "<", **how: Any) -> bytes:
    """The 16-bit grays."""
    values = DEEP.astype(f"{order}u2")
    return saved(Image.frombytes("I;16" if order == "<" else "I;16B", (3, 2), values.tobytes()), form, **how)


def late_orientation() -> bytes:
    """A PNG whose EXIF data stand behind its pixels, where the format allows them too."""
    data, exif = plain("PNG"), turned(6).tobytes().removeprefix(b"Exif\0\0")
    end = chunk(b"IEND", b"")
    return data.removesuffix(end) + chunk(b"eXIf", exif) + end


def odd_exif() -> bytes:
    """Orientation 6 beside a negative density, which Pillow can read but not write again."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHIi", 0x0128, 9, 1, -5)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return plain("PNG", exif=exif)


def ycck() -> bytes:
    """A CMYK JPEG whose first three inks are stored as YCbCr, as Adobe's mark says by a 2: none of them, no black."""
    content = block("CMYK", (255, 127, 127, 0), "JPEG")  # stored are 255 minus these: Y 0, Cb and Cr 128, K 255
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\x02" + content[at + 1 :]


OVER_WHITE = [[[255, 255, 255], [227, 177, 127], [200, 100, 0]]]
PALETTE_OVER_WHITE = [[[255, 255, 255], [127, 255, 127], [0, 0, 255]]]
RED, PAPER = [255, 0, 0], [255, 255, 255]
DEEP_ROWS = [row.astype(">u2").tobytes() for row in DEEP]

SEEN: dict[str, tuple[Callable[[], bytes], Any]] = {
    "PNG": (lambda: plain("PNG"), COLOURS),
    "BMP": (lambda: plain("BMP"), COLOURS),
    "PPM": (lambda: plain("PPM"), COLOURS),
    "TIFF": (lambda: plain("TIFF"), COLOURS),
    "TIFF, LZW": (lambda: plain("TIFF", compression="tiff_lzw"), COLOURS),
    "WebP": (lambda: plain("WEBP", lossless=True), COLOURS),
    "GIF": (lambda: plain("GIF", "P"), COLOURS),
    "JPEG 2000": (lambda: plain("JPEG2000", irreversible=False, num_resolutions=1), COLOURS),
    "palette": (lambda: plain("PNG", "P"), COLOURS),
    "1 bit": (lambda: plain("PNG", "1"), grays(np.asarray(Image.fromarray(COLOURS).convert("1")) * 255)),
    "gray": (lambda: saved(Image.fromarray(GRAYS), "PNG"), grays(GRAYS)),
    "16-bit PNG": (lambda: deep("PNG"), grays(DEEP_IN_8_BITS)),
    "16-bit TIFF": (lambda: deep("TIFF"), grays(DEEP_IN_8_BITS)),
    "16-bit TIFF, big-endian": (lambda: deep("TIFF", ">"), grays(DEEP_IN_8_BITS)),
    "16-bit TIFF, white is 0": (lambda: tagged(deep("TIFF"), 262, 0), grays(255 - np.array(DEEP_IN_8_BITS))),
    "16-bit PPM": (lambda: deep("PPM"), grays(DEEP_IN_8_BITS)),
    "16-bit JPEG 2000": (lambda: deep("JPEG2000", irreversible=False, num_resolutions=1), grays(DEEP_IN_8_BITS)),
    "12-bit TIFF": (
        lambda: tagged(saved(Image.frombytes("I;16", (2, 1), b"\x00\x0f\xff\x00"), "TIFF"), 258, 12),
        grays([[0, 255]]),
    ),
    "16-bit PNG, one value transparent": (
        lambda: png((3, 2), 16, 0, DEEP_ROWS, chunk(b"tRNS", struct.pack(">H", 300))),
        grays([[0, 1, 128], [255, 255, 255]]),
    ),
    "16-bit RGB": (lambda: png((1, 1), 16, 2, [struct.pack(">3H", 0xFFFF, 0x8000, 0)]), [[[255, 128, 0]]]),
    "16-bit RGB, one colour transparent": (
        lambda: png(
            (2, 1), 16, 2, [struct.pack(">6H", 700, 0, 0, 0, 0, 0)], chunk(b"tRNS", struct.pack(">3H", 700, 0, 0))
        ),
        [[PAPER, [0, 0, 0]]],
    ),
    "2-bit gray, one level transparent": (
        lambda: png((4, 1), 2, 0, [b"\x1b"], chunk(b"tRNS", struct.pack(">H", 1))),
        grays([[0, 255, 170, 255]]),
    ),
    "4-bit gray, one level transparent": (
        lambda: png((2, 1), 4, 0, [b"\x12"], chunk(b"tRNS", struct.pack(">H", 2))),
        grays([[17, 255]]),
    ),
    "1 bit, black transparent": (
        lambda: png((2, 1), 1, 0, [b"\x80"], chunk(b"tRNS", struct.pack(">H", 0))),
        grays([[255, 255]]),
    ),
    "gray, one level transparent": (
        lambda: saved(Image.fromarray(GRAYS), "PNG", transparency=64),
        grays([[0, 255, 255], [1, 254, 128]]),
    ),
    "RGB, one colour transparent": (
        lambda: plain("PNG", transparency=(10, 20, 30)),
        np.concatenate([COLOURS[:1], [[PAPER, PAPER, [0, 0, 0]]]]),
    ),
    "RGBA": (lambda: saved(with_alpha("RGBA"), "PNG"), OVER_WHITE),
    "RGBA, WebP": (lambda: saved(with_alpha("RGBA"), "WEBP", lossless=True, exact=True), OVER_WHITE),
    "gray with alpha": (lambda: saved(with_alpha("LA"), "PNG"), grays([[255, 177, 100]])),
    "palette, one colour transparent": (lambda: palette(0), [[PAPER, [0, 255, 0], [0, 0, 255]]]),
    "palette, a transparency each": (lambda: palette(b"\x00\x80\xff"), PALETTE_OVER_WHITE),
    "palette with alpha": (palette_with_alpha, PALETTE_OVER_WHITE),
    "CMYK TIFF": (lambda: block("CMYK", (0, 255, 255, 0), "TIFF"), np.tile(RED, (24, 40, 1))),
    "orientation behind the pixels": (late_orientation, np.rot90(COLOURS, -1)),
    "EXIF that cannot be written again": (odd_exif, np.rot90(COLOURS, -1)),
    "MPO": (
        lambda: block("RGB", "white", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        np.full((24, 40, 3), 255),
    ),
    "JPEG with a film behind it": (lambda: block("L", 255, "JPEG") + b"film" * 5000, np.full((24, 40, 3), 255)),
}


def put(folder: Path, content: bytes, name: str = "image.bin") -> Path:
    """A file with this content; its name says nothing about the format."""
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", SEEN)
def test_each_kind_is_read_as_it_is_meant_to_be_seen(tmp_path: Path, kind: str) -> None:
    """RGB of 8 bits, exactly these pixels, and the bulk check says the same size; the name says nothing."""
    content, expected = SEEN[kind]
    path = put(tmp_path, content())
    image = read_image(path)
    assert (image.mode, np.asarray(image).dtype) == ("RGB", np.uint8)
    assert np.asarray(image).tolist() == np.asarray(expected).tolist()
    assert image_sizes([path]) == {path: image.size}


LOSSY: dict[str, tuple[Callable[[], bytes], list[int]]] = {
    "JPEG": (lambda: block("RGB", (200, 100, 50), "JPEG"), [200, 100, 50]),
    "progressive JPEG": (lambda: block("RGB", (200, 100, 50), "JPEG", progressive=True), [200, 100, 50]),
    "gray JPEG": (lambda: block("L", 77, "JPEG"), [77, 77, 77]),
    "AVIF": (lambda: block("RGB", (200, 100, 50), "AVIF"), [200, 100, 50]),
    "AVIF with alpha": (lambda: block("RGBA", (200, 100, 50, 0), "AVIF"), PAPER),
    # Ink 0 is stored as 255, as Adobe does it: read the other way round, red would be a dark cyan.
    "CMYK JPEG": (lambda: block("CMYK", (0, 255, 255, 0), "JPEG"), RED),
    "CMYK JPEG, black ink": (lambda: block("CMYK", (0, 0, 0, 200), "JPEG"), [55, 55, 55]),
    "YCCK JPEG": (ycck, PAPER),
    "YCbCr TIFF": (lambda: block("YCbCr", (76, 85, 255), "TIFF"), RED),
    "LAB TIFF": (lambda: block("LAB", (138, 128 + 81, 128 + 70), "TIFF"), RED),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_colours_survive_formats_and_colour_spaces_with_loss(tmp_path: Path, kind: str) -> None:
    """One colour all over comes back, to a few levels."""
    content, colour = LOSSY[kind]
    path = put(tmp_path, content())
    image = read_image(path)
    assert image.size == BLOCK
    assert np.abs(np.asarray(image, int) - colour).max() <= 6, np.asarray(image)[0, 0]
    assert image_sizes([path]) == {path: image.size}


UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize(("form", "how"), [
    ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ("JPEG", {"quality": 100, "subsampling": 0}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
])  # fmt: skip
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_is_applied_in_every_format(
    tmp_path: Path, form: str, how: dict[str, Any], orientation: int
) -> None:
    """Four areas of different colours end where a viewer shows them; both ways of looking agree on the size."""
    stored = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 24), np.uint8))
    path = put(tmp_path, saved(Image.fromarray(grays(stored)), form, exif=turned(orientation), **how))
    image = read_image(path)
    expected = UPRIGHT[orientation](grays(stored))
    assert np.abs(np.asarray(image, int) - expected).max() <= 6
    assert image_sizes([path]) == {path: (expected.shape[1], expected.shape[0])}


def pages(form: str) -> bytes:
    """Two pictures in one file."""
    return block("RGB", "red", form, save_all=True, append_images=[Image.new("RGB", BLOCK, "blue")])


def noise(form: str, size: tuple[int, int] = (160, 120), **how: Any) -> bytes:
    """An image that no format makes small; the same one each time."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(values), form, **how)


def cut(content: bytes, share: float = 0.6) -> bytes:
    """The beginning of a file."""
    return content[: int(len(content) * share)]


def cut_behind_a_thumbnail(form: str, **how: Any) -> bytes:
    """A JPEG or MPO that breaks off soon after the end mark of another JPEG in its header."""
    thumbnail = noise("JPEG", (16, 12))
    content = noise(form, comment=thumbnail, **how)
    scan = content.index(b"\xff\xda", content.index(thumbnail) + len(thumbnail))
    return content[: scan + 1000]


def broken_tables() -> bytes:
    """A JPEG with its end in place, whose Huffman tables are impossible."""
    content = bytearray(noise("JPEG"))
    at = content.index(b"\xff\xc4")
    content[at + 5 : at + 21] = b"\xff" * 16
    return bytes(content)


def one_bit_flipped() -> bytes:
    """A PNG in whose pixels one bit has changed."""
    content = bytearray(noise("PNG"))
    content[len(content) // 2] ^= 1
    return bytes(content)


def stretched(form: str, at: str, **how: Any) -> bytes:
    """A small file whose header says 60000 x 60000; `at` is the struct format, then the offset or the bytes before."""
    content, (layout, place) = bytearray(noise(form, (16, 12), **how)), at.split()
    start = int(place) if place.isdigit() else content.index(bytes.fromhex(place)) + len(bytes.fromhex(place))
    values = (60000, 60000) if layout != "<6s" else ((59999).to_bytes(3, "little") * 2,)
    struct.pack_into(layout, content, start, *values)
    return bytes(content)


SEVERAL, LARGE = "holds several pictures", "has more than 134,217,728 pixels"
NUMBERS = "8 or 16 bits a channel are needed"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "animated GIF": (lambda: pages("GIF"), SEVERAL),
    "APNG": (lambda: pages("PNG"), SEVERAL),
    "animated WebP": (lambda: pages("WEBP"), SEVERAL),
    "animated AVIF": (lambda: pages("AVIF"), SEVERAL),
    "TIFF with two pages": (lambda: pages("TIFF"), SEVERAL),
    "32-bit whole numbers": (lambda: block("I", 7, "TIFF"), NUMBERS),
    "floating-point numbers": (lambda: block("F", 0.5, "TIFF"), NUMBERS),
    "PNG that says 60000 x 60000": (lambda: png((60000, 60000), 8, 2, [b"\0" * 9]), LARGE),
    "JPEG that says so": (lambda: stretched("JPEG", ">HH ffc0001108"), LARGE),
    "WebP that says so": (lambda: stretched("WEBP", "<6s 24", exif=turned(1)), LARGE),
    "GIF that says so": (lambda: stretched("GIF", "<HH 6"), LARGE),
    "BMP that says so": (lambda: stretched("BMP", "<II 18"), LARGE),
    "PPM that says so": (lambda: b"P6 60000 60000 255\n", LARGE),
    "cut PNG": (lambda: cut(noise("PNG")), "cannot be read ("),
    "cut JPEG": (lambda: cut(noise("JPEG")), "cannot be read ("),
    "cut progressive JPEG": (lambda: cut(noise("JPEG", progressive=True)), "cannot be read ("),
    "JPEG cut behind a thumbnail": (lambda: cut_behind_a_thumbnail("JPEG"), "cannot be read ("),
    "MPO cut behind a thumbnail": (
        lambda: cut_behind_a_thumbnail("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        "cannot be read (",
    ),
    "cut MPO": (lambda: cut(noise("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])), "cannot be read ("),
    "cut GIF": (lambda: cut(noise("GIF")), "cannot be read ("),
    "cut WebP": (lambda: cut(noise("WEBP")), "cannot be read ("),
    "cut TIFF": (lambda: cut(noise("TIFF")), "cannot be read ("),
    "cut BMP": (lambda: cut(noise("BMP")), "cannot be read ("),
    "cut PPM": (lambda: cut(noise("PPM")), "cannot be read ("),
    "cut AVIF": (lambda: cut(noise("AVIF")), "cannot be read ("),
    "cut JPEG 2000": (lambda: cut(noise("JPEG2000"), 0.02), "cannot be read ("),
    "JPEG with broken tables": (broken_tables, "cannot be read (broken data stream"),
    "PNG with a bit flipped": (one_bit_flipped, "cannot be read ("),
    "PNG without its palette": (lambda: png((2, 1), 8, 3, [b"\0\1"]), "cannot be read (its palette is missing)"),
    "PNG without pixels": (lambda: noise("PNG").replace(b"IDAT", b"iDAT"), "cannot be read ("),
    "EPS, which would start a program": (lambda: noise("EPS"), "cannot be read (its content is none of PNG, JPEG"),
    "text": (lambda: b"not an image", "cannot be read (its content is none of PNG, JPEG"),
    "empty": (lambda: b"", "cannot be read (its content is none of PNG, JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_by_the_bulk_check_and_when_read(tmp_path: Path, kind: str) -> None:
    """Both say why in the same words; reading names the file."""
    content, words = REFUSED[kind]
    path = put(tmp_path, content())
    found = image_sizes([path])[path]
    assert isinstance(found, str) and words in found, found
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert caught.value.where == f"image {path}"
    assert words in caught.value.got


def test_the_bulk_check_does_not_decode_png_and_jpeg(tmp_path: Path) -> None:
    """Pixels that are wrong under a right checksum pass it, and are told when the image is read."""
    path = put(tmp_path, png((2, 1), 8, 0, [], data=zlib.compress(b"\0")))
    assert image_sizes([path]) == {path: (2, 1)}
    with pytest.raises(DataError, match="cannot be read"):
        read_image(path)


def test_the_bound_on_pixels_is_exact_and_pillow_prints_nothing_below_it(tmp_path: Path) -> None:
    """2 ** 27 pixels pass without a warning on the terminal, one row more does not."""
    for height in (8192, 8193):
        put(tmp_path, png((16384, height), 1, 0, [b"\0" * 2048] * height), f"{height}.png")
    script = (
        "import sys; from pathlib import Path; from trainer.data.images import image_sizes\n"
        "print(*image_sizes(map(Path, sys.argv[1:])).values(), sep='; ')"
    )
    command = [sys.executable, "-W", "default", "-c", script, *sorted(map(str, tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "(16384, 8192); has more than 134,217,728 pixels\n"
    assert done.stderr == ""


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    """Eight TIFFs of 17.6 million pixels: all at once they took 1.8 GB, one after the other 0.7 GB."""
    content = saved(Image.new("RGBA", (4200, 4200)), "TIFF", compression="tiff_deflate")
    paths = [put(tmp_path, content, f"{number}.tif") for number in range(8)]
    script = (
        "import sys; from pathlib import Path; from trainer.data.images import image_sizes\n"
        "found = set(image_sizes(map(Path, sys.argv[1:])).values())\n"
        # not getrusage, which counts what the tests' own process had taken before it became this one
        "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(found, int(peak) // 1024, sep=';')"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sizes, megabytes = done.stdout.split(";")
    assert sizes == "{(4200, 4200)}"
    assert int(megabytes) < 1100


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a folder, a device, a link to itself, and nothing at all."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    script = (
        "import sys; from pathlib import Path; from trainer.data.images import image_sizes, read_image\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    print(image_sizes([path])[path])\n"
        "    try: read_image(path)\n"
        "    except ValueError as error: print(error.got)\n"
    )
    paths = [tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), tmp_path / "loop.png", tmp_path / "gone.png"]
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    reasons = ["is not a regular file"] * 3 + ["cannot be read (Too many levels of symbolic links)", "no such file"]
    assert done.stdout.splitlines() == [reason for reason in reasons for _ in ("image_sizes", "read_image")]


def test_paths_are_followed_to_where_they_lead_before_they_are_compared(tmp_path: Path) -> None:
    """Absolute, by `..` or through a link of a file or a folder, in either direction; the root may be a link itself."""
    root, other = tmp_path / "root", tmp_path / "root-2"
    for folder in (root / "img", other):
        folder.mkdir(parents=True)
    (root / "to_other").symlink_to(other)
    (root / "img" / "link.png").symlink_to(other / "a.png")
    (root / "img" / "within.png").symlink_to(root / "a.png")
    (other / "back").symlink_to(root)
    (tmp_path / "link").symlink_to(root)
    astray = {
        root / "../root-2/a.png": other / "a.png",
        root / "to_other/a.png": other / "a.png",
        root / "to_other/../a.png": tmp_path / "a.png",
        root / "img/link.png": other / "a.png",
        root / "img/../..": tmp_path,
        root / ".." / "a.png": tmp_path / "a.png",
        other / "a.png": other / "a.png",
    }
    inside = {
        root / "a.png", root / "img/b.png", root / "img/../c.png", root / "img/within.png", other / "back/a.png",
        tmp_path / "link/img/a.png", root / "to_other/back/a.png", root / "none/d.png",
    }  # fmt: skip
    for written in (root, tmp_path / "link", root / "img/.."):
        assert outside(written, inside | astray.keys()) == astray
