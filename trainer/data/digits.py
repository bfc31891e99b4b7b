"""The built-in data: scenes of digits with boxes and captions, written as JSONL and PNG like a user's own records.

Two looks of one task: ``hand`` shows handwritten digits of scikit-learn's ``load_digits`` on textured grounds (what
stage 3 learns), ``printed`` shows digits of the DejaVu fonts on plain grounds (what the pocket base was trained on).

Split: the 1797 originals are cut by index at 1029 and 1415, so that no original is in two sets. scikit-learn's copy
is the UCI test set by 13 writers and does not say who wrote which digit. Its targets repeat one form of about 130
digits, which begins again at 1029 and at 1415: the cuts lie between two forms, so a writer is probably in one set
only, but the data cannot prove it. All sets of the ``printed`` look share their fonts.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFont

Array = NDArray[np.float32]
Look = Literal["hand", "printed"]
Split = Literal["train", "val", "ood"]

VERSION = 1  # part of the folder name: raise it when the same arguments give other pixels
SIDE = 96  # pixels, both sides of every scene; a multiple of 32 (patch 16, merge 2)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (200, 30, 40), "green": (20, 140, 50), "blue": (30, 60, 200), "orange": (225, 120, 10)}
SMALL, LARGE = (24, 31), (36, 44)  # height of the upright digit in pixels, both ends included
ROTATED = 0.25  # share of objects
ANGLES = (15.0, 35.0)  # degrees to either side
TRIES = 30  # places tried for one digit before the scene goes without it
OVERLAP = 0.05  # largest shared area of two bounding boxes, as a share of the smaller one
FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold", "Serif-Italic")
DOMAINS: dict[Look, tuple[str, str, str, str]] = {  # the fourth is kept for ood
    "hand": ("ruled", "card", "weave", "slate"),
    "printed": ("white", "cream", "mist", "rose"),
}
GROUNDS = {"white": (250, 250, 250), "cream": (245, 236, 210), "mist": (214, 226, 234), "rose": (240, 214, 216)}
ORIGINALS: dict[Split, slice] = {"train": slice(0, 1029), "val": slice(1029, 1415), "ood": slice(1415, 1797)}
_SPLIT_NUMBER: dict[Split, int] = {"train": 0, "val": 1, "ood": 2}


@dataclass(frozen=True)
class DigitsPaths:
    """Where a written data set lies: three JSONL files and the taxonomy for prompt scheme B."""

    train: Path
    val: Path
    ood: Path
    taxonomy: Path


@dataclass(frozen=True)
class Scene:
    """One picture (SIDE, SIDE, 3) uint8 and its objects as they stand in the JSONL."""

    pixels: NDArray[np.uint8]
    objects: tuple[dict[str, Any], ...]
    domain: str


def ensure_digits(
    root: Path, *, seed: int = 17, n_train: int = 384, n_val: int = 96, n_ood: int = 48, look: Look = "hand"
) -> DigitsPaths:
    """Write the data set below ``root`` unless it is there already, and say where.

    The folder appears under its name only when it is complete; two processes may call this at once. Record ``i`` of
    a set depends on the seed, the set and ``i`` alone, so a larger set begins with the smaller one.

    Args:
        root: cache folder; made if missing.
        seed: of everything that is drawn.
        n_train: records of the training set; likewise ``n_val`` and ``n_ood``.
        n_val: records of the validation set.
        n_ood: records of the set with the look that training never shows.
        look: handwritten digits on textured grounds, or printed ones on plain grounds.

    Returns:
        The paths of the three files and of the taxonomy.
    """
    folder = root / f"digits-v{VERSION}-{look}-seed{seed}-{n_train}-{n_val}-{n_ood}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            counts: dict[Split, int] = {"train": n_train, "val": n_val, "ood": n_ood}
            for split, count in counts.items():
                _write_split(part, split, count, seed, look)
            (part / "taxonomy.yaml").write_text(yaml.safe_dump(taxonomy(), sort_keys=False), encoding="utf-8")
            part.chmod(0o755)
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker with the same bytes
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    train, val, ood = (folder / f"{split}.jsonl" for split in ORIGINALS)
    return DigitsPaths(train, val, ood, folder / "taxonomy.yaml")


def taxonomy() -> dict[str, Any]:
    """Types, attributes and domain rules of the scenes, as prompt scheme B reads them from YAML."""
    return {
        "types": list(WORDS),
        "attributes": {"ink": list(INKS), "size": ["small", "large"], "posture": ["rotated"]},
        "rules": [
            "Write desc as type/ink,size and add /rotated when the digit is turned.",
            "Use bbox_2d for an upright digit and quad for a turned one.",
            "A digit is large when its height is above a third of the picture.",
        ],
    }


def draw_scene(seed: int, split: Split, index: int, look: Look) -> Scene:
    """Draw scene ``index`` of a set: one to three digits with little overlap.

    Args:
        seed: of the data set.
        split: decides the originals (``hand``) and whether the fourth domain is shown (``ood``).
        index: number of the record within its set, from 0.
        look: ``hand`` or ``printed``.

    Returns:
        The picture and its objects, in the order of drawing.
    """
    rng = np.random.default_rng([seed, _SPLIT_NUMBER[split], index, look == "hand"])
    domain = DOMAINS[look][3 if split == "ood" else int(rng.integers(3))]
    canvas = _ground(domain, rng)
    taken: list[tuple[float, float, float, float]] = []
    objects = []
    for _ in range(int(rng.integers(1, 4))):
        drawn = _draw_digit(canvas, taken, rng, split, look, domain)
        if drawn is not None:
            objects.append(drawn)
    if look == "hand":
        canvas += rng.normal(0.0, 6.0, canvas.shape).astype(np.float32)
    return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(objects), domain)


def _write_split(folder: Path, split: Split, count: int, seed: int, look: Look) -> None:
    (folder / split).mkdir()
    lines = []
    for index in range(count):
        scene = draw_scene(seed, split, index, look)
        name = f"{split}/{index:05d}.png"
        Image.fromarray(scene.pixels).save(folder / name)
        record = {"images": [name], "width": SIDE, "height": SIDE, "domain": scene.domain, "objects": scene.objects}
        lines.append(json.dumps(record) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _draw_digit(
    canvas: Array,
    taken: list[tuple[float, float, float, float]],
    rng: np.random.Generator,
    split: Split,
    look: Look,
    domain: str,
) -> dict[str, Any] | None:
    """Draw one digit into ``canvas`` where it overlaps little; None where no such place was found."""
    large = bool(rng.random() < 0.5)
    height = int(rng.integers(*(LARGE if large else SMALL), endpoint=True))
    angle = float(rng.uniform(*ANGLES) * rng.choice([-1, 1])) if rng.random() < ROTATED else 0.0
    word, glyph = (_hand_glyph if look == "hand" else _print_glyph)(height, split, rng)
    turned = _rotate(glyph, angle)
    rows, columns = turned.shape
    place = _free_place(rows, columns, taken, rng)
    if place is None:
        return None
    x, y = place
    taken.append((x, y, x + columns, y + rows))
    name = str(rng.choice(list(INKS)))
    ink = np.clip(np.array(INKS[name]) + rng.normal(0, 10, 3), 0, 255).astype(np.float32)
    if domain == "slate":  # chalk on a dark board: the same hue, light
        ink = 255 - (255 - ink) * np.float32(0.6)
    cover = turned[..., None] * np.float32(rng.uniform(0.7, 1.0) if look == "hand" else 1.0)
    patch = canvas[y : y + rows, x : x + columns]
    patch += (ink - patch) * cover
    desc = f"{word}/{name},{'large' if large else 'small'}"
    if angle == 0.0:
        return {"bbox_2d": [x, y, x + columns, y + rows], "desc": desc}
    return {"quad": _corners(glyph.shape, angle, x + columns / 2, y + rows / 2), "desc": f"{desc}/rotated"}


def _free_place(
    rows: int, columns: int, taken: list[tuple[float, float, float, float]], rng: np.random.Generator
) -> tuple[int, int] | None:
    for _ in range(TRIES):
        x, y = int(rng.integers(0, SIDE - columns + 1)), int(rng.integers(0, SIDE - rows + 1))
        if all(_shared((x, y, x + columns, y + rows), other) <= OVERLAP for other in taken):
            return x, y
    return None


def _shared(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(across, 0.0) * max(down, 0.0) / smaller


def _corners(shape: tuple[int, ...], angle: float, x: float, y: float) -> list[int]:
    """Corners of a rotated glyph about its centre (x, y), clockwise from the one that was top left, in whole pixels."""
    half_h, half_w = shape[0] / 2, shape[1] / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = []
    for dx, dy in ((-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)):
        corners += [x + cos * dx + sin * dy, y - sin * dx + cos * dy]
    return [min(max(round(value), 0), SIDE) for value in corners]


def _rotate(glyph: Array, angle: float) -> Array:
    if angle == 0.0:
        return glyph
    turned = Image.fromarray(glyph).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return np.asarray(turned, np.float32)[:SIDE, :SIDE]


def _crop(glyph: Array) -> Array:
    rows, columns = np.nonzero(glyph.max(1) > 0.5)[0], np.nonzero(glyph.max(0) > 0.5)[0]
    return glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _hand_glyph(height: int, split: Split, rng: np.random.Generator) -> tuple[str, Array]:
    """One original of the split, enlarged to ``height`` with a stroke edge between soft and crisp."""
    images, targets = _originals(split)
    number = int(rng.integers(len(targets)))
    small = Image.fromarray(np.pad(images[number], 1))
    scale = height / 8 * 1.15  # most originals fill seven or eight of their eight rows
    width = max(1, round(10 * scale * rng.uniform(0.85, 1.1)))
    grown = np.asarray(small.resize((width, round(10 * scale)), Image.Resampling.BICUBIC), np.float32)
    edge = rng.uniform(0.25, 0.6)
    glyph = np.clip((grown - 0.45) / edge + 0.5, 0.0, 1.0).astype(np.float32)
    cropped = _crop(glyph)
    fitted = Image.fromarray(cropped).resize((cropped.shape[1], height), Image.Resampling.BILINEAR)
    return WORDS[int(targets[number])], np.asarray(fitted, np.float32)


@cache
def _originals(split: Split) -> tuple[Array, NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # slow to import, and only the handwritten look needs it

    data = load_digits()
    block = ORIGINALS[split]
    return (data.images[block] / 16.0).astype(np.float32), data.target[block].astype(np.int64)


def _print_glyph(height: int, split: Split, rng: np.random.Generator) -> tuple[str, Array]:
    """One digit in one of the fonts, ``height`` pixels high."""
    number = int(rng.integers(10))
    return WORDS[number], _printed(number, str(rng.choice(FONTS)), height)


@cache
def _printed(number: int, font: str, height: int) -> Array:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{font}.ttf"
    mask = ImageFont.truetype(str(file), 2 * height).getmask(str(number), mode="L")
    cover = (np.asarray(mask).reshape(mask.size[::-1]) / 255).astype(np.float32)
    glyph = _crop(cover)
    width = max(1, round(glyph.shape[1] * height / glyph.shape[0]))
    return np.asarray(Image.fromarray(glyph).resize((width, height), Image.Resampling.BOX), np.float32)


def _ground(domain: str, rng: np.random.Generator) -> Array:
    """An empty picture of the domain, (SIDE, SIDE, 3), 0..255."""
    if domain in GROUNDS:
        level = np.array(GROUNDS[domain]) + rng.normal(0, 4, 3)
        return np.broadcast_to(level, (SIDE, SIDE, 3)).astype(np.float32).copy()
    return _TEXTURES[domain](rng)


def _ruled(rng: np.random.Generator) -> Array:
    """Writing paper: thin blue-grey lines at an even distance."""
    page = np.full((SIDE, SIDE, 3), rng.uniform(225, 250), np.float32)
    page[int(rng.integers(10)) :: int(rng.integers(9, 15))] -= np.array([70, 50, 25], np.float32)
    return page


def _card(rng: np.random.Generator) -> Array:
    """Tinted cardboard with broad stains and a fall of light."""
    tint = rng.uniform(165, 215, 3).astype(np.float32)
    coarse = Image.fromarray(rng.normal(0, 22, (6, 6)).astype(np.float32))
    stains = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    light = np.linspace(-20, 20, SIDE, dtype=np.float32) * rng.choice([-1, 1])
    page: Array = tint + (stains + light.astype(np.float32))[..., None]
    return page


def _weave(rng: np.random.Generator) -> Array:
    """Cloth: two crossing waves of a short period."""
    grid = np.arange(SIDE, dtype=np.float32)
    across = np.sin(grid * 2 * np.pi / rng.uniform(5, 9) + rng.uniform(0, 6))
    down = np.sin(grid * 2 * np.pi / rng.uniform(5, 9) + rng.uniform(0, 6))
    cloth: Array = (rng.uniform(180, 230, 3) + 14 * (across[None, :] + down[:, None])[..., None]).astype(np.float32)
    return cloth


def _slate(rng: np.random.Generator) -> Array:
    """A dark board with wiped chalk, shown in the ood set only."""
    dust = Image.fromarray(rng.normal(0, 12, (SIDE // 4, SIDE // 16)).astype(np.float32))
    wiped = np.asarray(dust.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    board: Array = (np.array([55, 65, 60]) + rng.normal(0, 5, 3) + wiped[..., None]).astype(np.float32)
    return board


_TEXTURES: dict[str, Callable[[np.random.Generator], Array]] = {
    "ruled": _ruled,
    "card": _card,
    "weave": _weave,
    "slate": _slate,
}
