"""Random numbers as pure functions of a key: threefry2x32 with 20 rounds, the bits of `jax.random`.

A key is an int32 tensor of shape (2,), the two words of `jax.random.key_data`. Element i of a draw depends on the key
and on i alone (jax's partitionable mode), so a draw is the same bits eager, under `vmap` over keys, under
`torch.compile`, and in pieces: `offset=` is the flat index of the first element. No generator is read or advanced, and
the numbers live on the key's device. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from functrain.random.distributions import (
    bernoulli,
    bits,
    bits_of_each,
    normal,
    normal_of_each,
    permutation,
    randint,
    truncated_normal,
    uniform,
)
from functrain.random.keys import fold_in, key, split
from functrain.tree import elsewhere

__all__ = [
    "bernoulli",
    "bits",
    "bits_of_each",
    "fold_in",
    "key",
    "normal",
    "normal_of_each",
    "permutation",
    "randint",
    "split",
    "truncated_normal",
    "uniform",
]

elsewhere.furnish(__name__)
