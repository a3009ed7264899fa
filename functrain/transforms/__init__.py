"""Functions that take a function and return one."""

from functrain.transforms import loss_scale
from functrain.transforms.accumulation import accumulate
from functrain.transforms.compilation import CompilerNotFoundError, Staged, compile
from functrain.transforms.donation import ConsumedError
from functrain.transforms.gradient import grad, value_and_grad, vmap
from functrain.transforms.precision import Policy, autocast, mixed_precision

__all__ = [
    "CompilerNotFoundError", "ConsumedError", "Policy", "Staged", "accumulate", "autocast", "compile", "grad",
    "loss_scale", "mixed_precision", "value_and_grad", "vmap",
]  # fmt: skip
