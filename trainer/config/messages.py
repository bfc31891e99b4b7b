"""Turns what pydantic and the key check find into problems with file, line, key, and what to do."""

from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from trainer.config.augmentation import PARAMS
from trainer.config.fields import Impossible, Section, section_of
from trainer.config.problems import Problem, nearest, place, printable, shown
from trainer.config.schema import Config
from trainer.config.source import Node

_LISTED_KEYS = 14

# pydantic's error type -> (what is allowed, what to do); braces take pydantic's context
_WORDS = {
    "int_type": ("a whole number", "write a whole number, without quotes"),
    "float_type": ("a number", "write a number such as 1.2e-4, without quotes"),
    "finite_number": ("a finite number", "write a number such as 1.2e-4"),
    "bool_type": ("true or false", "write true or false, without quotes"),
    "string_type": ("text", "put it in quotes if it looks like a number"),
    "string_too_short": ("text that is not empty", "give a value or take the line out"),
    "literal_error": ("{expected}", "write one of these"),
    "tuple_type": ("a list", "write a list such as [a, b]"),
    "model_type": ("a map of keys", "put its keys below it, indented"),
    "dict_type": ("a map of keys", "put its keys below it, indented"),
    "missing": ("a value for this key", "add the key"),
    "greater_than": ("more than {gt:.10g}", "correct the value"),
    "greater_than_equal": ("at least {ge:.10g}", "correct the value"),
    "less_than": ("less than {lt:.10g}", "correct the value"),
    "less_than_equal": ("at most {le:.10g}", "correct the value"),
}


def field_of(dotted: str) -> FieldInfo | None:
    """Return the schema's field for a dotted key, or None where nobody knows it.

    Args:
        dotted: a key such as `training.vit_lr`, or a section such as `training`.
    """
    section: type[Section] | None = Config
    field = None
    for name in dotted.split("."):
        field = section.model_fields.get(name) if section else None
        if field is None:
            return None
        section = section_of(field.annotation)
    return field


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every value of the schema.

    Args:
        section: where to start.
        prefix: dotted key of the section, with its last dot.
    """
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        if below is None:
            yield prefix + name
        else:
            yield from all_keys(below, f"{prefix}{name}.")


@cache
def _by_last_name() -> dict[str, str]:
    """Last name -> its dotted key; of several, the one that lies highest (`training.seed` before the digits')."""
    return {key.rpartition(".")[2]: key for key in sorted(all_keys(), key=lambda key: key.count("."), reverse=True)}


def unknown_key(origin: str, dotted: str, section: type[Section]) -> Problem:
    """Return the problem of a key that nobody knows, with the nearest one that somebody does.

    Args:
        origin: where it was written.
        dotted: the whole key.
        section: the model of the section that should have known it.
    """
    parent, _, name = dotted.rpartition(".")
    anywhere = _by_last_name()
    if "." in name or (not parent and name in anywhere):
        guess: str | None = anywhere.get(name)
    elif sibling := nearest(name, section.model_fields):
        guess = f"{parent}.{sibling}" if parent else sibling
    else:
        other = nearest(name, anywhere)
        guess = anywhere[other] if other else None
    keys = list(section.model_fields)
    listed = ", ".join(keys[:_LISTED_KEYS]) + (" ..." if len(keys) > _LISTED_KEYS else "")
    return Problem(
        place(origin, dotted),
        f"{shown(name)}, a key that nobody knows",
        f"a key of {parent or 'the top level'}: {listed}",
        f"did you mean {guess}?" if guess else "correct the key or take it out",
    )


def from_pydantic(error: ValidationError, root: Node) -> list[Problem]:
    """Return pydantic's errors as problems that name file, line, key, value, and what is allowed.

    Args:
        error: what `Config.model_validate` raised.
        root: the tree that was validated.
    """
    return [_translated(details, root) for details in error.errors(include_url=False)]


def _translated(details: ErrorDetails, root: Node) -> Problem:
    """Return one of pydantic's errors as a problem."""
    # pydantic puts the name of an operation behind its place in the list
    loc = details["loc"]
    path = tuple(part for n, part in enumerate(loc) if not (n and isinstance(loc[n - 1], int) and part in PARAMS))
    context = details.get("ctx", {})
    impossible = context.get("error")
    if isinstance(impossible, Impossible):
        path += tuple(impossible.key.split(".")) if impossible.key else ()
        where = place(root.find(path).origin, _dotted(path))
        return Problem(where, impossible.got, impossible.allowed, impossible.do)
    dotted = _dotted(path)
    where = place(root.find(path).origin, dotted)
    if details["type"] in ("extra_forbidden", "union_tag_invalid", "union_tag_not_found"):
        return _unknown_in_a_list(details, where)
    allowed, do = _WORDS.get(details["type"], (details["msg"], "correct the value"))
    allowed = allowed.format(**context)
    field = _field(loc, dotted)
    if field is not None and NoneType in get_args(field.annotation):
        allowed += ", or null"
    if field is not None and field.description:
        allowed += f" ({' '.join(field.description.split()).rstrip('.')})"
    got = "nothing" if details["type"] == "missing" else shown(details["input"])
    return Problem(where, got, allowed, do)


def _field(loc: tuple[int | str, ...], dotted: str) -> FieldInfo | None:
    """Return the schema's field for a value; inside an operation that of its parameter."""
    if "params" in loc[:-1]:
        place_of_name = loc.index("params")
        return PARAMS[str(loc[place_of_name - 1])].model_fields.get(str(loc[place_of_name + 1]))
    return field_of(dotted.partition("[")[0])


def _unknown_in_a_list(details: ErrorDetails, where: str) -> Problem:
    """Return the problem of an operation or a parameter, or of a key of a stage, that nobody knows."""
    if details["loc"][:-2] == ("strategy", "vision", "schedule"):
        got, known = details["loc"][-1], ["from", "blocks"]
    elif details["type"] != "extra_forbidden":
        got, known = details.get("ctx", {}).get("tag", "an operation without a name"), [*PARAMS]
    else:
        *above, got = details["loc"]
        of_params = above[-1] == "params"
        known = [*PARAMS[str(above[-2])].model_fields] if of_params else ["name", "params"]
    guess = nearest(str(got), known)
    return Problem(
        where,
        f"{printable(str(got))}, which nobody knows",
        ", ".join(known),
        f"did you mean {guess}?" if guess else "correct it",
    )


def _dotted(path: tuple[int | str, ...]) -> str:
    """Return pydantic's path as `custom.augmentation.ops[0].name`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
