"""What a BERT is trained for: masked tokens, and whether the second sentence follows the first. B batch, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

import functrain as ft
from functrain.data.pretraining.pairs import FiniteSentencePairs
from functrain.data.pretraining.sentences import split_sentences
from functrain.models import bert
from functrain.progress import Progress
from functrain.recipes.config import Config
from functrain.recipes.model_config import Bert, Model
from functrain.recipes.texts import Bar, FirstBatches, Sides
from functrain.train import Hook

FLOAT32: Mapping[str, torch.dtype] = {"weights": torch.float32}  # in bfloat16 they would not add up to the rows


class Pairs(NamedTuple):
    """Both sides of a corpus as rows of two parts."""

    tokenizer: ft.data.Tokenizer
    train: ft.data.SentencePairs  # no end
    validation: FiniteSentencePairs  # one epoch
    size_bytes: tuple[int, int]  # of the texts
    unigram: float  # nats per token of the validation side, by how often each token is in the other


def loss_of(model: bert.Config, asked: Model | None) -> Any:
    """Return the loss: the mean over masked tokens plus the mean over rows."""

    def loss_fn(params: ft.tree.Params, batch: ft.tree.Batch, key: Tensor | None) -> ft.Loss:
        places = {"types": batch["token_types"], "mask": batch["attention_mask"], "places": batch.get("places")}
        predictions = bert.apply(params, batch["tokens"], model, **places, key=key)
        return bert.pretraining_loss(predictions, batch["targets"], batch["weights"], batch["next_sentence"])

    return loss_fn


def tokenizer_of(corpus: ft.data.Corpus, vocabulary: int, progress: Progress | None) -> ft.data.Tokenizer:
    """Learn pieces of words."""
    return ft.data.train_wordpiece(corpus, vocab_size=vocabulary, progress=progress)


def check(sides: Sides, tokenizer: ft.data.Tokenizer, context: int) -> str | None:
    """Raise a ValueError for a side with fewer than two documents of two sentences."""
    for side in sides:
        way_out = "a folder of more texts" + ("" if side.split == "train" else ", or a larger data.validation")
        _check_documents(side, f" on its {side.split} side", way_out)
    return None


def _check_documents(corpus: ft.data.Corpus, where: str, way_out: str) -> None:
    # the first two that are found suffice: a text of gigabytes is not split for this
    found = sum(1 for _ in islice((d for d in corpus.documents if len(split_sentences(d.text)) > 1), 2))
    if found < 2:
        raise ValueError(
            f"{corpus.name}: expected two documents of two sentences or more{where}, so that a second sentence can be "
            f"of another document, came {found} among {len(corpus.documents)}; give {way_out}"
        )


def encode(sides: Sides, tokenizer: ft.data.Tokenizer, config: Config, run: Path, bar: Bar) -> Pairs:
    """Encode the sentences of both sides; tokenizer and tokens are kept in the folder `run`."""
    tokenizer.save(run / "tokenizer.json")
    asked: dict[str, Any] = {"batch": config.batch, "context": config.model.context, "seed": config.seed}
    asked["folder"] = run / "tokens"
    with bar("encoding the training text", "characters") as progress:
        train = ft.data.sentence_pairs(sides.train, tokenizer, **asked, progress=progress)
    with bar("encoding the validation text", "characters") as progress:
        held_out = _epoch(sides.validation, tokenizer, **asked, progress=progress)
    sizes = [sum(len(document.text.encode()) for document in side.documents) for side in sides]
    unigram = _unigram(train.sentences.ids, held_out.sentences.ids, tokenizer)
    return Pairs(tokenizer, train, held_out, (sizes[0], sizes[1]), unigram)


def _epoch(corpus: ft.data.Corpus, tokenizer: ft.data.Tokenizer, **asked: Any) -> FiniteSentencePairs:
    found = ft.data.sentence_pairs(corpus, tokenizer, **asked, epochs=1)
    assert isinstance(found, FiniteSentencePairs)
    return found


def batches(config: Config, texts: Pairs) -> Any:
    """Give the batches of the training, masked anew each."""
    return _masked(texts.train, texts.tokenizer, config.model, config.seed)


def validation(config: Config, texts: Pairs, count: int | None = None) -> FirstBatches:
    """Give the first `count` batches of the validation side, or all of them."""
    found, there = _masked(texts.validation, texts.tokenizer, config.model, config.seed), len(texts.validation)
    return FirstBatches(found, there if count is None else min(count, there))


def prepared(corpus: ft.data.Corpus, tokenizer: ft.data.Tokenizer, progress: Progress | None) -> ft.data.Corpus:
    """Make of a text what can be evaluated: sentences are encoded when they are paired."""
    return corpus


def evaluated(
    corpus: ft.data.Corpus, batch: int, context: int, tokenizer: ft.data.Tokenizer, asked: Model | None, seed: int
) -> tuple[Any, int]:
    """Give the pairs of a text, masked as the config says, and how many there are.

    Raises: ValueError for fewer than two documents of two sentences.
    """
    _check_documents(corpus, "", "a folder of texts, or JSON lines of them")
    pairs = _epoch(corpus, tokenizer, batch=batch, context=context, seed=seed)
    return FirstBatches(_masked(pairs, tokenizer, asked, seed), len(pairs)), len(pairs.chunks.first)


def _masked(pairs: ft.data.SentencePairs, tokenizer: ft.data.Tokenizer, asked: Model | None, seed: int) -> Any:
    """Mask pairs as the config says, and give masked tokens weights that add up to the rows."""
    chosen = asked if isinstance(asked, Bert) else Bert()
    # the pairs draw by the same seed, from other streams
    most = None if chosen.max_predictions == "all" else chosen.max_predictions
    how: dict[str, Any] = {"rate": chosen.mask_rate, "whole_words": chosen.whole_words, "max_predictions": most}
    return _Weighted(ft.data.masked(pairs, tokenizer, seed=seed, **how))


class _Weighted:
    """Masked batches with weights in the place of the mask: made here, before a step cuts a batch into parts."""

    def __init__(self, batches: ft.data.Masked) -> None:
        self._batches = batches

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        batch = self._batches[t]
        kept = {name: batch[name] for name in _LEAVES if name in batch}
        return {**kept, "weights": bert.token_weights(batch["mask"])}


_LEAVES = ("tokens", "targets", "token_types", "attention_mask", "next_sentence", "places")


def measured(found: Mapping[str, float], text: Any) -> dict[str, float]:
    """Return what an evaluation is recorded as."""
    return dict(found)


def lines(found: Mapping[str, float], text: Any, pairs: int) -> list[str]:
    """Return what is told of an evaluation."""
    return [
        f"{pairs:,} pairs",
        f"loss           {found['loss']:.4f} nats, of both parts",
        f"masked tokens  {found['masked_lm_loss']:.4f} nats per token, {found['masked_lm_accuracy']:.1%} right",
        f"next sentence  {found['next_sentence_loss']:.4f} nats per pair, {found['next_sentence_accuracy']:.1%} right",
    ]


def hooks(texts: Pairs) -> list[Hook]:
    """Return what is recorded of each step beside its metrics: nothing."""
    return []


def counted(config: Config) -> dict[str, Any]:
    """Return what of a step is counted a second: rows, and their tokens with padding."""
    return {"samples": "weight", "tokens": config.batch * config.model.context}


def described(config: Config, texts: Pairs) -> list[str]:
    """Return what is told of the texts."""
    train, held_out = (size / 1e6 for size in texts.size_bytes)
    rows = len(texts.train.chunks.first), len(texts.validation.chunks.first)
    return [
        f"{config.data.corpus}: {train:.2f} MB to train on, {held_out:.2f} MB to validate, {rows[0]:,} and {rows[1]:,} "
        "pairs an epoch",
        f"a unigram model: {texts.unigram:.4f} nats per token",
    ]


def baselines(texts: Pairs) -> dict[str, float]:
    """Return what a simpler model reaches."""
    return {"unigram_loss": texts.unigram}


def closing(found: Mapping[str, float], texts: Pairs) -> str:
    """Return how well a run has ended."""
    loss = found["masked_lm_loss"]
    ahead = 1.0 - loss / texts.unigram
    return (
        f"validation: masked tokens {loss:.4f} nats, {abs(ahead):.1%} {'below' if ahead > 0 else 'above'} the unigram "
        f"model's {texts.unigram:.4f}, {found['masked_lm_accuracy']:.1%} right; next sentences "
        f"{found['next_sentence_loss']:.4f} nats, {found['next_sentence_accuracy']:.1%} right"
    )


def drawn(config: Config, vocabulary: int, files: Sequence[Path]) -> Any:
    """Give batches of tokens drawn at random, to measure the time of a step."""
    return _Drawn(config, vocabulary)


class _Drawn:
    def __init__(self, config: Config, vocabulary: int) -> None:
        self._config, self._vocabulary = config, vocabulary

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        config, shape = self._config, (self._config.batch, self._config.model.context)
        draws = numpy.random.default_rng([config.seed, t])
        tokens = torch.from_numpy(draws.integers(0, self._vocabulary, shape))
        model = config.model if isinstance(config.model, Bert) else Bert()
        second = torch.arange(shape[1]) >= shape[1] // 2
        batch = {
            "tokens": tokens,
            "targets": tokens.clone(),
            "token_types": second.long().repeat(shape[0], 1),
            "attention_mask": torch.ones(shape, dtype=torch.bool),
            "next_sentence": torch.from_numpy(draws.integers(0, 2, shape[:1])),
            "weights": bert.token_weights(torch.from_numpy(draws.random(shape) < model.mask_rate)),
        }
        if model.max_predictions == "all":
            return batch
        found = {name: batch[name][:, : model.max_predictions] for name in ("targets", "weights")}
        return {**batch, **found, "places": torch.arange(model.max_predictions).repeat(shape[0], 1)}


def _unigram(train: Any, text: Any, tokenizer: ft.data.Tokenizer) -> float:
    """Compute the mean of -ln P(token) over the ordinary tokens of a text, by counts and one more of each."""
    special = numpy.zeros(tokenizer.vocab_size, numpy.bool_)
    special[list(tokenizer.special.ids)] = True
    counts = numpy.bincount(train, minlength=tokenizer.vocab_size) + 1.0
    counts[special] = 0.0
    found = text[~special[text]]
    return float(numpy.mean(numpy.log(counts.sum()) - numpy.log(counts[found]))) if len(found) else float("nan")
