"""What the boxes of ms-swift's conversations hold: by placeholders, by labels, by text, or not known."""

from typing import Any

import pytest

from trainer.data.placeholders import Message, Name, name_boxes

UNCLEAR = "it is not clear which <ref-object> its box belongs to"
NOTHING = "no <ref-object> and no text says what its box holds"
NO_REF = "its <ref-object> stands for nothing in `ref`"


def names(*turns: str, refs: list[Any] | None = None, n_boxes: int = 9) -> dict[int, str]:
    """Box -> its description, or the problem; the turns are those of user and assistant, one after the other."""
    messages = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)]
    found = name_boxes(messages, list("abcdef") if refs is None else refs, n_boxes)
    return {box: name.problem or name.desc for box, name in found.items()}


BY_REF: dict[str, tuple[list[str], dict[int, str]]] = {
    "each box behind its ref": (
        ["<image>Describe.", "<ref-object><bbox> and <ref-object><bbox> play"],
        {0: "a", 1: "b"},
    ),
    "several boxes behind one ref": (["", "<ref-object><bbox><bbox>, <ref-object><bbox>"], {0: "a", 1: "a", 2: "b"}),
    "as many boxes as refs before them": (["", "<ref-object> and <ref-object>: <bbox><bbox>"], {0: "a", 1: "b"}),
    "each ref behind its box, as in Qwen3-VL's JSON": (
        [
            "Find <ref-object> and <ref-object>",
            '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"bbox_2d": <bbox>, "label": "<ref-object>"}]',
        ],
        {0: "c", 1: "d"},
    ),
    "each ref before its box in JSON": (
        [
            "Find <ref-object>",
            '[{"label": "<ref-object>", "bbox_2d": <bbox>}, {"label": "<ref-object>", "bbox_2d": <bbox>}]',
        ],
        {0: "b", 1: "c"},
    ),
    "boxes of the answer to a question with one ref": (["Find <ref-object>", "<bbox><bbox>"], {0: "a", 1: "a"}),
    "boxes and refs one each, over question and answer": (
        ["Find <ref-object> and <ref-object>", "<bbox><bbox>"],
        {0: "a", 1: "b"},
    ),
    "a box in the question, its ref in the answer": (["What is at <bbox>?", "<ref-object>"], {0: "a"}),
    "each turn for itself": (
        ["Find <ref-object>", "<bbox>", "What is <bbox>?", "<ref-object>", "And <ref-object>?", "<bbox><bbox>"],
        {0: "a", 1: "b", 2: "c", 3: "c"},
    ),
    "a ref without a box between them": (["", "<ref-object><bbox> near a <ref-object>"], {0: "a"}),
}


@pytest.mark.parametrize("case", BY_REF)
def test_a_box_holds_the_ref_whose_placeholder_it_stands_with(case: str) -> None:
    """Placeholders are counted over the whole conversation, boxes and refs apart."""
    turns, expected = BY_REF[case]
    assert names(*turns) == expected


OPEN: dict[str, tuple[list[str], dict[int, str]]] = {
    "three boxes for two refs": (
        ["Find <ref-object> and <ref-object>", "<bbox><bbox><bbox>"],
        {0: UNCLEAR, 1: UNCLEAR, 2: UNCLEAR},
    ),
    "two refs before one box": (["", "A <ref-object> by a <ref-object><bbox>"], {0: UNCLEAR}),
    "a box in a question that the answer does not name": (["What is at <bbox>?", "A dog."], {0: NOTHING}),
    "the ref of an earlier turn": (["Find <ref-object>", "<bbox>", "And the next?", "<bbox>"], {0: "a", 1: NOTHING}),
    "the ref of the answer's own box": (["What is left of <bbox>?", "<ref-object><bbox>"], {0: NOTHING, 1: "a"}),
    "a box alone": (["Click.", "Action: click(start_box='<bbox>')"], {0: NOTHING}),
}


@pytest.mark.parametrize("case", OPEN)
def test_nothing_is_guessed(case: str) -> None:
    """A wrong label is worse than a box that is left out and counted."""
    turns, expected = OPEN[case]
    assert names(*turns) == expected


def test_a_placeholder_without_a_ref_and_a_box_without_a_placeholder() -> None:
    """The first is told as that; the second is not among the names, nor is a placeholder beyond the boxes."""
    assert names("", "<ref-object><bbox><ref-object><bbox>", refs=["dog"]) == {0: "dog", 1: NO_REF}
    assert names("", "<ref-object><bbox>", refs=[7]) == {0: NO_REF}
    assert names("", "<ref-object><bbox><bbox>", n_boxes=1) == {0: "a"}


BY_TEXT: dict[str, tuple[str, dict[int, str]]] = {
    "the text before a box": ("There is a dog <bbox>, and a woman (<bbox>).", {0: "There is a dog", 1: "and a woman"}),
    "its last line, without marks": ("Here:\n- **red car**: <bbox>\n- tree: <bbox>", {0: "red car", 1: "tree"}),
    "boxes in a row share it": ("两只羊：<bbox>，<bbox>", {0: "两只羊", 1: "两只羊"}),
    "what stands behind the image": ("<image>a dog <bbox>", {0: "a dog"}),
    "the label in JSON, before or behind": (
        '```json\n[{"bbox_2d": <bbox>, "label": "dog"}, {"label": "cat", "bbox": <bbox>}, {"bbox_2d": <bbox>}]\n```',
        {0: "dog", 1: "cat", 2: NOTHING},
    ),
    "not JSON that is broken": ('[{"bbox_2d": <bbox> "label": "dog"}]', {0: NOTHING}),
    "not a model's own tokens": ("<|box_start|><bbox>", {0: NOTHING}),
}


@pytest.mark.parametrize("case", BY_TEXT)
def test_without_refs_the_answers_text_describes_a_box(case: str) -> None:
    """Only prose and labels do; code does not."""
    text, expected = BY_TEXT[case]
    assert names("Describe.", text, refs=[]) == expected


def test_a_description_says_whether_it_was_read_from_text() -> None:
    """So that it can be counted."""
    messages = [Message("user", "?"), Message("assistant", "a dog <bbox>")]
    assert name_boxes(messages, [], 1) == {0: Name("a dog", from_text=True)}
    assert name_boxes([Message("assistant", "<ref-object><bbox>")], [" a dog "], 1) == {0: Name("a dog")}
