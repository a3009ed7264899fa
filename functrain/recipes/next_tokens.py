"""What a decoder is trained for: the next token of a text. B batch, T tokens, D width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import functrain as ft
from functrain.progress import Progress
from functrain.recipes import texts as texts_of
from functrain.recipes.config import Config
from functrain.recipes.model_config import Llama, Model
from functrain.recipes.record import bits
from functrain.recipes.texts import Bar, FirstBatches, Sides, Texts, bits_per_byte
from functrain.train import Hook

tokenizer_of = texts_of.byte_pairs

FLOAT32: Mapping[str, torch.dtype] = {}  # nothing of a batch is a floating-point number


def loss_of(module: Any, head: Callable[[ft.tree.Params], Tensor], model: Any, asked: Model | None) -> Any:
    """Return the loss: next tokens, from hidden states, and with a key, in training, that of a mixture's balance."""
    balance = asked.balance if isinstance(asked, Llama) and asked.balance != "none" else None

    def loss_fn(params: ft.tree.Params, batch: ft.tree.Batch, key: Tensor | None) -> ft.Loss:
        about: dict[str, Any] = {"key": key}
        if "documents" in batch:
            about |= {"documents": batch["documents"], "positions": batch["positions"], "mask": batch["documents"] >= 0}
        if balance is None or key is None:
            return _next(module.hidden(params, batch["tokens"], model, **about), params, batch)
        hidden, load = module.hidden_and_balance(params, batch["tokens"], model, **about)
        loss = _next(hidden, params, batch)
        # a mean times the weight of the tokens: what parts of a batch add up to is divided by that
        even = loss.weight * load.total / load.weight.clamp(min=1.0)
        metrics = {**loss.metrics, "next_token_loss": loss.total.detach(), "load_balancing": even.detach()}
        return loss._replace(total=loss.total + balance * even, metrics=metrics)

    def _next(hidden: Tensor, params: ft.tree.Params, batch: ft.tree.Batch) -> ft.Loss:
        return ft.losses.next_token_from_hidden(hidden, head(params), batch["targets"], batch["mask"])

    return loss_fn


def check(sides: Sides, tokenizer: ft.data.Tokenizer, context: int) -> str | None:
    """Return a sentence where the validation side says little. Raises: ValueError for a side that is too short."""
    return texts_of.check_lengths(sides, tokenizer, context)


def encode(sides: Sides, tokenizer: ft.data.Tokenizer, config: Config, run: Path, bar: Bar) -> Texts:
    """Encode both sides; tokenizer and tokens are kept in the folder `run`."""
    return texts_of.encode(sides, tokenizer, run, bar=bar)


def batches(config: Config, texts: Texts) -> Any:
    """Give the batches of the training: windows, or packed documents."""
    asked, tokens = config.model, texts.train
    if _is_packed(asked):
        return ft.data.packed(
            tokens, batch=config.batch, context=asked.context, seed=config.seed, end=texts.tokenizer.end
        )
    return ft.data.windows(tokens, batch=config.batch, context=asked.context, seed=config.seed)


def validation(config: Config, texts: Texts, count: int | None = None) -> FirstBatches:
    """Give the first `count` batches of the validation side, or all of them."""
    asked = config.model
    found, _ = evaluated(texts.validation, config.batch, asked.context, texts.tokenizer, asked, config.seed)
    return FirstBatches(found, len(found) if count is None else min(count, len(found)))


def prepared(corpus: ft.data.Corpus, tokenizer: ft.data.Tokenizer, progress: Progress | None) -> ft.data.Tokens:
    """Make of a text what can be evaluated."""
    return ft.data.tokenize(corpus, tokenizer, progress=progress)


def evaluated(
    tokens: ft.data.Tokens, batch: int, context: int, tokenizer: ft.data.Tokenizer, asked: Model | None, seed: int
) -> tuple[Any, int]:
    """Give the windows of a text side by side, as `ft.data.evaluation_windows`, and how many tokens they predict.

    A model that was trained on packed rows is told of the documents in them.
    """
    found: Any = ft.data.evaluation_windows(tokens, batch=batch, context=context)
    if _is_packed(asked):
        assert tokenizer.end is not None, "it stood between the documents of the training"
        found = _Documents(found, tokenizer.end)
    return found, len(tokens.ids) - 1


