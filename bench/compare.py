"""Compare two saved runs of ``pytest bench --benchmark-json=FILE`` by ratios, which two machines or days have in common.

python bench/compare.py bench/results/xeon-2.json new.json      # exits with 1 if swl has fallen behind anything by over 25 %
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def ratios(path: Path) -> dict[str, float]:
    """Give how many times as long as swl each contender took."""
    rows = json.loads(path.read_text())["benchmarks"]
    return {f"{row['group']} | {row['extra_info']['contender']}": row["extra_info"]["times_own"] for row in rows}


def main() -> int:
    """Print what has changed by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.25, help="legal loss, as a part (%(default)s)")
    options = parser.parse_args()
    old, new = ratios(options.old), ratios(options.new)
    worse = 0
    for name in old.keys() & new.keys():
        change = new[name] / old[name]
        if change < 1 - options.tolerance or change > 1 / (1 - options.tolerance):
            worse += change < 1
            print(f"{'worse ' if change < 1 else 'better'} {change:6.2f}  {old[name]:8.3g} -> {new[name]:8.3g}  {name}")
    print(f"{len(old.keys() & new.keys())} ratios compared, {worse} of them worse by over {options.tolerance:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
