"""Train models the JAX way in PyTorch: pure functions over trees of tensors, and functions that transform them.

import functrain as ft

A room is loaded when it is first named: `import functrain` alone loads no torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        sharding,
        testing,
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
        compile,
        grad,
        loss_scale,
        mixed_precision,
        per_example_grad,
        value_and_grad,
        vmap,
    )

    # out of its file: mypy takes `recompute` of the room for the file of that name
    from functrain.transforms.recompute import checkpoint_name, recompute, recompute_layers

__version__ = "0.1.0"

ROOMS = (
    "checkpoint", "curvature", "data", "generation", "losses", "models", "nn", "optim", "random", "schedules",
    "sharding", "testing", "train", "transforms", "tree",
)  # fmt: skip
# what is named often has a name here too, and lives in a room
_FROM = {
    "curvature": ("ggnvp", "hvp"),
    "generation": ("generate",),
    "losses": ("Loss",),
    "nn": ("from_module", "to_module"),
    "train": ("TrainState", "evaluate", "fit", "init_state", "sweep", "train_step", "unroll"),
    "transforms": (
        "Policy", "accumulate", "autocast", "checkpoint_name", "compile", "grad", "loss_scale", "mixed_precision",
        "per_example_grad", "recompute", "recompute_layers", "value_and_grad", "vmap",
    ),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _FROM.items() for name in names}

__all__ = [
    "Loss", "Policy", "TrainState", "accumulate", "autocast", "checkpoint", "checkpoint_name", "compile", "curvature",
    "data", "evaluate", "fit", "from_module", "generate", "generation", "ggnvp", "grad", "hvp", "init_state",
    "loss_scale", "losses", "mixed_precision", "models", "nn", "optim", "per_example_grad", "random", "recompute",
    "recompute_layers", "schedules", "sharding", "sweep", "testing", "to_module", "train", "train_step",
    "transforms", "tree",
    "unroll", "value_and_grad", "vmap",
]  # fmt: skip

if not TYPE_CHECKING:  # for a type checker, what is not above does not exist

    def __getattr__(name):
        if name in ROOMS:
            return import_module(f"functrain.{name}")
        if name in _ROOM_OF:
            found = getattr(import_module(f"functrain.{_ROOM_OF[name]}"), name)
            globals()[name] = found
            return found
        if name.startswith("_"):  # what Python itself asks for, such as __path__, is no slip
            raise AttributeError(f"module 'functrain' has no attribute {name!r}")
        from functrain.tree import elsewhere

        return elsewhere.ask(sys.modules[__name__], name)

    def __dir__():
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
