"""What a run needs to know of each architecture: its model, its objective, and how one becomes the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import functrain as ft
from functrain.models import bert, gpt2, llama
from functrain.recipes import masked_pairs, next_tokens
from functrain.recipes.model_config import GPT2, Bert, Llama, Model
from functrain.recipes.objective import Objective


class Architecture(NamedTuple):
    """A model and what it is trained for."""

    name: str
    module: Any  # of functrain.models: init, from_hf, to_hf, and what generates
    objective: Objective  # a module: next_tokens or masked_pairs
    model: Callable[[Any, int], Any]  # what a run is asked for, and the size of the vocabulary -> the module's Config
    loss: Callable[[Any, Any], Any]  # the module's Config, and what the run is asked for, if there is one -> the loss
    types: tuple[str, ...]  # `model_type` in the config.json of transformers
    generates: bool  # text from a cache
    takes_end: bool  # `to_hf` is told the token that ends a text


def _gpt2(asked: GPT2, vocabulary: int) -> gpt2.Config:
    return gpt2.Config(vocab=vocabulary, **_fields(asked))


def _llama(asked: Llama, vocabulary: int) -> llama.Config:
    fields = _fields(asked)
    for name in ("balance", "packed"):  # of the training alone
        del fields[name]
    fields["rope"] = ft.nn.Rotary(base=fields.pop("rope_base"))
    return llama.Config(vocab=vocabulary, **{name: value for name, value in fields.items() if value != "none"})


def _bert(asked: Bert, vocabulary: int) -> bert.Config:
    fields = _fields(asked)
    for name in ("mask_rate", "whole_words", "max_predictions"):
        del fields[name]
    return bert.Config(vocab=vocabulary, **fields)


def _fields(asked: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(asked)
    del fields["architecture"]
    return fields


ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture(
            name="gpt2",
            module=gpt2,
            objective=next_tokens,
            model=_gpt2,
            loss=functools.partial(next_tokens.loss_of, gpt2, lambda params: params["wte"]),
            types=("gpt2",),
            generates=True,
            takes_end=True,
        ),
        Architecture(
            name="llama",
            module=llama,
            objective=next_tokens,
            model=_llama,
            loss=functools.partial(next_tokens.loss_of, llama, llama.head),
            types=tuple(layout.model_type for layout in llama.HF),
            generates=True,
            takes_end=True,
        ),
        Architecture(
            name="bert",
            module=bert,
            objective=masked_pairs,
            model=_bert,
            loss=masked_pairs.loss_of,
            types=("bert",),
            generates=False,
            takes_end=False,
        ),
    )
}


def of(asked: Model) -> Architecture:
    """Return the architecture that a run is asked for."""
    return ARCHITECTURES[asked.architecture]


def saved(architecture: str, fields: dict[str, Any]) -> Any:
    """Return the module's Config of the fields that JSON has kept."""
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "rope" in found:
        found["rope"] = ft.nn.Rotary(**fields["rope"])
    return ARCHITECTURES[architecture].module.Config(**found)
