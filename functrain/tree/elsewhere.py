"""What other libraries call things, for the error of a name that does not exist here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NoReturn

import torch

from functrain.tree.hints import nearest

# optax's, jax's, flax's, torch's and Lightning's names, where letters alone would not tell
_CALLED: Mapping[str, str] = {
    "jit": "ft.compile", "pjit": "ft.compile", "pmap": "ft.vmap", "remat": "ft.recompute", "scan": "ft.nn.stack",
    "lax": "ft.nn.stack", "fori_loop": "ft.nn.stack", "tree_util": "ft.tree", "tree_utils": "ft.tree",
    "pytree": "ft.tree", "PRNGKey": "ft.random.key", "prng": "ft.random.key", "manual_seed": "ft.random.key",
    "seed": "ft.random.key", "set_seed": "ft.random.key", "seed_everything": "ft.random.key",
    "Generator": "ft.random.key", "rand": "ft.random.uniform", "randn": "ft.random.normal",
    "randperm": "ft.random.permutation", "shuffle": "ft.random.permutation", "permute": "ft.random.permutation",
    "choice": "ft.random.randint",
    "hessian": "ft.hvp", "hessian_vector_product": "ft.hvp", "jvp": "torch.func.jvp", "vjp": "torch.func.vjp",
    "jacobian": "torch.func.jacrev", "jacrev": "torch.func.jacrev", "jacfwd": "torch.func.jacfwd",
    "stop_gradient": "torch.Tensor.detach", "detach": "torch.Tensor.detach", "no_grad": "torch.no_grad",
    "custom_vjp": "torch.autograd.Function", "custom_jvp": "torch.autograd.Function",
    "device_put": "ft.tree.to", "Module": "ft.from_module", "Trainer": "ft.fit", "train": "ft.fit",
    "GradScaler": "ft.loss_scale.dynamic", "DynamicScale": "ft.loss_scale.dynamic", "amp": "ft.mixed_precision",
    "DataLoader": "ft.data.batches", "Dataset": "ft.data.batches", "train_test_split": "ft.data.split",
    "Tokenizer": "ft.data.load_tokenizer",
    "AutoTokenizer": "ft.data.load_tokenizer", "AutoModel": "ft.models.gpt2", "GPT2LMHeadModel": "ft.models.gpt2",
    "restore": "ft.checkpoint.load", "load_checkpoint": "ft.checkpoint.load", "save_checkpoint": "ft.checkpoint.save",
    "Checkpointer": "ft.checkpoint.every", "CheckpointManager": "ft.checkpoint.every",
    "ModelCheckpoint": "ft.checkpoint.every", "EarlyStopping": "ft.train.early_stopping",
    "TensorBoardLogger": "ft.train.watching.tensorboard", "SummaryWriter": "ft.train.watching.tensorboard",
    "CSVLogger": "ft.train.watching.csv", "WandbLogger": "ft.train.watching.wandb", "tqdm": "ft.train.progress",
    "MLFlowLogger": "ft.train.watching.mlflow", "ProgressBar": "ft.train.progress", "Callback": "ft.train.Hook",
    "value_and_grads": "ft.value_and_grad", "gradient": "ft.grad", "backward": "ft.grad",
    "lr_scheduler": "ft.schedules", "CosineAnnealingLR": "ft.schedules.cosine_decay_schedule",
    "get_cosine_schedule_with_warmup": "ft.schedules.warmup_cosine_decay_schedule",
    "get_linear_schedule_with_warmup": "ft.schedules.join_schedules",
    "CosineAnnealingWarmRestarts": "ft.schedules.sgdr_schedule", "OneCycleLR": "ft.schedules.cosine_onecycle_schedule",
    "StepLR": "ft.schedules.piecewise_constant_schedule", "MultiStepLR": "ft.schedules.piecewise_constant_schedule",
    "step_lr": "ft.schedules.piecewise_constant_schedule", "ExponentialLR": "ft.schedules.exponential_decay",
    "LinearLR": "ft.schedules.linear_schedule", "ConstantLR": "ft.schedules.constant_schedule",
    "PolynomialLR": "ft.schedules.polynomial_schedule", "CyclicLR": "ft.schedules.triangular_schedule",
    "SequentialLR": "ft.schedules.join_schedules", "ReduceLROnPlateau": "ft.optim.reduce_on_plateau",
    "constant": "ft.schedules.constant_schedule", "linear": "ft.schedules.linear_schedule",
    "contrib": "ft.optim", "Optimizer": "ft.optim.GradientTransformation", "compose": "ft.optim.chain",
    "clip_grad_norm": "ft.optim.clip_by_global_norm", "clip_grad_norm_": "ft.optim.clip_by_global_norm",
    "clip_grad_value_": "ft.optim.clip", "clip_by_value": "ft.optim.clip",
    "ExponentialMovingAverage": "ft.optim.keep_ema",
    "AveragedModel": "ft.optim.keep_swa", "momentum": "ft.optim.trace", "param_groups": "ft.optim.partition",
    "adam_with_weight_decay": "ft.optim.adamw",
    "cross_entropy": "ft.losses.softmax_cross_entropy_with_integer_labels",
    "CrossEntropyLoss": "ft.losses.softmax_cross_entropy_with_integer_labels",
    "nll_loss": "ft.losses.softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy_with_logits": "ft.losses.softmax_cross_entropy",
    "binary_cross_entropy_with_logits": "ft.losses.sigmoid_binary_cross_entropy",
    "binary_cross_entropy": "ft.losses.sigmoid_binary_cross_entropy", "bce": "ft.losses.sigmoid_binary_cross_entropy",
    "BCEWithLogitsLoss": "ft.losses.sigmoid_binary_cross_entropy", "BCELoss": "ft.losses.sigmoid_binary_cross_entropy",
    "mse": "ft.losses.squared_error", "mse_loss": "ft.losses.squared_error", "MSELoss": "ft.losses.squared_error",
    "smooth_l1_loss": "ft.losses.huber_loss", "SmoothL1Loss": "ft.losses.huber_loss",
    "kl_div": "ft.losses.kl_divergence", "KLDivLoss": "ft.losses.kl_divergence",
    "Dense": "ft.nn.linear", "MultiHeadAttention": "ft.nn.attention", "MultiheadAttention": "ft.nn.attention",
    "scaled_dot_product_attention": "ft.nn.attention",
    "map_structure": "ft.tree.map", "map_leaves": "ft.tree.map", "flatten_with_path": "ft.tree.items",
    "leaves_with_path": "ft.tree.items", "tree_flatten_with_path": "ft.tree.items", "key_paths": "ft.tree.paths",
    "global_norm": "ft.tree.norm", "ravel_pytree": "ft.tree.flatten",
}  # fmt: skip


def furnish(name: str) -> None:
    """Give a room, or a file that is one within it, its error for a name that does not exist, and a `__dir__` of what
    is public: neither files that it is made of nor what it imports.

    `name` is that of its module, `__name__`.
    """
    room = sys.modules[name]
    # put there from here, for a type checker to see no room in which every name exists
    vars(room)["__getattr__"] = functools.partial(ask, room)
    vars(room)["__dir__"] = lambda: sorted({*room.__all__, *(key for key in vars(room) if key.startswith("__"))})


def ask(room: ModuleType, name: str) -> NoReturn:
    """Raise the AttributeError of a name that a room does not have, with what may be meant, here or elsewhere."""
    near = None if name.startswith("_") else _meant(name, room, _rooms(room))
    raise AttributeError(
        f"module {room.__name__!r} has no attribute {name!r}" + (f"; did you mean {near}?" if near else "")
    )


def _rooms(room: ModuleType) -> dict[str, ModuleType]:
    """Return all rooms, and this one, by the name that they have behind `ft`, "" for the house, which knows them."""
    house = sys.modules["functrain"]
    rooms = {"": house} | {name: getattr(house, name) for name in house.ROOMS if name != "testing"}
    return rooms if room is house else rooms | {room.__name__.removeprefix("functrain."): room}


def _meant(name: str, room: ModuleType, rooms: Mapping[str, ModuleType]) -> str | None:
    names = {place: _public(other) for place, other in rooms.items()}
    here = next(place for place, other in rooms.items() if other is room)
    order = [here, *[place for place in rooms if place != here]]
    plain = _letters(name)
    same = [_path(place, n) for place in order for n in names[place] if _letters(n) == plain]
    if name in _CALLED and not (same and same[0] == _path(here, name)):
        return _CALLED[name]
    if same:
        return same[0]
    if here == "nn" and hasattr(torch.nn.functional, name):
        return f"torch.nn.functional.{name}"
    for place in (here, *([] if here else order[1:])):
        if near := nearest(name, names[place]) or nearest(name.lower(), names[place]) or _begin(plain, names[place]):
            return _path(place, near[0])
    return f"ft.from_module(torch.nn.{name}(...))" if hasattr(torch.nn, name) else None


def _begin(plain: str, names: Sequence[str]) -> list[str]:
    """Return the shortest name that begins as this one, or that this one begins with."""
    found = [n for n in names if len(min(plain, n, key=len)) > 4 and _one_begins(plain, _letters(n))]
    return sorted(found, key=len)[:1]


def _one_begins(a: str, b: str) -> bool:
    return a.startswith(b) or b.startswith(a)


def _public(room: ModuleType) -> Sequence[str]:
    names: Sequence[str] = room.__all__
    return names


def _path(place: str, name: str) -> str:
    return ".".join(filter(None, ("ft", place, name)))


def _letters(name: str) -> str:
    """Return what AdamW, adam_w and tree_map share with adamw and map."""
    return name.lower().removeprefix("tree_").replace("_", "")
