"""Measure this machine for ``deepfuse simulate --calibration``: products, memory, and the link between two processes.

python benchmarks/calibrate.py rates.json               over the loopback
python benchmarks/calibrate.py rates.json --rate 66     over a link of 66 MB/s between network namespaces, as root
deepfuse simulate v3-tiny --device cpu --quantize none --calibration rates.json
"""

import argparse
import json
import math
from pathlib import Path

from predictions import calibration_of, measured_by_ranks
from slow_link import missing

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON to write")
    parser.add_argument("--rate", type=float, default=0.0, help="MB a second of the link, both ways together")
    given = parser.parse_args()
    if not 0 <= given.rate < math.inf:
        parser.error(f"want --rate >= 0, got {given.rate}; without it messages go over the loopback")
    if given.rate and missing():
        parser.error(f"a link with --rate {missing()}; without it messages go over the loopback")
    if not given.out.parent.is_dir():
        parser.error(f"want a file in a folder that exists, got {given.out}")
    (found,) = measured_by_ranks([{"rate": given.rate * 1e6, "tokens": [], "rounds": ROUNDS}])
    found_rates = calibration_of(found)
    given.out.write_text(json.dumps(found_rates, indent=1) + "\n")
    print(json.dumps(found_rates, indent=1))


if __name__ == "__main__":
    main()
