"""The words with which all samples begin: found in a batch, and run through the frozen layers once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.fused.layers import DecoderLayer, Rows
from trainer.fused.shared import Words

_FEWEST = 8  # words that are worth being shared
_MOST_PROMPTS = 8


@dataclass(frozen=True)
class Prompt:
    """A text that has been through the layers that do not train."""

    ids: list[int]
    words: list[Words]
    """Of each of these layers."""
    rows: Tensor
    """(p, D) behind the last of them."""
    positions: Tensor
    """(4, p)."""

    def cut(self, count: int) -> "Prompt":
        """Its beginning: no word sees what follows it."""
        if count == len(self.ids):
            return self
        words = [Words(count, *(None if t is None else t[:count] for t in (w.keys, w.values))) for w in self.words]
        return Prompt(self.ids[:count], words, self.rows[:count], self.positions[:, :count])


@dataclass
class Prompts:
    """The prompts that a run has met."""

    layers: Sequence[DecoderLayer]
    """The language model's layers before the first that trains."""
    known: list[Prompt] = field(default_factory=list)

    @torch.no_grad()
    def get(self, ids: list[int], embedded: Tensor, positions: Tensor, rows: Rows) -> Prompt:
        """The prompt with these ids; run now if no known one begins with them.

        Args:
            ids: p of them.
            embedded: (p, D).
            positions: (4, p).
            rows: of these p, one segment.
        """
        for prompt in self.known:
            if prompt.ids[: len(ids)] == ids:
                return prompt.cut(len(ids))
        x, words = embedded, []
        for layer in self.layers:
            x, keys, values = layer.with_keys(x, rows)
            words.append(Words(len(ids), keys.contiguous(), values.contiguous()))
        self.known = [Prompt(ids, words, x, positions), *self.known][:_MOST_PROMPTS]
        return self.known[0]


def common_words(ids: Tensor, starts: Tensor, lengths: Tensor, other: Tensor) -> int:
    """How many words all samples begin with; 0 where it is not worth it.

    Args:
        ids: (T,) of samples end to end.
        starts: (n,) first row of each.
        lengths: (n,) rows of each.
        other: (T,) bool; rows that are no words of a prompt, such as image tokens: sharing ends before the first. Every
            sample's answer must come behind one of them.
    """
    upto = int(lengths.min())
    places = starts[:, None] + torch.arange(upto, device=ids.device)
    of_samples = ids[places]
    same = (of_samples == of_samples[0]).all(0) & ~other[places].any(0)
    count = int(same.int().cumprod(0).sum())
    return count if _FEWEST <= count < upto else 0
