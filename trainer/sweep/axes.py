"""Reads the axes of a sweep from the tree of its file: lists of choices, and bounds of numbers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from trainer.config.load import SHORT_NAMES
from trainer.config.problems import Problem, place, shown
from trainer.config.resolved import leaves
from trainer.config.source import Node
from trainer.sweep.space import SEED, Axis, Choice, Choices, Range

_RANGES = {"uniform": (False, False), "log_uniform": (True, False), "int": (False, True), "log_int": (True, True)}
"""Word of a file -> whether it is logarithmic, whether it is whole."""


class Findings:
    """What is wrong with a sweep's file, and where each key was written."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self.problems: list[Problem] = []
        self.places: dict[str, str] = {}
        """Dotted key of the configuration -> file and line that set it."""

    def wrong(self, origin: str, key: str, got: str, allowed: str, do: str) -> None:
        """Note a mistake, told with the rest of them."""
        self.problems.append(Problem(place(origin, key), got, allowed, do))


def read_axes(space: Node, fixed: Mapping[str, str], found: Findings, *, is_grid: bool) -> tuple[Axis, ...]:
    """The axes below `space:`; those that are wrong are left out and noted.

    Args:
        space: key -> list of choices, or bounds.
        fixed: keys that every point sets alike.
        found: takes mistakes and places.
        is_grid: whether all points are to be tried, so that bounds say too little.
    """
    if not space.children:
        allowed, do = "a map: key -> list of choices, or bounds", "say what the sweep varies"
        found.wrong(space.origin, "space", shown(space.plain()), allowed, do)
        return ()
    axes: list[Axis] = []
    for written, node in space.children.items():
        key = SHORT_NAMES.get(written, written)
        found.places[key] = node.origin
        axis = _range(key, node, found) if node.children is not None else _choices(key, node, found)
        if axis is None:
            continue
        if is_grid and isinstance(axis, Range):
            allowed, do = "a list of values where the sampler is grid", "list values, or say sampler: tpe, and trials"
            found.wrong(node.origin, f"space: {key}", "bounds", allowed, do)
        _check_keys(axis, node, fixed, axes, found)
        axes.append(axis)
    return tuple(axes)


def _check_keys(axis: Axis, node: Node, fixed: Mapping[str, str], before: list[Axis], found: Findings) -> None:
    """No key may be set twice: by two axes, or by an axis and for all points; seeds have a place of their own."""
    keys, where = keys_of(axis), f"space: {axis.key}"
    for key in keys - {axis.key}:
        found.places.setdefault(key, node.origin)
    for other in before:
        for key in sorted(keys & keys_of(other)):
            do = "let one of them set it; keys that belong together are one axis of {name, set}"
            found.wrong(node.origin, where, f"{key}, which {other.key} sets too", "one of them", do)
    for key in sorted(keys & set(fixed)):
        do = "take it out of the settings, or of the command line"
        found.wrong(node.origin, where, f"{key}, which is {fixed[key]} for every point", "one of them", do)
    if SEED in keys:
        found.wrong(node.origin, where, SEED, "`seeds: [17, 18]` beside the space", "move them there")


def _range(key: str, node: Node, found: Findings) -> Range | None:
    given: Any = node.plain()
    word, bounds = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else ("", None)
    if word not in _RANGES:
        allowed = f"a list of choices, or one of {', '.join(_RANGES)}: [low, high]"
        found.wrong(node.origin, f"space: {key}", shown(given), allowed, "write {log_uniform: [1.0e-5, 1.0e-3]}")
        return None
    log, whole = _RANGES[word]
    if not (isinstance(bounds, list) and len(bounds) == 2 and all(_is_number(b, whole=whole) for b in bounds)):
        kind = "two whole numbers" if whole else "two numbers"
        found.wrong(node.origin, f"space: {key}", shown(bounds), f"{kind}, [low, high]", "correct the bounds")
        return None
    low, high = bounds
    if low >= high or (log and low <= 0):
        allowed = "low < high" + (", both above 0" if log else "")
        found.wrong(node.origin, f"space: {key}", shown(bounds), allowed, "correct the bounds")
        return None
    return Range(key, low, high, log, whole)


def _is_number(value: Any, *, whole: bool) -> bool:
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _choices(key: str, node: Node, found: Findings) -> Choices | None:
    given = node.value
    if not isinstance(given, list) or not given:
        allowed = "a list of choices, or bounds such as {uniform: [0, 1]}"
        found.wrong(node.origin, f"space: {key}", shown(given), allowed, "write a list")
        return None
    choices = [choice for item in given if (choice := _choice(key, item, node, found))]
    labels = [choice.label for choice in choices]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        found.wrong(node.origin, f"space: {key}", f"{twice[0]} twice", "each choice once", "take one out")
    return Choices(key, tuple(choices)) if choices else None


def _choice(key: str, item: Any, node: Node, found: Findings) -> Choice | None:
    if not isinstance(item, dict):
        return Choice(text_of(item), {key: text_of(item)})
    changed = dict(leaves(item["set"])) if isinstance(item.get("set"), dict) else {}
    if set(item) != {"name", "set"} or not isinstance(item["name"], str) or not changed:
        allowed = "a value, or {name: ..., set: {key: value, ...}}"
        found.wrong(node.origin, f"space: {key}", shown(item), allowed, "give it a name and what it sets")
        return None
    return Choice(item["name"], {SHORT_NAMES.get(name, name): text_of(value) for name, value in changed.items()})


def keys_of(axis: Axis) -> set[str]:
    """The keys that an axis sets."""
    return {axis.key} if isinstance(axis, Range) else {key for choice in axis.choices for key in choice.settings}


def text_of(value: Any) -> str:
    """A value as an override has it.

    Args:
        value: anything plain that YAML can hold.
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
