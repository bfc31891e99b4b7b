"""Attention over packs without flash-attention: scaled dot products, one sample of the pack after the other.

transformers finds packs by itself in the text positions, and writes them into one dense (L, L) mask for SDPA: at 20,000
tokens that mask alone takes 400 MB, and nearly all of what is computed under it is thrown away. Here every sample
attends to itself alone, causally, without a mask. The functions are registered with transformers under a name of our
own, so that a model chooses them in its configuration like any other implementation; nothing is patched.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

PACKED_SDPA = "packed_sdpa"
GPU_ONLY = ("flash_attention_2", "flex_attention")
"""Implementations without a backward pass on a CPU."""


def attention_implementation(asked: str, dtype: torch.dtype) -> str:
    """The name that transformers knows for what a user asks.

    Args:
        asked: a name of transformers' own, or `auto`: varlen flash-attention for a bf16 base on a GPU that has it (it
            computes in no wider format), else SDPA. Without any GPU those that need one are SDPA too: same result.
        dtype: of the base's weights.
    """
    if asked != "auto":
        return "sdpa" if needs_missing_gpu(asked) else asked
    flash = dtype is torch.bfloat16 and torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def needs_missing_gpu(asked: str) -> bool:
    """Whether an implementation trains on GPUs only, and this machine has none."""
    return asked in GPU_ONLY and not torch.cuda.is_available()


def segment_lengths(places: Tensor) -> list[int]:
    """Tokens of each sample of a packed row; (L,) places in the text, each sample's counted from 0."""
    starts = (places == 0).nonzero().flatten()
    lengths: list[int] = torch.diff(starts, append=starts.new_tensor([len(places)])).tolist()
    return lengths


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA in which the samples of a packed row are blind to each other; with a mask or a cache it is plain SDPA.

    Args:
        module: the attention layer.
        query: (B, heads, L, head size).
        key: (B, key heads, L, head size); longer than `query` when a cache is used.
        value: likewise.
        attention_mask: as `sdpa_mask` makes it where rows are padded; None where they are packed.
        position_ids: (B, L) places in the text.
        **kwargs: passed on.

    Returns:
        (B, L, heads, head size), and no weights.
    """
    whole = attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]
    lengths = segment_lengths(position_ids.flatten()) if whole and position_ids is not None else []
    if len(lengths) <= len(query):  # one sample a row, or a step of generation
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert len(query) == 1, "packs come in one row"  # noqa: S101  # our own collate sees to it
    pieces = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in pieces], dim=1), None


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where transformers was given none: then a single row is packed, and `packed_sdpa` sees to it."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
