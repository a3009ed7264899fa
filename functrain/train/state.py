"""What a training run is, between two steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler.half_products import warn_if_slow
from functrain.optim import GradientTransformation
from functrain.train.guard import Guard
from functrain.train.trainable import Trainable, marks, splitting
from functrain.transforms.gradient_checks import check_no_module
from functrain.transforms.loss_scale import LossScale
from functrain.tree import Params, Tree


class TrainState(NamedTuple):
    """The state of a training run between two steps, as `init_state` makes it."""

    step: Tensor  # (), int64: steps done, skipped ones too
    params: Params
    opt_state: Tree
    key: Tensor  # (2,), int32: step t uses fold_in(key, t)
    loss_scale: Tree = None  # of ft.loss_scale; None where the loss is not scaled
    buffers: Tree = None  # what the loss updates without a gradient, such as batch-norm statistics; None without any
    guard: Tree = None  # of ft.train.skip_nonfinite or skip_spikes; None where no step is skipped by one
    trainable: Tree = None  # like params, () where a leaf is trained, None where it is frozen; None where all are


def init_state(
    params: Params,
    optimizer: GradientTransformation,
    *,
    key: Tensor,
    loss_scale: LossScale | None = None,
    buffers: Tree = None,
    guard: Guard | None = None,
    trainable: Trainable | None = None,
) -> TrainState:
    """Return the state before the first step of `ft.train_step` with the same options and optimizer.

    `buffers` is a tree of tensors for `ft.train_step(..., buffers=True)`. Params and buffers are copied: a donated step
    gives the state's memory away, and never the caller's.

    With `trainable`, patterns of paths such as `"head/**"`, the other params are frozen: the optimizer has no moments
    for them. They may be of any dtype.

    Raises: TypeError naming a leaf of params that is no floating-point tensor, or of buffers that is no tensor, and for
    an argument of another kind; ValueError for keys that make a path ambiguous, naming a leaf that is a Parameter, and
    for a `trainable` that fits nothing.

    >>> state = ft.init_state({"w": torch.zeros(2)}, ft.optim.adam(1e-3), key=ft.random.key(0))
    >>> ft.tree.paths(state)
    ['step', 'params/w', 'opt_state/0/count', 'opt_state/0/mu/w', 'opt_state/0/nu/w', 'key']
    """
    if not hasattr(optimizer, "init"):
        raise TypeError(f"init_state: expected (params, optimizer, key=...), came {type(optimizer).__name__} second")
    check_pairs("init_state", loss_scale, guard)
    if not isinstance(key, Tensor) or key.shape != (2,):
        raise TypeError(f"init_state: expected a key, as ft.random.key(0) makes it, came {type(key).__name__} {key!r}")
    split = splitting("init_state", trainable)
    trained = set(tree.paths(split(params)[0]))
    for path, leaf in tree.items(params):
        check_no_module(f"init_state: {path or 'params'}", leaf)
        if isinstance(leaf, torch.nn.Parameter) and leaf.requires_grad:
            raise ValueError(
                f"init_state: {path}: expected a tensor, came a Parameter that requires grad, so that every step would "
                "keep the graphs of all steps before; take ft.from_module(module).params, or detach it"
            )
        if not isinstance(leaf, Tensor) or (path in trained and not (leaf.is_floating_point() or leaf.is_complex())):
            came = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}"
            way_out = "keep it out of params" if isinstance(leaf, Tensor) else "make it one by torch.as_tensor"
            raise TypeError(
                f"init_state: {path or 'params'}: expected a floating-point tensor to train, came {came}; {way_out}"
            )
    for path, leaf in tree.items(buffers):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"init_state: buffers: {path}: expected a tensor, came {type(leaf).__name__} {leaf!r}; "
                "make it torch.tensor(...), or keep it out of buffers"
            )
    for dtype in {leaf.dtype for leaf in tree.leaves(params)}:
        warn_if_slow("init_state", dtype, tree.leaves(params))
    # copied: a state must not share a memory that a step may give away with another, or with the caller
    params = tree.map(torch.clone, params)
    device = next((leaf.device for leaf in tree.leaves(params)), key.device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    scale = None if loss_scale is None else loss_scale.init(device)
    buffers = tree.map(lambda leaf: leaf.detach().to(device, copy=True), buffers)
    guarded = None if guard is None else guard.init(device)
    given = split(params)[0]
    marked = None if trainable is None else marks(params, given)
    return TrainState(step, params, optimizer.init(given), key.to(device, copy=True), scale, buffers, guarded, marked)


def check_pairs(what: str, loss_scale: object, guard: object) -> None:
    """Raise a TypeError unless each is None or what makes such a pair returned."""
    for name, came, kind, ways in (
        ("loss_scale", loss_scale, LossScale, "ft.loss_scale.dynamic() or static(scale)"),
        ("guard", guard, Guard, "ft.train.skip_nonfinite() or skip_spikes()"),
    ):
        if came is not None and not isinstance(came, kind):
            raise TypeError(f"{what}: expected {name}={ways}, came {type(came).__name__} {came!r}")
