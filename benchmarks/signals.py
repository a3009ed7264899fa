"""Two ranks of which one gets a signal: both end after the same step with 143, and one process goes on from there.

    python benchmarks/signals.py [--runs 200]

Each run is that of `tests/train/test_ranks.py`, anew: two processes under gloo, SIGTERM for the second after step 7.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "train")]

import test_ranks  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    failures = []
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            try:
                test_ranks.test_a_signal_in_one_rank_stops_both_after_one_step_and_one_process_goes_on(Path(folder))
            except AssertionError as error:
                failures.append(f"run {number}: {error}")
    load = round(os.getloadavg()[1], 1)
    print(json.dumps({"runs": options.runs, "failures": failures, "load of the last 5 minutes": load}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
