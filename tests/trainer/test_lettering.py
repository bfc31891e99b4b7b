"""Text on a drawing: every script has a font, lines fit, and what no font has is told."""

import io
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure

from trainer import lettering
from trainer.lettering import Lettering, shown
from trainer.sheet import style

SCRIPTS = {
    "simplified Chinese": "汽车/红色，大型（左侧车门有划痕）",
    "traditional Chinese": "汽車/紅色，體積龐大",
    "Japanese": "猫/かわいい、ネコ",
    "Korean": "강아지/갈색",
    "Greek, Cyrillic, accents": "αβγ/Жук/é ñ ş",
    "signs": 'a/b,c "d" {e} $x^2$ € × → …',
}


def drawn(text: str, letters: Lettering) -> np.ndarray:
    """A line of text as matplotlib draws it, (height, width, 4); a letter without a font is an error."""
    with mpl.rc_context(style(letters)), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure(figsize=(4, 0.4), dpi=100)
        figure.text(0, 0.5, text, fontsize=12)
        figure.savefig(file := io.BytesIO(), format="rgba")
    return np.frombuffer(file.getvalue(), np.uint8).reshape(40, 400, 4)


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without any font: what remains is matplotlib's own, and the one that comes as a package."""
    Lettering([])  # the package is known to matplotlib from here on
    ours = [entry for entry in font_manager.fontManager.ttflist if entry.name in (lettering._FAMILY, lettering._OWN)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", ours)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_drawn_where_the_system_has_no_font(script: str) -> None:
    """No letter is missing, matplotlib does not warn, and letters look different: boxes would not."""
    letters = Lettering([SCRIPTS[script]])
    assert letters.missing == ""
    assert drawn(SCRIPTS[script], letters)[..., :3].min() < 128
    a, b = SCRIPTS[script][:2]
    assert not np.array_equal(drawn(a, letters), drawn(b, letters))


@pytest.mark.usefixtures("only_ours")
def test_letters_that_no_font_has_are_told() -> None:
    """Each once, and they still take room; what is there is not among them."""
    letters = Lettering(["cat 𒀀 猫 𒀁𒀀"])
    assert letters.missing == "𒀀𒀁"
    assert letters.width("𒀀", 10) > 0


def test_an_installed_font_is_found_by_its_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first choice lacks a letter, another font is added behind it, even one newer than matplotlib's list."""
    Lettering([])
    entries = font_manager.fontManager.ttflist
    (dejavu,) = {str(e.fname) for e in entries if e.name == "DejaVu Sans" and str(e.fname).endswith("DejaVuSans.ttf")
                 and "mpl-data" in str(e.fname)}  # fmt: skip
    monkeypatch.setattr(lettering, "_OWN", "no such font")
    others = [e for e in entries if e.name == lettering._FAMILY]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(others))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [dejavu, __file__])
    letters = Lettering(["猫 ע"])
    assert letters.families == [lettering._FAMILY, "DejaVu Sans"] and letters.missing == ""


@given(st.text('猫汽车，a b/{}":1.\n', max_size=80), st.floats(0.4, 3))
def test_lines_fit_and_nothing_is_lost(text: str, inches: float) -> None:
    """Broken lines are within the width, and together they are the text, but for spaces at their ends."""
    letters = Lettering([text])
    lines = letters.lines(text, inches, 7)
    assert all(letters.width(line, 7) <= inches + 1e-9 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_lines_break_where_words_end() -> None:
    """At spaces and behind commas in Latin text, behind any letter in Chinese, but not before its comma."""
    letters = Lettering([])
    assert letters.lines("one two three four", letters.width("one two thr", 7), 7) == ["one two", "three four"]
    assert letters.lines("[12,34,56]", letters.width("[12,34", 7), 7) == ["[12,", "34,56]"]
    assert letters.lines("汽车，红色", letters.width("汽车", 7) + 0.01, 7) == ["汽", "车，", "红色"]
    assert letters.lines("a\n\nb", 1, 7) == ["a", "", "b"]


@pytest.mark.parametrize("text", ['{"bbox_2d":[57,30],"desc":"AVAV"}', "坐标为相对图像宽高的整数", "1234567890" * 4])
def test_a_measured_width_is_the_drawn_one(text: str) -> None:
    """But for kerning, which makes a line narrower by a percent or so."""
    letters = Lettering([text])
    with mpl.rc_context(style(letters)):
        figure = Figure(figsize=(8, 1), dpi=150)
        line = figure.text(0, 0.5, text, fontsize=6.5)
        figure.canvas.draw()
        found = line.get_window_extent().width / 150
    assert 0.97 * letters.width(text, 6.5) <= found <= 1.002 * letters.width(text, 6.5)


def test_a_long_line_is_shortened_with_an_ellipsis() -> None:
    """It fits; line feeds become spaces; what fits is left as it is."""
    letters = Lettering([])
    assert letters.shortened("short", 2, 7) == "short"
    assert letters.shortened("two\nlines", 2, 7) == "two lines"
    cut = letters.shortened("汽车/红色,大型/停放/左侧车门有划痕", 1, 7)
    assert cut.startswith("汽车/红色") and cut.endswith("…") and letters.width(cut, 7) <= 1


def test_a_line_is_shortened_to_the_last_letter_that_fits_in_few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A description may have 4,000 letters; to measure it again for each letter takes their square."""
    letters = Lettering([])
    for inches in (0.0, 0.05, 1.0, 20.0):
        cut = letters.shortened("iW" * 200, inches, 7)
        fitting = [n for n in range(400) if letters.width(("iW" * 200)[:n] + "…", 7) <= inches]
        assert cut == ("iW" * 200)[: max(fitting, default=0)] + "…"
    measured = []
    monkeypatch.setattr(Lettering, "width", lambda *_: measured.append(1) or 2.0)
    assert letters.shortened("i" * 4000, 1.0, 7) == "…"
    assert len(measured) < 20


def test_what_cannot_be_seen_is_written_out() -> None:
    """Control signs and marks of zero width; spaces of any width and line feeds stay."""
    assert shown("a\tb\x07c\u200dd\u3000e\nf") == "a\\tb\\x07c\\u200dd\u3000e\nf"
