"""The loss of a trained model on a text."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import functrain as ft
from functrain.models import gpt2
from functrain.progress import Progress
from functrain.recipes import folder, texts
from functrain.recipes.opened import Opened


class Evaluation(NamedTuple):
    loss: float  # nats per token, the mean over all tokens but the first
    bits_per_byte: float
    perplexity: float  # exp(loss)
    tokens: int  # that were predicted


def evaluate(found: Opened, tokens: ft.data.Tokens, *, batch: int, progress: Progress | None = None) -> Evaluation:
    """Compute a model's loss on tokens, in the dtype and on the device of its parameters.

    Every token but the first is predicted once, from what precedes it in its window of the model's context; the windows
    lie side by side. `progress` counts batches. Ctrl-C gives up: `Stopped` has what was evaluated until then.

    Raises: ValueError for less than two tokens; Stopped.
    """
    windows = ft.data.evaluation_windows(tokens, batch=batch, context=found.model.context)

    def loss_fn(params: ft.tree.Params, window: dict[str, Tensor], key: Tensor | None) -> ft.Loss:
        hidden = gpt2.hidden(params, window["tokens"], found.model)  # (B, T, D)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], window["targets"], window["mask"])

    predicted = len(tokens.ids) - 1
    try:
        loss = ft.evaluate(loss_fn, found.params, windows, compile=False, progress=progress)["loss"]
    except ft.train.EvaluationInterrupted as stopped:
        until = min(stopped.done * batch * found.model.context, predicted)
        result = _evaluation(stopped.metrics["loss"], until, tokens) if stopped.metrics else None
        raise Stopped(result, stopped.done, len(windows)) from None
    return _evaluation(loss, predicted, tokens)


class Stopped(KeyboardInterrupt):
    """An evaluation that was given up, with what it had found: the loss on the first `done` of `batches` batches."""

    def __init__(self, evaluation: Evaluation | None, done: int, batches: int) -> None:
        super().__init__()
        self.evaluation, self.done, self.batches = evaluation, done, batches


def text_of(data: str | None, found: Opened, *, progress: Progress | None = None) -> tuple[str, ft.data.Tokens]:
    """Read the tokens to evaluate, and what to call them: a text, a folder of texts, "python", JSON lines with a field
    `text`, a token file, or without any name the text that the model's run kept for validation.

    `progress` counts characters that are encoded.

    Raises: ValueError naming the file, and the line of JSON lines.
    """
    if data is None:
        return _of_the_run(found, progress)
    path = Path(data)
    if path.suffix == ".bin" and path.is_file():
        tokens = ft.data.open_tokens(path)
        if tokens.tokenizer != found.tokenizer.fingerprint:
            raise ValueError(
                f"{path}: expected tokens of the model's own tokenizer ({found.tokenizer.fingerprint[:16]}), came "
                f"those of another ({tokens.tokenizer[:16]}); give the text itself"
            )
        return data, tokens
    corpus = _json_lines(path) if path.suffix in (".jsonl", ".ndjson") else ft.data.corpus(data, validation=0.0)
    return data, ft.data.tokenize(corpus, found.tokenizer, progress=progress)


def _of_the_run(found: Opened, progress: Progress | None) -> tuple[str, ft.data.Tokens]:
    if found.run is None:
        raise ValueError(f"{found.found}: a model's folder has no text of its own; name one with --data FILE")
    config = folder.read_config(found.run)
    side = texts.read(config.data).validation
    trained = ft.checkpoint.contents(found.found).metadata.get("text", {}).get("validation", side.fingerprint)
    if trained != side.fingerprint:
        raise ValueError(
            f"{config.data.corpus}: not the text any more that {found.run} was validated on; name one with --data FILE"
        )
    return f"the validation side of {config.data.corpus}", ft.data.tokenize(side, found.tokenizer, progress=progress)


def _json_lines(path: Path) -> ft.data.Corpus:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    documents, digest = [], hashlib.sha256()
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else {"text": ""}
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: expected JSON in UTF-8, and it breaks off: {error}") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or ft.data.END in text:
            came = f"the keys {', '.join(row) or 'none'}" if isinstance(row, dict) else type(row).__name__
            came = "a zero byte in it" if isinstance(text, str) else came
            raise ValueError(f'{path}: line {number}: expected an object whose "text" is a text, came {came}')
        if text:
            documents.append(ft.data.Document(f"{number:09d}", text))
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    if not documents:
        raise ValueError(f"{path}: expected lines of JSON with texts, came none")
    return ft.data.Corpus(path.name, "validation", tuple(documents), digest.hexdigest())


def _evaluation(loss: float, predicted: int, tokens: ft.data.Tokens) -> Evaluation:
    perplexity = math.exp(loss) if loss < 700.0 else math.inf
    return Evaluation(loss, texts.bits_per_byte(loss, tokens), perplexity, predicted)
