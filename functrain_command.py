"""The command `functrain` up to its command's name: help and a wrong name need no torch, which takes seconds to load.

This file lies beside the package, since importing any module in it imports all of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "pre-train a language model on text, or go on with a run that was stopped",
    "presets": "list what train knows by name, or print the config of one",
    "generate": "let a model continue a prompt, shown as it comes",
    "evaluate": "compute a model's loss on a text",
    "inspect": "show what a run, a checkpoint, a model's folder or a safetensors file holds",
    "plot": "draw the learning curves of runs",
    "profile": "show where the time and the memory of a training step go",
    "dry-run": "rehearse a step on any mesh of GPUs, without one: memory, collectives, time",
    "verify": "read every byte of a run's checkpoints, or of a file, and say what is broken",
    "export": "write a run's model as a folder that transformers loads",
}
USAGE = "usage: functrain COMMAND [OPTIONS]\n\n" + "".join(f"  {n:10}{what}\n" for n, what in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as `functrain.cli` says."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE + "\n`functrain COMMAND --help` tells more.", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"functrain {version('functrain')}")
        return 0
    if words[0] not in COMMANDS:
        print(f"functrain: no command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if words[0] == "profile":
        # read when torch is loaded: its profiler warns of memory that is older than it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from functrain.cli import run

    return run(words)
