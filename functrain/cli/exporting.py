"""What `functrain export` does."""

from __future__ import annotations

import json
from pathlib import Path

import functrain as ft
from functrain.checkpoint.run import step_of
from functrain.cli import bars
from functrain.cli.options import UsageError
from functrain.recipes import folder, pretrain


def export(run: Path, to: Path, *, step: int | None) -> None:
    """Write a run's model as a folder that transformers loads."""
    chosen = folder.newest(run) if step is None else _chosen(run, step)
    tokenizer = ft.data.load_tokenizer(run / "tokenizer.json")
    with bars.bar("loading", "bytes") as loading:
        params = ft.checkpoint.load(chosen, at="params", progress=loading)
    files = tokenizer_files(tokenizer)
    architecture, model = pretrain.model_at(run, chosen, tokenizer)
    end = {"end": tokenizer.end} if architecture.takes_end else {}
    with bars.bar("writing", "bytes") as writing:
        made = architecture.module.to_hf(to, params, model, **end, files=files, progress=writing)
    print(f"{chosen} -> {made}")
    if not files:
        print(f"without a tokenizer: {run / 'tokenizer.json'} is none of the tokenizers library")


def _chosen(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}"
    if not path.is_dir():
        there = ", ".join(sorted({str(step_of(path)) for path in ft.checkpoint.list(run)}, key=int))
        raise UsageError(f"--step: {run} has no checkpoint of step {step}; it has those of {there or 'none'}")
    return path


def tokenizer_files(tokenizer: ft.data.Tokenizer) -> dict[str, bytes]:
    """Return the files with which `AutoTokenizer` encodes as this tokenizer does; none where it cannot."""
    if not isinstance(tokenizer, ft.data.Subwords):
        return {}
    # the class that obeys tokenizer.json alone; that of GPT-2 would add rules of its own
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {key: name for key, name in tokenizer.special_names().items() if name is not None}
    if "eos_token" in names:  # it stands before a document, too, where nothing else does
        names = {"bos_token": names["eos_token"]} | names
    settings |= names
    return {
        "tokenizer.json": tokenizer.definition.encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }
