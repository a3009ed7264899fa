"""A model that was trained, to be used: out of a run, one of its checkpoints, or a folder of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import functrain as ft
from functrain.checkpoint import hub, manifest
from functrain.progress import Progress
from functrain.recipes import folder, pretrain
from functrain.recipes.architectures import ARCHITECTURES, Architecture


class Opened(NamedTuple):
    found: Path  # what was read: a checkpoint, or a model's folder
    params: ft.tree.Params
    architecture: Architecture
    model: Any  # the Config of the architecture's module
    tokenizer: ft.data.Tokenizer
    end: int | None  # the token that ends a document
    run: Path | None  # the run that it belongs to


def opened(
    path: Path, device: torch.device, *, tokenizer: Path | None = None, progress: Progress | None = None
) -> Opened:
    """Open a run (its newest whole checkpoint), a checkpoint in a run, or a folder as `functrain export` writes it and
    transformers does, of an architecture that `functrain train` knows.

    `tokenizer` is the file of a tokenizer that is not beside the model. `progress` counts bytes of tensors.

    Raises: ValueError where there is no model, no tokenizer, or one of another vocabulary; CheckpointError.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected the folder of a run or of a model, and there is none")
    if _is_model(path):
        return _model(path, device, tokenizer, progress)
    inside = (path / manifest.TREE).exists()
    run = path.absolute().parents[1] if inside else path
    found = path if inside else folder.newest(run)
    words = ft.data.load_tokenizer(tokenizer or run / "tokenizer.json")
    architecture, model = pretrain.model_at(run, found, words)
    _check_vocabulary(path, words, model)
    params = ft.checkpoint.load(found, at="params", device=device, progress=progress)
    return Opened(found, params, architecture, model, words, words.end, run)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / hub.SINGLE).exists() or (path / hub.INDEX).exists()


def _model(path: Path, device: torch.device, tokenizer: Path | None, progress: Progress | None) -> Opened:
    if tokenizer is None and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: expected a tokenizer.json beside the model, and there is none; name the run's with "
            "--tokenizer RUN/tokenizer.json"
        )
    words = ft.data.load_tokenizer(tokenizer or path / "tokenizer.json")
    table = hub.load_json(path / "config.json")
    kind, types = table.get("model_type"), {name: found for found in ARCHITECTURES.values() for name in found.types}
    if kind not in types:
        raise ValueError(
            f"{path / 'config.json'}: expected a model_type of {', '.join(types)}, came {kind!r}; load it with "
            "functrain.from_module in Python"
        )
    params, model = types[kind].module.from_hf(path, progress=progress)
    _check_vocabulary(path, words, model)
    said = table.get("eos_token_id")
    end = said if isinstance(said, int) and 0 <= said < model.vocab else words.end
    return Opened(path, ft.tree.map(lambda p: p.to(device), params), types[kind], model, words, end, None)


def _check_vocabulary(path: Path, tokenizer: ft.data.Tokenizer, model: Any) -> None:
    if tokenizer.vocab_size > model.vocab:
        raise ValueError(
            f"{path}: expected a tokenizer of at most the model's {model.vocab} tokens, came one of "
            f"{tokenizer.vocab_size}; name the one that the model was trained with"
        )
