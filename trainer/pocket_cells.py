"""The warm-up's task: what stands in the cell of a merged token, its class, look, and place in an answer's digits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.digits import INKS, WORDS
from trainer.data.geometry import Geometry, bounding_box, emit
from trainer.data.records import Record

# Shapes: C cells (merged tokens) of a scene, N cells of several scenes, D width.

CELL = 32  # pixels a side of what one merged token covers
CORNERS = 8  # numbers
ASKED = (1, len(WORDS), len(INKS), 2, 4, 11 * CORNERS, 10 * CORNERS)
"""Sizes of a cell's answers: occupied, class, ink, large and rotated, box in the cell's frame, tens, units."""


class CellHeads(nn.Module):
    """Linear readers of the merger's and the three DeepStack mergers' outputs; thrown away after training."""

    def __init__(self, width: int) -> None:
        """Make four heads for features of `width`."""
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width, elementwise_affine=False), nn.Linear(width, sum(ASKED))) for _ in range(4)
        )

    def forward(self, features: Sequence[Tensor], cells: Tensor) -> Tensor:
        """Loss of the final output plus a fifth of that of each tap."""
        losses = [cell_loss(head(f), cells.flatten(0, 1)) for head, f in zip(self.heads, features, strict=True)]
        return losses[0] + 0.2 * torch.stack(losses[1:]).sum()


def cells_of(record: Record) -> Tensor:
    """(C, 25): occupied, class, ink, large, rotated, box in the cell's frame, tens and units of the corners.

    A digit belongs to the cell that holds its box's centre. The corners are those of a quad; an upright box has them
    too. Their tens (0 to 10) and units are those of norm100, the digits that an answer is written in.
    """
    width, height = record.size
    across = width // CELL
    cells = torch.zeros(across * (height // CELL), 9 + 2 * CORNERS)
    for item in record.objects:
        x0, y0, x1, y1 = bounding_box(item.geometry.points)
        column, row = int((x0 + x1) / 2 // CELL), int((y0 + y1) / 2 // CELL)
        word, look, *condition = item.desc.split("/")
        ink, size = look.split(",")
        said = [1, WORDS.index(word), list(INKS).index(ink), size == "large", bool(condition)]
        box = [x0 / CELL - column, y0 / CELL - row, x1 / CELL - column, y1 / CELL - row]
        corners = item.geometry.points if condition else (x0, y0, x1, y0, x1, y1, x0, y1)
        numbers = emit(Geometry("quad", corners), (width, height), "norm100").points
        digits = [number // 10 for number in numbers] + [number % 10 for number in numbers]
        cells[row * across + column] = torch.tensor([*said, *box, *digits], dtype=torch.float32)
    return cells


def cell_loss(answers: Tensor, cells: Tensor) -> Tensor:
    """What (N, answers) says of (N, 25): every cell whether it is occupied, occupied ones the rest."""
    occupied = cells[:, 0] > 0
    loss = 2 * F.binary_cross_entropy_with_logits(answers[:, 0], cells[:, 0])
    _, word, ink, flags, box, tens, units = torch.split(answers[occupied], list(ASKED), dim=1)
    true = cells[occupied]
    loss = loss + F.cross_entropy(word, true[:, 1].long()) + 0.5 * F.cross_entropy(ink, true[:, 2].long())
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(flags, true[:, 3:5])
    loss = loss + 4 * F.smooth_l1_loss(box, true[:, 5:9], beta=0.1)
    loss = loss + F.cross_entropy(tens.reshape(-1, 11), true[:, 9 : 9 + CORNERS].reshape(-1).long())
    return loss + 0.3 * F.cross_entropy(units.reshape(-1, 10), true[:, 9 + CORNERS :].reshape(-1).long())
