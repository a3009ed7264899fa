"""A small GPT-2 whose every parameter matters, and the same model of transformers."""

from __future__ import annotations

import torch
from later import Later
from torch import Tensor

from functrain import random, tree
from functrain.models import gpt2
from functrain.tree import Params

transformers = Later("transformers")

CONFIG = gpt2.Config(vocab=17, context=12, layers=2, heads=2, width=8)


def draw_params(config: gpt2.Config, seed: int = 0) -> Params:
    # every leaf random, so that a bias or a norm that is not used shows
    params = gpt2.init(config, random.key(seed))
    keys = random.split(random.key(seed + 1), len(tree.leaves(params)))
    noise = [0.3 * random.normal(key, leaf.shape) for key, leaf in zip(keys, tree.leaves(params), strict=True)]
    return tree.add(params, tree.unflatten(tree.structure(params), noise))


def draw_tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return random.randint(random.key(seed), (batch, count), 0, CONFIG.vocab)


THEIR_NAMES = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "ln_f": "transformer.ln_f",
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attn/qkv": "attn.c_attn",
    "attn/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def their_name(path: str) -> str:
    words = path.split("/")
    if words[0] == "blocks":
        return f"transformer.h.{words[1]}.{THEIR_NAMES['/'.join(words[2:-1])]}.{words[-1]}"
    return ".".join([THEIR_NAMES[words[0]], *words[1:]])


def their_model(params: Params, config: gpt2.Config) -> transformers.GPT2LMHeadModel:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab, n_positions=config.context, n_embd=config.width, n_layer=config.layers,
            n_head=config.heads, bos_token_id=0, eos_token_id=None, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    theirs = dict(model.named_parameters())
    assert {their_name(path) for path in tree.paths(params)} == set(theirs)
    with torch.no_grad():
        for path, leaf in tree.items(params):
            theirs[their_name(path)].copy_(leaf)  # only names differ: shapes would broadcast, not transpose
            assert theirs[their_name(path)].shape == leaf.shape
    return model
