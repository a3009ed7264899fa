"""ModernBERT: an encoder of pre-norm blocks with rotary positions, local and global attention and gated MLPs.

B batch, T tokens, L layers, D width, H heads, K = D / H width of a head, V vocabulary, F inner width, N labels.

Linear weights are (in, out); norms and linear layers have a `weight`, and a `bias` where the config says so:
`embeddings/tokens` (V, D), `embeddings/norm`, `blocks/i/norm_1` but of the first block, whose input is what a norm
made, `blocks/i/attn/{qkv,out}` (D, 3 D), (D, D), `blocks/i/norm_2`, `blocks/i/mlp/{up,down}` (D, 2 F), (F, D), `norm`,
and, as the head needs them, `head/{dense,norm}` (D, D), (D,), `decoder/{weight,bias}` (V, D), (V,), `classifier`
(D, N).

Source: Warner et al. 2024 (arXiv:2412.13663).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from functrain import nn, random
from functrain.models import hf, modernbert_layout
from functrain.models.activations import ACTIVATIONS
from functrain.models.labels import Labels
from functrain.models.modernbert_config import Config, Head
from functrain.models.places import at_places
from functrain.models.positions import positions_of
from functrain.models.sharding_rules import modernbert as sharding
from functrain.progress import Progress
from functrain.tree import Params, elsewhere

__all__ = ["HF", "Config", "apply", "from_hf", "hidden", "init", "labels", "sharding", "to_hf", "token_logits"]


def init(config: Config, key: Tensor) -> Params:
    """Draw initial parameters, float32, on the key's device.

    Weights are normal with deviation 0.02, of what is added to the residual and of the head 0.02 / sqrt(2 L), of a
    classifier 1 / sqrt(D), none beyond two deviations; biases are 0, norms 1. To put a head on the parameters of a
    folder: `{**init(config, key), **params}`; a classifier may begin with `params["head"]` of "masked_lm".

    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> params["blocks"][0]["mlp"]["up"]["weight"].shape, ["norm_1" in block for block in params["blocks"]]
    (torch.Size([8, 24]), [False, True])
    """
    width, into, out = config.width, 0.02, 0.02 / (2 * config.layers) ** 0.5
    embeddings, blocks, dense, last = random.split(key, 4).unbind()

    def normal(key: Tensor, deviation: float, *shape: int) -> Tensor:
        return random.truncated_normal(key, -2.0, 2.0, shape) * deviation

    def with_bias(weight: Tensor, bias: bool) -> Params:
        return {"weight": weight, "bias": weight.new_zeros(weight.shape[-1])} if bias else {"weight": weight}

    def norm() -> Params:
        return with_bias(torch.ones(width, device=key.device), config.norm_bias)

    def block(number: int, key: Tensor) -> Params:
        keys = random.split(key, 4).unbind()
        qkv, attended = normal(keys[0], into, width, 3 * width), normal(keys[1], out, width, width)
        up, down = normal(keys[2], into, width, 2 * config.inner), normal(keys[3], out, config.inner, width)
        return {
            **({"norm_1": norm()} if number else {}),
            "attn": {name: with_bias(w, config.attention_bias) for name, w in (("qkv", qkv), ("out", attended))},
            "norm_2": norm(),
            "mlp": {name: with_bias(w, config.mlp_bias) for name, w in (("up", up), ("down", down))},
        }

    params: Params = {
        "embeddings": {"tokens": normal(embeddings, into, config.vocab, width), "norm": norm()},
        "blocks": [block(i, key) for i, key in enumerate(random.split(blocks, config.layers).unbind())],
        "norm": norm(),
    }
    if config.head != "none":
        params["head"] = {"dense": with_bias(normal(dense, out, width, width), config.head_bias), "norm": norm()}
    if config.head == "masked_lm" and not (config.tied and not config.decoder_bias):
        bias = {"bias": torch.zeros(config.vocab, device=key.device)} if config.decoder_bias else {}
        params["decoder"] = bias if config.tied else {"weight": normal(last, out, config.vocab, width), **bias}
    if config.classifies:
        params["classifier"] = with_bias(normal(last, width**-0.5, width, config.num_labels), True)
    return params


def apply(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    places: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Return what the config's head makes of the tokens (B, T).

    It is (B, T, V) of "masked_lm", (B, N) of "sequence", (B, T, N) of "token" and (B, T, D) of "none". With `places`
    (B, K) of `ft.data.masked(..., max_predictions=K)`, logits of tokens are those of these places alone, (B, K, V). The
    other arguments are those of `hidden`; `ft.models.bert.classifier_loss` is a loss of classifiers.
    Raises: as `hidden`; ValueError for documents of which a "sequence" head would make one; ValueError and TypeError
    for places that are not (B, K) integers, or with another head.

    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> ft.models.modernbert.apply(params, torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 256])
    """
    if config.head == "sequence" and documents is not None:
        raise ValueError(
            "modernbert: expected no documents with the head 'sequence', which classifies whole rows, came "
            f"{tuple(documents.shape)}; give each document a row of its own"
        )
    last = None
    if key is not None and config.classifies:
        key, last = random.split(key, 2).unbind()
    x = hidden(params, tokens, config, mask=mask, documents=documents, positions=positions, key=key)
    asked = at_places("modernbert", x, places, config.head == "masked_lm")  # (B, T or K, D)
    if config.head == "none":
        return x
    if config.head == "masked_lm":
        return token_logits(params, asked, config)
    if config.head == "sequence":
        x = _pooled(x, mask, config)  # (B, D)
    x = nn.dropout(_predicting(params, x, config), config.classifier_dropout, last)
    return nn.linear(x, **params["classifier"])


