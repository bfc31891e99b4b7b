"""The public shapes of Qwen3-VL 2B, 4B, 8B and 32B, for plans on the meta device and random-weight runs."""

from typing import Any

from transformers import Qwen3VLConfig

from trainer.errors import ModelError

_VISION_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_VISION_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

# size -> (vision, LLM hidden size, LLM intermediate size, layers, attention heads, tied embeddings)
_SHAPES: dict[str, tuple[dict[str, Any], int, int, int, int, bool]] = {
    "2b": (_VISION_SMALL, 2048, 6144, 28, 16, True),
    "4b": (_VISION_SMALL, 2560, 9728, 36, 32, True),
    "8b": (_VISION_LARGE, 4096, 12288, 36, 32, False),
    "32b": (_VISION_LARGE, 5120, 25600, 64, 64, False),
}

SIZES = tuple(_SHAPES)


def qwen3_vl_config(size: str) -> Qwen3VLConfig:
    """The configuration of a released dense Qwen3-VL, as its `config.json` on the hub states it.

    Args:
        size: one of `SIZES`.

    Raises:
        ModelError: unknown size.
    """
    if size.lower() not in _SHAPES:
        raise ModelError(
            "model.model", f"random:{size}", "random:" + ", random:".join(SIZES), "choose one of the released sizes"
        )
    vision, hidden, intermediate, layers, heads, tied = _SHAPES[size.lower()]
    return Qwen3VLConfig(
        vision_config={**vision, "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": hidden},
        text_config={
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
        },
        tie_word_embeddings=tied,
    )
