"""Markdown and the page made of it: what is text stays text, and nothing is fetched."""

import base64
import re
from pathlib import Path

import pytest

from analysis.page import code, html, plain, table

HOSTILE = "a|b &copy; <script>alert(1)</script> `c` *d* [e](http://f) \\ _g_ last6_lora\nnew"


def test_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """Names and values come from anywhere: no cell breaks, no markup, no link, no script."""
    page = html("\n".join(table(["x", "y"], [[plain(HOSTILE), "2"]])), tmp_path)
    (cells,) = re.findall(r"<tr>\n<td>(.*?)</td>\n<td>(.*?)</td>\n</tr>", page, re.DOTALL)
    shown = cells[0].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == HOSTILE.replace("\n", " ") and cells[1] == "2"


@pytest.mark.parametrize("vector", [True, False])
def test_pictures_are_inside(tmp_path: Path, vector: bool) -> None:
    """As SVG where there is one, else as PNG; nothing on the page names a file or an address."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(b"png")
    if vector:
        (tmp_path / "figures" / "one.svg").write_bytes(b"svg")
    page = html("# Title & more\n\n![What it shows](figures/one.png)\n", tmp_path)
    kind, data = re.findall(r'<img src="data:image/([a-z+]+);base64,([^"]+)" alt="What it shows"', page)[0]
    assert (kind, base64.b64decode(data)) == (("svg+xml", b"svg") if vector else ("png", b"png"))
    assert "<title>Title &amp; more</title>" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page.lower().replace("http-equiv", "")


@pytest.mark.parametrize("name", ["/etc/hostname", "figures/../secret.png", "secret.png", "figures/none.png"])
def test_only_the_reports_own_figures_are_taken_in(tmp_path: Path, name: str) -> None:
    """A tag or param that holds an image of its own reads no file of whoever writes the report."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    page = html(f"![x]({name})\n", tmp_path)
    assert 'src="data:,"' in page and base64.b64encode(b"secret").decode() not in page


def test_a_code_span_cannot_be_left(tmp_path: Path) -> None:
    """Backticks, pipes and new lines in a value stay inside."""
    page = html("\n".join(table(["x"], [[code("a` ![y](/etc/hostname) `|b\n\nc")]])), tmp_path)
    assert "<img" not in page and "<code>a' ![y](/etc/hostname) '|b c</code>" in page
