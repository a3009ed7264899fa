"""From updates to new params."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like
from functrain.optim.transformation import Updates
from functrain.schedules import Scalar
from functrain.tree import Params


def apply_updates(params: Params, updates: Updates) -> Params:
    """Return params + updates, each leaf in the dtype of the parameter; None for an update leaves the parameter.

    Raises: ValueError naming the paths in which the trees differ, or a leaf of another shape; TypeError naming an
    integer parameter whose update would be cut to an integer.

    >>> ft.optim.apply_updates({"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-0.1, 0.2])})
    {'w': tensor([ 0.9000, -1.8000])}
    """
    if tree.structure(params) == tree.structure(updates):
        return _add(params, updates)
    given = _given(params, updates)
    touched, untouched = tree.partition(lambda path, _: path in given, params)
    return tree.combine(_add(touched, updates), untouched)


def incremental_update(new_tensors: Params, old_tensors: Params, step_size: Scalar) -> Params:
    """Return step_size * new + (1 - step_size) * old: a moving average of params.

    A leaf that is no floating-point or complex number, such as a count, is a copy of the new one. The old tensors are
    float32 at least: in half precision an average does not move by less than 1/512 of itself. The new ones may be
    shorter.

    Raises: TypeError naming the old leaf that is in half precision; ValueError naming the paths in which the trees
    differ, or a leaf of another shape.

    >>> ft.optim.incremental_update({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])}, step_size=0.1)
    {'w': tensor([0.1000])}
    """
    tree.check_same_structure(old_tensors, new_tensors, what="incremental_update: old and new tensors")
    check_shapes("incremental_update", old_tensors, new_tensors)
    rest = 1.0 - step_size

    def moved(path: str, new: Tensor, old: Tensor) -> Tensor:
        if not (new.is_floating_point() or new.is_complex()):
            return new.clone()
        if old.is_floating_point() and old.dtype.itemsize < 4:
            raise TypeError(
                f"incremental_update: {path or 'the leaf'}: an average in {old.dtype} stops where steps are small; "
                f"keep it in float32, as from ft.tree.cast(params, torch.float32)"
            )
        new = new.to(torch.promote_types(new.dtype, old.dtype))
        return like(step_size, new) * new + like(rest, old) * old

    return tree.map_with_path(moved, new_tensors, old_tensors)


def periodic_update(new_tensors: Params, old_tensors: Params, steps: Tensor, update_period: int | Tensor) -> Params:
    """Return the new params when `update_period` divides `steps`, else the old ones; errors as `incremental_update`.

    >>> new, old = torch.tensor([1.0]), torch.tensor([0.0])
    >>> [ft.optim.periodic_update(new, old, torch.tensor(step), update_period=2) for step in (1, 2)]
    [tensor([0.]), tensor([1.])]
    """
    tree.check_same_structure(old_tensors, new_tensors, what="periodic_update: old and new tensors")
    check_shapes("periodic_update", old_tensors, new_tensors)
    return tree.where(steps % update_period == 0, new_tensors, old_tensors)


def _given(params: Params, updates: Updates) -> set[str]:
    given, known = set(tree.paths(updates)), set(tree.paths(params))
    if not given <= known or not all(_is_none(updates, path) for path in known - given):
        tree.check_same_structure(params, updates, what="apply_updates: params and updates")
    return given


def _is_none(updates: Updates, path: str) -> bool:
    try:
        return tree.at(updates, path) is None
    except KeyError:
        return False


def check_shapes(what: str, params: Params, given: Params) -> None:
    """Raise a ValueError naming the first leaf of `given` that has not the shape of the parameter, which broadcasting
    would make another one of."""
    for i, (param, new) in enumerate(zip(tree.leaves(params), tree.leaves(given), strict=True)):
        if param.shape != new.shape:
            path = tree.paths(params)[i] or "the root"
            raise ValueError(
                f"{what}: {path}: expected shape {tuple(param.shape)}, as the parameter has, came {tuple(new.shape)}; "
                "reshape it, or look for a state or a gradient of other params"
            )


def _add(params: Params, updates: Updates) -> Params:
    check_shapes("apply_updates", params, updates)
    for param, update in zip(tree.leaves(params), tree.leaves(updates), strict=True):
        if update.is_floating_point() and not (param.is_floating_point() or param.is_complex()):
            _refuse(params, updates)
    return tree.map(lambda param, update: (param + update).to(param.dtype), params, updates, by_kind=True)


def _refuse(params: Params, updates: Updates) -> None:
    for (path, param), update in zip(tree.items(params), tree.leaves(updates), strict=True):
        if update.is_floating_point() and not (param.is_floating_point() or param.is_complex()):
            raise TypeError(
                f"{path}: an update of {update.dtype} would be cut to the parameter's {param.dtype}; "
                f"give None as its update, or keep it apart with tree.partition"
            )
