"""Split leaves in a loss: held by their part until they are used, and then gathered, those of a layer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from functrain import tree
from functrain.sharding import collectives
from functrain.sharding.mesh import current
from functrain.sharding.placement import Dims, Where
from functrain.sharding.split import Split
from functrain.tree import nodes


@tree.dataclass(static=("dims", "kept", "added_in", "again", "where"))
class Held:
    """A leaf of which this rank has a part, before it is gathered over all axes but those that are `kept`."""

    part: Tensor
    dims: Dims
    kept: tuple[str, ...]
    added_in: torch.dtype | None  # the dtype in which gradients are added over ranks, None for their own
    again: bool  # gathered again for the backward pass, and not kept for it
    where: Where

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {self._why()}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        held: list[Held] = []
        _find((args, kwargs or {}), held)
        # no TypeError, in whose place an operator of Python's would raise its own
        raise RuntimeError(f"{getattr(function, '__name__', function)}: {held[0]._why()}")

    def _why(self) -> str:
        return (
            f"sharding: {self.where.path} is split over ranks, and gathered where its layer runs; run the layer "
            "through ft.nn.stack, or call ft.sharding.use(layer) before"
        )


def bind(
    params: tree.Tree,
    dims: Mapping[str, Dims],
    late: Mapping[str, bool],
    kept: tuple[str, ...],
    added_in: torch.dtype | None,
    again: bool,
) -> tree.Tree:
    """Gather the leaves of a loss that are used at once, and let those that are `late` be held till their layer
    runs; along the axes that are `kept` they stay split."""
    structure = tree.structure(params)
    marked = {
        path: Held(leaf, dims[path], kept, added_in, again, Where(path)) if any(dims[path]) else leaf
        for path, leaf in tree.items(params)
    }
    early = {path: leaf for path, leaf in marked.items() if not late[path]}
    marked |= dict(zip(early, use(list(early.values())), strict=True))
    return tree.unflatten(structure, list(marked.values()))


def use(values: tree.Tree) -> tree.Tree:
    """Gather the leaves of a tree that are split over ranks, all at once, and return the tree of whole tensors.

    In a loss of a step whose plan says that a layer is gathered late: `ft.nn.stack` calls it for each of its layers. A
    tree of whole tensors comes back as it is. The derivative adds over ranks, and gives each rank its part.

    >>> ft.sharding.use({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """
    held: list[Held] = []
    _find(values, held)
    if not held:
        return values
    return _filled(values, iter([_kept(leaf, x) for leaf, x in zip(held, _gathered(held), strict=True)]))


def _kept(leaf: Held, x: Tensor) -> Any:
    dims = tuple(tuple(axis for axis in axes if axis in leaf.kept) for axes in leaf.dims)
    return Split(x, dims, leaf.where) if any(dims) else x


def is_gathered_again(values: tree.Tree) -> bool:
    """Tell whether the leaves of a layer are to be gathered for the backward pass, too."""
    held: list[Held] = []
    _find(values, held)
    return any(leaf.again for leaf in held)


def is_held(values: tree.Tree) -> bool:
    """Tell whether a tree has a leaf that is not gathered."""
    held: list[Held] = []
    _find(values, held)
    return bool(held)


def _find(node: Any, found: list[Held]) -> None:
    if isinstance(node, Held):
        found.append(node)
        return
    for child in nodes.below(node) or ():
        _find(child, found)


def _filled(node: Any, whole: Any) -> Any:
    if isinstance(node, Held):
        return next(whole)
    inside = nodes.below(node)
    return node if not inside else nodes.rebuild(node, [_filled(child, whole) for child in inside])


def _gathered(held: Sequence[Held]) -> list[Tensor]:
    """Gather leaves, with one collective for those that the same axes split and that have one dtype."""
    values = [leaf.part for leaf in held]
    over = [tuple(tuple(axis for axis in axes if axis not in leaf.kept) for axes in leaf.dims) for leaf in held]
    most = max(sum(map(bool, dims)) for dims in over)
    for nth in range(most):  # of a leaf that is split at several dimensions one after another
        todo: dict[Any, list[tuple[int, int]]] = {}
        for i, dims in enumerate(over):
            split = [d for d, axes in enumerate(dims) if axes]
            if nth < len(split):
                todo.setdefault((dims[split[nth]], values[i].dtype), []).append((i, split[nth]))
        for (axes, _), places in todo.items():
            found = _together([values[i] for i, _ in places], [d for _, d in places], axes, held[0].added_in)
            for (i, _), x in zip(places, found, strict=True):
                values[i] = x
    return values


def _together(
    xs: Sequence[Tensor], dims: Sequence[int], axes: tuple[str, ...], added_in: torch.dtype | None
) -> list[Tensor]:
    """Gather tensors along a dimension of each by one collective."""
    count = current().size(axes)
    if count == 1:
        return list(xs)
    flat = torch.cat([x.reshape(-1) for x in xs])
    rows = collectives.gather_for_use(flat, axes, added_in).view(count, -1).split([x.numel() for x in xs], 1)
    found = []
    for x, d, row in zip(xs, dims, rows, strict=True):
        parts = row.reshape(count, *x.shape)
        shape = (*x.shape[:d], count * x.shape[d], *x.shape[d + 1 :])
        found.append(parts.movedim(0, d).reshape(shape))
    return found
