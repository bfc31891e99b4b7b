"""Exchanges the images of records that have equal grids: what is lost by it is what looking at the image is worth."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from trainer.data.template import Sample


def exchange_images(samples: Iterable[Sample]) -> list[Sample]:
    """Give each sample the pixels of the next one with the same grid; token ids and positions stay as they are.

    The partner is fixed by the order alone, so every evaluation exchanges the same pairs.

    Args:
        samples: encoded records.

    Returns:
        The samples that have a partner, in groups of equal grids; records alone with their grid are left out.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[tuple(tuple(row) for row in sample.image_grid_thw.tolist())].append(sample)
    return [
        replace(sample, pixel_values=group[(index + 1) % len(group)].pixel_values)
        for group in groups.values()
        if len(group) > 1
        for index, sample in enumerate(group)
    ]
