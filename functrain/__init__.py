"""Train models the JAX way in PyTorch: pure functions over trees of tensors, and functions that transform them.

import functrain as ft
"""

from importlib import import_module
from types import ModuleType

from functrain import (
    checkpoint,
    curvature,
    data,
    generate,
    losses,
    models,
    nn,
    optim,
    random,
    schedules,
    train,
    transforms,
    tree,
)
from functrain.curvature import ggnvp, hvp
from functrain.losses import Loss
from functrain.nn import from_module, to_module
from functrain.train import TrainState, fit, init_state, sweep, train_step, unroll
from functrain.transforms import (
    Policy,
    accumulate,
    autocast,
    checkpoint_name,
    compile,
    grad,
    loss_scale,
    mixed_precision,
    per_example_grad,
    recompute,
    recompute_layers,
    value_and_grad,
    vmap,
)

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    # ft.testing, the side tower, is built when somebody looks into it
    if name != "testing":
        raise AttributeError(f"module 'functrain' has no attribute {name!r}")
    return import_module("functrain.testing")


__all__ = [
    "Loss", "Policy", "TrainState", "accumulate", "autocast", "checkpoint", "checkpoint_name", "compile", "curvature",
    "data", "fit", "from_module", "generate", "ggnvp", "grad", "hvp", "init_state", "loss_scale", "losses",
    "mixed_precision", "models", "nn", "optim", "per_example_grad", "random", "recompute", "recompute_layers",
    "schedules", "sweep", "testing", "to_module", "train", "train_step", "transforms", "tree", "unroll",
    "value_and_grad", "vmap",
]  # fmt: skip
