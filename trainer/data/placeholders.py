"""What a box of ms-swift's grounding data holds, read from where its placeholder stands in the conversation.

The n-th `<bbox>` of a conversation stands for the n-th box, the n-th `<ref-object>` for the n-th description. Nothing
else ties boxes and descriptions together. Where their places do not say whose is whose, nothing is guessed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

_REF, _BOX, _IMAGE = "<ref-object>", "<bbox>", "<image>"
_MARK = re.compile(f"{_REF}|{_BOX}")
_FENCE = re.compile(r"^\s*```\w*|```\s*$")
_NO_PROSE = re.compile(r"[{}\[\]<>\"=|\\]")  # code, JSON, a model's own tokens
_EDGES = " \t\r\n,.;:!?*•-–—、，。；：！？"
_OPEN, _CLOSE = "([（【", ")]）】"

Run = tuple[str, list[int]]
"""Placeholders of one kind, one after the other, by their numbers in the conversation."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    text: str


@dataclass(frozen=True)
class Name:
    """What a box holds, and whether that was read from plain text; or the problem why it is not known."""

    desc: str = ""
    from_text: bool = False
    problem: str | None = None


def name_boxes(messages: Sequence[Message], refs: Sequence[Any], n_boxes: int) -> dict[int, Name]:
    """Say for each box what it holds.

    The `<ref-object>` beside it in the same message counts first (`_beside`). A box of an answer without any takes
    those of its question, a box of a question those of the answer: one for all boxes, or one each. For want of these,
    a box of an answer takes the `label` of its JSON object, or the text before it.

    Args:
        messages: the conversation.
        refs: the descriptions.
        n_boxes: how many boxes there are.

    Returns:
        By the number of the box, from 0. A box without placeholder is not among them.
    """
    numbers = {_REF: count(), _BOX: count()}
    conversation = [_runs([(mark, next(numbers[mark])) for mark in _MARK.findall(m.text)]) for m in messages]
    names: dict[int, Name] = {}
    for index, (message, runs) in enumerate(zip(messages, conversation, strict=True)):
        boxes = _numbers(runs, _BOX)
        found = _beside(runs)
        if lone := [box for box in boxes if box not in found]:
            found |= _share(_nearby(messages, conversation, index), lone)
        texts = _texts(message) if message.role == "assistant" else [""] * len(boxes)
        names |= {box: _name(found, box, refs, text) for box, text in zip(boxes, texts, strict=True) if box < n_boxes}
    return names


def _name(found: Mapping[int, int | None], box: int, refs: Sequence[Any], text: str) -> Name:
    if box not in found:
        return (
            Name(text, from_text=True) if text else Name(problem="no <ref-object> and no text says what its box holds")
        )
    ref = found[box]
    if ref is None:
        return Name(problem="it is not clear which <ref-object> its box belongs to")
    if ref >= len(refs) or not isinstance(refs[ref], str):
        return Name(problem="its <ref-object> stands for nothing in `ref`")
    return Name(refs[ref].strip())


def _runs(marks: Sequence[tuple[str, int]]) -> list[Run]:
    return [(kind, [number for _, number in run]) for kind, run in groupby(marks, lambda mark: mark[0])]


def _numbers(runs: Sequence[Run], kind: str) -> list[int]:
    return [number for each, numbers in runs if each == kind for number in numbers]


def _beside(runs: list[Run]) -> dict[int, int | None]:
    """Box -> its ref in the same message, None where that is not clear.

    Boxes follow their refs, unless the message begins with a box and ends with a ref. Boxes with no ref on their side
    are not in the result.
    """
    refs_last = bool(runs) and runs[0][0] == _BOX and runs[-1][0] == _REF
    if runs and runs[0][0] == _BOX and not refs_last:
        runs = runs[1:]
    found: dict[int, int | None] = {}
    for (_, first), (_, second) in zip(runs[::2], runs[1::2], strict=False):
        found |= _share(second, first) if refs_last else _share(first, second)
    return found


def _nearby(messages: Sequence[Message], conversation: Sequence[list[Run]], index: int) -> list[int]:
    """The refs of the question that a message answers, or of the answer to it where that has no boxes of its own."""
    if messages[index].role != "assistant":
        after = conversation[index + 1] if index + 1 < len(messages) else []
        return [] if _numbers(after, _BOX) else _numbers(after, _REF)
    for before in range(index - 1, -1, -1):
        if messages[before].role == "assistant":
            break
        if refs := _numbers(conversation[before], _REF):
            return refs
    return []


def _share(refs: Sequence[int], boxes: Sequence[int]) -> dict[int, int | None]:
    """One ref for all boxes, or one each; with other numbers it is not clear whose is whose."""
    if len(refs) == 1:
        return dict.fromkeys(boxes, refs[0])
    if len(refs) == len(boxes):
        return dict(zip(boxes, refs, strict=True))
    return dict.fromkeys(boxes) if refs else {}


def _texts(message: Message) -> list[str]:
    """For each box of an answer what its JSON object or the text before it calls it; empty where nothing does.

    A box that directly follows another shares its text.
    """
    before = message.text.split(_BOX)[:-1]
    if (labels := _labels(message.text)) is not None:
        return [labels.get(position, "") for position in range(len(before))]
    texts: list[str] = []
    for piece in before:
        texts.append(texts[-1] if texts and not piece.strip(_EDGES) else _prose(piece))
    return texts


def _labels(text: str) -> dict[int, str] | None:
    """Position of a box -> label, in an answer like `[{"bbox_2d": <bbox>, "label": "dog"}]`; None if it is no JSON."""
    positions = count()
    numbered = re.sub(_BOX, lambda _: str(next(positions)), _FENCE.sub("", text))
    try:
        tree = json.loads(numbered)
    except (ValueError, RecursionError):
        return None
    objects = [each for each in (tree if isinstance(tree, list) else [tree]) if isinstance(each, dict)]
    pairs = [(each.get("bbox_2d", each.get("bbox")), each.get("label")) for each in objects]
    return {box: label.strip() for box, label in pairs if type(box) is int and isinstance(label, str)}


def _prose(piece: str) -> str:
    """The end of a text as a description: its last line, after an image, without punctuation at its ends."""
    last = piece.split(_IMAGE)[-1].strip().split("\n")[-1]
    text = last.lstrip(_EDGES + _CLOSE).rstrip(_EDGES + _OPEN)
    return "" if _NO_PROSE.search(text) or not any(letter.isalnum() for letter in text) else text
