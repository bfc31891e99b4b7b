"""The gallery as one HTML file: images inside, shapes as SVG over them, tabs by domain, orders to choose from."""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

from PIL import Image

from analysis.gallery import Gallery, Said, Shown
from trainer.data.answer import in_order
from trainer.data.geometry import bounding_box, corners
from trainer.data.images import read_image
from trainer.data.records import Object

_LONGEST, _QUALITY = 640, 85
"""Pixels of an image's longer side, and JPEG's quality, as it is embedded."""
_NONE = "no domain"

_WORTH = {
    "true": "truth",
    "found": "found: in its place, of its type",
    "misnamed": "in its place, of another type",
    "wrong": "of nothing",
    "missed": "missed",
}

_STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f7; --text: #1c2128; --back: #ffffff; --dim: #59636e;
  --true: #0072b2; --found: #009e73; --misnamed: #e69f00; --wrong: #d55e00; --missed: #cc79a7; }
@media (prefers-color-scheme: dark) { :root { --line: #3b424b; --soft: #22272e; --text: #e3e7ec; --back: #16191e;
  --dim: #9aa4af; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--text); background: var(--back);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header { position: sticky; top: 0; z-index: 2; padding: .8rem 1.2rem; background: var(--back);
  border-bottom: 1px solid var(--line); }
h1 { margin: 0 0 .3rem; font-size: 1.2rem; }
.bar { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; }
.tabs { display: flex; flex-wrap: wrap; gap: .25rem; }
button, select { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: .3rem; padding: .15rem .6rem; }
button[aria-selected=true] { background: var(--text); color: var(--back); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: .9rem; height: .7rem; margin-right: .35rem; border: 2px solid; }
main { padding: 0 1.2rem 4rem; }
article { padding: 1rem 0; border-bottom: 1px solid var(--line); }
article[hidden] { display: none; }
h2 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; } h2 small { color: var(--dim); font-weight: 400; }
.row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(max(11rem, var(--column)), 1fr));
  --column: calc((100% - (var(--columns) - 1) * .8rem) / var(--columns)); }
