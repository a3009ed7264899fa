"""The copies of params that a state holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functrain.tree as tree
from functrain.optim.masking import MaskedNode, ParamsPlaceholder
from functrain.optim.transformation import OptState
from functrain.tree import Tree
from functrain.tree.nodes import children, rebuild, signature


def tree_map_params(
    initable: Any,
    f: Callable[..., Any],
    state: OptState,
    /,
    *rest: Tree,
    transform_non_params: Callable[[Any], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
) -> OptState:
    """Apply `f` to every leaf of `state` that stands for a leaf of params, such as a moment, and return the new state.

    `initable` is the transformation that the state is of, or its `init`. `f` gets the leaf, and what each tree of
    `rest`, like params, has in its place: a device, a placement. Other leaves become `transform_non_params(leaf)`, or
    stay. A MaskedNode stays, unless `is_leaf` is true of it: then `f` gets it. Equals `optax.tree_map_params`.

    Raises: ValueError naming where the state is not one of `initable`, or where `rest` is not like params.

    >>> optimizer = ft.optim.adam(0.1)
    >>> state = optimizer.init({"w": torch.zeros(2)})
    >>> state = ft.optim.tree_map_params(optimizer, lambda moment: moment.to(torch.float64), state)
    >>> state[0].mu["w"].dtype, state[0].count.dtype
    (torch.float64, torch.int64)
    """
    init = initable.init if hasattr(initable, "init") else initable
    return _outside(init(ParamsPlaceholder()), state, "", f, rest, transform_non_params, is_leaf)


def _outside(
    made: Any, node: Any, path: str, f: Any, rest: tuple[Tree, ...], other: Callable[[Any], Any] | None, is_leaf: Any
) -> Any:
    """Walk the state as far as the state of the placeholder goes."""
    if isinstance(made, ParamsPlaceholder):
        return _inside(node, path, f, rest, is_leaf)
    expected, below = children(made), children(node)
    if expected is None and below is None:
        return other(node) if other else node
    if expected is None or below is None or signature(made) != signature(node):
        raise ValueError(
            f"tree_map_params: {path or 'the state'}: expected {_described(made)}, as this transformation makes it, "
            f"came {_described(node)}; pass the transformation that made the state"
        )
    pairs = zip(expected, below, strict=True)
    return rebuild(node, [_outside(a, b, _join(path, name), f, rest, other, is_leaf) for (name, a), (_, b) in pairs])


def _inside(node: Any, path: str, f: Any, rest: tuple[Tree, ...], is_leaf: Any) -> Any:
    """Walk a copy of params, and the rest beside it."""
    if is_leaf is not None and is_leaf(node):
        return f(node, *rest)
    below = children(node)
    if below is None:
        return f(node, *rest)
    if isinstance(node, MaskedNode):
        return node
    columns = []
    for given in rest:
        if signature(given) != signature(node):
            raise ValueError(
                f"tree_map_params: {path}: expected {_described(node)} in each tree of rest, came {_described(given)}; "
                "pass trees like params"
            )
        columns.append([child for _, child in children(given) or ()])
    rows = zip(*columns, strict=True) if columns else iter([()] * len(below))
    made = [
        _inside(child, _join(path, name), f, tuple(row), is_leaf)
        for (name, child), row in zip(below, rows, strict=True)
    ]
    return rebuild(node, made)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _described(node: Any) -> str:
    names = tree.paths(node)
    return f"{type(node).__name__} with {len(names)} leaves" if children(node) is not None else type(node).__name__
