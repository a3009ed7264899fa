"""Keys."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.random.drawing import check_key
from functrain.random.hashing import counters, pairs
from functrain.random.threefry import signed


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """Make a key. Equals `jax.random.key(seed)`, whose default reads the low 32 bits: seeds equal there are one key.

    Raises: TypeError for a seed that is no int; ValueError for one outside [-2**63, 2**64).

    >>> ft.random.key(42)
    tensor([ 0, 42], dtype=torch.int32)
    """
    if not isinstance(seed, int):
        raise TypeError(f"random.key: expected an int seed, came {type(seed).__name__}; pass int(seed)")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"random.key: expected a seed in [-2**63, 2**64), came {seed}; take it modulo 2**32")
    return torch.tensor([0, signed(seed)], dtype=torch.int32, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Make `num` independent keys, (num, 2). Equals `jax.random.split`.

    >>> init_key, train_key = ft.random.split(ft.random.key(0))
    >>> init_key, train_key
    (tensor([ 1797259609, -1715843330], dtype=torch.int32), tensor([ 928981903, -841280227], dtype=torch.int32))
    """
    check_key("split", key)
    return pairs(key.unbind(), *counters(0, num, key.device))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Make the key number `data` of the 2**32 keys below `key`. Equals `jax.random.fold_in`.

    A tensor is a () integer, taken modulo 2**32 and never read by the host: other data never recompiles.
    Raises: TypeError for data of another kind; ValueError for an int outside [0, 2**32).

    >>> key = ft.random.key(0)
    >>> ft.random.normal(ft.random.fold_in(key, 100), (3,))  # the noise of step 100, whatever was drawn before
    tensor([ 1.7934, -0.3458, -0.5834])
    """
    check_key("fold_in", key)
    if isinstance(data, Tensor):
        if data.shape != () or data.is_floating_point() or data.is_complex():
            came = f"{tuple(data.shape)} {data.dtype}"
            raise TypeError(f"random.fold_in: expected a () integer tensor, came {came}; map over many with ft.vmap")
        low = data.to(torch.int32)
    elif not isinstance(data, int):
        raise TypeError(f"random.fold_in: expected an int or a () integer tensor, came {type(data).__name__}; pass int")
    elif not 0 <= data < 2**32:
        raise ValueError(f"random.fold_in: expected data in [0, 2**32), came {data}; take it modulo 2**32")
    else:
        low = torch.full((), signed(data), dtype=torch.int32, device=key.device)
    return pairs(key.unbind(), 0, low)
