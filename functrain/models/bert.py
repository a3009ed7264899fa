"""BERT: an encoder of post-norm blocks with learned positions and token types, and the heads that are put on it.

B batch, T tokens, L layers, D width, H heads, K = D / H width of a head, C context, V vocabulary, F inner width, Y
token types, N labels.

Linear weights are (in, out), and norms and linear layers have `weight` and `bias`:
`embeddings/{tokens,positions,types}` (V, D), (C, D), (Y, D), `embeddings/norm`, `blocks/i/attn/{qkv,out,norm}`
(D, 3 D), (D, D), (D,), `blocks/i/mlp/{up,down,norm}` (D, F), (F, D), (D,), and, as the head needs them, `pooler`
(D, D), `masked_lm/{transform,norm,bias}` (D, D), (D,), (V,), `next_sentence` (D, 2), `classifier` (D, N).

Source: Devlin et al. 2018 (arXiv:1810.04805).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from functrain import nn, random
from functrain.models import bert_layout, hf
from functrain.models.activations import ACTIVATIONS
from functrain.models.bert_config import Config, Head
from functrain.models.bert_losses import classifier_loss, pretraining_loss, token_weights
from functrain.models.labels import Labels
from functrain.models.places import at_places
from functrain.models.sharding_rules import bert as sharding
from functrain.progress import Progress
from functrain.tree import Params, elsewhere

__all__ = ["HF", "Config", "Predictions", "apply", "classifier_loss", "from_hf", "hidden", "init", "labels",
           "pretraining_loss", "sharding", "to_hf", "token_logits", "token_weights"]  # fmt: skip


class Predictions(NamedTuple):
    """What the head "pretraining" returns."""

    tokens: Tensor  # (B, T, V): logits of the token at each place, or (B, K, V), at those asked for
    next_sentence: Tensor  # (B, 2): logits of 0, the second sentence follows the first, and 1, it is another's


def init(config: Config, key: Tensor) -> Params:
    """Draw initial parameters, float32, on the key's device.

    Weights are normal with deviation 0.02, the embedding of the padding token and biases are 0, norms 1. To put a head
    on the parameters of a folder: `{**init(config, key), **params}`.

    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> ft.tree.size(params), params["blocks"][0]["attn"]["qkv"]["weight"].shape
    (3842, torch.Size([8, 24]))
    """
    width = config.width
    tokens, positions, types, blocks, heads = random.split(key, 5).unbind()

    def normal(key: Tensor, *shape: int) -> Tensor:
        return random.normal(key, shape) * 0.02

    def linear(key: Tensor, inputs: int, outputs: int) -> Params:
        return {"weight": normal(key, inputs, outputs), "bias": torch.zeros(outputs, device=key.device)}

    def norm() -> Params:
        return {"weight": torch.ones(width, device=key.device), "bias": torch.zeros(width, device=key.device)}

    def block(key: Tensor) -> Params:
        qkv, out, up, down = random.split(key, 4).unbind()
        return {
            "attn": {"qkv": linear(qkv, width, 3 * width), "out": linear(out, width, width), "norm": norm()},
            "mlp": {"up": linear(up, width, config.inner), "down": linear(down, config.inner, width), "norm": norm()},
        }

    table = normal(tokens, config.vocab, width)
    if config.padding is not None:
        rows = torch.arange(config.vocab, device=key.device)
        table = torch.where((rows == config.padding)[:, None], 0.0, table)
    params: Params = {
        "embeddings": {
            "tokens": table,
            "positions": normal(positions, config.context, width),
            "types": normal(types, config.types, width),
            "norm": norm(),
        },
        "blocks": [block(key) for key in random.split(blocks, config.layers).unbind()],
    }
    pooler, transform, next_sentence, classifier = random.split(heads, 4).unbind()
    if config.has_pooler:
        params["pooler"] = linear(pooler, width, width)
    if config.head in ("pretraining", "masked_lm"):
        bias = torch.zeros(config.vocab, device=key.device)
        params["masked_lm"] = {"transform": linear(transform, width, width), "norm": norm(), "bias": bias}
    if config.head == "pretraining":
        params["next_sentence"] = linear(next_sentence, width, 2)
    if config.head in ("sequence", "token"):
        params["classifier"] = linear(classifier, width, config.num_labels)
    return params


def apply(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    types: Tensor | None = None,
    mask: Tensor | None = None,
    places: Tensor | None = None,
    key: Tensor | None = None,
) -> Any:
    """Return what the config's head makes of the tokens (B, T): `Predictions` of "pretraining", and else a tensor.

    It is (B, T, V) of "masked_lm", (B, N) of "sequence", (B, T, N) of "token", (B, D) of "pooled" and (B, T, D) of
    "none". With `places` (B, K) of `ft.data.masked(..., max_predictions=K)`, logits of tokens are those of these places
    alone, (B, K, V). The other arguments are those of `hidden`.
    Raises: as `hidden`; ValueError and TypeError for places that are not (B, K) integers, or with another head.

    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> tokens, next_sentence = ft.models.bert.apply(params, torch.tensor([[1, 2, 3]]), config)
    >>> tokens.shape, next_sentence.shape
    (torch.Size([1, 3, 256]), torch.Size([1, 2]))
    """
    last = None
    if key is not None and config.head in ("sequence", "token"):
        key, last = random.split(key, 2).unbind()
    x = hidden(params, tokens, config, types=types, mask=mask, key=key)
    asked = at_places("bert", x, places, config.head in ("pretraining", "masked_lm"))  # (B, T or K, D)
    if config.head == "none":
        return x
    if config.head == "masked_lm":
        return token_logits(params, asked, config)
    if config.head != "token":
        pooled = torch.tanh(nn.linear(x[:, 0], **params["pooler"]))  # (B, D)
        if config.head == "pooled":
            return pooled
        if config.head == "pretraining":
            return Predictions(token_logits(params, asked, config), nn.linear(pooled, **params["next_sentence"]))
        x = pooled
    rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
    return nn.linear(nn.dropout(x, rate, last), **params["classifier"])


def token_logits(params: Params, x: Tensor, config: Config) -> Tensor:
    """Return the logits of the token at each place, (..., V), of what `hidden` made of these places, (..., D).

    The heads "masked_lm" and "pretraining" take it of all places, or of `places`: the vocabulary is most of the work of
    a small model, and a loss asks about masked tokens alone.

    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=1, heads=2, width=8, inner=16, head="masked_lm")
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> x = ft.models.bert.hidden(params, torch.tensor([[1, 2, 3]]), config)
    >>> ft.models.bert.token_logits(params, x[:, 1:2], config).shape
    torch.Size([1, 1, 256])
    """
    head = params["masked_lm"]
    x = ACTIVATIONS[config.activation](nn.linear(x, **head["transform"]))  # (..., D)
    x = nn.layer_norm(x, **head["norm"], eps=config.eps)
    return x @ params["embeddings"]["tokens"].mT + head["bias"]  # (..., V)


def hidden(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    types: Tensor | None = None,
    mask: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Return what the last block makes of each token, (B, T, D). Without a key nothing is dropped.

    `types` (B, T) are 0 for the first sentence, and everywhere unless given, and 1 for the second. With `mask` (B, T),
    true at tokens and false at padding, no token sees padding.
    Raises: ValueError for tokens that are not (B, T) with T up to the context, and others of another shape; TypeError
    unless they are integers and the mask boolean; IndexError for a token outside the vocabulary, or a type, on the CPU.

    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> mask = torch.tensor([[True, True, False]])
    >>> ft.models.bert.hidden(params, torch.tensor([[1, 2, 0]]), config, mask=mask).shape
    torch.Size([1, 3, 8])
    """
    config.check(tokens, types, mask)
    if config.dropout == config.attention_dropout == 0.0:
        key = None  # keys that nothing draws from would still be inputs of every block, and be computed
    keys = [None] * (config.layers + 1) if key is None else list(random.split(key, config.layers + 1).unbind())
    seen = None if mask is None else nn.attention_mask(tokens.shape[1], key_mask=mask)  # (B, 1, 1, T)

    def block(layer: tuple[Params, Tensor | None], x: Tensor, seen: Tensor | None) -> Tensor:
        params, key = layer
        weights_key, attention_key, mlp_key = (None, None, None) if key is None else random.split(key, 3).unbind()
        attn, mlp = params["attn"], params["mlp"]
        qkv, each = nn.linear(x, **attn["qkv"]), config.width // config.heads
        q, k, v = rearrange(qkv, "b t (n h k) -> n b h t k", n=3, k=each)  # (B, H, T, K)
        attended = nn.attention(
            q, k, v, seen, dropout_rate=config.attention_dropout, key=weights_key, heads=config.heads,
            implementation=config.attention,
        )  # fmt: skip
        out = nn.linear(rearrange(attended, "b h t k -> b t (h k)"), **attn["out"])  # (B, T, D)
        x = nn.layer_norm(x + nn.dropout(out, config.dropout, attention_key), **attn["norm"], eps=config.eps)
        out = nn.linear(ACTIVATIONS[config.activation](nn.linear(x, **mlp["up"])), **mlp["down"])  # (B, T, D)
        return nn.layer_norm(x + nn.dropout(out, config.dropout, mlp_key), **mlp["norm"], eps=config.eps)

    x = _embedded(params["embeddings"], tokens, types, config)  # (B, T, D)
    x = nn.dropout(x, config.dropout, keys[0])
    return nn.stack(block, list(zip(params["blocks"], keys[1:], strict=True)), x, seen)


