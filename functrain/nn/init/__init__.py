"""Initializers of weights, under the names of `jax.nn.initializers` and `torch.nn.init`.

An initializer is a function `(key, shape, dtype) -> tensor`; most names are functions that make one:

    >>> weight = ft.nn.init.he_normal()(ft.random.key(0), (784, 256))
    >>> weight.std()  # the root of 2 / 784 is 0.0505
    tensor(0.0504)

Those whose scale follows the size of a layer take its weight as `ft.nn.linear` has it, (I, O). Of any other shape they
must be told which dims are inputs and outputs: `in_dim=1, out_dim=0` for `ft.nn.conv`.

    >>> kernel = ft.nn.init.he_normal(in_dim=1, out_dim=0)(ft.random.key(0), (64, 32, 3, 3))
    >>> kernel.std()  # the root of 2 / (32 * 3 * 3) is 0.0833
    tensor(0.0838)
"""

from functrain.nn.init.constants import constant, dirac, eye, identity, ones, zeros
from functrain.nn.init.orthogonal import delta_orthogonal, orthogonal
from functrain.nn.init.random import normal, sparse, truncated_normal, uniform
from functrain.nn.init.scaling import (
    Initializer,
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)
from functrain.tree import elsewhere

__all__ = [
    "Initializer", "constant", "delta_orthogonal", "dirac", "eye", "glorot_normal", "glorot_uniform", "he_normal",
    "he_uniform", "identity", "kaiming_normal", "kaiming_uniform", "lecun_normal", "lecun_uniform", "normal", "ones",
    "orthogonal", "sparse", "truncated_normal", "uniform", "variance_scaling", "xavier_normal", "xavier_uniform",
    "zeros",
]  # fmt: skip

elsewhere.furnish(__name__)
