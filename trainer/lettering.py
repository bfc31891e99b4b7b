"""Text on a drawing: which fonts have its letters, how wide it is, where its lines break."""

import contextlib
import importlib.util
import string
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry, FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

# Matplotlib brings no Chinese, Japanese or Korean. Noto Sans CJK (SIL Open Font License) comes as a package; its Latin
# letters go with its Chinese ones, so it is the first choice for all text.
_PACKAGE, _FILE, _FAMILY = "noto_cjk_sans_otc", "NotoSansCJK-Regular.ttc", "Noto Sans CJK SC"
_OWN = "DejaVu Sans"
_STAND_IN = "Last Resort"
"""Of matplotlib: draws any letter that no font has as a box with the name of its script; no font to be found here."""

_ALWAYS = string.ascii_letters + string.digits + string.punctuation + "…"
_BREAKS = " ,;/-，。、；：）」』》】"
_WIDE = "\u2e80"
"""From here on a line may break behind any letter."""
_POINTS_AN_INCH = 72
_REFERENCE = 10.0
"""Points at which letters are measured; widths grow with the size."""


class Lettering:
    """Fonts that together have the letters of some texts, and the measures of text set in them."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Find fonts; what is installed is looked through only for letters that ours do not have."""
        needed = {letter for text in (_ALWAYS, *texts) for letter in shown(text) if not letter.isspace()}
        self.families: list[str] = []
        """Names of fonts, the preferred one first."""
        for entry in _candidates():
            if found := _letters_of(entry, needed) if needed else set():
                self.families.append(entry.name)
                needed -= found
        self.missing = "".join(sorted(needed))
        """Letters that no font here has; they are drawn as boxes."""
        self._widths: dict[str, float] = {}
        self._properties = FontProperties(family=self.families, size=_REFERENCE)

    def width(self, text: str, points: float) -> float:
        """Inches that a line takes at a size; kerning may make it a little narrower."""
        return sum(map(self._width, text)) * points / _POINTS_AN_INCH

    def lines(self, text: str, inches: float, points: float) -> list[str]:
        """Break text into lines of at most `inches`, where it has line feeds and where words or signs end."""
        room = inches * _POINTS_AN_INCH / points
        return [line for paragraph in shown(text).split("\n") for line in self._broken(paragraph, room)]

    def shortened(self, text: str, inches: float, points: float) -> str:
        """One line of at most `inches`; where letters are left out it ends with an ellipsis."""
        line = " ".join(shown(text).split())
        if self.width(line, points) <= inches:
            return line
        kept = bisect_right(range(1, len(line)), inches, key=lambda n: self.width(line[:n] + "…", points))
        return line[:kept].rstrip() + "…"

    def _broken(self, paragraph: str, room: float) -> Iterator[str]:
        begin, may_break, used = 0, 0, 0.0
        for place, letter in enumerate(paragraph):
            used += self._width(letter)
            if used > room and place > begin:
                end = may_break if may_break > begin else place
                yield paragraph[begin:end].rstrip()
                begin, used = end, sum(map(self._width, paragraph[end : place + 1]))
            following = paragraph[place + 1 : place + 2]
            if (letter in _BREAKS or letter >= _WIDE) and (not following or following not in _BREAKS):
                may_break = place + 1
        yield paragraph[begin:]

    def _width(self, letter: str) -> float:
        """Width at a size of one point, in points."""
        if letter not in self._widths:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of letters without a font, which are told in `missing`
                width, _, _ = text_to_path.get_text_width_height_descent(letter, self._properties, ismath=False)
            self._widths[letter] = width / _REFERENCE
        return self._widths[letter]


def shown(text: str) -> str:
    """Text with what cannot be seen written out: control signs, marks of zero width."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )  # fmt: skip


def _candidates() -> Iterator[FontEntry]:
    """Ours first, then upright fonts of normal weight among those that matplotlib finds, by name."""
    _add_package()
    entries = sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, str(entry.fname)))
    for family in (_FAMILY, _OWN):
        yield from [entry for entry in entries if entry.name == family and _is_upright(entry)][:1]
    for entry in chain(entries, _installed_since(entries)):
        if entry.name not in (_FAMILY, _OWN) and not entry.name.startswith(_STAND_IN) and _is_upright(entry):
            yield entry


def _installed_since(known: list[FontEntry]) -> Iterator[FontEntry]:
    """Fonts of the system that are newer than the list which matplotlib keeps of them."""
    manager = font_manager.fontManager
    for path in sorted({*font_manager.findSystemFonts()} - {str(entry.fname) for entry in known}):
        before = len(manager.ttflist)
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # bitmap fonts, and what is no font
            manager.addfont(path)
        yield from manager.ttflist[before:]


def _is_upright(entry: FontEntry) -> bool:
    return entry.style == "normal" and entry.weight in (400, "normal", "regular")


@cache
def _add_package() -> None:
    """Tell matplotlib of the font that comes as a package; without it the installed ones have to do."""
    found = importlib.util.find_spec(_PACKAGE)
    for folder in found.submodule_search_locations or () if found else ():
        font_manager.fontManager.addfont(Path(folder) / _FILE)


def _letters_of(entry: FontEntry, needed: set[str]) -> set[str]:
    """Those that a font has; none where its file has gone or is a bitmap font."""
    try:
        font = FT2Font(entry.fname, face_index=entry.index)
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in needed if font.get_char_index(ord(letter))} if font.scalable else set()
