"""Changes of colour, each drawn once and then a function of pixels; Pillow and OpenCV do the work."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from trainer.data.warp import Colour, Pixels

Range = tuple[float, float]
"""Both ends of what is drawn from, evenly."""


def color_jitter(
    generator: np.random.Generator, *, brightness: Range, contrast: Range, saturation: Range
) -> list[Colour]:
    """Factors of brightness, contrast and saturation, in this order; 1 changes nothing."""
    ways = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [generator.uniform(*ends) for ends in (brightness, contrast, saturation)]
    return [partial(_enhanced, way, factor) for way, factor in zip(ways, factors, strict=True) if factor != 1]


def gamma(generator: np.random.Generator, *, gamma: Range) -> list[Colour]:
    """Each value v of 0 to 1 becomes v ** gamma: below 1 lighter, above 1 darker."""
    levels = 255 * (np.arange(256) / 255) ** generator.uniform(*gamma)
    return [partial(_looked_up, np.round(levels).astype(np.uint8))]


def hsv(generator: np.random.Generator, *, hue_delta_deg: Range, sat: Range, val: Range) -> list[Colour]:
    """The hue turned by degrees of the colour circle, saturation and value times a factor."""
    return [partial(_hsv, generator.uniform(*hue_delta_deg), generator.uniform(*sat), generator.uniform(*val))]


def clahe(generator: np.random.Generator, *, clip_limit: float, tile_grid_size: Sequence[int]) -> list[Colour]:
    """Contrast-limited adaptive equalization of the lightness (Zuiderveld 1994), in columns x rows of tiles."""
    return [partial(_clahe, clip_limit, (tile_grid_size[0], tile_grid_size[1]))]


def auto_contrast(generator: np.random.Generator, *, cutoff: float) -> list[Colour]:
    """The range of each channel stretched to 0 to 255, without `cutoff` percent of its pixels at either end."""
    return [partial(_by_pillow, partial(ImageOps.autocontrast, cutoff=cutoff))]


def equalize(generator: np.random.Generator) -> list[Colour]:
    """The histogram of each channel made flat."""
    return [partial(_by_pillow, ImageOps.equalize)]


def sharpness(generator: np.random.Generator, *, factor: Range) -> list[Colour]:
    """A factor of sharpness: 0 blurs, 1 changes nothing, 2 sharpens."""
    return [partial(_enhanced, ImageEnhance.Sharpness, generator.uniform(*factor))]


def solarize(generator: np.random.Generator, *, threshold: int) -> list[Colour]:
    """Values of `threshold` and above turned into their negative."""
    return [partial(_by_pillow, partial(ImageOps.solarize, threshold=threshold))]


def posterize(generator: np.random.Generator, *, bits: int) -> list[Colour]:
    """Only the highest `bits` bits of each value kept."""
    return [partial(_by_pillow, partial(ImageOps.posterize, bits=bits))]


def _by_pillow(change: Callable[[Image.Image], Image.Image], pixels: Pixels) -> Pixels:
    return np.asarray(change(Image.fromarray(pixels)))


def _enhanced(way: type, factor: float, pixels: Pixels) -> Pixels:
    return np.asarray(way(Image.fromarray(pixels)).enhance(factor))


def _looked_up(levels: Pixels, pixels: Pixels) -> Pixels:
    return levels[pixels]


def _hsv(degrees: float, saturation: float, value: float, pixels: Pixels) -> Pixels:
    # as floats: OpenCV's 8-bit hue has steps of two degrees
    hsv = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + degrees) % 360
    hsv[..., 1:] = np.clip(hsv[..., 1:] * np.array([saturation, value], np.float32), 0, 1)
    return np.asarray(np.round(255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), np.uint8)


def _clahe(clip_limit: float, tiles: tuple[int, int], pixels: Pixels) -> Pixels:
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(clip_limit, tiles).apply(np.ascontiguousarray(lab[..., 0]))
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


CHANGES: Mapping[str, Callable[..., list[Colour]]] = {
    "color_jitter": color_jitter,
    "gamma": gamma,
    "hsv": hsv,
    "clahe": clahe,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "sharpness": sharpness,
    "solarize": solarize,
    "posterize": posterize,
}
"""Every change by its name in a configuration: (generator, its parameters) -> functions of pixels."""
