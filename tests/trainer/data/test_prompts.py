"""Prompts: what scheme A keeps to itself, what scheme B adds, and the taxonomy file."""

from pathlib import Path

import pytest

from trainer.data.geometry import EmitNorm
from trainer.data.prompts import Language, Taxonomy, system_prompt, user_prompt
from trainer.errors import DataError

TAXONOMY = Taxonomy(("bolt", "nut"), (("colour", ("red", "grey")),), ("A nut without a bolt is left out.",))


def test_scheme_a_in_english_is_short() -> None:
    """At most 45 words, in every frame."""
    assert all(len(system_prompt("A", "en", norm).split()) <= 45 for norm in ("norm1000", "norm100", "none"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_scheme_a_states_the_format_only_and_b_begins_with_it(language: Language) -> None:
    """B adds the order, the form of `desc`, taxonomy and rules; A knows nothing of them."""
    a, b = (system_prompt(scheme, language, "norm1000", TAXONOMY) for scheme in ("A", "B"))
    assert b.startswith(a + "\n")
    added = b.removeprefix(a)
    assert all(word in added for word in ("bolt", "nut", "colour", "red", "grey", *TAXONOMY.rules))
    assert not any(word in a for word in ("bolt", "colour"))
    assert system_prompt("B", language, "norm1000") == b[: b.index({"en": "\nTypes", "zh": "\n类型："}[language])]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("norm", "words"), [("norm1000", " 1000"), ("norm100", " 100"), ("none", "")])
def test_the_prompt_names_the_frame_of_the_coordinates(language: Language, norm: EmitNorm, words: str) -> None:
    """0 to 1000, 0 to 100, or pixels."""
    prompt = system_prompt("A", language, norm)
    assert words in prompt
    assert ("pixel" in prompt or "像素" in prompt) == (norm == "none")
    assert ("1000" in prompt) == (norm == "norm1000")


def test_the_user_prompt_counts_several_images() -> None:
    """One image is not counted."""
    assert user_prompt("en") == "Describe all objects in this image."
    assert "3" in user_prompt("en", 3)
    assert "3" in user_prompt("zh", 3)


def test_a_taxonomy_is_read_in_the_order_of_its_file(tmp_path: Path) -> None:
    """All three parts, each of which may be missing."""
    path = tmp_path / "taxonomy.yaml"
    path.write_text(
        "types: [bolt, nut]\nattributes:\n  colour: [red, grey]\nrules:\n- A nut without a bolt is left out.\n"
    )
    assert Taxonomy.read(path) == TAXONOMY
    path.write_text("types: [螺栓]\n", encoding="utf-8")
    assert Taxonomy.read(path) == Taxonomy(types=("螺栓",))


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("- bolt\n", "a list where a map is needed"),
        ("type: [bolt]\n", "unknown keys: type"),
        ("types: bolt\n", "`types` is not a list of texts"),
        ("types: [bolt, 3]\n", "`types` is not a list of texts"),
        ("attributes: [red]\n", "`attributes` is not a map"),
        ("attributes: {on: [red]}\n", "item 1 is a bool (quote numbers, yes, no, on and off)"),
        ("attributes: {colour: red}\n", "`attributes.colour` is not a list"),
        ("types: [bolt\n", "cannot be read"),
    ],
)
def test_a_wrong_taxonomy_is_told_in_one_message(tmp_path: Path, text: str, got: str) -> None:
    """File, what was got, what is allowed; a missing file too."""
    path = tmp_path / "taxonomy.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        Taxonomy.read(path)
    assert got in caught.value.got
    assert caught.value.where == str(path)
    with pytest.raises(DataError, match="cannot be read"):
        Taxonomy.read(tmp_path / "none.yaml")
