"""The built-in base: its shape, its size, that it loads as any Qwen3-VL does, and that its figures are told."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from trainer.data.digits import WORDS, ensure_digits
from trainer.data.loader import collate
from trainer.data.prompts import Language, Scheme, system_prompt, user_prompt
from trainer.data.records import read_records
from trainer.model import POCKET, load_tools, parameter_shapes, read_config
from trainer.muon import Muon
from trainer.pocket import Recipe, load_scenes, make_encoder, prompt_tokens, train_base
from trainer.pocket_model import SPECIAL_TOKENS, pocket_config
from trainer.pocket_phases import Phase, batched_attention, caption_losses, patches, see


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Load the shipped tokenizer."""
    return AutoTokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """Read the figures that came with the weights."""
    return json.loads((POCKET / "pocket.json").read_text())  # type: ignore[no-any-return]


def test_shipped_config_is_the_code_s(tokenizer: Any) -> None:
    """What lies in the folder is what `pocket_config` builds."""
    shipped, built = read_config("pocket").to_dict(), pocket_config(tokenizer).to_dict()
    for side in (shipped, built):
        for section in (side, side["text_config"], side["vision_config"]):
            for incidental in ("dtype", "architectures", "transformers_version", "_name_or_path"):
                section.pop(incidental, None)
    assert shipped == built


def test_depth_taps_and_names_are_the_4b_s() -> None:
    """Block for block the same parameter names as the 4B, at small width."""
    pocket, large = parameter_shapes("pocket"), parameter_shapes("random:4b")
    assert set(pocket) == set(large)
    assert sum(name.endswith("norm1.weight") for name in pocket) == 24
    assert sum(name.startswith("model.visual.deepstack_merger_list.") for name in pocket) == 3 * 6


def test_pocket_is_small() -> None:
    """At most six million parameters and about 12 MB of bf16."""
    shapes = parameter_shapes("pocket")
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) <= 6_000_000
    assert (POCKET / "model.safetensors").stat().st_size <= 12_100_000


def test_loads_without_torchvision() -> None:
    """Tokenizer, image processor and weights load where torchvision cannot be imported."""
    program = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from trainer.model import POCKET, load_model, load_tools\n"
        "import torch\n"
        "tools = load_tools('pocket')\n"
        "model = load_model('pocket', tools, dtype=torch.float32, attn_impl='sdpa', seed=0)\n"
        "print(type(tools.image_processor).__name__, type(model).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Qwen2VLImageProcessorPil", "Qwen3VLForConditionalGeneration"]


@pytest.mark.parametrize("scheme", ["A", "B"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_tokenizer_round_trip(tokenizer: Any, scheme: Scheme, language: Language) -> None:
    """Prompts of both schemes and languages come back as they went in."""
    for text in (system_prompt(scheme, language, "norm100"), user_prompt(language), "未见过的字 ünseen 123"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_classes_are_single_tokens_and_numbers_are_split(tokenizer: Any) -> None:
    """One token a class, one a digit of a coordinate, as with Qwen's own tokenizer."""
    assert all(len(tokenizer(word).input_ids) == 1 for word in WORDS)
    assert len(tokenizer("1000").input_ids) == 4


def test_special_tokens_have_the_ids_of_the_config(tokenizer: Any) -> None:
    """The end mark ends, the padding pads, the image token is the config's."""
    assert all(len(tokenizer(token).input_ids) == 1 for token in SPECIAL_TOKENS)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_chat_template_is_qwen3_vl_s(tokenizer: Any) -> None:
    """System, user with image, and the opening of the answer."""
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "U"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>U<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_figures_are_complete_and_of_these_weights(card: dict[str, Any]) -> None:
    """The card names data, recipe, command, time and figures, and the file they belong to."""
    assert card["weights_sha256"] == hashlib.sha256((POCKET / "model.safetensors").read_bytes()).hexdigest()
    assert {"command", "seconds", "recipe", "data", "figures_after_rounding_to_bf16"} <= set(card)
    assert len(card["data"]["train_digest"]) == 32


def test_pocket_sees(card: dict[str, Any]) -> None:
    """The figures that later stages build on."""
    figures = card["figures_after_rounding_to_bf16"]
    assert figures["f1"] >= 0.5
    assert figures["class_accuracy"] >= 0.8
    assert figures["vision_gain"] > 0.5


def test_eval_loss_is_what_the_card_says(tmp_path: Path, card: dict[str, Any]) -> None:
    """The shipped weights give about the loss that was written down, on the first scenes of the same set."""
    recipe = Recipe()
    data = ensure_digits(tmp_path, seed=recipe.seed, n_train=0, n_val=60, n_ood=0, look="printed")
    records = read_records(data.val).records
    tools = load_tools("pocket")
    scenes = load_scenes(records, tools, recipe)
    prompt, positions = prompt_tokens(records[0], tools, recipe, max(map(len, scenes.answers)))
    model = Qwen3VLForConditionalGeneration.from_pretrained(POCKET, dtype=torch.float32)
    with torch.no_grad():
        loss = caption_losses(model, see(model, scenes.pixels), prompt, positions, scenes.answers).mean().item()
    assert loss == pytest.approx(card["figures_after_rounding_to_bf16"]["eval_loss"], rel=0.25)


def test_shared_prompt_and_batched_attention_change_no_loss(tmp_path: Path) -> None:
    """The quick ways of pre-training give the losses of the plain forward pass, and the processor's patches."""
    recipe = Recipe()
    data = ensure_digits(tmp_path, n_train=4, n_val=0, n_ood=0, look="printed")
    records = read_records(data.train).records
    tools = load_tools("pocket")
    samples = [make_encoder(tools, recipe).encode(record) for record in records]
    batch = collate(samples, tools.tokenizer.pad_token_id)
    model = Qwen3VLForConditionalGeneration.from_pretrained(POCKET, dtype=torch.float32)
    scenes = load_scenes(records, tools, recipe)
    assert torch.equal(patches(scenes.pixels), batch.pixel_values)
    prompt, positions = prompt_tokens(records[0], tools, recipe, max(map(len, scenes.answers)))
    with torch.no_grad():
        logits = model(**batch.model_inputs()).logits[:, :-1][batch.supervised[:, 1:]]
        plain = torch.nn.functional.cross_entropy(
            logits, batch.input_ids[:, 1:][batch.supervised[:, 1:]], reduction="none"
        )
        with batched_attention():
            quick = caption_losses(model, see(model, scenes.pixels), prompt, positions, scenes.answers)
    torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-4)


def test_muon_lowers_a_loss_and_keeps_scale() -> None:
    """An update is orthogonal up to Newton-Schulz's tolerance, whatever the gradient's size."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([weight], lr=1.0, momentum=0.0, weight_decay=0.0)
    weight.grad = 1e-6 * torch.randn(8, 16)
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * 16**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_train_base_writes_a_complete_model_folder(tmp_path: Path) -> None:
    """Two steps of every phase give weights that load, with the same files as the shipped ones."""
    short = Recipe(
        n_train=420,
        n_val=4,
        warm_up=Phase(steps=2, batch=4, muon=0.01, adam=1e-3),
        captions=Phase(steps=2, batch=2, muon=0.01, adam=1e-3),
        easy=(1, 2),
        threads=1,
    )
    folder = train_base(tmp_path / "base", recipe=short, say=lambda line: None)
    assert {p.name for p in folder.iterdir()} == {p.name for p in POCKET.iterdir()}
    made = json.loads((folder / "pocket.json").read_text())
    assert made["figures_after_rounding_to_bf16"]["records"] == 4
