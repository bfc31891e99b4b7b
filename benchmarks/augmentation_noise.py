"""Runs the 2x2 of experiments/sweeps/augmentation.yaml: does noisy augmentation cost LoRA less than full fine-tuning?

    python benchmarks/augmentation_noise.py --jobs 2              # skips what is already in the store

Clean and noisy runs of one seed see the same records in the same order, turned and zoomed alike.
"""

import argparse
from itertools import product
from pathlib import Path

import yaml
from arms import Arm, train_missing, write_report

from trainer.provenance import code_version

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "experiments" / "sweeps" / "augmentation.yaml"


def main() -> None:
    """Train what is missing, then write the report."""
    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    strategies = sweep["space"].pop("strategy")
    seeds = ",".join(map(str, sweep["seeds"]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=seeds, help="comma-separated; by default those of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "augmentation_noise", help="folder for the report")
    parser.add_argument("--code", default=code_version(), help="commit whose runs count; by default the one here")
    arguments = parser.parse_args()
    arms = [
        Arm(strategy, dict(zip(sweep["space"], values, strict=True)))
        for strategy, values in product(strategies, product(*sweep["space"].values()))
    ]
    train_missing(arguments.code, arms, [int(seed) for seed in arguments.seeds.split(",")], arguments.jobs)
    write_report(arguments.code, arguments.out)


if __name__ == "__main__":
    main()
