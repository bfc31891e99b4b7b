"""The raw form of a strategy: what its names mean, the rules that come of them, and what is no name of anything."""

import subprocess
import sys

import pytest

from tests.conftest import shapes_of, tiny_model
from trainer.errors import StrategyError
from trainer.model import apply_plan, parameter_shapes
from trainer.raw_strategy import RawStrategy, raw_rules
from trainer.strategy import (
    Lora,
    Method,
    ParameterPlan,
    Part,
    Shapes,
    Strategy,
    Target,
    make_plan,
    plan_rules,
)

LORA = Lora(rank=4, alpha=8, dropout=0.0)
MERGERS = ("visual.merger", *(f"visual.deepstack_merger_list.{index}" for index in range(3)))
FROZEN, ALL_LORA, ALL_FULL = Target("none", Method.FROZEN), Target("all", Method.LORA), Target("all", Method.FULL)


@pytest.fixture(scope="module")
def pocket() -> Shapes:
    """24 vision blocks, 36 LLM layers, tied embeddings."""
    return parameter_shapes("pocket")


def rules(shapes: Shapes, **raw: object) -> tuple[list[tuple[Method, str]], tuple[str, ...]]:
    """The rules of a raw form, without the last one, and what it says that changes nothing."""
    said = {"target_regex": None, "target_modules": None, "modules_to_save": (), "freeze": {}} | raw
    origins = {f"tuner.{key}": "mine.yaml:7" for key in raw}
    found, notes = raw_rules(RawStrategy(**said), shapes, origins=origins)  # type: ignore[arg-type]  # as the test says
    assert (found[-1].method, found[-1].pattern) == (Method.FROZEN, ".+")
    return [(rule.method, rule.pattern) for rule in found[:-1]], notes


def plan(shapes: Shapes, **raw: object) -> ParameterPlan:
    """The plan that a raw form means."""
    said = {"target_regex": None, "target_modules": None, "modules_to_save": (), "freeze": {}} | raw
    return plan_rules(raw_rules(RawStrategy(**said), shapes)[0], shapes, LORA)  # type: ignore[arg-type]


def told(shapes: Shapes, **raw: object) -> str:
    """The message that a raw form is refused with."""
    with pytest.raises(StrategyError) as caught:
        rules(shapes, **raw)
    return str(caught.value)


def methods(of: ParameterPlan) -> list[tuple[str, Part, Method]]:
    """What happens to every tensor."""
    return [(t.name, t.part, t.method) for t in of.tensors]


# --- rules


def test_rules_are_full_first_then_lora_and_one_for_all_that_differ_in_an_index(pocket: Shapes) -> None:
    """They stay as readable as the expression that they come from."""
    regex = r"language_model\.layers\.3[45]\.mlp\.up_proj|visual\.blocks\.(0|7|23)\.attn\.qkv"
    assert rules(pocket, target_regex=regex, modules_to_save=("visual.blocks.1", "visual.blocks.2", "visual.merger"))[
        0
    ] == [
        (Method.FULL, r"model\.visual\.blocks\.(1|2)\..+"),
        (Method.FULL, r"model\.visual\.merger\..+"),
        (Method.LORA, r"model\.visual\.blocks\.(0|7|23)\.attn\.qkv\.weight"),
        (Method.LORA, r"model\.language_model\.layers\.(34|35)\.mlp\.up_proj\.weight"),
    ]


def test_the_translation_needs_no_torch() -> None:
    """Names and shapes are enough."""
    code = "import trainer.raw_strategy, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- target_regex


@pytest.mark.parametrize(
    "regex",
    [
        r"model\.visual\.blocks\.2[23]\.attn\.(qkv|proj)",
        r"visual\.blocks\.2[23]\.attn\.(qkv|proj)",
        r"^(model\.)?visual\.blocks\.2[23]\.attn\.(qkv|proj)$",
        r".*blocks\.(22|23)\.attn\..*",
    ],
)
def test_the_expression_matches_whole_names_with_or_without_model(pocket: Shapes, regex: str) -> None:
    """Existing files are written both ways."""
    found, notes = rules(pocket, target_regex=regex)
    assert found == [
        (Method.LORA, rf"model\.visual\.blocks\.(22|23)\.attn\.{name}\.weight") for name in ("qkv", "proj")
    ]
    assert notes == ()


def test_what_is_no_linear_layer_gets_no_lora_and_is_told(pocket: Shapes) -> None:
    """Containers only lie on the way; norms, embeddings and the patch convolution were asked for."""
    found, (note,) = rules(pocket, target_regex=r"model\.visual\..*")
    assert {method for method, _ in found} == {Method.LORA} and len(found) == 8  # four kinds in blocks, two in mergers
    assert "model.visual.patch_embed.proj, model.visual.pos_embed, model.visual.blocks.0.norm1 ..." in note
    assert note.startswith("tuner.target_regex: 54 ") and note.endswith("(mine.yaml:7)")