figure { margin: 0; } figcaption { font-size: .85rem; } figcaption small { color: var(--dim); }
svg { display: block; width: 100%; height: auto; max-height: 26rem; background: var(--soft); }
svg .shape { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2.5; }
svg .halo { fill: none; vector-effect: non-scaling-stroke; stroke-width: 4.5; stroke: #fff; opacity: .75; }
svg text { font-family: system-ui, sans-serif; paint-order: stroke; stroke: #fff; stroke-linejoin: round; fill: #111; }
.true { stroke: var(--true); border-color: var(--true) !important; }
.found { stroke: var(--found); border-color: var(--found) !important; }
.misnamed { stroke: var(--misnamed); border-color: var(--misnamed) !important; }
.wrong { stroke: var(--wrong); border-color: var(--wrong) !important; }
.missed { stroke: var(--missed); stroke-dasharray: 5 4; border: 2px dashed var(--missed) !important; }
details { font-size: .8rem; color: var(--dim); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
.note { color: var(--dim); font-size: .85rem; margin: .2rem 0 0; }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll("article")], main = document.querySelector("main");
const tabs = [...document.querySelectorAll("[role=tab]")], order = document.querySelector("#order");
function show(tab) {
  for (const each of tabs) each.setAttribute("aria-selected", each === tab);
  for (const card of cards) card.hidden = tab.dataset.domain !== "" && card.dataset.domain !== tab.dataset.domain;
}
function sort() {
  const [key, sign] = order.value.split(" ");
  cards.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
  for (const card of cards) main.append(card);
}
for (const tab of tabs) tab.addEventListener("click", () => show(tab));
order.addEventListener("change", sort);
"""


def page(gallery: Gallery) -> str:
    """The whole page.

    Returns:
        HTML that needs no network and no other file.

    Raises:
        DataError: an image has gone.
    """
    domains = sorted({image.record.domain or _NONE for image in gallery.images})
    counts = {domain: sum((i.record.domain or _NONE) == domain for i in gallery.images) for domain in domains}
    arms = ", ".join(f"{label} ({reading.run.name})" for label, reading in gallery.arms.items())
    cards = "".join(_card(image, place) for place, image in enumerate(gallery.images))
    legend = "".join(f'<span><i class="{key}"></i>{escape(text)}</span>' for key, text in _WORTH.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in (f"Runs: {arms}", *gallery.notes))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>Gallery</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{len(gallery.images)} validation images, {len(gallery.arms)} arms beside the truth</h1>\n"
        f'<div class="bar"><div class="tabs" role="tablist">{_tabs(counts)}</div>\n'
        '<label>order <select id="order"><option value="disagreement -1">arms disagree most</option>'
        '<option value="score 1">worst first</option><option value="score -1">best first</option>'
        f'<option value="place 1">as in the file</option></select></label>\n<div class="legend">{legend}</div></div>\n'
        f'{notes}</header>\n<main style="--columns: {len(gallery.arms) + 1}">\n{cards}</main>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _tabs(counts: Mapping[str, int]) -> str:
    tabs = [("", f"all {sum(counts.values())}"), *((domain, f"{domain} {count}") for domain, count in counts.items())]
    return "".join(
        f'<button role="tab" aria-selected="{str(not domain).lower()}" data-domain="{escape(domain)}">'
        f"{escape(text)}</button>"
        for domain, text in tabs
    )


def _card(image: Shown, place: int) -> str:
    record, width = image.record, image.record.size[0]
    picture = f"p{place}"
    truth = _figure("truth", _objects(len(record.objects)), record.size, picture, _truth(image), "")
    said = "".join(_said(label, each, record.size, picture) for label, each in image.said.items())
    number = record.id.rpartition(":")[2]
    return (
        f'<article data-domain="{escape(record.domain or _NONE)}" data-disagreement="{image.disagreement:.4f}" '
        f'data-score="{image.score:.4f}" data-place="{number if number.isdecimal() else place}">\n'
        f"<h2>{escape(record.id)} <small>{escape(record.domain or '')} disagreement {image.disagreement:.2f}, "
        f"F1 {image.score:.2f}</small></h2>\n"
        f'<svg width="0" height="0" style="position:absolute"><defs><image id="{picture}" width="{width}" '
        f'height="{record.size[1]}" preserveAspectRatio="none" href="{_embedded(image)}"/></defs></svg>\n'
        f'<div class="row">{truth}{said}</div>\n</article>\n'
    )


def _truth(image: Shown) -> list[tuple[Object, str]]:
    """Objects in the order of the answer that is to be learned."""
    return [(image.record.objects[place], "true") for place, _ in in_order(image.record, 0, "norm1000")]


def _said(label: str, said: Said, size: tuple[int, int], picture: str) -> str:
    marks = [mark for _, mark in said.objects]
    wrong = len(marks) - marks.count("found")
    told = f"F1 {said.score.f1:.2f}: {marks.count('found')} found, {wrong} wrong, {len(said.missed)} missed"
    told += f"; answer {said.state}" if said.state != "sound" else ""
    shapes = [*((each, "missed") for each in said.missed), *said.objects]
    text = f"<details><summary>answer</summary><pre>{escape(said.text)}</pre></details>"
    return _figure(label, told, size, picture, shapes, text)


def _figure(
    name: str, told: str, size: tuple[int, int], picture: str, shapes: Iterable[tuple[Object, str]], below: str
) -> str:
    drawn = list(shapes)
    letters = max(size) / 26
    paths = "".join(_shape(item, mark) for item, mark in drawn)
    texts = "".join(_text(item, size, letters) for item, mark in drawn if mark != "missed")
    return (
        f'<figure><svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(name)}">'
        f'<use href="#{picture}"/>{paths}'
        f'<g font-size="{letters:.1f}" stroke-width="{letters / 5:.2f}">{texts}</g></svg>'
        f"<figcaption><b>{escape(name)}</b> <small>{escape(told)}</small></figcaption>{below}</figure>"
    )


def _shape(item: Object, mark: str) -> str:
    points = item.geometry.points if item.geometry.kind != "bbox_2d" else corners(item.geometry.points)
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(points[0::2], points[1::2], strict=True))
    tag = "polyline" if item.geometry.kind == "line" else "polygon"
    title = f"<title>{escape(item.desc)} ({_WORTH[mark]})</title>"
    return f'<{tag} class="halo" points="{listed}"/><{tag} class="shape {mark}" points="{listed}">{title}</{tag}>'


def _text(item: Object, size: tuple[int, int], letters: float) -> str:
    """The type and attributes of an object, at its upper left corner, inside the image."""
    x1, y1, _, _ = bounding_box(item.geometry.points)
    text = item.desc if len(item.desc) <= 24 else item.desc[:23] + "…"
    x = max(0.0, min(x1, size[0] - 0.58 * letters * len(text)))
    return f'<text x="{x:.1f}" y="{max(letters, y1 - letters / 4):.1f}">{escape(text)}</text>'


def _objects(number: int) -> str:
    return "1 object" if number == 1 else f"{number} objects"


def _embedded(image: Shown) -> str:
    """An image as a data URI: small ones as they are, large ones as JPEG of `_LONGEST` pixels."""
    picture = read_image(image.record.images[0].path)
    buffer, small = io.BytesIO(), max(picture.size) <= _LONGEST // 2
    if not small:
        picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    picture.save(buffer, "PNG" if small else "JPEG", quality=_QUALITY)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
