"""What a data set holds, in numbers: images, objects, types, token lengths, packs, and what a length limit would do."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.packing import StepPlan, best_fit, epoch_order
from trainer.data.records import Record, object_type
from trainer.data.template import TokenCounts

LIMITS = (256, 512, 1024, 2048, 4096, 8192, 12288, 16384, 20000, 24576, 32768, 65536)
"""Tokens: the length limits that are tried beside the one that is set."""

_PERCENTS = (0, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Measured:
    """A record and the tokens that its longest sample, by objects or summary, would have without any limit."""

    record: Record
    tokens: TokenCounts


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Where values lie. Each number is one of them: `p90` is the smallest that 90 % of the values do not exceed."""

    min: float
    median: float
    p90: float
    p99: float
    max: float


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """Of values in any order; None where there is none."""
    listed = [*values]
    if not listed:
        return None
    return Quantiles(*np.percentile(listed, _PERCENTS, method="inverted_cdf").tolist())


@dataclass(frozen=True, slots=True)
class SetStatistics:
    """The numbers of one set.

    Attributes:
        records: that can be read; those that are too long are among them.
        images: in all records together.
        image_files: how many of them are different files.
        objects: in all records together.
        summaries: records that have one.
        weighted: records whose weight is not 1.
        too_long: records that have more tokens than the limit.
        kinds: objects by geometry, the most frequent first, as in the next two.
        types: objects by the first element of their `desc`.
        domains: records by their domain; those without one are in none.
        spreads: of what every image has (`image_width`, `image_height` in pixels, `image_megapixels`), and every record
            (`weight`, `objects`, `prompt_tokens`, `image_tokens`, `answer_tokens`, and all of these as `tokens`).
    """

    records: int
    images: int
    image_files: int
    objects: int
    summaries: int
    weighted: int
    too_long: int
    kinds: Mapping[str, int]
    types: Mapping[str, int]
    domains: Mapping[str, int]
    spreads: Mapping[str, Quantiles | None]


def set_statistics(measured: Sequence[Measured], limit: int) -> SetStatistics:
    """Count one set.

    Args:
        measured: its records.
        limit: tokens of a sample at most.
    """
    records, tokens = [each.record for each in measured], [each.tokens for each in measured]
    pictures = [picture for record in records for picture in record.images]
    objects = [each for record in records for each in record.objects]
    return SetStatistics(
        records=len(records),
        images=len(pictures),
        image_files=len({picture.path for picture in pictures}),
        objects=len(objects),
        summaries=sum(record.images[0].summary is not None for record in records),
        weighted=sum(record.weight != 1 for record in records),
        too_long=sum(each.whole > limit for each in tokens),
        kinds=_counted(each.geometry.kind for each in objects),
        types=_counted(object_type(each.desc) for each in objects),
        domains=_counted(record.domain for record in records if record.domain is not None),
        spreads={
            "image_width": quantiles(picture.width for picture in pictures),
            "image_height": quantiles(picture.height for picture in pictures),
            "image_megapixels": quantiles(picture.width * picture.height / 1e6 for picture in pictures),
            "weight": quantiles(record.weight for record in records),
            "objects": quantiles(len(record.objects) for record in records),
            "prompt_tokens": quantiles(each.prompt for each in tokens),
            "image_tokens": quantiles(each.image for each in tokens),
            "answer_tokens": quantiles(each.answer for each in tokens),
            "tokens": quantiles(each.whole for each in tokens),
        },
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def ranked(*counts: Mapping[str, int]) -> list[str]:
    """All names, those first that are the most frequent in the first of these sets, then in the next."""
    every = dict.fromkeys(name for of_set in counts for name in of_set)
    return sorted(every, key=lambda name: tuple(-of_set.get(name, 0) for of_set in counts))


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the first epoch of training holds.

    Attributes:
        samples: turns of several images and weights make them other than records.
        tokens: of all samples.
        packs: what they are laid into; where they are not packed, one each.
        capacity: tokens of a pack at most; None where samples are not packed.
        steps: optimizer steps.
    """

    samples: int
    tokens: int
    packs: int
    capacity: int | None
    steps: int

    @property
    def fill(self) -> float | None:
        """Share of the packs' room that is used, 0 to 1; None where samples are not packed."""
        return None if self.capacity is None else self.tokens / (self.packs * self.capacity)


def first_epoch(plan: StepPlan) -> Epoch:
    """Count the first epoch of a plan that has at least one sample."""
    lengths = plan.samples.lengths(0)
    return Epoch(len(lengths), sum(lengths), len(plan.packs(0)), plan.capacity, plan.steps_in_epoch(0))


@dataclass(frozen=True, slots=True)
class Limit:
    """What a length limit does.

    Attributes:
        tokens: of a sample, and of a pack, at most.
        too_long: set -> records that have more.
        packs: that the training records which fit would make, each of them once.
        fill: share of the packs' room that they use, 0 to 1.
    """

    tokens: int
    too_long: Mapping[str, int]
    packs: int
    fill: float


def tried_limits(lengths: Mapping[str, Sequence[int]], limit: int, *, seed: int) -> list[Limit]:
    """The limit that is set, and the round ones between half of all records and all of them.

    Args:
        lengths: set -> tokens of each record.
        limit: the one that is set.
        seed: of the data order, in which packs are filled.
    """
    ordered = sorted(length for of_set in lengths.values() for length in of_set)
    if not ordered:
        return []
    median, longest = ordered[(len(ordered) - 1) // 2], ordered[-1]
    tried = LIMITS[bisect_left(LIMITS, median) : bisect_left(LIMITS, longest) + 1]
    return [_tried(lengths, tokens, seed) for tokens in sorted({*tried, limit})]


def _tried(lengths: Mapping[str, Sequence[int]], tokens: int, seed: int) -> Limit:
    fitting = [length for length in lengths.get("train", ()) if length <= tokens]
    packs = len(best_fit(fitting, epoch_order(len(fitting), seed=seed, epoch=0), tokens))
    too_long = {name: sum(length > tokens for length in of_set) for name, of_set in lengths.items()}
    return Limit(tokens, too_long, packs, sum(fitting) / (packs * tokens) if packs else 0.0)
