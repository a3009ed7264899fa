"""Models beside those of transformers, of configs that are drawn: results, gradients, and folders written back.

    python benchmarks/parity.py bert --configs 200

A difference above the bounds, 2e-5 of the largest result and 2e-4 of the largest gradient, raises. Prints a table row.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "models")]

import parity  # noqa: E402
import transformers  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tests/models/MODEL_witness.py")
    parser.add_argument("--configs", type=int, default=200)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    witness = importlib.import_module(f"{arguments.model}_witness")
    found: list[dict[str, float]] = []

    @settings(
        deadline=None, derandomize=True, database=None, max_examples=arguments.configs, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=witness.cases(), shards=st.booleans())
    def run(case: parity.Case, shards: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found.append(parity.check(case, Path(folder), shards=shards))

    run()
    print("| model | configs | largest difference of results | of gradients | saved back |")
    print("|---|---|---|---|---|")
    largest = [max(one[name] for one in found) for name in ("results", "gradients")]
    print(f"| {arguments.model} | {len(found)} | {largest[0]:.1e} | {largest[1]:.1e} | bit for bit |")


if __name__ == "__main__":
    main()
