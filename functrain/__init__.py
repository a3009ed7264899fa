"""Train models the JAX way in PyTorch: pure functions over trees of tensors, and functions that transform them.

import functrain as ft
"""

import sys
from importlib import import_module
from types import ModuleType

from functrain import (
    checkpoint,
    curvature,
    data,
    generation,
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
from functrain.generation import generate
from functrain.losses import Loss
from functrain.nn import from_module, to_module
from functrain.train import TrainState, evaluate, fit, init_state, sweep, train_step, unroll
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
from functrain.tree import elsewhere

__version__ = "0.1.0"


_ROOMS = {
    "": sys.modules[__name__], "optim": optim, "schedules": schedules, "losses": losses, "tree": tree, "random": random,
    "nn": nn, "transforms": transforms, "train": train, "checkpoint": checkpoint, "data": data, "models": models,
    "curvature": curvature, "generation": generation,
}  # fmt: skip
_missing = elsewhere.asks(_ROOMS[""], _ROOMS)
for _name, _room in _ROOMS.items():
    if _name:  # put there from here, as a room below knows nothing of the others
        vars(_room)["__getattr__"] = elsewhere.asks(_room, _ROOMS)
    vars(_room)["__dir__"] = elsewhere.lists(_room)


def __getattr__(name: str) -> ModuleType:
    # ft.testing, the side tower, is built when somebody looks into it
    if name != "testing":
        _missing(name)
    return import_module("functrain.testing")


__all__ = [
    "Loss", "Policy", "TrainState", "accumulate", "autocast", "checkpoint", "checkpoint_name", "compile", "curvature",
    "data", "evaluate", "fit", "from_module", "generate", "generation", "ggnvp", "grad", "hvp", "init_state",
    "loss_scale", "losses", "mixed_precision", "models", "nn", "optim", "per_example_grad", "random", "recompute",
    "recompute_layers", "schedules", "sweep", "testing", "to_module", "train", "train_step", "transforms", "tree",
    "unroll", "value_and_grad", "vmap",
]  # fmt: skip
