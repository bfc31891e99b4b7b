"""Markdown: tables and escaped text, and a document with its pictures as one HTML file that needs no network."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

_SPECIAL = re.compile(r"[\\|*`<&\[\]]|(?<!\w)_|_(?!\w)")

_FIGURE = re.compile(r"figures/\w+\.png")

_STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f7; --text: #1c2128; --back: #ffffff; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3b424b; --soft: #22272e; --text: #e3e7ec; --back: #16191e; --link: #7ab7ff; }
  img { background: #ffffff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.4rem; padding-top: .6rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.05rem; }
a { color: var(--link); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; }
th { background: var(--soft); }
img { display: block; width: 100%; max-width: 44rem; height: auto; margin: 1rem 0; }
pre { overflow-x: auto; padding: .8rem; background: var(--soft); font-size: .8125rem; }
code { font-family: ui-monospace, "SFMono-Regular", Consolas, monospace; font-size: .9em; }
@media print { body { max-width: none; } h2 { break-after: avoid; } img, table { break-inside: avoid; } }
"""


def plain(text: str) -> str:
    """Text that Markdown shows as it is: names of runs and values of params may hold anything."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def code(text: str) -> str:
    """Text as a code span, in one line and without what would end it."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; cells are Markdown already."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def html(markdown: str, folder: Path) -> str:
    """A Markdown document as one HTML file.

    Args:
        markdown: the document; HTML in it is shown and not obeyed.
        folder: that its pictures are named from. A PNG with an SVG beside it is drawn from the SVG.

    Returns:
        The page, pictures and style inside.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", _inside(folder, str(child.attrGet("src"))))
    body = parser.renderer.render(tokens, parser.options, {})
    # a wide table scrolls by itself, so that the page does not
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    title = next((line.removeprefix("# ") for line in markdown.splitlines() if line.startswith("# ")), "Report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _inside(folder: Path, name: str) -> str:
    """A picture as a data URI; whatever is not one of the report's own figures is not looked at."""
    path = folder / name
    if not _FIGURE.fullmatch(name) or not path.is_file():
        return "data:,"
    vector = path.with_suffix(".svg")
    kind, data = ("svg+xml", vector) if vector.is_file() else ("png", path)
    return f"data:image/{kind};base64,{base64.b64encode(data.read_bytes()).decode('ascii')}"
