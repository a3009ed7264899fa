"""Functions that take a function and return one."""

from functrain.compiler.compilation import CompilerNotFoundError, compile
from functrain.compiler.donation import ConsumedError
from functrain.transforms import laplace, loss_scale
from functrain.transforms.accumulation import accumulate
from functrain.transforms.curvature import fisher_vp, ggnvp, hvp
from functrain.transforms.gradient import grad, value_and_grad, vmap
from functrain.transforms.implicit import implicit_grad, influence
from functrain.transforms.krylov import Estimate, Solution, Spectrum, conjugate_gradients, hutchinson, lanczos
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

__all__ = [
    "CompilerNotFoundError", "ConsumedError", "Estimate", "GradientMoments", "GradientNoise", "Policy", "Solution",
    "Spectrum", "accumulate", "autocast", "checkpoint_name", "compile", "conjugate_gradients", "fisher_vp",
    "ggnvp", "grad", "gradient_moments", "gradient_noise", "hutchinson", "hvp", "implicit_grad", "influence",
    "lanczos", "laplace", "loss_scale", "mixed_precision", "per_example_grad", "per_example_value_and_grad",
    "recompute", "recompute_layers", "value_and_grad", "vmap",
]  # fmt: skip
