"""Reads what probe.py has written in the environments of other trainers, into results/performance/peers.json.

    python benchmarks/peers.py LINES.jsonl 'ms-swift=ms-swift 4.6.0' 'TRL=trl 1.16.0'

After the file come the versions that the page tells, one for each name. Lines of disturbed runs are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from throughput import DISTURBED, save


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("versions", nargs="+", help="NAME=WHAT IS INSTALLED")
    asked = parser.parse_args()
    runs = [json.loads(line) for line in asked.lines.read_text(encoding="utf-8").splitlines()]
    kept = [run for run in runs if run["others"] <= DISTURBED]
    versions = dict(text.split("=", 1) for text in asked.versions)
    if missing := {run["name"] for run in kept} - set(versions):
        sys.exit(f"no versions of {', '.join(sorted(missing))}")
    print(f"{len(kept)} of {len(runs)} runs were not disturbed")
    save("peers", {}, kept, versions=versions)


if __name__ == "__main__":
    main()