def _embedded(params: Params, tokens: Tensor, types: Tensor | None, config: Config) -> Tensor:
    x = nn.embedding(tokens, params["tokens"])
    if config.padding is not None:
        x = torch.where((tokens == config.padding)[..., None], x.detach(), x)
    x = x + (params["types"][0] if types is None else nn.embedding(types, params["types"]))
    return nn.layer_norm(x + params["positions"][: tokens.shape[1]], **params["norm"], eps=config.eps)


def labels(config: Config) -> Labels:
    """Say which parameters decay, how deep they lie and which are matrices of hidden layers, for `ft.optim`.

    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> ft.models.bert.labels(config).depth("embeddings/norm/bias"), ft.models.bert.labels(config).depth("pooler/bias")
    (0, 3)
    """
    tables = tuple(f"embeddings/{name}" for name in ("tokens", "positions", "types"))
    return Labels(layers=config.layers, embeddings=tables, first=("embeddings/**",))


def from_hf(folder: hf.Folder, *, head: Head | None = None, progress: Progress | None = None) -> tuple[Params, Config]:
    """Load the parameters, in the dtype of the files, and the config of a BERT in a folder of transformers.

    The head is that of the folder's `architectures`, or `head`, whose tensors must be there; others are passed over.
    Results equal those of the class of transformers to rounding. Attention is "fused" unless weights are dropped.
    `progress` counts bytes of the files.
    Raises: CheckpointError of `functrain.checkpoint`, which names the file, the field or tensor, and a way out;
    ValueError for a head that there is not.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.models.bert.to_hf(f"{folder}/mine", params, config)
    ...     loaded, its_config = ft.models.bert.from_hf(path, head="masked_lm")
    >>> its_config.head, "masked_lm" in loaded, "pooler" in loaded
    ('masked_lm', True, False)
    """
    return hf.read(folder, HF, progress, head=head)


def to_hf(
    folder: hf.Folder,
    params: Params,
    config: Config,
    *,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Save parameters and config as a folder that transformers loads bit for bit; return its path.

    `files` is what else stands in the folder, such as a tokenizer. Equals both again under `from_hf`, but for
    `attention`. `progress` counts bytes of tensors.
    Raises: CheckpointError of `functrain.checkpoint`; the folder then is as it was.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.bert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.bert.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in ft.models.bert.to_hf(f"{folder}/mine", params, config).iterdir())
    ['config.json', 'model.safetensors']
    """
    return hf.write(folder, params, config, HF, {}, files, progress)


def _config(*, attention_dropout: float, **fields: Any) -> Config:
    attention: Literal["fused", "math"] = "math" if attention_dropout > 0.0 else "fused"
    return Config(attention=attention, attention_dropout=attention_dropout, **fields)


HF = bert_layout.layout(_config, init)

elsewhere.furnish(__name__)
