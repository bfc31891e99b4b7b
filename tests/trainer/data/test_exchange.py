"""Exchanged images: every record gets another one's pixels, of equal grid, and nothing else changes."""

import torch

from trainer.data.exchange import exchange_images
from trainer.data.template import Sample


def sample(name: str, grid: tuple[int, int, int]) -> Sample:
    """A sample whose pixels all hold its name's number."""
    number = float(ord(name))
    ids = torch.arange(4)
    count = grid[1] * grid[2]
    return Sample(
        name, ids, ids > 1, ids == 0, torch.zeros(3, 4), torch.full((count, 6), number), torch.tensor([grid]), None
    )


def test_every_record_gets_the_image_of_another_with_the_same_grid() -> None:
    """Three of one grid and two of another; everything but the pixels stays."""
    samples = [sample("a", (1, 2, 2)), sample("b", (1, 4, 2)), sample("c", (1, 2, 2)), sample("d", (1, 4, 2)),
               sample("e", (1, 2, 2))]  # fmt: skip
    exchanged = {s.record_id: s for s in exchange_images(samples)}
    assert {name: chr(int(s.pixel_values[0, 0])) for name, s in exchanged.items()} == {
        "a": "c", "c": "e", "e": "a", "b": "d", "d": "b",
    }  # fmt: skip
    for before in samples:
        after = exchanged[before.record_id]
        assert after.pixel_values.shape == before.pixel_values.shape
        assert torch.equal(after.input_ids, before.input_ids)
        assert torch.equal(after.image_grid_thw, before.image_grid_thw)


def test_a_record_alone_with_its_grid_is_left_out() -> None:
    """A turned image has another grid: 2 x 4 is not 4 x 2."""
    assert exchange_images([sample("a", (1, 2, 4)), sample("b", (1, 4, 2))]) == []
    assert exchange_images([]) == []
