"""What is wrong with a configuration, collected while it is read and told in one error."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.errors import ConfigError

_SHOWN_CHARACTERS = 120
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, in the four parts of a `UserError`."""

    where: str
    got: str
    allowed: str
    do: str


class ConfigErrors(ConfigError):
    """Several mistakes of one configuration; the four parts are those of the first, the text tells all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Tell every problem, the first 20 in full.

        Args:
            problems: at least one.
        """
        self.problems = tuple(problems)
        first = problems[0]
        super().__init__(first.where, first.got, first.allowed, first.do)
        if len(problems) > 1:
            told = [str(ConfigError(p.where, p.got, p.allowed, p.do)) for p in problems[:_SHOWN_PROBLEMS]]
            rest = len(problems) - len(told)
            more = [f"... and {rest} more"] if rest else []
            self.args = ("\n".join([f"{len(problems)} mistakes in the configuration", *told, *more]),)


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raise all problems as one error, each told once and in the order found.

    Args:
        problems: what was found wrong; nothing happens when empty.

    Raises:
        ConfigErrors: at least one problem.
    """
    if found := tuple(dict.fromkeys(problems)):
        raise ConfigErrors(found)


def place(origin: str, key: str) -> str:
    """Return how a message names a value.

    Args:
        origin: file and line, `-P`, or `default`.
        key: its dotted key.
    """
    return printable(f"-P {key}" if origin == "-P" else f"{origin}: {key}")


def printable(text: str) -> str:
    """Return a name from outside as a message may hold it: line breaks and what moves a terminal's cursor written out.

    Args:
        text: a key, or the name of a file.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, cut where it is long.

    Args:
        value: anything that YAML can hold.
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def counted(number: int, what: str) -> str:
    """Return `1 rank`, `2 ranks`.

    Args:
        number: how many.
        what: one of them.
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a misspelt one most likely means, or None.

    Args:
        word: what was written.
        known: what could have been meant.
    """
    by_case = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(word[:_SHOWN_CHARACTERS].lower(), by_case, n=1, cutoff=0.6)
    return by_case[matches[0]] if matches else None
