"""The parameters of a model of the Llama family: drawn, and what an optimizer should know of them.

D width, K width of a head, F inner width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrain import random
from functrain.models.labels import Labels
from functrain.models.llama_config import Config
from functrain.tree import Params


def init(config: Config, key: Tensor) -> Params:
    """Draw initial parameters, float32, on the key's device: weights normal with deviation 0.02, biases 0, norms 1.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=4, key_heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> params["blocks"][0]["attn"]["k"]["weight"].shape
    torch.Size([8, 4])
    """
    width, each = config.width, config.width_of_head
    embed, head, blocks = random.split(key, 3).unbind()

    def normal(key: Tensor, *shape: int) -> Tensor:
        return random.normal(key, shape) * 0.02

    def linear(key: Tensor, inputs: int, outputs: int, bias: bool) -> Params:
        weight = normal(key, inputs, outputs)
        return {"weight": weight, "bias": weight.new_zeros(outputs)} if bias else {"weight": weight}

    def norm(size: int) -> Params:
        return {"weight": torch.ones(size, device=key.device)}

    def block(number: int, key: Tensor) -> Params:
        q, k, v, out, gate, up, down, router = random.split(key, 8).unbind()
        queries, keys = config.heads * each, config.heads_of_keys * each
        attn = {
            "q": linear(q, width, queries, config.qkv_bias),
            "k": linear(k, width, keys, config.qkv_bias),
            "v": linear(v, width, keys, config.qkv_bias),
            "out": linear(out, queries, width, config.out_bias),
        }
        if config.qk_norm:
            attn |= {"q_norm": norm(each), "k_norm": norm(each)}
        ends = {"norm_1": norm(width), "attn": attn, "norm_2": norm(width)}
        if number in config.expert_layers:
            count, inner = config.experts, config.inner_of_expert
            experts = {"router": normal(router, width, count), "gate": normal(gate, count, width, inner)}
            experts |= {"up": normal(up, count, width, inner), "down": normal(down, count, inner, width)}
            return {**ends, "experts": experts}
        mlp = {
            "gate": linear(gate, width, config.inner, config.mlp_bias),
            "up": linear(up, width, config.inner, config.mlp_bias),
            "down": linear(down, config.inner, width, config.mlp_bias),
        }
        return {**ends, "mlp": mlp}

    params = {
        "embed": normal(embed, config.vocab, width),
        "blocks": [block(i, key) for i, key in enumerate(random.split(blocks, config.layers).unbind())],
        "norm": norm(width),
    }
    return params if config.tied else {**params, "head": normal(head, config.vocab, width)}


def labels(config: Config) -> Labels:
    """Return which parameters decay, how deep they lie, and which are matrices of hidden layers, for `ft.optim`.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> ft.models.llama.labels(config).decayed(params)["blocks"][0]["attn"]["q"]
    {'weight': True}
    """
    return Labels(layers=config.layers, embeddings=["embed"], first=["embed"])
