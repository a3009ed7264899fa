"""A model trained by functrain and the module of transformers by torch.optim.AdamW, on the same batches.

    python benchmarks/same_training.py bert --steps 50

Prints the largest relative difference of the losses of a step, of steps in one part and in four.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "models")]

import transformers  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tests/models/MODEL_witness.py")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    witness = importlib.import_module(f"{arguments.model}_witness")
    print("| model | steps | accumulated in | first loss | last loss | largest relative difference of a step |")
    print("|---|---|---|---|---|---|")
    for parts in (1, 4):
        ours, theirs = witness.trained(arguments.steps, parts)
        apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        print(f"| {arguments.model} | {len(ours)} | {parts} | {theirs[0]:.4f} | {theirs[-1]:.4f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
