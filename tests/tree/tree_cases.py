"""Trees for the tree tests: what Hypothesis draws, and what equal means, told without the code under test."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from functrain import tree


class Pair(NamedTuple):
    x: Any
    y: Any


@tree.dataclass(static=("rate",))
class Layer:
    weight: Any
    bias: Any
    rate: float = 0.5


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
FLOATS = DTYPES[:4]


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (*DTYPES, torch.complex64)) -> Tensor:
    """Small whole numbers in any dtype and shape; () and empty shapes happen."""
    shape, dtype = draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.sampled_from(dtypes))
    count = torch.empty(shape).numel()
    values = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    tensor = torch.tensor(values).reshape(shape).to(dtype)
    return tensor * (1 - 2j) if dtype.is_complex else tensor


names = st.sampled_from(["a", "b", "w", "ln_1", "10", "9", "é", " ", "*", "a b"])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    rows = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        rows,
        st.dictionaries(st.integers(-2, 12), inner, max_size=3),
        st.dictionaries(st.one_of(st.integers(0, 8), st.sampled_from("ab")), inner, max_size=4),
        rows.map(OrderedDict),
        rows.map(lambda table: defaultdict(list, table)),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.builds(Layer, inner, inner, st.sampled_from([0.0, 0.5])),
    )


def trees(leaves: st.SearchStrategy[Any] | None = None, max_leaves: int = 10) -> st.SearchStrategy[Any]:
    """Trees of every container, of tensors of every dtype unless `leaves` says otherwise."""
    ends = st.one_of(tensors() if leaves is None else leaves, st.none())
    return st.recursive(ends, containers, max_leaves=max_leaves)


def below(node: Any) -> list[tuple[str, Any]] | None:
    """Return a node's children by name in the order in which they are kept, or None for a leaf."""
    if node is None:
        return []
    if isinstance(node, dict):
        return [(str(key), child) for key, child in node.items()]
    if isinstance(node, Pair):
        return list(node._asdict().items())
    if type(node) in (list, tuple):
        return [(str(i), child) for i, child in enumerate(node)]
    return [("weight", node.weight), ("bias", node.bias)] if isinstance(node, Layer) else None


def assert_same(a: Any, b: Any, *, identical: bool = False) -> None:
    """Equal containers down to the order of insertion, and leaves that are equal, or one object."""
    assert type(a) is type(b), (a, b)
    first, second = below(a), below(b)
    if first is None or second is None:
        if isinstance(a, Tensor) and not identical:
            assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
        else:
            assert a is b or (a == b and not identical), (a, b)
        return
    assert [name for name, _ in first] == [name for name, _ in second]
    assert getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
    assert getattr(a, "rate", None) == getattr(b, "rate", None)
    for (_, x), (_, y) in zip(first, second, strict=True):
        assert_same(x, y, identical=identical)


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """Run `fn` as one graph that Dynamo traced."""
    torch._dynamo.reset()
    return torch.compile(fn, backend="eager", fullgraph=True)(*args)
