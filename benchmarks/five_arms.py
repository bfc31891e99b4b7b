"""Trains the five arms on several seeds, writes the report that README and docs show, and records the runs.

    python benchmarks/five_arms.py --seeds 17,18,19 --jobs 2      # skips what is already in the store

Each run is its own process with as many threads as fit beside the others. Arms of one seed see the same batches in the
same order (until accumulation differs). Only runs of the code that is checked out count.
"""

import argparse
from pathlib import Path

import recorded
from arms import Arm, train_missing, write_report

from analysis.store import Store
from trainer.provenance import code_version

ROOT = Path(__file__).parents[1]
ARMS = [Arm(name) for name in ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")]


def main() -> None:
    """Train what is missing, then write the report and the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="17,18,19", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "five_arms", help="folder for the report")
    parser.add_argument("--code", default=code_version(), help="commit whose runs count; by default the one here")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    recorded.save(Store(), train_missing(arguments.code, ARMS, seeds, arguments.jobs))
    write_report(arguments.code, arguments.out)


if __name__ == "__main__":
    main()
