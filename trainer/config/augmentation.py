"""Augmentation as configured: each operation with its typed parameters, and what happens to labels at an edge."""

from typing import Annotated, Any, Generic, Literal, TypeGuard, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trainer.config.fields import Count, CountOrZero, Impossible, Section, Share

Mode = Literal["off", "clean", "published_noisy"]
"""Not at all; labels follow the pixels; the fault of the published runs: labels stay when what they name has left."""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _around_one(value: object, *, most: float) -> object:
    """A range around 1 may be written as one number: 0.2 means 0.8 to 1.2."""
    if not _is_number(value):
        return value
    if not 0 <= value <= most:
        allowed = f"[low, high], or one number d of 0 to {most:g} for [1 - d, 1 + d]"
        raise Impossible(f"{value:g}", allowed, f"write both ends; [{value:g}, {value:g}] is always this one")
    return 1 - value, 1 + value


def _ends(value: object) -> object:
    return _around_one(value, most=1)


def _positive_ends(value: object) -> object:
    return _around_one(value, most=0.99)


def _either_way(value: object) -> object:
    """A range around 0 may be written as one number: 20 means -20 to 20."""
    return (-abs(value), abs(value)) if _is_number(value) else value


def _twice(value: object) -> object:
    """Two equal numbers may be written as one."""
    return (value, value) if _is_number(value) else value


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise Impossible(f"[{ends[0]:g}, {ends[1]:g}]", "[low, high] with low <= high", "exchange the two")
    return ends


_Factor = Annotated[float, Field(ge=0, le=100)]
_Degrees = Annotated[float, Field(ge=-360, le=360)]
_Positive = Annotated[float, Field(gt=0, le=100)]
_Factors = Annotated[tuple[_Factor, _Factor], Field(strict=False), BeforeValidator(_ends), AfterValidator(_in_order)]
_Positives = Annotated[
    tuple[_Positive, _Positive], Field(strict=False), BeforeValidator(_positive_ends), AfterValidator(_in_order)
]
_Turns = Annotated[
    tuple[_Degrees, _Degrees], Field(strict=False), BeforeValidator(_either_way), AfterValidator(_in_order)
]
_Shares = Annotated[tuple[Share, Share], Field(strict=False), BeforeValidator(_twice), AfterValidator(_in_order)]
_Side = Annotated[int, Field(ge=1, le=256)]  # OpenCV takes a minute for thousands
_Tiles = Annotated[tuple[_Side, _Side], Field(strict=False), BeforeValidator(_twice)]
_Multiple = Annotated[int, Field(ge=1, le=4096)]


class Params(Section):
    """What every operation has."""

    prob: Share = 0.5
    """Share of samples that the operation changes."""


class Rotate(Params):
    """Turn about the middle; the canvas stays as it is."""

    max_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Degrees to either side at most, drawn evenly."""


class _LowHigh(Params):
    lo: _Positive = 0.9
    """Smallest factor."""
    hi: _Positive = 1.1
    """Largest factor."""

    @model_validator(mode="after")
    def _lo_below_hi(self) -> "_LowHigh":
        if self.lo > self.hi:
            raise Impossible(f"lo {self.lo:g} above hi {self.hi:g}", "lo <= hi", "exchange the two", "lo")
        return self


class Scale(_LowHigh):
    """Zoom about the middle; the canvas stays as it is."""


class ResizeByScale(_LowHigh):
    """Image and canvas made larger or smaller together."""

    align_multiple: _Multiple = 32
    """Pixels; the new sides are rounded to multiples of it."""


class ColorJitter(Params):
    """Factors of brightness, contrast and saturation."""

    brightness: _Factors = (0.8, 1.2)
    """[low, high], or one number d for [1 - d, 1 + d]."""
    contrast: _Factors = (0.8, 1.2)
    """Likewise."""
    saturation: _Factors = (0.8, 1.2)
    """Likewise."""


class Gamma(Params):
    """Values of 0 to 1 raised to a power."""

    gamma: _Positives = (0.8, 1.25)
    """[low, high] of the exponent, or one number d for [1 - d, 1 + d]; below 1 is lighter."""


class Hsv(Params):
    """Hue turned, saturation and value multiplied."""

    hue_delta_deg: _Turns = (-10.0, 10.0)
    """Degrees of the colour circle, [low, high] or one number to either side."""
    sat: _Factors = (0.8, 1.2)
    """Factor of the saturation."""
    val: _Factors = (0.8, 1.2)
    """Factor of the value."""


class Clahe(Params):
    """Adaptive histogram equalization of the lightness."""

    clip_limit: _Positive = 2.0
    """Bound on the slope of a tile's equalization."""
    tile_grid_size: _Tiles = (8, 8)
    """Columns and rows of tiles, or one number for both."""


class AutoContrast(Params):
    """Each channel stretched to its full range."""

    cutoff: Annotated[float, Field(ge=0, lt=50)] = 0.0
    """Percent of pixels left out at either end."""


class Sharpness(Params):
    """Blurs below 1, sharpens above."""

    factor: _Factors = (0.5, 2.0)
    """[low, high], or one number d for [1 - d, 1 + d]."""


class Solarize(Params):
    """Bright values made negative."""

    threshold: Annotated[int, Field(ge=0, le=256)] = 128
    """Value from which on, 0 to 256."""


class Posterize(Params):
    """Fewer levels."""

    bits: Annotated[int, Field(ge=1, le=8)] = 4
    """Bits kept of each value."""


