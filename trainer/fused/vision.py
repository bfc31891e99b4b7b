"""The vision tower over the images of a batch: its frozen beginning once an image, the rest in every step."""

from collections.abc import Collection
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from trainer.fused.features import FeatureStore, Keep, content_digest
from trainer.fused.layers import Rows, VisionBlock
from trainer.fused.products import live, rounding

# Shapes: P patches of n images, of D numbers; k places in the tower whose rows are needed behind its frozen beginning.


class VisionTower:
    """A `Qwen3VLVisionModel`, PEFT-wrapped or not."""

    def __init__(self, visual: Any, *, dtype: torch.dtype, checkpointed: Collection[int], keep: Keep) -> None:
        """Take it over.

        Args:
            visual: on its device.
            dtype: of the rows.
            checkpointed: blocks that run forward again in the backward pass.
            keep: what of images is kept between steps and runs.
        """
        self._visual, self._dtype = visual, dtype
        self._blocks = [VisionBlock(block) for block in visual.blocks]
        for index in checkpointed:
            self._blocks[index].checkpointed = True
        frozen = len(list(takewhile(lambda block: not block.trained, self._blocks)))
        self._taps: list[int] = list(visual.deepstack_visual_indexes)
        self._places = sorted({tap for tap in self._taps if tap < frozen} | ({frozen - 1} if frozen else set()))
        self._frozen, self._in_training = frozen, keep.in_training
        self._store = FeatureStore(self._store_name(), keep.max_bytes) if keep.max_bytes and frozen else None

    def features(self, pixel_values: Tensor, grid: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        """Image tokens as the language model reads them, and what DeepStack adds behind its first layers.

        Args:
            pixel_values: (P, numbers of a patch).
            grid: (n, 3) patches in time, height, width.
            training: whether adapters drop out.

        Returns:
            (image tokens, width of the language model), and one like it for each tap.
        """
        if self._frozen:
            kept = self._frozen_rows(pixel_values, grid, training=training)
            tapped = dict(zip(self._places, kept.unbind(), strict=True))
            x = tapped[self._frozen - 1]
        else:
            x, tapped = self._patches(pixel_values, grid), {}
        tapped |= self._run(x, grid, range(self._frozen, len(self._blocks)), training=training)
        mergers = self._visual.deepstack_merger_list
        deep = [self._merged(merger, tapped[tap]) for tap, merger in zip(self._taps, mergers, strict=True)]
        return self._merged(self._visual.merger, tapped[len(self._blocks) - 1]), deep

    def _frozen_rows(self, pixel_values: Tensor, grid: Tensor, *, training: bool) -> Tensor:
        """Rows at the places that are needed of the blocks before everything trained, (k, P, D)."""
        if self._store is None or (training and not self._in_training):
            return self._run_frozen(pixel_values, grid)
        patches = torch.split(pixel_values, grid.prod(1).tolist())
        images = zip(patches, grid[:, None], strict=True)
        return torch.cat([self._store.get(image, partial(self._run_frozen, *image)) for image in images], 1)

    @torch.no_grad()
    def _run_frozen(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        rows = self._run(self._patches(pixel_values, grid), grid, range(self._frozen), training=False)
        return torch.stack([rows[place] for place in self._places])

    def _run(self, x: Tensor, grid: Tensor, blocks: range, *, training: bool) -> dict[int, Tensor]:
        """Block -> the rows behind it, (P, D)."""
        places = get_vision_position_ids(grid, self._visual.config.spatial_merge_size)
        turns = self._visual.rotary_pos_emb(places.new_empty(0, dtype=torch.float32), places)
        lengths = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])  # every frame of an image is a segment
        patches, extra = len(x), rounding(x)
        rows = Rows.of(turns, lengths, self._dtype, extra=extra)
        behind = {}
        x = nn.functional.pad(x, (0, 0, 0, extra))
        for index in blocks:
            x = self._blocks[index](x, rows, training=training)
            behind[index] = x[:patches]
        return behind

    def _patches(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """Patches as the first block reads them, (P, D)."""
        visual = self._visual
        with self._as_transformers(pixel_values.device):
            x = visual.patch_embed(pixel_values)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=visual.config.spatial_merge_size,
        )  # fmt: skip
        places = (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        made: Tensor = (x + places.to(x.dtype)).to(self._dtype)
        return made

    def _merged(self, merger: Any, x: Tensor) -> Tensor:
        """Four patches to one token; mergers are small, and transformers' own."""
        with self._as_transformers(x.device):
            tokens: Tensor = live(merger)(x)
        return tokens

    def _as_transformers(self, device: torch.device) -> torch.autocast:
        """What transformers' modules compute in: trained ones are float32, and rows may be bfloat16."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def _store_name(self) -> str:
        """Other weights, places, formats or devices are other rows."""
        visual = self._visual
        parts = (visual.patch_embed, visual.pos_embed, *map(live, visual.blocks[: self._frozen]))
        # adapters that are switched off change no row
        digest = content_digest(p for part in parts for n, p in part.named_parameters() if ".lora_" not in n)
        made_by = next(visual.parameters()).device.type
        return f"{digest}-{'-'.join(map(str, self._places))}-{str(self._dtype).removeprefix('torch.')}-{made_by}"
