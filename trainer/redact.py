"""Keeps secrets of the environment out of all that is written down: params, tags, artifacts, messages."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?i)pass(word|wd|phrase)|secret|(api|access|private)_?key|(^|_)(token|pwd|auth|credentials?)($|_)"
)
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/@\s'\"]*:[^/\s'\"]*(?=@)")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:pass|pwd|token|secret|signature|api_?key)[\w.-]*=)[^&\s'\"]+")
_SHORTEST = 6
"""Characters; what is shorter occurs by chance, and hiding it would spoil what was meant to be read."""


class Redactor:
    """Puts `***` in place of every secret it knows."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Know the values of variables whose name says that they are secret, but those that name a file."""
        values = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST
            if not value.isdigit() and not _is_path(value)
        }
        longest_first = sorted(values, key=len, reverse=True)  # one may be a part of another
        self._known = re.compile("|".join(map(re.escape, longest_first))) if values else None

    def text(self, text: str) -> str:
        """A text without the secrets, and without user and password of the addresses in it."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        return _SECRET_QUERY.sub(rf"\1{HIDDEN}", _USER_AND_PASSWORD.sub(HIDDEN, text))

    def tree(self, value: Any) -> Any:
        """The same for every string in maps and lists."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(key): self.tree(part) for key, part in value.items()}
            case list() | tuple():
                return [self.tree(part) for part in value]
            case _:
                return value


class RedactedStream:
    """A text stream that shows no secrets; everything else is that of the stream behind it."""

    def __init__(self, stream: TextIO, redactor: Redactor) -> None:
        """Write to `stream`."""
        self._stream, self._redactor = stream, redactor

    def write(self, text: str) -> int:
        """Write a text without its secrets; returns the length of what was asked for."""
        self._stream.write(self._redactor.text(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream can do."""
        return getattr(self._stream, name)


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long, or with a byte that no name has
        return False


def of_environment() -> Redactor:
    """Of the variables of this process."""
    return Redactor(os.environ)
