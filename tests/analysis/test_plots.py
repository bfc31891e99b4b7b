"""Figures: what is computed before anything is drawn, one look an arm, and files that are there and whole."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from analysis.comparison import CURVES_NEEDED, Comparison, along, default_axis
from analysis.curves import Curve, last_write_wins
from analysis.plots import costs, curve_figure, draw, looks, over_seeds, pareto, sweep
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.tables import render
from tests.analysis.test_ranking import run


def curve(points: dict[int, float]) -> Curve:
    """Step -> value."""
    return last_write_wins([(step, step, value) for step, value in points.items()])


def comparison(per_step: dict[str, int], *, seeds: int = 2) -> Comparison:
    """Arms that take so many samples a step, and end at step 20."""
    found, curves = [], {}
    for place, (arm, samples) in enumerate(per_step.items()):
        for seed in range(seeds):
            loss = 0.5 + 0.1 * place + 0.01 * seed
            metrics = {
                "eval/loss": loss, "samples_seen": 20.0 * samples, "generalization_gap": 0.1, "train_seconds": 60.0,
                "eval/loss_by_domain/street": loss, "eval/loss_by_domain/field": 2 * loss,
            }  # fmt: skip
            one = run(arm, seed, metrics=metrics, last_step=20, params={"trainable_parameters/total": str(10 + place)})
            reading = read(one, "eval/loss", At(), {})
            assert isinstance(reading, Reading)
            found.append(reading)
            curves[one.id] = {metric: curve({}) for metric in CURVES_NEEDED} | {
                "eval/loss": curve({0: 0.9, 10: loss - 0.05, 20: loss}),
                "train/loss": curve({1: 0.9, 20: loss - 0.1}),
                "samples_seen": curve({0: 0, 1: samples, 10: 10 * samples, 20: 20 * samples}),
            }
    ranking = rank(found, "eval/loss", At())
    return Comparison(ranking, curves)


def test_the_axis_is_samples_where_steps_are_not_equal_work() -> None:
    """Accumulation 2 and 4: equal steps are not equal samples."""
    assert default_axis(comparison({"a": 16, "b": 16}).ranking) == "steps"
    assert default_axis(comparison({"a": 16, "b": 32}).ranking) == "samples"


def test_points_lie_where_the_counter_stood() -> None:
    """Step 5 lies between the rows of 0 and 160 samples; beyond the last row, or without a counter, nowhere."""
    counter = curve({0: 0.0, 10: 160.0})
    values = curve({0: 1.0, 5: 0.9, 10: 0.8, 11: 0.7})
    x = along(values, {"samples_seen": counter}, "samples")
    assert x[:3].tolist() == [0, 80, 160] and math.isnan(x[3])
    assert along(values, {}, "steps").tolist() == [0, 5, 10, 11]
    assert np.isnan(along(values, {"samples_seen": curve({})}, "samples")).all()


def test_a_mean_over_seeds_is_drawn_where_all_of_them_are() -> None:
    """From the latest start to the earliest end; between points, straight lines."""
    one = (np.array([0.0, 10, 20]), np.array([1.0, 0.8, 0.6]))
    other = (np.array([5.0, 15]), np.array([1.1, 0.5]))
    x, low, mean, high = over_seeds([one, other], smooth=False)
    assert x.tolist() == [5, 10, 15]
    np.testing.assert_allclose(low, [0.9, 0.8, 0.5])
    np.testing.assert_allclose(mean, [1.0, 0.8, 0.6])
    np.testing.assert_allclose(high, [1.1, 0.8, 0.7])


@pytest.mark.parametrize(("lower", "front"), [(True, [(1, 5), (2, 3), (4, 1)]), (False, [(1, 5), (3, 6)])])
def test_the_pareto_front_by_hand(lower: bool, front: list[tuple[float, float]]) -> None:
    """(3, 6) costs more than (2, 3) and is worse; of two at one cost, the better one."""
    assert pareto([(3, 6), (1, 5), (4, 1), (2, 3), (2, 4)], lower=lower) == front


def test_an_arm_looks_the_same_whoever_wins() -> None:
    """Colour, line and marker follow the name and not the rank; no two arms of eight share any."""
    assert looks(["b", "a", "c"]) == looks(["c", "b", "a"])
    eight = looks([f"arm{i}" for i in range(8)]).values()
    assert len({look.colour for look in eight}) == len({look.line for look in eight}) == len({*eight}) == 8


def test_all_figures_that_can_be_drawn_are_written(tmp_path: Path) -> None:
    """PNG that opens and is not blank, SVG beside it; drawn twice, the SVG is the same file."""
    found = comparison({"a": 16, "b": 32})
    paths = draw(found, tmp_path, "samples")
    assert [path.stem for path in paths] == ["eval_loss", "train_loss", "gap_bars", "costs", "domains"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    first = {path: path.with_suffix(".svg").read_bytes() for path in paths}
    assert {path: path.with_suffix(".svg").read_bytes() for path in draw(found, tmp_path, "samples")} == first
    assert all(b">a</text>" in text for path, text in first.items() if path.stem == "eval_loss")


def test_long_names_stay_inside_the_figure(tmp_path: Path) -> None:
    """Four arms named with their settings: fewer columns, more rows, nothing cut off."""
    arms = [
        f"last6_{method} (augmentation {mode})" for method in ("lora", "full") for mode in ("clean", "published_noisy")
    ]
    figure = curve_figure(comparison(dict.fromkeys(arms, 16)), "eval/loss", "eval loss", "steps")
    assert figure is not None
    figure.savefig(tmp_path / "figure.png")
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and len(legend.get_texts()) == 4


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A regular expression is no formula, and a bracket no markup: neither a traceback nor lost text."""
    hostile = r".*\.(qkv)$|.*_x^{$ [/red]"
    found = comparison({hostile: 16, "b": 32})
    paths = draw(found, tmp_path, "samples")
    assert b"(qkv)$|.*_x^{$" in (tmp_path / "eval_loss.svg").read_bytes() and len(paths) == 5
    console = Console(width=300, record=True, file=io.StringIO())
    render(found.ranking, console)
    assert hostile in console.export_text()


