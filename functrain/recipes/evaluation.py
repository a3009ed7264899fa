"""The loss of a trained model on a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, TypeAlias

import functrain as ft
from functrain.progress import Progress
from functrain.recipes import folder, next_tokens, texts
from functrain.recipes.opened import Opened


class Evaluation(NamedTuple):
    metrics: dict[str, float]  # "loss" and what is measured beside it
    done: int  # tokens that were predicted, or pairs


def evaluate(found: Opened, text: Text, *, batch: int, progress: Progress | None = None) -> Evaluation:
    """Compute a model's loss on a text, in the dtype and on the device of its parameters.

    By a decoder every token but the first is predicted once, from what precedes it in its window of the model's
    context; the windows lie side by side. Of a BERT each pair of an epoch counts once, masked as its run masks, with
    the seed of the run. `progress` counts batches. Ctrl-C gives up: `Stopped` has what was evaluated until then.

    Raises: ValueError for less than two tokens, or two documents of two sentences; Stopped.
    """
    objective = found.architecture.objective
    config = None if found.run is None else folder.read_config(found.run)
    asked, seed = (None, 0) if config is None else (config.model, config.seed)
    rows, parts = objective.evaluated(text, batch, found.model.context, found.tokenizer, asked, seed)
    loss_fn = found.architecture.loss(found.model, asked)
    try:
        metrics = ft.evaluate(loss_fn, found.params, rows, compile=False, progress=progress)
    except ft.train.EvaluationInterrupted as stopped:
        result = None
        if stopped.metrics:
            each = batch * (found.model.context if isinstance(text, ft.data.Tokens) else 1)
            result = Evaluation(objective.measured(stopped.metrics, text), min(stopped.done * each, parts))
        raise Stopped(result, stopped.done, len(rows)) from None
    return Evaluation(objective.measured(metrics, text), parts)


class Stopped(KeyboardInterrupt):
    """An evaluation that was given up, with what it had found: the loss on the first `done` of `batches` batches."""

    def __init__(self, evaluation: Evaluation | None, done: int, batches: int) -> None:
        super().__init__()
        self.evaluation, self.done, self.batches = evaluation, done, batches


# encoded already, or the documents of which sentences are taken
Text: TypeAlias = ft.data.Tokens | ft.data.Corpus


def text_of(data: str | None, found: Opened, *, progress: Progress | None = None) -> tuple[str, Text]:
    """Read the text to evaluate, and what to call it: a text, a folder of texts, "python", JSON lines with a field
    `text`, a token file, or without any name the text that the model's run kept for validation.

    A decoder gets its tokens, and `progress` counts characters that are encoded; a BERT its documents.

    Raises: ValueError naming the file, and the line of JSON lines.
    """
    if data is None:
        return _of_the_run(found, progress)
    path = Path(data)
    if path.suffix == ".bin" and path.is_file():
        if found.architecture.objective is not next_tokens:
            raise ValueError(f"{path}: a {found.architecture.name} is evaluated on sentences; give the text itself")
        tokens = ft.data.open_tokens(path)
        if tokens.tokenizer != found.tokenizer.fingerprint:
            raise ValueError(
                f"{path}: expected tokens of the model's own tokenizer ({found.tokenizer.fingerprint[:16]}), came "
                f"those of another ({tokens.tokenizer[:16]}); give the text itself"
            )
        return data, tokens
    corpus = _json_lines(path) if path.suffix in (".jsonl", ".ndjson") else ft.data.corpus(data, validation=0.0)
    return data, found.architecture.objective.prepared(corpus, found.tokenizer, progress)


def _of_the_run(found: Opened, progress: Progress | None) -> tuple[str, Text]:
    if found.run is None:
        raise ValueError(f"{found.found}: a model's folder has no text of its own; name one with --data FILE")
    config = folder.read_config(found.run)
    side = texts.read(config.data).validation
    trained = ft.checkpoint.contents(found.found).metadata.get("text", {}).get("validation", side.fingerprint)
    if trained != side.fingerprint:
        raise ValueError(
            f"{config.data.corpus}: not the text any more that {found.run} was validated on; name one with --data FILE"
        )
    prepared = found.architecture.objective.prepared(side, found.tokenizer, progress)
    return f"the validation side of {config.data.corpus}", prepared


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
