"""Trees compared: each assertion names all leaves that fail it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.testing.differing import Difference, different_bits, far_apart
from functrain.tree import Tree

_SHOWN = 8  # leaves in one message


def assert_trees_equal(actual: Tree, expected: Tree) -> None:
    """Assert that two trees have one structure, and leaves of the same shape, dtype, device and bits.

    NaN equals NaN of the same bits, and 0.0 is not -0.0.

    Raises: AssertionError naming the leaves that differ; ValueError naming the paths when the structures differ.
    """
    _raise("assert_trees_equal", different_bits(actual, expected), actual)


def assert_trees_close(actual: Tree, expected: Tree, *, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Assert that two trees have one structure, and leaves of the same shape, dtype, device and nearly the same values.

    Near is `|actual - expected| <= atol + rtol * |expected|`, in float64; NaN is near NaN. Integers and booleans must
    be equal.

    Raises: AssertionError naming the leaves that differ; ValueError naming the paths when the structures differ.
    """
    _raise("assert_trees_close", far_apart(actual, expected, rtol=rtol, atol=atol), actual)


def assert_trees_finite(*trees: Tree) -> None:
    """Assert that no element of any leaf is NaN or infinite.

    Raises: AssertionError naming the leaves and what is in them.
    """
    for values in trees:
        found = [Difference(path, text) for path, leaf in tree.items(values) if (text := _not_finite(leaf))]
        _raise("assert_trees_finite", found, values)


def _not_finite(leaf: Any) -> str | None:
    if not isinstance(leaf, Tensor):
        return None if not isinstance(leaf, float) or math.isfinite(leaf) else f"came {leaf}"
    nan = int(torch.isnan(leaf).sum())
    infinite = leaf.numel() - int(torch.isfinite(leaf).sum()) - nan
    return f"{nan} NaN and {infinite} infinite of {leaf.numel()} elements" if nan or infinite else None


def _raise(what: str, found: list[Difference], values: Tree) -> None:
    if not found:
        return
    lines = [f"  {path or 'the tree itself'}: {text}" for path, text in found[:_SHOWN]]
    more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    raise AssertionError("\n".join([f"{what}: {len(found)} of {len(tree.leaves(values))} leaves fail", *lines, *more]))
