"""Simulates how often the intervals of `analysis` hold the truth, and how often its verdicts are wrong or find nothing.

    python benchmarks/coverage.py        # about two minutes

Prints Markdown. The real residuals are those of the recorded runs of the five arms (`results/five_arms`). Losses are
arm + seed + noise: arms of one seed see the same batches and share its effect.
"""

import argparse
from collections.abc import Callable

import numpy as np
import recorded
from rich.progress import track

from analysis.ranking import At, Reading, arms, read
from analysis.statistics import all_differences, difference, estimate
from trainer import names

SEEDS = (3, 5, 10)
ARMS = 5
LOSS = 0.57
NOISE = 0.0045
"""Deviation over seeds of an arm's eval loss on pocket, without what arms share; nats per supervised token."""
SHARED = 0.002
"""Deviation of what the arms of a seed share."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

DRAWS: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "heavy tails (t with 3 degrees of freedom)": lambda generator, shape: generator.standard_t(3, shape) / np.sqrt(3),
    "skewed (exponential)": lambda generator, shape: generator.exponential(size=shape) - 1,
}


def coverage(draw: Draw, n: int, trials: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Percent of 95 % intervals that hold the truth: a mean, a paired difference, Welch's with deviations 1 and 3."""
    hits = np.zeros(3)
    for _ in range(trials):
        a, b = draw(generator, (2, n))
        mean = estimate(a)
        paired = difference("a", "b", {"a": by_seed(a), "b": by_seed(b)}).estimate
        welch = difference("a", "b", {"a": by_seed(a), "b": by_seed(3 * b, "other ")}).estimate
        hits += [found.low <= 0 <= found.high for found in (mean, paired, welch)]
    mean_, paired_, welch_ = 100 * hits / trials
    return float(mean_), float(paired_), float(welch_)


def verdicts(
    draw: Draw, n: int, shift: float, trials: int, generator: np.random.Generator, unequal: bool = False
) -> float:
    """Percent of verdicts over five arms that call a pair different: any pair of equal arms, or the one that is.

    Args:
        draw: noise of deviation 1.
        n: seeds.
        shift: by which the first arm is better, nats per supervised token; 0: all are equal.
        trials: simulated comparisons.
        generator: of all draws.
        unequal: whether arms have deviations of 0.5 to 3 times the usual.
    """
    scale = NOISE * (np.linspace(0.5, 3, ARMS) if unequal else np.ones(ARMS))
    found = 0
    for _ in range(trials):
        losses = LOSS + SHARED * generator.normal(size=n) + scale[:, None] * draw(generator, (ARMS, n))
        losses[0] -= shift
        pairs = all_differences({str(arm): by_seed(of_arm) for arm, of_arm in enumerate(losses)})
        told = [pair.distinguishable for pair in pairs if shift == 0 or {pair.first, pair.second} == {"0", "1"}]
        found += any(told)
    return 100 * found / trials


def by_seed(values: np.ndarray, prefix: str = "") -> dict[str, float]:
    """A block a value."""
    return {f"{prefix}{seed}": float(value) for seed, value in enumerate(values)}


def residuals() -> np.ndarray:
    """Final eval losses of the recorded runs minus their arm's mean, scaled to deviation 1."""
    readings = [r for r in (read(run, names.EVAL_LOSS, At(), {}) for run in recorded.runs()) if isinstance(r, Reading)]
    left = []
    for members in arms(readings).values():
        values = np.array([reading.values[names.EVAL_LOSS] for reading in members])
        if len(values) > 1:
            left += list((values - values.mean()) * np.sqrt(len(values) / (len(values) - 1)))
    found = np.array(left)
    print(f"{len(found)} residuals of real runs, deviation {found.std():.4f} nats per supervised token.\n")
    return found / found.std()


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000, help="simulated comparisons behind each number")
    arguments = parser.parse_args()
    pool = residuals()
    draws = DRAWS | {"residuals of real runs": lambda generator, shape: generator.choice(pool, shape)}
    generator = np.random.default_rng(20261125)
    cells = [(name, n) for name in draws for n in SEEDS]
    lines = [
        "| noise | seeds | mean | paired | Welch, deviations 1 and 3 | false verdicts | the same, unequal noise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, n in track(cells, "coverage"):
        held = coverage(draws[name], n, arguments.trials, generator)
        wrong = [verdicts(draws[name], n, 0.0, arguments.trials // 4, generator, unequal) for unequal in (False, True)]
        lines.append(f"| {name} | {n} | " + " | ".join(f"{value:.1f} %" for value in (*held, *wrong)) + " |")
    lines += [
        "",
        "| true difference | " + " | ".join(f"{n} seeds" for n in SEEDS) + " |",
        "| --- |" + " --- |" * len(SEEDS),
    ]
    for percent in (1, 2, 5):
        shift = percent / 100 * LOSS
        found = [verdicts(draws["normal"], n, shift, arguments.trials // 4, generator) for n in SEEDS]
        lines.append(f"| {percent} % | " + " | ".join(f"{value:.0f} %" for value in found) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
