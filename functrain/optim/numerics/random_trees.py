"""Random trees like another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.tree import Tree


def split_key_like(rng_key: Tensor, target_tree: Tree) -> Tree:
    """Return a tree of independent keys, one for each leaf.

    Equals `optax.tree.split_key_like`, to the bit.

    >>> keys = ft.optim.split_key_like(ft.random.key(0), {"w": torch.zeros(3, 2), "b": torch.zeros(2)})
    >>> keys["w"].shape, torch.equal(keys["w"], keys["b"])
    (torch.Size([2]), False)
    """
    leaves, structure = tree.flatten(target_tree)
    return tree.unflatten(structure, random.split(rng_key, len(leaves)).unbind() if leaves else ())


def random_like(
    rng_key: Tensor,
    target_tree: Tree,
    sampler: Callable[..., Tensor] = random.normal,
    dtype: torch.dtype | None = None,
) -> Tree:
    """Return a tree of the same shapes with `sampler(key, shape, dtype)` in each leaf, in the leaf's dtype or `dtype`.

    Equals `optax.tree.random_like`: same draws from a key, as far as `sampler` has JAX's.

    >>> params = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
    >>> ft.tree.map(lambda x: tuple(x.shape), ft.optim.random_like(ft.random.key(0), params))
    {'w': (3, 2), 'b': (2,)}
    """
    keys = split_key_like(rng_key, target_tree)
    return tree.map(lambda leaf, key: sampler(key, tuple(leaf.shape), dtype or leaf.dtype), target_tree, keys)
