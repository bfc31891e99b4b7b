"""What every section of the configuration is made of: the frozen base model, value types, and their own errors."""

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainer.config.problems import shown

_SPAN = re.compile(r"all|none|last-[1-9]\d{0,3}|\d{1,4}-\d{1,4}|\d{1,4}(,\d{1,4})*", re.ASCII)
_SPAN_ALLOWED = "all, none, last-N (N from 1), A-B (A <= B), or different numbers split by commas, such as 5,11,17"

_GPUS = re.compile(r"\d{1,3}(,\d{1,3})*", re.ASCII)
_GPUS_ALLOWED = "an index from 0, or different ones split by commas, such as 0,1"

_MOST_RANKS = 1024  # more would bring the machine down before they did anything
_RANKS_ALLOWED = f"auto, or a number of ranks: at least 1, at most {_MOST_RANKS}"


class Impossible(ValueError):
    """A value, or two values together, that no run can have; becomes one ConfigError with file and line."""

    def __init__(self, got: str, allowed: str, do: str, key: str = "") -> None:
        """Keep what the message needs.

        Args:
            got: what was found.
            allowed: what would have been accepted.
            do: the one thing to do next.
            key: the key to point at, dotted and relative to the section that raises; empty is the value itself.
        """
        self.got, self.allowed, self.do, self.key = got, allowed, do, key
        super().__init__(got)


def _span(value: object) -> str:
    """Return `blocks` or `layers` in its one text form, from what YAML made of it (`18` is a number there)."""
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        value = ",".join(str(item) for item in value)
    text = re.sub(r"\s+", "", str(value)) if isinstance(value, str) or type(value) is int else ""
    problem = Impossible(shown(value), _SPAN_ALLOWED, "write one of these forms, such as last-6")
    if not _SPAN.fullmatch(text):
        raise problem
    if text.startswith(("all", "none", "last")):
        return text
    if "-" in text:
        first, last = (int(end) for end in text.split("-"))
        if first > last:
            raise problem
        return f"{first}-{last}"
    numbers = [int(number) for number in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise problem
    return ",".join(str(number) for number in numbers)


def _gpus(value: object) -> str:
    """Return GPU indices in their one text form, from what YAML made of them (`0` is a number there)."""
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        value = ",".join(str(item) for item in value)
    text = re.sub(r"\s+", "", str(value)) if isinstance(value, str) or type(value) is int else ""
    numbers = [int(number) for number in text.split(",")] if _GPUS.fullmatch(text) else []
    if not numbers or len(set(numbers)) < len(numbers):
        raise Impossible(shown(value), _GPUS_ALLOWED, "write 0, or 0,1 for two")
    return ",".join(map(str, numbers))


def _ranks(value: object) -> object:
    """Return a number of ranks, or the word `auto`, as it is."""
    if value == "auto" or (type(value) is int and 1 <= value <= _MOST_RANKS):
        return value
    raise Impossible(shown(value), _RANKS_ALLOWED, "write auto, which shares the steps of one rank, or a number")


Gpus = Annotated[str, BeforeValidator(_gpus)]
Ranks = Annotated[Literal["auto"] | int, BeforeValidator(_ranks)]
Span = Annotated[str, BeforeValidator(_span)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Port = Annotated[int, Field(ge=1, le=65535)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Pixels = Annotated[int, Field(ge=1, le=10**18)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML gives lists; frozen models keep tuples


class Section(BaseModel):
    """What every section has in common: frozen, no unknown key, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section model behind a field's annotation (`Strategy | None` included), or None for a plain value."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    models = [item for item in candidates if isinstance(item, type) and issubclass(item, Section)]
    return models[0] if len(models) == 1 else None
