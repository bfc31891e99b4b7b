"""Draws what is known of a data set: token lengths, objects per record, types, image sizes."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.data.statistics import Measured, quantiles, ranked
from trainer.errors import UserError
from trainer.lettering import Lettering
from trainer.validate import Validation

ENDINGS = (".png", ".svg", ".pdf")

_COLOURS = {"train": "#0072B2", "val": "#E69F00", "ood": "#009E73"}  # Okabe and Ito, as in the analysis
_LABEL, _POINTS = 1.5, 9  # inches that a type's name may take, and its size
_MARKERS = {"train": "o", "val": "^", "ood": "s"}
_STYLE: Any = {
    "font.size": _POINTS, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip
_TYPES = 15  # drawn; the rest is counted
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}  # behind text that lies on lines
_FAR = 1.5  # times the longest sample, from which on the limit is said and not drawn

Sets = Mapping[str, Sequence[Measured]]


def check_out(out: Path) -> None:
    """Refuse a picture that could not be written, before anything is read for it.

    Raises:
        UserError: its ending is unknown, or it is a folder.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError("--out", str(out), f"a file that ends in {', '.join(ENDINGS)}", "choose one of these endings")
    if out.is_dir():
        raise UserError("--out", f"{out} is a folder", "a file", "choose another name")


def draw(found: Validation, out: Path) -> None:
    """Write the four panels as one picture; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    letters = Lettering(name for of_set in found.statistics.values() for name in of_set.types)
    with mpl.rc_context(_STYLE | {"font.family": letters.families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # it is drawn as a box
        drawn = panels(found, letters)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(out, dpi=150)
        except OSError as error:
            got = f"{error.filename or out}: {error.strerror or error}"
            raise UserError("--out", got, "a file that can be written", "choose another place") from None


def panels(found: Validation, letters: Lettering) -> Figure:
    """The four panels, `letters` those of the types."""
    sets = {name: each.measured for name, each in found.sets.items() if each.measured}
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (tokens, objects), (types, sizes) = figure.subplots(2, 2)
    _draw_tokens(tokens, sets, found.resolved.config.max_length)
    _draw_objects(objects, sets)
    _draw_types(types, {name: found.statistics[name].types for name in sets}, letters)
    _draw_sizes(sizes, sets)
    if sets:
        figure.legend(*tokens.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_tokens(plot: Axes, sets: Sets, limit: int) -> None:
    """Shares of records by the tokens of their sample, with the limit and quantiles of training."""
    lengths = {name: [each.tokens.whole for each in of_set] for name, of_set in sets.items()}
    longest = max((max(of_set) for of_set in lengths.values()), default=1)
    _histogram(plot, lengths, np.linspace(min((min(s) for s in lengths.values()), default=0), longest + 1, 41))
    edge = plot.get_xaxis_transform()  # x in tokens, y from 0 at the foot to 1 at the top
    near = limit <= _FAR * longest
    if near:
        plot.axvline(limit, color="#D55E00", linewidth=1.4)
        plot.text(
            limit, 1.0, f"limit {limit:,}", transform=edge, ha="center", va="bottom", color="#D55E00", bbox=_PAPER
        )
    if of := quantiles(lengths.get("train", ())):
        for place, (word, value) in enumerate((("median", of.median), ("p90", of.p90), ("p99", of.p99))):
            plot.axvline(value, color="#555555", linewidth=0.8, linestyle=":")
            side = "right" if value > sum(plot.get_xlim()) / 2 else "left"
            plot.text(
                value, 0.97 - 0.08 * place, f"{word} of train {value:,}", transform=edge, va="top", ha=side,
                fontsize=8, color="#333333", bbox=_PAPER,
            )  # fmt: skip
    title = "Token lengths" if near else f"Token lengths (the limit, {limit:,}, lies far to the right)"
    plot.set(xlabel="tokens of a sample", ylabel="% of the set's records")
    plot.set_title(title, pad=16)


def _draw_objects(plot: Axes, sets: Sets) -> None:
    counts = {name: [len(each.record.objects) for each in of_set] for name, of_set in sets.items()}
    most = max((max(of_set) for of_set in counts.values()), default=1)
    step = max(1, most // 30)
    _histogram(plot, counts, np.arange(0.5, most + step + 0.5, step))
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.set(xlabel="objects of a record", ylabel="% of the set's records", title="Objects per record")


def _histogram(plot: Axes, values: Mapping[str, Sequence[int]], edges: np.ndarray) -> None:
    """Outlines, the first set filled: sets of different sizes are compared by shares."""
    for name, of_set in values.items():
        shares = 100 * np.histogram(of_set, edges)[0] / len(of_set)
        if name == "train":
            plot.stairs(shares, edges, fill=True, color=_COLOURS[name], alpha=0.35, label=name)
        else:
            plot.stairs(shares, edges, color=_COLOURS[name], linewidth=1.4, label=name)


def _draw_types(plot: Axes, types: Mapping[str, Mapping[str, int]], letters: Lettering) -> None:
    """Shares of objects by type, a bar a set, the most frequent type of training on top."""
    names = ranked(*types.values())
    shown, rest = names[:_TYPES], names[_TYPES:]
    rows = [[name] for name in shown] + ([rest] if rest else [])
    high = 0.8 / max(1, len(types))
    for place, (name, counts) in enumerate(types.items()):
        total = sum(counts.values())
        shares = [100 * sum(counts.get(each, 0) for each in row) / total for row in rows]
        plot.barh(np.arange(len(rows)) + place * high - 0.4 + high / 2, shares, high, color=_COLOURS[name])
    labels = [letters.shortened(name, _LABEL, _POINTS) for name in shown] + ([f"{len(rest):,} more"] if rest else [])
    plot.set_yticks(range(len(rows)), labels)
    plot.invert_yaxis()
    plot.grid(axis="y", visible=False)
    plot.set(xlabel="% of the set's objects", title="Types")


def _draw_sizes(plot: Axes, sets: Sets) -> None:
    """A mark a size of image, larger where it is more frequent."""
    for name, of_set in sets.items():
        sizes = Counter((picture.width, picture.height) for each in of_set for picture in each.record.images)
        share = np.array([*sizes.values()]) / sizes.total()
        widths, heights = zip(*sizes, strict=True)
        plot.scatter(
            widths, heights, s=12 + 200 * share, marker=_MARKERS[name], alpha=0.6, linewidth=1.2, facecolor="none",
            edgecolor=_COLOURS[name],
        )  # fmt: skip
    plot.update_datalim([(0, 0)])
    plot.autoscale_view()
    plot.set(xlabel="width, pixels", ylabel="height, pixels", title="Image sizes (larger marks: more images)")
