"""Trees to try a function on, drawn and made smaller by Hypothesis: `pip install 'functrain[testing]'`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functrain import tree
from functrain.sharding import P
from functrain.tree import Batch, Params, Tree, elsewhere

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "functrain.testing: trees are drawn by Hypothesis, which is not installed; pip install 'functrain[testing]'",
        name=error.name,
    ) from error

__all__ = ["Pair", "batches", "fill", "gradients", "masks", "params", "plans", "trees"]

Shape: TypeAlias = tuple[int, ...]

SHAPES: tuple[Shape, ...] = ((), (3,), (2, 3), (2, 1, 2), (0,), (0, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
BATCH_DTYPES = (torch.float32, torch.int64, torch.bool, torch.bfloat16)


class Pair(NamedTuple):
    """A NamedTuple, as a node of drawn trees."""

    left: Tree
    right: Tree


def trees(leaves: SearchStrategy[Any], *, max_leaves: int = 4) -> SearchStrategy[Tree]:
    """Draw trees of these leaves: a leaf alone, dict, list, tuple, NamedTuple, and None for an empty node.

    A tree has one leaf or more.
    """
    # "10" comes before "9" in a path's order, and after it in a number's
    keys = st.sampled_from(["b", "a", "10", "9"])
    nodes = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=2),
            st.tuples(inner, inner),
            st.builds(Pair, inner, st.one_of(st.none(), inner)),
        ),
        max_leaves=max_leaves,
    )
    return nodes


@st.composite
def params(
    draw: st.DrawFn,
    *,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    max_leaves: int = 4,
    tied: bool = True,
) -> Params:
    """Draw trees of floating-point tensors: of several dtypes, () and empty ones too; with `tied`, sometimes one
    tensor stands at two paths."""
    empty = st.builds(lambda shape, dtype: torch.empty(shape, dtype=dtype), st.sampled_from(shapes), _of(dtypes))
    made = tree.map(torch.clone, fill(draw(trees(empty, max_leaves=max_leaves)), draw(seeds)))
    paths = tree.paths(made)
    if tied and len(paths) > 1 and draw(st.integers(0, 3)) == 3:
        made = tree.set_at(made, paths[-1], tree.at(made, paths[0]))
    return made


def gradients(params: Params) -> SearchStrategy[Tree]:
    """Draw trees like params: of unlike sizes from leaf to leaf, with some zeros."""
    return seeds.map(lambda seed: fill(params, seed))


def masks(params: Params) -> SearchStrategy[Tree]:
    """Draw trees of booleans like params."""
    leaves, structure = tree.flatten(params)
    return st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)).map(
        lambda chosen: tree.unflatten(structure, chosen)
    )


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    rows: SearchStrategy[int] | None = None,
    shapes: Sequence[Shape] = ((), (3,), (2, 2)),
    dtypes: Sequence[torch.dtype] = BATCH_DTYPES,
    max_leaves: int = 3,
) -> Batch:
    """Draw trees of tensors that have their first dimension in common; integers are in 0 to 9.

    Shapes: every leaf is (B, ...), with B from `rows`, 1 to 8 without it.
    """
    size = draw(st.integers(1, 8) if rows is None else rows)
    empty = st.builds(lambda shape, dtype: torch.empty(size, *shape, dtype=dtype), st.sampled_from(shapes), _of(dtypes))
    return fill(draw(trees(empty, max_leaves=max_leaves)), draw(seeds))


@st.composite
def plans(
    draw: st.DrawFn,
    params: Params,
    *,
    sharding: Callable[..., Sequence[Any]] | None = None,
    max_ranks: int = 4,
) -> dict[str, Any]:
    """Draw what `ft.sharding.Plan` is called with: 2 to `max_ranks` ranks along "data" and "fsdp", and rules that
    split some leaves of params at a dimension that divides.

    With `sharding(fsdp=, tensor=)`, rules of a model such as `ft.models.gpt2.sharding`, sometimes these, along "tensor"
    too, with tokens split between ranks or not. For `ft.testing.assert_same_under_plan`.
    """
    axes = ["data", "fsdp"] + (["tensor"] if sharding is not None else [])
    sizes = draw(
        st.tuples(*[st.sampled_from([1, 2, 4]) for _ in axes]).filter(lambda found: 1 < math.prod(found) <= max_ranks)
    )
    mesh = {axis: size for axis, size in zip(axes, sizes, strict=True) if size > 1 or draw(st.booleans())}
    if sharding is not None and "tensor" in mesh:
        rules = sharding(tensor="tensor", **({"fsdp": "fsdp"} if "fsdp" in mesh else {}))
        return {"mesh": mesh, "params": list(rules), "tensor": "tensor", "stream": draw(st.booleans())}
    layers = draw(st.sampled_from(["blocks/*/**", ()]))
    return {"mesh": mesh, "params": [draw(_rule(*item, mesh)) for item in tree.items(params)], "layers": layers}


def _rule(path: str, leaf: Tensor, mesh: Mapping[str, int]) -> SearchStrategy[tuple[str, P]]:
    """Draw how a leaf is split, along all axes, one, or none."""
    chosen: list[P] = [P()]
    for axes in [(axis,) for axis in mesh] + ([tuple(mesh)] if len(mesh) > 1 else []):
        count = math.prod(mesh[axis] for axis in axes)
        fitting = [d for d, size in enumerate(leaf.shape) if size and size % count == 0]
        chosen += [P(*(axes if at == d else None for at in range(d + 1))) for d in fitting]
    return st.sampled_from(chosen).map(lambda rule: (path, rule))


seeds = st.integers(0, 99)


def fill(values: Tree, seed: int) -> Tree:
    """Return a tree like this one with other values, a function of the seed: normal ones of unlike sizes from leaf to
    leaf, a tenth of them zero; integers from 0 to 9; booleans."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: _filled(leaf, generator), values)


def _filled(leaf: Tensor, generator: torch.Generator) -> Tensor:
    draws = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    if leaf.dtype == torch.bool:
        return draws > 0
    if not leaf.is_floating_point() and not leaf.is_complex():
        return torch.randint(0, 10, leaf.shape, generator=generator, dtype=leaf.dtype)
    size = 10.0 ** int(torch.randint(-2, 2, (), generator=generator))
    if leaf.is_complex():
        draws = torch.complex(draws, torch.randn(leaf.shape, generator=generator, dtype=torch.float64))
    kept = torch.rand(leaf.shape, generator=generator) > 0.1
    return (draws * size * kept).to(leaf.dtype).to(leaf.device)


def _of(dtypes: Sequence[torch.dtype]) -> SearchStrategy[torch.dtype]:
    return st.sampled_from(list(dtypes))


elsewhere.furnish(__name__)
