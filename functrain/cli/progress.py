"""What the command shows while a run trains."""

from __future__ import annotations

import rich as _  # noqa: F401  the command's bar needs it: told at once, as every missing package of the extra is

from functrain.train.watching.display import Display, display


def show() -> Display:
    """Return what fits standard output; of the metrics, those that the loss of every run of ours is made of."""
    return display(metrics=("masked_lm_loss", "next_sentence_accuracy", "load_balancing"))


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of show: a young model writes any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
