"""Initializers of weights, under the names of `jax.nn.initializers` and `torch.nn.init`.

An initializer is a function `(key, shape, dtype) -> tensor`; most names are functions that make one:

    weight = ft.nn.init.he_normal()(key, (784, 256))

Those whose scale follows the size of a layer take its weight as `ft.nn.linear` has it, (I, O). Of any other shape they
must be told which dims are inputs and outputs: `in_dim=1, out_dim=0` for `ft.nn.conv`.
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

__all__ = [
    "Initializer", "constant", "delta_orthogonal", "dirac", "eye", "glorot_normal", "glorot_uniform", "he_normal",
    "he_uniform", "identity", "kaiming_normal", "kaiming_uniform", "lecun_normal", "lecun_uniform", "normal", "ones",
    "orthogonal", "sparse", "truncated_normal", "uniform", "variance_scaling", "xavier_normal", "xavier_uniform",
    "zeros",
]  # fmt: skip
