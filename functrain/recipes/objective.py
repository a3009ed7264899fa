"""What a run needs of an objective: a module with these functions, such as `next_tokens` and `masked_pairs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import functrain as ft
from functrain.progress import Progress
from functrain.recipes.config import Config
from functrain.recipes.model_config import Model
from functrain.recipes.texts import Bar, FirstBatches, Sides
from functrain.train import Hook


class Objective(Protocol):
    """Text to batches, and numbers to words. `texts` is what `encode` returns, each objective's own, and has a
    `tokenizer` and a `validation`, which is `text` for what measures an evaluation."""

    @property
    def FLOAT32(self) -> Mapping[str, torch.dtype]:
        """Leaves of a batch that are no part of what is computed in half precision."""

    def tokenizer_of(self, side: ft.data.Corpus, vocabulary: int, progress: Progress | None) -> ft.data.Tokenizer:
        """Learn a tokenizer of the side to train on."""

    def check(self, sides: Sides, tokenizer: ft.data.Tokenizer, context: int) -> str | None:
        """Raise for texts that are too short, before anything is written; return what is to be told."""

    def encode(self, sides: Sides, tokenizer: ft.data.Tokenizer, config: Config, run: Path, bar: Bar) -> Any:
        """Encode both sides."""

    def batches(self, config: Config, texts: Any) -> Any:
        """Give the batches of the training, a function of (seed, t)."""

    def validation(self, config: Config, texts: Any, count: int | None = None) -> FirstBatches:
        """Give the first `count` batches of the validation side, or all of them."""

    def prepared(self, corpus: ft.data.Corpus, tokenizer: ft.data.Tokenizer, progress: Progress | None) -> Any:
        """Make of a text what `evaluated` takes."""

    def evaluated(
        self, text: Any, batch: int, context: int, tokenizer: ft.data.Tokenizer, asked: Model | None, seed: int
    ) -> tuple[Any, int]:
        """Give the batches of a text that is evaluated, and how many parts they have: tokens, pairs."""

    def measured(self, found: Mapping[str, float], text: Any) -> dict[str, float]:
        """Return what is recorded of an evaluation, of what `ft.evaluate` has found."""

    def lines(self, found: Mapping[str, float], text: Any, parts: int) -> list[str]:
        """Return what is told of an evaluation."""

    def hooks(self, texts: Any) -> list[Hook]:
        """Return what records more of each step."""

    def counted(self, config: Config) -> dict[str, Any]:
        """Return what of a step is counted a second, for `ft.train.record`."""

    def described(self, config: Config, texts: Any) -> list[str]:
        """Return what is told of the texts when a run begins."""

    def baselines(self, texts: Any) -> dict[str, float]:
        """Return what simpler models reach, for the summary."""

    def closing(self, found: Mapping[str, float], texts: Any) -> str:
        """Return what is told of the validation when a run has ended."""

    def drawn(self, config: Config, vocabulary: int, files: Sequence[Path]) -> Any:
        """Give batches to measure the time of a step."""