@pytest.mark.parametrize(
    ("regex", "got", "do"),
    [
        (
            r"visual\.blokcs\.1\.attn\.qkv",
            "no module of this model with 24 vision blocks and 36 LLM layers",
            "blocks.1",
        ),
        (
            r"blocks\.1\.attn\.qkv",
            "no module",
            "only found inside model.visual.blocks.1.attn.qkv: match the whole name",
        ),
        (r"visual\.blocks\.\d+", "24 of the modules and no linear layer", "such as model.visual.blocks.0.attn.qkv"),
        (r"visual\.pos_embed", "1 of the modules and no linear layer", "tuner.modules_to_save"),
    ],
)
def test_an_expression_that_catches_nothing_is_an_error_with_the_nearest(
    pocket: Shapes, regex: str, got: str, do: str
) -> None:
    """Nothing would train, and the loss would still fall by what else does."""
    message = told(pocket, target_regex=regex, modules_to_save=MERGERS)
    assert message.startswith("mine.yaml:7: tuner.target_regex\n")
    assert got in message and do in message.partition("do:")[2]


def test_an_alternative_that_catches_nothing_is_told(pocket: Shapes) -> None:
    """As when a file for 36 LLM layers meets the 28 of a 2B: the rest of it would train in silence."""
    llm = r"language_model\.layers\.(34|35)\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    regex = llm + r"|visual\.blocks\.23\.attn\.(qkv|proj)"
    _, (note,) = rules(parameter_shapes("random:2b"), target_regex=regex)
    assert repr(llm) in note and "(34|35)" in note and note.count("'") == 2
    assert rules(pocket, target_regex=regex)[1] == ()
    _, (note,) = rules(pocket, target_regex=r"visual\.blocks\.(23|24|2[5-7]|[|)])\.attn\.(qkv|out(?:a|b))")
    assert note.startswith("tuner.target_regex: its alternatives '24', '2[5-7]', '[|)]', 'out(?:a|b)' catch nothing")


# --- modules_to_save


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.visual.merger", r"model\.visual\.merger"),
        ("visual.merger", r"model\.visual\.merger"),
        ("merger", r"model\.visual\.merger"),
        ("blocks.2", r"model\.visual\.blocks\.(2)"),
        ("deepstack_merger_list", r"model\.visual\.deepstack_merger_list"),
        ("model.language_model.norm", r"model\.language_model\.norm"),
        ("visual", r"model\.visual"),
    ],
)
def test_a_saved_module_is_named_whole_or_by_an_end_that_only_it_has(pocket: Shapes, name: str, pattern: str) -> None:
    """PEFT takes whatever ends so; here `blocks.2` is one block, and never 12 or 22."""
    found, _ = rules(pocket, modules_to_save=(name,), target_modules=())
    assert found == [(Method.FULL, pattern + r"\..+")]


def test_a_module_inside_another_one_needs_no_rule_of_its_own(pocket: Shapes) -> None:
    """Nor does one that is named twice."""
    names = ("visual.merger", "visual", "model.visual.merger")
    assert rules(pocket, modules_to_save=names, target_modules=())[0] == [(Method.FULL, r"model\.visual\..+")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("visual.mergr", ["no module of this model", "did you mean model.visual.merger?"]),
        ("visual.blocks.24", ["no module of this model", "model.visual.blocks.0 to model.visual.blocks.23"]),
        ("model.layers.35.mlp.up_prj", ["did you mean model.language_model.layers.35.mlp.up_proj?"]),
        ("lm_head", ["no module of this model"]),
        ("", ["no module of this model"]),
        ("0", ["the end of 3 modules: model.visual.blocks.0, ", "full module names"]),
        ("norm1", ["the end of 24 modules", "write the full names"]),
        ("visual.merger.linear_fc1", ["lies inside model.visual.merger", "write model.visual.merger"]),
    ],
)
def test_a_name_of_no_module_of_several_or_of_a_piece_is_an_error(pocket: Shapes, name: str, words: list[str]) -> None:
    """With the nearest module, all that end so, or the whole that it belongs to (`lm_head` is tied here)."""
    message = told(pocket, modules_to_save=(name,), target_modules=())
    assert message.startswith("mine.yaml:7: tuner.modules_to_save\n")
    assert all(word in message for word in words), message