def test_what_was_not_logged_is_not_drawn(tmp_path: Path) -> None:
    """No domain, no gap, no curve: no figure, no error."""
    reading = read(run(), "eval/loss", At(), {})
    assert isinstance(reading, Reading)
    ranking = rank([reading], "eval/loss", At())
    empty = {reading.run.id: {metric: curve({}) for metric in CURVES_NEEDED}}
    assert draw(Comparison(ranking, empty), tmp_path, "steps") == []


def test_costs_of_arms_without_a_value_are_not_drawn() -> None:
    """Every seed has diverged: parameters are known, and nothing that they could be drawn against."""
    reading = read(run("arm", 1, math.nan, params={"trainable_parameters/total": "10"}), "eval/loss", At(), {})
    assert isinstance(reading, Reading)
    assert costs(rank([reading], "eval/loss", At())) is None


def swept(settings: list[tuple[str, str, str, str]]) -> Ranking:
    """Arms of (blocks, method, vit_lr, rank), each with two seeds."""
    found = []
    for place, (blocks, method, rate, lora_rank) in enumerate(settings):
        n = 24 if blocks == "all" else int(blocks.removeprefix("last-"))
        params = {
            "strategy.vision.blocks": blocks, "strategy.vision.method": method, "training.vit_lr": rate,
            "tuner.lora_rank": lora_rank, "vision.blocks_resolved": str([*range(24 - n, 24)]),
        }  # fmt: skip
        for seed in (1, 2):
            one = read(run("arm", seed, 0.5 + 0.01 * place + 0.001 * seed, params=params, id=f"{place}-{seed}"),
                       "eval/loss", At(), {})  # fmt: skip
            assert isinstance(one, Reading)
            found.append(one)
    return rank(found, "eval/loss", At())


def lines_of(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y of each line of a sweep."""
    (plot,) = figure.axes
    return {
        str(container.get_label()): (container.lines[0].get_xdata().tolist(), container.lines[0].get_ydata().tolist())
        for container in plot.containers
    }


def test_a_sweep_is_a_line_of_arms_that_share_the_rest() -> None:
    """Three depths by LoRA, two rates at last-6, two ranks at last-6: a line each; arms alone are on none."""
    ranking = swept(
        [("last-4", "lora", "1e-4", "16"), ("last-6", "lora", "1e-4", "16"), ("last-8", "lora", "1e-4", "16"),
         ("last-6", "lora", "2e-4", "16"), ("last-6", "lora", "1e-4", "32"), ("all", "full", "3e-5", "16")]
    )  # fmt: skip
    by_blocks = lines_of(sweep(ranking, "blocks"))
    assert by_blocks == {"lora": ([4, 6, 8], pytest.approx([0.5015, 0.5115, 0.5215]))}  # at six, the best of three
    rates = lines_of(sweep(ranking, "vit_lr"))
    assert rates == {"last-6, lora, rank 16": ([1e-4, 2e-4], pytest.approx([0.5115, 0.5315]))}
    ranks = lines_of(sweep(ranking, "rank"))
    assert ranks == {"last-6, lora, rate 0.0001": ([16, 32], pytest.approx([0.5115, 0.5415]))}


def test_without_a_sweep_there_is_no_such_figure() -> None:
    """Two arms that differ in everything."""
    ranking = swept([("last-6", "lora", "1e-4", "16"), ("all", "full", "3e-5", "16")])
    assert [sweep(ranking, name) for name in ("blocks", "vit_lr", "rank")] == [None] * 3
