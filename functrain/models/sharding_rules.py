"""Which axes of a mesh split which leaves of our models: rules for `ft.sharding.Plan`."""

from __future__ import annotations

from typing import Any

from functrain.sharding import P, largest, parts


def gpt2(*, fsdp: str | None = None, tensor: str | None = None) -> list[tuple[str, Any]]:
    """Return rules that split params along the axes of these names: `fsdp` any leaf, which is gathered where it is
    used, `tensor` heads, the inside of MLPs and the vocabulary.

    >>> ft.models.gpt2.sharding(fsdp="fsdp", tensor="tensor")[0]
    ('wte', P('tensor', 'fsdp'))
    """
    return [("wte", P(tensor, fsdp))] * bool(tensor) + _blocks(fsdp, tensor, fused=3)


def bert(*, fsdp: str | None = None, tensor: str | None = None) -> list[tuple[str, Any]]:
    """Return rules that split params along the axes of these names: `fsdp` any leaf, which is gathered where it is
    used, `tensor` heads and the inside of MLPs.

    >>> ft.models.bert.sharding(tensor="tensor")[2]
    ('blocks/*/attn/out/weight', P('tensor', None))
    """
    return _blocks(fsdp, tensor, fused=3)


def vit(*, fsdp: str | None = None, tensor: str | None = None) -> list[tuple[str, Any]]:
    """Return rules that split params along the axes of these names: `fsdp` any leaf, which is gathered where it is
    used, `tensor` heads and the inside of MLPs.

    >>> ft.models.vit.sharding(fsdp="fsdp")
    [('**', largest('fsdp'))]
    """
    return _blocks(fsdp, tensor, fused=3)


def modernbert(*, fsdp: str | None = None, tensor: str | None = None) -> list[tuple[str, Any]]:
    """Return rules that split params along the axes of these names: `fsdp` any leaf, which is gathered where it is
    used, `tensor` heads and the inside of MLPs.

    >>> ft.models.modernbert.sharding(tensor="tensor")[3]
    ('blocks/*/mlp/up/weight', P(None, parts('tensor', 2)))
    """
    return _blocks(fsdp, tensor, fused=3, gated=2)


def llama(*, fsdp: str | None = None, tensor: str | None = None) -> list[tuple[str, Any]]:
    """Return rules that split params along the axes of these names: `fsdp` any leaf, which is gathered where it is
    used, `tensor` heads, of keys too, the inside of MLPs and the vocabulary; experts by `fsdp` alone.

    >>> ft.models.llama.sharding(tensor="tensor")[0]
    ('embed', P('tensor', None))
    """
    vocabulary: list[tuple[str, Any]] = [(name, P(tensor, fsdp)) for name in ("embed", "head")] * bool(tensor)
    return vocabulary + _blocks(fsdp, tensor, fused=1)


def _blocks(fsdp: str | None, tensor: str | None, *, fused: int, gated: int = 1) -> list[tuple[str, Any]]:
    rest: Any = P() if fsdp is None else largest(fsdp)
    if tensor is None:
        return [("**", rest)]

    def columns(name: str, count: int = 1) -> list[tuple[str, Any]]:
        axis = tensor if count == 1 else parts(tensor, count)
        return [(f"blocks/*/{name}/weight", P(fsdp, axis)), (f"blocks/*/{name}/bias", P(axis))]

    def rows(name: str) -> list[tuple[str, Any]]:
        return [(f"blocks/*/{name}/weight", P(tensor, fsdp))]

    heads = columns("attn/qkv", fused) if fused > 1 else [rule for name in "qkv" for rule in columns(f"attn/{name}")]
    inside = columns("mlp/up", gated) + ([] if fused > 1 else columns("mlp/gate"))
    return [*heads, *rows("attn/out"), *inside, *rows("mlp/down"), ("**", rest)]
