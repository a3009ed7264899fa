"""A model of another family adds a name map and nothing else: a small Llama, beside that of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from later import Later
from torch import Tensor

from functrain import checkpoint, nn, random, tree
from functrain.models import hf, names

transformers = Later("transformers")

transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab: int
    layers: int
    heads: int
    width: int
    inner: int
    eps: float


def init(config: Config, key: Tensor) -> tree.Params:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=key.device)

    width, inner = config.width, config.inner
    attn = {name: zeros(width, width) for name in "qkvo"}
    mlp = {"gate": zeros(width, inner), "up": zeros(width, inner), "down": zeros(inner, width)}
    block = {"norm_1": zeros(width), "attn": attn, "norm_2": zeros(width), "mlp": mlp}
    ends = {"embed": zeros(config.vocab, width), "norm": zeros(width), "head": zeros(width, config.vocab)}
    return {**ends, "blocks": [block] * config.layers}


def apply(params: tree.Params, tokens: Tensor, config: Config) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps) * weight

    def turned(x: Tensor) -> Tensor:  # (B, H, T, K)
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] / 10000.0 ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = params["embed"][tokens]  # (B, T, D)
    for block in params["blocks"]:
        h = norm(x, block["norm_1"])
        q, k, v = ((h @ block["attn"][n]).unflatten(-1, (config.heads, -1)).transpose(1, 2) for n in "qkv")
        seen = nn.attention(turned(q), turned(k), v, nn.causal_mask(tokens.shape[1], x.device))
        x = x + seen.transpose(1, 2).flatten(2) @ block["attn"]["o"]
        h = norm(x, block["norm_2"])
        mlp = block["mlp"]
        x = x + (torch.nn.functional.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
    return norm(x, params["norm"]) @ params["head"]  # (B, T, V)


# ---- all that the model adds --------------------------------------------------------------------------------------

LLAMA = hf.Layout(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    names=names.Names(
        modules={
            "embed": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "head": "lm_head.weight",
            "blocks/*/norm_1": "model.layers.*.input_layernorm.weight",
            "blocks/*/norm_2": "model.layers.*.post_attention_layernorm.weight",
            **{f"blocks/*/attn/{n}": f"model.layers.*.self_attn.{n}_proj.weight" for n in "qkvo"},
            **{f"blocks/*/mlp/{n}": f"model.layers.*.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
        },
        transposed=("head", "blocks/*/attn/*", "blocks/*/mlp/*"),
    ),
    tied={},
    ignored=("layers.*.self_attn.rotary_emb.inv_freq",),
    fields={
        "vocab": hf.Field("vocab_size", 32000),
        "layers": hf.Field("num_hidden_layers", 32),
        "heads": hf.Field(("num_attention_heads", "num_key_value_heads"), 32),
        "width": hf.Field("hidden_size", 4096),
        "inner": hf.Field("intermediate_size", 11008),
        "eps": hf.Field("rms_norm_eps", 1e-6),
    },
    config=Config,
    init=init,
    fixed=lambda config: {
        **{"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": (False,)},
        **{"head_dim": (config.width // config.heads,), "attention_dropout": (0.0,)},
        "rope_parameters": ({"rope_theta": 10000.0, "rope_type": "default"},),
    },
    silent=("max_position_embeddings", "pretraining_tp"),
)


def test_a_llama_gives_the_logits_of_transformers_and_loads_there_bit_for_bit(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 17}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    with torch.no_grad():
        for number, leaf in enumerate(theirs.parameters()):
            leaf.copy_(0.3 * random.normal(random.fold_in(random.key(0), number), leaf.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    params, config = hf.read(tmp_path / "theirs", LLAMA)
    assert config == Config(vocab=17, layers=2, heads=2, width=8, inner=12, eps=1e-6)
    tokens = random.randint(random.key(1), (2, 9), 0, 17)
    with torch.no_grad():
        # float32 rounding of logits of order 1
        torch.testing.assert_close(apply(params, tokens, config), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    hf.write(tmp_path / "ours", params, config, LLAMA, {})
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    state = dict(theirs.named_parameters())
    assert len(state) == 21 and all(torch.equal(leaf, state[name]) for name, leaf in again.named_parameters())


def test_what_this_llama_does_not_compute_is_refused(tmp_path: Path) -> None:
    table = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}
    with pytest.raises(checkpoint.UnsupportedError, match="'rope_parameters': expected .*10000.0.*, came .*llama3"):
        hf.read_config(table, LLAMA, "config.json")
    with pytest.raises(
        checkpoint.UnsupportedError, match="'num_key_value_heads': expected 8 as in num_attention_heads"
    ):
        hf.read_config({"model_type": "llama", "num_attention_heads": 8}, LLAMA, "config.json")