class _Documents:
    """Windows in which no document sees another. The token of an end begins the next one, as in packed rows."""

    def __init__(self, windows: ft.data.EvaluationWindows, end: int) -> None:
        self._windows, self._end = windows, end

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        batch = self._windows[i]
        begins = torch.eq(batch["tokens"], torch.tensor(self._end))  # (B, T)
        place = torch.arange(begins.shape[1])
        # the last place before each, or at it, where a document begins
        first = torch.where(begins, place, 0).cummax(1).values
        return {**batch, "documents": begins.long().cumsum(1), "positions": place - first}


def _is_packed(asked: Model | None) -> bool:
    return isinstance(asked, Llama) and asked.packed


def measured(found: Mapping[str, float], tokens: ft.data.Tokens) -> dict[str, float]:
    """Return what an evaluation of these tokens is recorded as."""
    loss = found["loss"]
    perplexity = math.exp(loss) if loss < 700.0 else math.inf
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, tokens), "perplexity": perplexity}


def lines(found: Mapping[str, float], tokens: ft.data.Tokens, predicted: int) -> list[str]:
    """Return what is told of an evaluation of these tokens."""
    return [
        f"{predicted:,} tokens predicted, of {tokens.bytes_per_token:.2f} bytes each",
        f"loss           {found['loss']:.4f} nats per token",
        f"perplexity     {found['perplexity']:.6g}",
        f"bits per byte  {found['bits_per_byte']:.4f}",
    ]


def hooks(texts: Texts) -> list[Hook]:
    """Return what is recorded of each step beside its metrics."""
    return [bits(bits_per_byte(1.0, texts.train))]


def counted(config: Config) -> dict[str, Any]:
    """Return what of a step is counted a second."""
    return {"tokens": "weight"}


def described(config: Config, texts: Texts) -> list[str]:
    """Return what is told of the texts."""
    return [
        f"{config.data.corpus}: {texts.train.size_bytes / 1e6:.2f} MB to train on, "
        f"{texts.validation.size_bytes / 1e6:.2f} MB to validate, {texts.train.bytes_per_token:.2f} bytes per token",
        f"a trigram model: {texts.trigram:.4f} bits per byte (of tokens: {texts.token_trigram:.4f})",
    ]


def baselines(texts: Texts) -> dict[str, float]:
    """Return what simpler models reach."""
    return {"trigram_bits_per_byte": texts.trigram, "token_trigram_bits_per_byte": texts.token_trigram}


def closing(found: Mapping[str, float], texts: Texts) -> str:
    """Return how well a run has ended."""
    loss, reached = found["loss"], found["bits_per_byte"]
    ahead = texts.trigram - reached
    return (
        f"validation loss {loss:.4f} = {reached:.4f} bits per byte, "
        f"{abs(ahead):.4f} {'below' if ahead > 0 else 'above'} the trigram model's {texts.trigram:.4f}"
    )


def drawn(config: Config, vocabulary: int, files: Sequence[Path]) -> Any:
    """Give batches to measure the time of a step: of a run's tokens, or of tokens drawn at random."""
    if files:
        tokens: ft.data.Tokens | numpy.ndarray = ft.data.open_tokens(files[-1])
    else:
        length = max(1_000_000, 2 * config.model.context)
        tokens = numpy.random.default_rng(config.seed).integers(0, vocabulary, length, numpy.uint32)
    if _is_packed(config.model):
        # documents of random tokens end where the first of the vocabulary is drawn, as in a run the end's
        return ft.data.packed(tokens, batch=config.batch, context=config.model.context, seed=config.seed, end=0)
    return ft.data.windows(tokens, batch=config.batch, context=config.model.context, seed=config.seed)