def test_a_module_in_both_forms_trains_whole_and_that_is_told(pocket: Shapes) -> None:
    """LoRA beside a free weight adds nothing."""
    found, (note,) = rules(pocket, target_regex=r".*\.linear_fc1", modules_to_save=MERGERS)
    assert [pattern for method, pattern in found if method is Method.LORA] == [
        r"model\.visual\.blocks\.(" + "|".join(map(str, range(24))) + r")\.mlp\.linear_fc1\.weight"
    ]
    assert note.startswith("tuner.target_regex: 4 of its modules train whole") and "model.visual.merger.linear" in note


# --- target_modules and freeze_*


@pytest.mark.parametrize(
    ("freeze", "arm"),
    [
        ({}, {"llm": ALL_LORA}),
        ({Part.VISION: None, Part.LLM: None}, {"llm": ALL_LORA}),
        ({Part.VISION: False}, {"llm": ALL_LORA, "vision": ALL_LORA}),
        ({Part.VISION: False, Part.LLM: True}, {"vision": ALL_LORA}),
        ({Part.ALIGNER: False, Part.LLM: True}, {"aligner": ALL_LORA}),
        ({Part.VISION: False, Part.ALIGNER: False}, {"llm": ALL_LORA, "vision": ALL_LORA, "aligner": ALL_LORA}),
    ],
)
@pytest.mark.parametrize("size", ["pocket", "random:8b"])
def test_all_linear_is_every_linear_layer_of_the_parts_that_are_not_frozen(
    size: str, freeze: dict[Part, bool | None], arm: dict[str, Target]
) -> None:
    """An unset flag counts as in ms-swift: only the language model is free. `lm_head` is none of them."""
    shapes = parameter_shapes(size)
    ours = Strategy(**({"vision": FROZEN, "aligner": FROZEN, "llm": FROZEN} | arm), lora=LORA)
    for target_modules in (("all-linear",), None):
        assert methods(plan(shapes, target_modules=target_modules, freeze=freeze)) == methods(make_plan(ours, shapes))


def test_names_are_last_names_in_the_parts_that_are_not_frozen(pocket: Shapes) -> None:
    """`proj` is the vision tower's, not the end of `q_proj`."""
    found, _ = rules(pocket, target_modules=("q_proj", "proj", "mlp.linear_fc1"), freeze={Part.VISION: False})
    assert [pattern.rpartition(")")[2] for _, pattern in found] == [
        r"\.attn\.proj\.weight", r"\.mlp\.linear_fc1\.weight", r"\.self_attn\.q_proj\.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q_prj", ["the last name of no linear layer", "did you mean q_proj?"]),
        ("all_linear", ["did you mean all-linear?"]),
        ("norm1", ["the last name of no linear layer"]),
        ("qkv", ["only frozen parts have", "model.visual.blocks.0.attn.qkv", "set tuner.freeze_vit to false"]),
        ("linear_fc2", ["set tuner.freeze_vit to false"]),
    ],
)
def test_a_name_that_hits_nothing_is_an_error_with_the_nearest(pocket: Shapes, name: str, words: list[str]) -> None:
    """Or with the flag that keeps it out."""
    message = told(pocket, target_modules=("v_proj", name))
    assert message.startswith("mine.yaml:7: tuner.target_modules\n")
    assert all(word in message for word in words), message


def test_nothing_that_trains_is_an_error(pocket: Shapes) -> None:
    """Three frozen parts leave something only where modules are saved."""
    assert "no module that trains" in told(pocket, freeze={Part.LLM: True})
    assert plan(pocket, freeze={Part.LLM: True}, modules_to_save=MERGERS).trainable_parameters()["llm"] == 0


# --- through PEFT


@pytest.mark.parametrize(
    "raw",
    [
        {"target_modules": ("all-linear",), "freeze": dict.fromkeys(Part, False), "modules_to_save": MERGERS},
        {"target_modules": ("q_proj", "qkv"), "freeze": {Part.VISION: False}},
        {"target_regex": r".*(_proj|proj|linear_fc.)", "modules_to_save": ("visual.blocks.2", "layers.3", "merger")},
        {"modules_to_save": ("visual", "language_model.norm"), "target_modules": ()},
        {"modules_to_save": ("patch_embed", "pos_embed", "deepstack_merger_list"), "freeze": {Part.LLM: True}},
    ],
)
def test_peft_does_what_the_raw_form_means(raw: dict[str, object]) -> None:
    """`apply_plan` proves it, tensor by tensor, and raises where it is not so."""
    model = tiny_model()
    planned = plan(shapes_of(model), **raw)
    apply_plan(model, planned, seed=1)
    assert planned.trained()


def test_an_expression_that_would_take_for_ever_is_told(pocket: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further character of a name would double its time."""
    monkeypatch.setattr("trainer.raw_strategy._SECONDS", 1)
    assert "not through with the module names after 1 s" in told(pocket, target_regex="(([a-z._0-9])+)+X")
