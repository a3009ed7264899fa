"""Trees for the checkpoint tests: what Hypothesis draws, and what equal means."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from functrain import checkpoint, tree
from functrain.checkpoint.tensors import NAMES


@checkpoint.register
class Moments(NamedTuple):
    mu: Any
    nu: Any


@checkpoint.register
@tree.dataclass(static=("rate", "name"))
class Layer:
    weight: Any
    bias: Any
    rate: float = 0.5
    name: str | None = None


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bits in any dtype that can be saved, in many layouts in memory: NaN payloads and negative zeros happen."""
    dtype = draw(st.sampled_from(list(NAMES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.empty(shape, dtype=dtype).nbytes
    drawn = draw(st.binary(min_size=count, max_size=count))
    raw = torch.tensor(list(drawn), dtype=torch.uint8)
    plain = (raw % 2).view(torch.bool) if dtype == torch.bool else raw.view(dtype)
    tensor = plain.reshape(shape)
    match draw(st.sampled_from(["plain", "permuted", "expanded", "sliced", "conjugated"])):
        case "permuted":
            return tensor.permute(draw(st.permutations(range(tensor.dim()))))
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "sliced" if tensor.dim():
            return tensor[..., :: draw(st.integers(2, 4))]
        case "conjugated" if dtype == torch.complex64:
            return tensor.conj()
    return tensor


scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.builds(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0], st.integers(0, 2**64 - 1)),
    st.complex_numbers(),
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=5),
)
keys = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/"), min_size=1, max_size=4)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    rows = st.dictionaries(st.one_of(keys, st.just("__metadata__")), inner, max_size=3)
    return st.one_of(
        rows,
        st.dictionaries(st.integers(-3, 9), inner, max_size=3),
        rows.map(OrderedDict),
        rows.map(lambda table: defaultdict(list, table)),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Moments, inner, inner),
        st.builds(Layer, inner, inner, st.floats(), st.one_of(st.none(), st.just("é"))),
    )


trees = st.recursive(st.one_of(tensors(), scalars, st.none()), containers, max_leaves=8)


def bits(leaf: Any) -> bytes:
    """Every bit of a leaf and what it is, in an order that does not depend on how it lies in memory."""
    if isinstance(leaf, Tensor):
        plain = torch.empty(leaf.shape, dtype=leaf.dtype).copy_(leaf.detach())
        return f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + bytes(plain.reshape(-1).view(torch.uint8).tolist())
    if isinstance(leaf, float):
        return b"float" + struct.pack(">d", leaf)
    if isinstance(leaf, complex):
        return b"complex" + struct.pack(">dd", leaf.real, leaf.imag)
    return f"{type(leaf).__name__} {leaf!r}".encode()


def assert_same(a: Any, b: Any) -> None:
    """Equal containers, equal static fields, and leaves equal to the last bit."""
    assert type(a) is type(b), (type(a), type(b))
    below, other = tree.children(a), tree.children(b)
    if below is None or other is None:
        assert bits(a) == bits(b), (a, b)
        return
    if isinstance(a, dict):
        assert list(a) == list(b) and getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
    if isinstance(a, Layer):
        assert bits(a.rate) == bits(b.rate) and a.name == b.name
    assert [name for name, _ in below] == [name for name, _ in other]
    for (_, x), (_, y) in zip(below, other, strict=True):
        assert_same(x, y)


def small(step: int) -> Any:
    """A little state that differs in every leaf from that of any other step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 7, generator=generator)
    return {
        "params": {"w": weight, "tied": weight, "b": torch.randn(3, generator=generator).bfloat16()},
        "moments": Moments(torch.randn(5, 7, generator=generator), torch.full((), float(step))),
        "step": torch.tensor(step),
        "note": f"step {step}",
    }