class PadToMultiple(Params):
    """Fill added on the right and below."""

    multiple: _Multiple = 32
    """Pixels; sides become multiples of it."""
    prob: Share = 1.0
    """Share of samples."""


class ExpandToFitAffine(PadToMultiple):
    """The canvas made as large as what turning and zooming have moved out of it, so that nothing is cut off."""


class Crop(Params):
    """What happens to labels at the edges of a crop."""

    min_coverage: Share = 0.3
    """Share of an object's area (a line's length) that must stay visible; with less its label is dropped."""
    completeness_threshold: Share = 0.95
    """Share below which a label that stays is marked partly visible."""
    min_objects: CountOrZero = 1
    """Labels that must be left; with fewer the crop is not done."""
    skip_if_line: bool = True
    """Whether a crop that would cut a line is not done."""


class RandomCrop(Crop):
    """A part of the image, anywhere."""

    scale: _Shares = (0.6, 1.0)
    """Share of the canvas's area, drawn evenly from [low, high]; one number: always this."""
    aspect_ratio: _Positives = (0.8, 1.25)
    """Width over height of the crop, as a factor on that of the canvas."""


class CenterCrop(Crop):
    """A part of the image in the middle, of the canvas's shape."""

    scale: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the canvas's area."""


N = TypeVar("N", bound=str)
P = TypeVar("P", bound=Params)


class Op(Section, Generic[N, P]):
    """One operation of the chain."""

    name: N
    """Which one."""
    params: P
    """Its parameters."""

    @model_validator(mode="before")
    @classmethod
    def _params_may_be_left_out(cls, value: Any) -> Any:
        return value if not isinstance(value, dict) or value.get("params") is not None else {**value, "params": {}}


AugmentationOp = Annotated[
    Op[Literal["hflip"], Params]
    | Op[Literal["vflip"], Params]
    | Op[Literal["rotate"], Rotate]
    | Op[Literal["scale"], Scale]
    | Op[Literal["resize_by_scale"], ResizeByScale]
    | Op[Literal["color_jitter"], ColorJitter]
    | Op[Literal["gamma"], Gamma]
    | Op[Literal["hsv"], Hsv]
    | Op[Literal["clahe"], Clahe]
    | Op[Literal["auto_contrast"], AutoContrast]
    | Op[Literal["equalize"], Params]
    | Op[Literal["sharpness"], Sharpness]
    | Op[Literal["solarize"], Solarize]
    | Op[Literal["posterize"], Posterize]
    | Op[Literal["pad_to_multiple"], PadToMultiple]
    | Op[Literal["expand_to_fit_affine"], ExpandToFitAffine]
    | Op[Literal["random_crop"], RandomCrop]
    | Op[Literal["center_crop"], CenterCrop],
    Field(discriminator="name"),
]

PARAMS: dict[str, type[Params]] = {
    get_args(op.model_fields["name"].annotation)[0]: op.model_fields["params"].annotation
    for op in get_args(get_args(AugmentationOp)[0])
}
"""Operation -> the model of its parameters."""


class Augmentation(Section):
    """Random changes of training images and their objects; evaluation is never augmented."""

    enabled: bool = False
    """The switch of existing files: true is `mode: clean`, or the mode that is given; null: as `mode` says."""
    mode: Mode = "off"
    """null: as `enabled` says. off; clean: labels follow pixels; published_noisy: no expansion, no crops, and labels
    of what left the view stay at the edge, as in the published runs."""
    bypass_prob: Share = 0.0
    """Share of training samples left as they are."""
    bank: Count | None = None
    """Different changes of each sample, of which epochs take turns, so that image features can be kept; null: every
    epoch draws anew."""
    turned_boxes: Literal["quad", "bbox_2d"] = "quad"
    """What a box becomes by a rotation: its four corners, or the upright box around them."""
    min_coverage: Share = 0.3
    """Share of an object that must be left where an edge other than a crop's cuts it; else its label is dropped."""
    completeness_threshold: Share = 0.95
    """Share below which such a label is marked partly visible."""
    complete_word: str | None = None
    """Word of a `desc` that says the object is whole; `partial_word` takes its place. null: there is none."""
    partial_word: str | None = None
    """Attribute that marks an object partly visible; empty: none; null: "partly visible", or the same in Chinese."""
    ops: Annotated[tuple[AugmentationOp, ...], Field(strict=False)] = ()
    """The operations, in the order in which they are applied."""

    @model_validator(mode="before")
    @classmethod
    def _one_switch(cls, value: Any) -> Any:
        """Whichever of the two switches is written, both say the same afterwards."""
        if not isinstance(value, dict):
            return value
        mode, enabled = value.get("mode"), value.get("enabled")
        if mode is False:  # what YAML makes of a bare `off`
            mode = "off"
        if mode is None:
            mode = "clean" if enabled is True else "off"
        elif enabled is False and mode != "off":
            raise Impossible(
                f"enabled false with mode {mode}",
                "enabled true (or null) with a mode, or mode off",
                "take enabled out",
                "enabled",
            )
        return {**value, "mode": mode} | ({} if enabled not in (None, True) else {"enabled": mode != "off"})

    @model_validator(mode="after")
    def _something_to_do(self) -> "Augmentation":
        if self.mode != "off" and not self.ops:
            raise Impossible(
                f"mode {self.mode} without any operation",
                "at least one operation in custom.augmentation.ops",
                "list operations, or set custom.augmentation.mode to off",
                "ops",
            )
        return self
