"""Figures of a comparison, as PNG and SVG: the only module here that draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison import AXES, CURVE_FIGURES, Comparison, along
from analysis.curves import Curve, Floats
from analysis.effects import METHODS, QUESTIONS, Effects, Question, domain_values, n_blocks, two_by_twos
from analysis.ranking import TRAINABLE, Ranking, Row
from analysis.settings import BLOCKS, LORA_RANK, METHOD, VIT_LR, number
from analysis.statistics import Estimate
from trainer import names

COSTS = {
    TRAINABLE: ("trainable parameters, M", 1e-6),
    names.PEAK_MEMORY: ("peak memory, GB", 1e-9),
    names.TRAIN_SECONDS: ("hours of training", 1 / 3600),
}

# Okabe and Ito (2008), told apart by the colour-blind; dark and light alternate, and lines and markers differ too, for
# prints in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#8C8C8C")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False, "legend.fontsize": 8, "svg.fonttype": "none",
    "text.parse_math": False, "svg.hashsalt": "analysis",
}  # fmt: skip
_SIZE = (4.6, 3.3)
"""Inches: type of nine points stays legible when a figure is set in one column."""


@dataclass(frozen=True, slots=True)
class Look:
    """How one arm is drawn, in every figure."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each arm, by the alphabet: the same in every figure, whoever wins."""
    return {
        label: Look(_COLOURS[i % 8], _LINES[(i + i // 8) % 8], _MARKERS[(i + 3 * (i // 8)) % 8])
        for i, label in enumerate(sorted(labels))
    }


def draw(comparison: Comparison, folder: Path, axis: str) -> list[Path]:
    """Write all figures for which there is something to draw.

    Args:
        comparison: what is drawn.
        folder: made where it is not there.
        axis: a key of `AXES`.

    Returns:
        The PNG files; an SVG lies beside each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figures: dict[str, Figure | None] = {
            name: curve_figure(comparison, comparison.loss if name == "eval_loss" else metric, label, axis)
            for name, (metric, label) in CURVE_FIGURES.items()
        }
        figures["gap_bars"] = gap_bars(comparison.ranking)
        figures["costs"] = costs(comparison.ranking)
        figures |= {name: sweep(comparison.ranking, name) for name in SWEEPS}
        figures |= {name: interaction(comparison.ranking, q) for name, q in QUESTIONS.items() if q.robustness}
        figures["domains"] = domain_map(comparison.ranking)
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=200)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})  # equal runs give equal files
    return [folder / f"{name}.png" for name in drawn]


def curve_figure(comparison: Comparison, metric: str, label: str, axis: str) -> Figure | None:
    """One metric over an axis: runs thin, their smoothed mean thick, a band from the lowest to the highest seed."""
    figure, plot = _one()
    styles = looks([row.label for row in comparison.ranking.rows])
    drawn = [_draw_arm(plot, comparison, row, styles[row.label], metric, axis) for row in comparison.ranking.rows]
    if not any(drawn):
        return None
    plot.set(xlabel=AXES[axis][2], ylabel=label)
    if metric.startswith(names.LEARNING_RATE):
        plot.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _legend(figure, plot)
    return figure


def _draw_arm(plot: Axes, comparison: Comparison, row: Row, look: Look, metric: str, axis: str) -> bool:
    """One arm; returns whether it had the metric."""
    lines = []
    for reading in row.readings:
        curves = comparison.curves[reading.run.id]
        curve = curves[metric]
        x = along(curve, curves, axis)
        keep = np.isfinite(x) & np.isfinite(curve.values)
        if keep.any():
            lines.append((x[keep], curve.values[keep]))
    if not lines:
        return False
    smooth = metric == names.TRAIN_LOSS  # many noisy rows; an evaluation is over the whole set and is drawn as it is
    for x, y in lines:
        plot.plot(x, y, color=look.colour, linewidth=0.6, alpha=0.35)
        if metric in (names.EVAL_LOSS, names.EVAL_LOSS_SMOOTHED):
            best = int(np.argmin(y))
            plot.plot(x[best], y[best], look.marker, color=look.colour, markersize=5, markerfacecolor="white", zorder=4)
    grid, low, mean, high = over_seeds(lines, smooth=smooth)
    plot.fill_between(grid, low, high, color=look.colour, alpha=0.15, linewidth=0)
    plot.plot(grid, mean, color=look.colour, linestyle=look.line, linewidth=1.6, label=row.label, zorder=3)
    return True


def over_seeds(lines: Sequence[tuple[Floats, Floats]], *, smooth: bool) -> tuple[Floats, Floats, Floats, Floats]:
    """Lowest, mean and highest of several curves where all of them are.

    Args:
        lines: (x, y) of each run, x rising.
        smooth: whether each is smoothed as TensorBoard does first.

    Returns:
        x (n,), lowest (n,), mean (n,), highest (n,).
    """
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    points = np.unique(np.concatenate([x for x, _ in lines]))
    grid = points[(points >= start) & (points <= end)]
    values = []
    for x, y in lines:
        steps = np.arange(len(y), dtype=np.int64)
        values.append(np.interp(grid, x, Curve(steps, y, steps).smoothed().values if smooth else y))
    stacked = np.stack(values)
    return grid, stacked.min(axis=0), stacked.mean(axis=0), stacked.max(axis=0)


def gap_bars(ranking: Ranking) -> Figure | None:
    """The gap as published beside the clean one, with 95 % intervals over seeds."""
    shown = {names.GAP: "as published", names.GAP_CLEAN: "clean: eval minus probe"}
    keys = [key for key in shown if any(row.estimates[key].n for row in ranking.rows)]
    if not keys:
        return None
    figure, plot = _one()
    styles = looks([row.label for row in ranking.rows])
    for place, key in enumerate(keys):
        for index, row in enumerate(ranking.rows):
            found = row.estimates[key]
            plot.bar(
                index + 0.4 * place - 0.2 * (len(keys) - 1), found.mean, 0.38,
                color=styles[row.label].colour, alpha=1 if place == 0 else 0.45, hatch="" if place == 0 else "///",
                edgecolor="white", yerr=_error(found), capsize=2.5, ecolor="#333333", error_kw={"linewidth": 0.8},
            )  # fmt: skip
    plot.set_xticks(range(len(ranking.rows)), [row.label for row in ranking.rows], rotation=20, ha="right")
    plot.set_ylabel("gap, nats per supervised token")
    plot.grid(axis="x", visible=False)
    plot.set_title(
        "; ".join(f"{'full' if i == 0 else 'hatched'}: {shown[key]}" for i, key in enumerate(keys)), fontsize=8
    )
    return figure


def costs(ranking: Ranking) -> Figure | None:
    """The ranked metric against what it cost, and the front of arms that no other beats in both."""
    rows = [row for row in ranking.rows if row.estimates[ranking.by].n]
    keys = [key for key in COSTS if any(row.estimates[key].n for row in rows)]
    if not keys:
        return None
    figure = Figure(figsize=(3.1 * len(keys), 3.1), layout="constrained")
    plots = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    styles = looks([row.label for row in ranking.rows])
    for plot, key in zip(plots, keys, strict=True):
        label, scale = COSTS[key]
        shown = [row for row in rows if row.estimates[key].n]
        for row in shown:
            cost, quality, look = row.estimates[key], row.estimates[ranking.by], styles[row.label]
            plot.errorbar(
                cost.mean * scale, quality.mean, yerr=_error(quality), marker=look.marker, color=look.colour,
                linestyle="none", capsize=2.5, markersize=6, linewidth=0.9, label=row.label,
            )  # fmt: skip
        lower = names.metric(ranking.by).better == "lower"
        front = pareto([(r.estimates[key].mean * scale, r.estimates[ranking.by].mean) for r in shown], lower=lower)
        plot.plot([x for x, _ in front], [y for _, y in front], color="#555555", linewidth=0.9, zorder=1, linestyle=":")
        plot.set_xlabel(label)
    plots[0].set_ylabel(ranking.by)
    _legend(figure, plots[0])
    return figure


def pareto(points: Sequence[tuple[float, float]], *, lower: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: cheaper first, each better than all that cost less.

    Args:
        points: (cost, quality); less cost is better.
        lower: whether a lower quality value is the better one.
    """
    sign = 1 if lower else -1
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * quality < sign * front[-1][1]:
            front.append((cost, quality))
    return front


def domain_map(ranking: Ranking) -> Figure | None:
    """Eval loss by arm and domain at the end of runs, mean over seeds, the lowest of each domain in bold."""
    found = domain_values(ranking)
    domains = sorted({domain for of_arm in found.values() for domain in of_arm})
    if len(domains) < 2:
        return None
    empty: dict[str, float] = {}
    values = np.array([[_mean([*of_arm.get(d, empty).values()]) for d in domains] for of_arm in found.values()])
    figure = Figure(figsize=(1.6 + 0.9 * len(domains), 1.1 + 0.38 * len(found)), layout="constrained")
    plot = figure.subplots()
    shifts = values - np.nanmin(values, axis=0)  # from the best of the domain: domains differ more than arms do
    image = plot.imshow(shifts, cmap="cividis_r", aspect="auto")
    for i, j in np.ndindex(values.shape):
        dark = shifts[i, j] > 0.55 * np.nanmax(shifts)
        plot.text(
            j, i, f"{values[i, j]:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black",
            fontweight="bold" if shifts[i, j] == 0 else "normal",
        )  # fmt: skip
    plot.set_xticks(range(len(domains)), domains)
    plot.set_yticks(range(len(found)), [*found])
    plot.grid(visible=False)
    figure.colorbar(image, ax=plot, label="above the domain's best", shrink=0.9)
    return figure


def interaction(ranking: Ranking, question: Question) -> Figure | None:
    """The ranked metric on the levels of the second factor, a line for each of the first; a panel for each 2x2."""
    found = two_by_twos(ranking, question)
    if not found:
        return None
    figure = Figure(figsize=(_SIZE[0] - 1 + 2.6 * (len(found) - 1), _SIZE[1]), layout="constrained")
    plots = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for plot, effects in zip(plots, found, strict=True):
        _draw_effects(plot, effects, ranking.by)
        plot.set_xlabel(question.second.header)
        if question.within:
            plot.set_title(f"{question.within.header} {effects.within}", fontsize=9)
    plots[0].set_ylabel(ranking.by)
    _legend(figure, plots[0])
    return figure


def _draw_effects(plot: Axes, effects: Effects, by: str) -> None:
    """One 2x2: arms with 95 % intervals over seeds, and thin lines for the seeds that an arm has at both levels."""
    lines, columns = effects.levels
    styles = looks(lines)
    for place, line in enumerate(lines):
        look, rows = styles[line], [effects.cells[line, column] for column in columns]
        x = np.array([0.0, 1.0]) + 0.04 * (place - 0.5)  # beside each other, so that intervals can be read
        left, right = ({reading.block: reading.values[by] for reading in row.readings} for row in rows)
        for block in left.keys() & right.keys():
            plot.plot(x, [left[block], right[block]], color=look.colour, linewidth=0.6, alpha=0.35)
        estimates = [row.estimates[by] for row in rows]
        plot.errorbar(
            x, [one.mean for one in estimates], yerr=_errors(estimates), label=effects.question.first.word(line),
            color=look.colour, linestyle=look.line, marker=look.marker, capsize=2.5, linewidth=1.6, zorder=3,
        )  # fmt: skip
    plot.set_xticks([0, 1], [effects.question.second.word(column) for column in columns])
    plot.set_xlim(-0.3, 1.3)
    plot.grid(axis="x", visible=False)


SWEEPS: dict[str, tuple[str, Callable[[Row], float], tuple[str, ...]]] = {
    "blocks": ("trained vision blocks", n_blocks, (METHOD,)),
    "vit_lr": ("learning rate of the vision part", lambda row: _param(row, VIT_LR), (BLOCKS, METHOD, LORA_RANK)),
    "rank": ("LoRA rank", lambda row: _param(row, LORA_RANK), (BLOCKS, METHOD, VIT_LR)),
}
"""Figure -> label of x, x of an arm, params that arms on one line share."""

_TOLD = {LORA_RANK: "rank ", VIT_LR: "rate "}


def sweep(ranking: Ranking, name: str) -> Figure | None:
    """The ranked metric against one setting: a line for arms that share the others, with 95 % intervals over seeds.

    Of several arms at one place of a line, the best is drawn.
    """
    label, place, shared = SWEEPS[name]
    lines: dict[str, dict[float, Row]] = {}
    for row in ranking.rows:  # the best first
        params = row.readings[0].run.params
        if params.get(METHOD) in METHODS and row.estimates[ranking.by].n and not np.isnan(place(row)):
            text = ", ".join(f"{_TOLD[key]}{_param(row, key):g}" if key in _TOLD else params.get(key, "")
                             for key in shared)  # fmt: skip
            lines.setdefault(text, {}).setdefault(place(row), row)
    lines = {text: dict(sorted(points.items())) for text, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, plot = _one()
    styles = looks([*lines])
    for text, points in lines.items():
        look = styles[text]
        found = [row.estimates[ranking.by] for row in points.values()]
        plot.errorbar(
            [*points], [one.mean for one in found], yerr=_errors(found), label=text, color=look.colour,
            linestyle=look.line, marker=look.marker, capsize=2.5, linewidth=1.2,
        )  # fmt: skip
    if name != "blocks":
        plot.set_xscale("log")
    values = sorted({x for points in lines.values() for x in points})
    plot.set_xticks(values, [f"{x:g}" for x in values])
    plot.set_xticks([], minor=True)
    plot.set(xlabel=label, ylabel=ranking.by)
    _legend(figure, plot)
    return figure


def _param(row: Row, key: str) -> float:
    return number(row.readings[0].run.params.get(key))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _one() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, plot: Axes) -> None:
    """Below the plots, in as many columns as its longest name leaves room for; the figure grows with its rows."""
    handles, labels = plot.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = int(width / (0.55 + 0.062 * max(map(len, labels))))  # inches: a line with its gaps, a letter of 8 points
    columns = max(1, min(3, len(labels), columns))
    figure.set_size_inches(width, height + 0.17 * max(0, -(-len(labels) // columns) - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


def _error(estimate: Estimate) -> float | None:
    return None if np.isnan(estimate.half_width) else estimate.half_width


def _errors(estimates: Sequence[Estimate]) -> list[float]:
    return [0.0 if (error := _error(estimate)) is None else error for estimate in estimates]