def token_logits(params: Params, x: Tensor, config: Config) -> Tensor:
    """Return the logits of the token at each place, (..., V), of what `hidden` made of these places, (..., D).

    The head "masked_lm" takes it of all places, or of `places`: the vocabulary is most of the work of a small model,
    and a loss asks about masked tokens alone.

    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=1, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> x = ft.models.modernbert.hidden(params, torch.tensor([[1, 2, 3]]), config)
    >>> ft.models.modernbert.token_logits(params, x[:, 1:2], config).shape
    torch.Size([1, 1, 256])
    """
    decoder = params.get("decoder", {})
    weight = params["embeddings"]["tokens"] if config.tied else decoder["weight"]
    return nn.linear(_predicting(params, x, config), weight.mT, decoder.get("bias"))  # (..., V)


def _predicting(params: Params, x: Tensor, config: Config) -> Tensor:
    head = params["head"]
    x = ACTIVATIONS[config.head_activation](nn.linear(x, **head["dense"]))  # (..., D)
    return nn.layer_norm(x, **head["norm"], eps=config.eps)


def _pooled(x: Tensor, mask: Tensor | None, config: Config) -> Tensor:
    if config.pooling == "cls":
        return x[:, 0]
    if mask is None:
        return torch.mean(x, 1)
    # a row of padding alone has a mean of zero, and no NaN
    count = torch.sum(mask, 1, keepdim=True).clamp(min=1)
    return torch.sum(torch.where(mask[..., None], x, 0.0), 1) / count.to(x.dtype)


