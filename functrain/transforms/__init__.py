"""Functions that take a function and return one."""

from functrain.compiler.compilation import compile
from functrain.compiler.cxx import CompilerNotFoundError
from functrain.compiler.donation import ConsumedError
from functrain.transforms import loss_scale
from functrain.transforms.accumulation import accumulate
from functrain.transforms.gradient import grad, value_and_grad, vmap
from functrain.transforms.per_example import (
    GradientMoments,
    GradientNoise,
    gradient_moments,
    gradient_noise,
    per_example_grad,
    per_example_value_and_grad,
)
from functrain.transforms.precision import Policy, autocast, mixed_precision
from functrain.transforms.recompute import checkpoint_name, recompute, recompute_layers
from functrain.tree import elsewhere

__all__ = [
    "CompilerNotFoundError", "ConsumedError", "GradientMoments", "GradientNoise", "Policy", "accumulate", "autocast",
    "checkpoint_name", "compile", "grad", "gradient_moments", "gradient_noise", "loss_scale", "mixed_precision",
    "per_example_grad", "per_example_value_and_grad", "recompute", "recompute_layers", "value_and_grad", "vmap",
]  # fmt: skip

elsewhere.furnish(__name__)
