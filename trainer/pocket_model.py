"""What the pocket is before it has learned anything: architecture, tokenizer, chat template, random weights."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from trainer.data.answer import answer_text
from trainer.data.geometry import EmitNorm
from trainer.data.prompts import Language, Scheme, Taxonomy, system_prompt, user_prompt
from trainer.data.records import Record

SPECIAL_TOKENS = (  # Qwen's, in its order
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 960  # rows of the embedding; the tokenizer fills 956
_SPLIT = (  # Qwen's pre-tokenizer: digits one by one, words with one sign in front, runs of signs
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorPil",
    "size": {"shortest_edge": 1024, "longest_edge": 1048576},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def pocket_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """Architecture of the pocket: 24 vision blocks, taps 5, 11, 17, 36 LLM layers, 96 wide, tied embeddings."""
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 176,
            "num_hidden_layers": 36,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 96,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_tokenizer(folder: Path, records: Sequence[Record], taxonomy: Taxonomy) -> None:
    """Train the byte-level BPE and write tokenizer, chat template and image processor settings into `folder`.

    Args:
        folder: exists.
        records: their answers are part of the corpus.
        taxonomy: for the prompts of scheme B; all prompts of both schemes and languages are part of the corpus.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(records, taxonomy), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 4096,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _corpus(records: Sequence[Record], taxonomy: Taxonomy) -> Iterator[str]:
    norms: tuple[EmitNorm, ...] = ("norm100", "norm1000", "none")
    schemes: tuple[Scheme, ...] = ("A", "B")
    languages: tuple[Language, ...] = ("en", "zh")
    for scheme in schemes:
        for language in languages:
            for norm in norms:
                requests = f"{user_prompt(language)}\n{user_prompt(language, 2)}"
                prompt = f"system\n{system_prompt(scheme, language, norm, taxonomy)}\nuser\n{requests}\nassistant\n"
                yield from [prompt] * 20  # often enough that every word of a prompt becomes one token
    for record in records:
        for norm in norms[:2]:
            yield answer_text(record, norm)


def initial_model(config: Qwen3VLConfig, seed: int) -> Qwen3VLForConditionalGeneration:
    """Random weights that a narrow, deep model can learn from.

    Matrices keep the variance of their input; residual outputs are scaled for the depth in the tower and begin at zero
    in the LLM; word embeddings are large beside what layers add, and the last norm is small in return.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    depth = model.model.visual.config.depth
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Embeddings of tokens and positions are matrices, but no linear maps.
            if name.endswith("patch_embed.proj.weight") or (parameter.ndim == 2 and "embed" not in name):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            if name.endswith(("attn.proj.weight", "mlp.linear_fc2.weight")):
                parameter.mul_((2 * depth) ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.visual.pos_embed.weight.normal_(std=0.5)
        model.model.language_model.embed_tokens.weight.normal_(std=0.5)
        model.model.language_model.norm.weight.fill_(0.2)
    settings = model.generation_config
    assert settings is not None  # noqa: S101  # every model that can generate has one
    llm = model.model.language_model.config
    settings.eos_token_id, settings.pad_token_id = llm.eos_token_id, llm.pad_token_id
    return model
