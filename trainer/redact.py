"""Keeps secrets of the environment out of all that is written down: params, tags, artifacts, messages."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?i)pass(word|wd|phrase)|secret|(api|access|account|encryption|private|signing|storage)_?key|connection_?string|"
    r"(^|_)(token|pass|pwd|pat|auth|credentials?)($|_)"
)
_USER_AND_PASSWORD = re.compile(r"(?<=://)(?:[^/\s'\"]+|[^/@\s'\"]*:(?!\d+/)[^@\s'\"]*)(?=@)")
"""Of an address; a password may hold a slash, which the port before a path is told from, and an @."""
HIDDEN_KEYS = "pass|pwd|token|secret|signature|credential|api_?key|odbc_connect"
"""Alternatives of a regular expression: what is in the query of an address is secret where its key holds one."""
_SECRET_QUERY = re.compile(rf"(?i)([?&][\w.-]*(?:{HIDDEN_KEYS})[\w.-]*=)([^&\s'\"]+)")
_TOKEN_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|"
    r"sk-[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})"
)
"""Of Hugging Face, GitHub, GitLab, OpenAI and AWS: secret wherever they stand, also in the name of a folder."""
_SHORTEST = 6
"""Characters; what is shorter occurs by chance, and hiding it would spoil what was meant to be read."""
_COMMON = {"mlflow", "postgres", "postgresql", "sqlite", "trainer", "training", "vision"}
"""Passwords that hide nothing from anybody, and whose absence from all texts would spoil these too."""


class Redactor:
    """Puts `***` in place of every secret it knows."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Know the values of variables whose name says that they are secret, but those that name a file; and the
        passwords in the addresses of all others.
        """
        secrets = {value for name, value in environment.items() if _SECRET_NAME.search(name) and not _is_path(value)}
        secrets |= {secret for value in environment.values() for secret in _passwords(value)}
        spellings = {spelling for secret in secrets for spelling in _spellings(secret.strip())}
        longest_first = sorted(spellings, key=len, reverse=True)  # one may be a part of another
        self._known = re.compile("|".join(map(re.escape, longest_first))) if spellings else None

    def text(self, text: str) -> str:
        """A text without the secrets, and without user and password of the addresses in it."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _TOKEN_SHAPES.sub(HIDDEN, _USER_AND_PASSWORD.sub(HIDDEN, text))
        return _SECRET_QUERY.sub(rf"\1{HIDDEN}", text)

    def tree(self, value: Any) -> Any:
        """The same for every string in maps and lists; the keys of maps are our own."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {key: self.tree(part) for key, part in value.items()}
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

    def writelines(self, lines: Iterable[str]) -> None:
        """Write some lines in the same way."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream can do."""
        return getattr(self._stream, name)


def _passwords(text: str) -> Iterator[str]:
    """The secrets in the addresses that a text holds."""
    for address in _USER_AND_PASSWORD.findall(text):
        yield address.partition(":")[2]
    for _, value in _SECRET_QUERY.findall(text):
        yield value


def _spellings(secret: str) -> set[str]:
    """A secret as it may stand in a text, in an address and in JSON; nothing of one that would occur by chance."""
    if len(secret) < _SHORTEST or secret.isdigit() or secret.lower() in _COMMON:
        return set()
    bare = {secret, unquote(secret)}
    return {spelt for plain in bare for spelt in (plain, quote(plain, safe=""), json.dumps(plain)[1:-1])}


def _is_path(value: str) -> bool:
    try:
        return os.sep in value and Path(value).exists()  # a folder may be called like the token it was made for
    except (OSError, ValueError):  # too long, or with a byte that no name has
        return False


def of_environment() -> Redactor:
    """Of the variables of this process."""
    return Redactor(os.environ)