def hidden(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Return the last norm of each token, (B, T, D). Without a key nothing is dropped.

    With `mask` (B, T), true at tokens and false at padding, no token sees padding; what padding itself has is not
    transformers'. With `documents` (B, T), the number of the document of each token, several are packed in a row, and
    none sees another. `positions` (B, T) are counted anew in each document unless given.
    Raises: ValueError for tokens that are not (B, T) with T up to the context, and others of another shape; TypeError
    unless they are integers and the mask boolean; IndexError for a token outside the vocabulary on the CPU.

    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> tokens, documents = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]])
    >>> ft.models.modernbert.hidden(params, tokens, config, documents=documents).shape
    torch.Size([1, 3, 8])
    """
    config.check(tokens, mask=mask, documents=documents, positions=positions)
    if config.embedding_dropout == config.attention_dropout == config.mlp_dropout == 0.0:
        key = None  # keys that nothing draws from would still be inputs of every block, and be computed
    keys = [None] * (config.layers + 1) if key is None else list(random.split(key, config.layers + 1).unbind())
    kinds = _kinds(tokens, mask, documents, positions, config)

    def block(layer: Any, x: Tensor) -> Tensor:
        (params, (seen, cos, sin), key), rate = layer, config.attention_dropout
        weights_key, attention_key, mlp_key = (None, None, None) if key is None else random.split(key, 3).unbind()
        h = nn.layer_norm(x, **params["norm_1"], eps=config.eps) if "norm_1" in params else x
        parts = {"n": 3, "k": config.width // config.heads}
        q, k, v = rearrange(nn.linear(h, **params["attn"]["qkv"]), "b t (n h k) -> n b h t k", **parts)
        how: Any = {"key": weights_key, "dropout_rate": rate, "implementation": config.attention}
        attended = nn.attention(nn.rotate(q, cos, sin), nn.rotate(k, cos, sin), v, seen, heads=config.heads, **how)
        out = nn.linear(rearrange(attended, "b h t k -> b t (h k)"), **params["attn"]["out"])  # (B, T, D)
        x = x + nn.dropout(out, rate, attention_key)
        h = nn.layer_norm(x, **params["norm_2"], eps=config.eps)
        inside, gate = nn.linear(h, **params["mlp"]["up"]).chunk(2, -1)
        inside = ACTIVATIONS[config.activation](inside) * gate  # (B, T, F)
        inside = nn.dropout(inside, config.mlp_dropout, mlp_key, whole=(2, config.inner))
        return x + nn.linear(inside, **params["mlp"]["down"])

    embeddings = params["embeddings"]
    x = nn.embedding(tokens, embeddings["tokens"])  # (B, T, D)
    if config.padding is not None:
        x = torch.where((tokens == config.padding)[..., None], x.detach(), x)
    x = nn.dropout(nn.layer_norm(x, **embeddings["norm"], eps=config.eps), config.embedding_dropout, keys[0])
    x = nn.stack(block, list(zip(params["blocks"], kinds, keys[1:], strict=True)), x)
    return nn.layer_norm(x, **params["norm"], eps=config.eps)


def _kinds(
    tokens: Tensor, mask: Tensor | None, documents: Tensor | None, positions: Tensor | None, config: Config
) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Return what each layer sees, and the angles by which it turns."""
    count, each = tokens.shape[1], config.width // config.heads
    positions = positions_of(tokens, documents, None) if positions is None else positions
    window = config.window // 2 + 1
    made: list[tuple[Tensor | None, Tensor, Tensor]] = []
    for reach, rope in ((None, config.global_rope), (window if window < count else None, config.local_rope)):
        seen = None
        if reach is not None or documents is not None or mask is not None:
            seen = nn.attention_mask(count, window=reach, documents=documents, key_mask=mask, device=tokens.device)
        made.append((seen, *nn.rotary_angles(positions, each, rope)))  # (B, T, K / 2)
    chosen = config.which_global
    return [made[i not in chosen] for i in range(config.layers)]


def labels(config: Config) -> Labels:
    """Say which parameters decay, how deep they lie and which are matrices of hidden layers, for `ft.optim`.

    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> [ft.models.modernbert.labels(config).depth(path) for path in ("embeddings/norm/weight", "head/dense/weight")]
    [0, 3]
    """
    return Labels(layers=config.layers, embeddings=("embeddings/tokens",), first=("embeddings/**",))


def from_hf(folder: hf.Folder, *, head: Head | None = None, progress: Progress | None = None) -> tuple[Params, Config]:
    """Load the parameters, in the dtype of the files, and the config of a ModernBERT in a folder of transformers.

    The head is that of the folder's `architectures`, or `head`, whose tensors must be there; others are passed over.
    Results equal those of the class of transformers to rounding, but at padding. Attention is "fused" unless weights
    are dropped. `progress` counts bytes of the files.
    Raises: CheckpointError of `functrain.checkpoint`, which names the file, the field or tensor, and a way out;
    ValueError for a head that there is not.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.models.modernbert.to_hf(f"{folder}/mine", params, config)
    ...     loaded, its_config = ft.models.modernbert.from_hf(path, head="none")
    >>> its_config.head, "decoder" in loaded
    ('none', False)
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
    `attention`, and with `global_layers` said. `progress` counts bytes of tensors.
    Raises: CheckpointError of `functrain.checkpoint`; the folder then is as it was.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.modernbert.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=12)
    >>> params = ft.models.modernbert.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in ft.models.modernbert.to_hf(f"{folder}/mine", params, config).iterdir())
    ['config.json', 'model.safetensors']
    """
    return hf.write(folder, params, replace(config, global_layers=config.which_global), HF, {}, files, progress)


def _config(*, attention_dropout: float, **fields: Any) -> Config:
    attention: Literal["fused", "math"] = "math" if attention_dropout > 0.0 else "fused"
    return Config(attention=attention, attention_dropout=attention_dropout, **fields)


HF = modernbert_layout.layout(_config, init)

elsewhere.furnish(__name__)
