"""The whole forward pass of a Qwen3-VL over samples that lie end to end: from ids and patches to losses."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from trainer.fused.features import NOTHING, Keep
from trainer.fused.head import supervised_loss
from trainer.fused.layers import DecoderLayer, Rows
from trainer.fused.products import live, rounding
from trainer.fused.prompt import Prompt, Prompts, common_words
from trainer.fused.shared import Words
from trainer.fused.vision import VisionTower

# Shapes: T tokens of all samples, P patches and n images of the batch, D the model's width.


@dataclass(frozen=True)
class Tokens:
    """Tokens of samples that lie end to end."""

    ids: Tensor
    """(T,)."""
    supervised: Tensor
    """(T,) bool."""
    positions: Tensor
    """(4, T); place in the text, from 0 in each sample, then M-RoPE's three."""
    starts: Tensor
    """(samples,) first token of each."""
    lengths: Tensor
    """(samples,) tokens of each."""

    def behind(self, count: int) -> "Tokens":
        """The same samples without their first `count` tokens, where they say the same."""
        stays = torch.ones_like(self.supervised)
        stays[self.starts[:, None] + torch.arange(count, device=self.ids.device)] = False
        starts = self.starts - count * torch.arange(len(self.starts), device=self.ids.device)
        rest = self.ids[stays], self.supervised[stays], self.positions[:, stays]
        return Tokens(*rest, starts, self.lengths - count)


class FusedLoss(nn.Module):
    """What `SupervisedLoss` computes, in the layers of this package.

    Samples lie end to end whether the batch is packed or padded: no token of padding is computed. Words that all of
    them begin with are computed once.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        bf16: bool = False,
        checkpointed: Collection[str] = (),
        keep: Keep = NOTHING,
        share_prompts: bool = True,
    ) -> None:
        """Take over a PEFT-wrapped `Qwen3VLForConditionalGeneration`, on its device.

        Args:
            model: wrapped by a plan; its parameters are trained where they are.
            bf16: whether products are made in bfloat16.
            checkpointed: names, in the base model, of layers and blocks that run forward again in the backward pass.
            keep: what of images is kept between steps and runs.
            share_prompts: whether words that all samples begin with are computed once; to compare.
        """
        super().__init__()
        self.model, self._dtype = model, torch.bfloat16 if bf16 else torch.float32
        base: Any = model.get_base_model()
        visual, self._text = base.model.visual, base.model.language_model
        again = {stem: {int(n.rpartition(".")[2]) for n in checkpointed if f".{stem}." in n} for stem in _STEMS}
        self._tower = VisionTower(visual, dtype=self._dtype, checkpointed=again["visual"], keep=keep)
        self._layers = [DecoderLayer(layer) for layer in self._text.layers]
        for index in again["language_model"]:
            self._layers[index].checkpointed = True
        self._prompts = Prompts(list(takewhile(lambda layer: not layer.trained, self._layers)))
        self._share_prompts = share_prompts
        self._image_token: int = base.config.image_token_id
        self._head = base.lm_head

    def forward(
        self,
        supervised: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood of each supervised token.

        Args:
            supervised: (B, L) bool; the first token of a sample is never supervised.
            input_ids: (B, L).
            position_ids: (4, B, L); place in the text, from 0 in each sample, then M-RoPE's three.
            pixel_values: (P, numbers of a patch).
            image_grid_thw: (n, 3).
            attention_mask: (B, L), 0 where padded on the right; None: nothing is.

        Returns:
            (number of supervised tokens,) float32, nats, row by row.
        """
        real = slice(None) if attention_mask is None else attention_mask.flatten().bool()
        positions = position_ids.flatten(1)[:, real]
        starts = (positions[0] == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([positions.shape[1]]))
        tokens = Tokens(input_ids.flatten()[real], supervised.flatten()[real], positions, starts, lengths)
        images, deep = self._tower.features(pixel_values, image_grid_thw, training=self.training)

        ends_prompt = tokens.supervised | (tokens.ids == self._image_token)
        count = common_words(tokens.ids, starts, lengths, ends_prompt) if self._share_prompts else 0
        prompt = self._prompt(tokens, count) if count else None
        rest = tokens.behind(count) if count else tokens
        hidden = self._run(rest, prompt, images, deep)  # (T, D)
        targets = rest.supervised.nonzero()[:, 0]
        last = live(self._text.norm)(hidden[targets - 1])
        return supervised_loss(last, live(self._head).weight, rest.ids[targets])

    def _run(self, tokens: Tokens, prompt: Prompt | None, images: Tensor, deep: list[Tensor]) -> Tensor:
        """Rows behind the last layer, (T, D); the prompt's own are not among them."""
        x = self._embedded(tokens.ids)
        image_rows = (tokens.ids == self._image_token).nonzero()[:, 0]
        x = x.index_copy(0, image_rows, images)
        extra = rounding(x)
        x = nn.functional.pad(x, (0, 0, 0, extra))
        rows = self._rows(tokens.positions, tokens.lengths, extra)
        upto = len(prompt.words) if prompt else 0
        for index, layer in enumerate(self._layers):
            if prompt is not None and index == upto:  # from here on the prompt's words are rows themselves
                x, image_rows = torch.cat((prompt.rows, x)), image_rows + len(prompt.rows)
                of_all = torch.cat((prompt.positions, tokens.positions), 1)
                rows = replace(self._rows(of_all, tokens.lengths, extra), words=Words(len(prompt.rows)))
            seen = replace(rows, words=prompt.words[index]) if prompt is not None and index < upto else rows
            x = layer(x, seen, training=self.training)
            if index < len(deep):  # DeepStack (Meng et al. 2024, arXiv:2406.04334)
                x = x.index_add(0, image_rows, deep[index])
        first = len(x) - extra - len(tokens.ids)
        return x[first : first + len(tokens.ids)]

    def _embedded(self, ids: Tensor) -> Tensor:
        rows: Tensor = live(self._text.embed_tokens)(ids)
        return rows.to(self._dtype)

    def _prompt(self, tokens: Tokens, count: int) -> Prompt:
        """The words with which all samples begin, behind the layers that do not train."""
        ids, positions = tokens.ids[:count], tokens.positions[:, :count]
        rows = self._rows(positions, torch.tensor([count]))
        return self._prompts.get(ids.tolist(), self._embedded(ids), positions, rows)

    def _rows(self, positions: Tensor, lengths: Tensor, extra: int = 0) -> Rows:
        cos, sin = self._text.rotary_emb(positions.new_empty(0, dtype=torch.float32), positions[1:, None])
        return Rows.of((cos[0], sin[0]), lengths, self._dtype, extra=extra, causal=True)


_STEMS = ("visual", "language_model")
