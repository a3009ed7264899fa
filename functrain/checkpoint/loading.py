"""A folder back to a tree: as it was saved, or as the caller's own tree wants it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import tree as trees
from functrain.checkpoint.choosing import Renaming, choose
from functrain.checkpoint.description import Node, leaves, named_items, scalar
from functrain.checkpoint.errors import MissingError
from functrain.checkpoint.like import check, describe_like, types
from functrain.checkpoint.reading import Folder, opened, read_tensors
from functrain.checkpoint.registry import build
from functrain.checkpoint.tensors import DTYPE_NAMES
from functrain.progress import Progress, counter
from functrain.tree import Tree

Device = torch.device | str | int | None


def load(
    folder: Folder,
    *,
    like: Tree = None,
    at: str = "",
    only: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    device: Device = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Tree:
    """Load the tree that was saved, or the subtree `at` a path, after checking every byte against the manifest.

    With `like`, its containers, static fields and devices are those of the result, and its paths, shapes and dtypes
    must be those of the file; a `like` on the meta device gives tensors on the CPU. Without, containers are as saved,
    NamedTuples and dataclasses if their types are registered. Tensors own their memory and require no gradient.

    `only` takes the leaves whose paths fit these patterns of `tree.select`; the others stay those of `like`, or
    without it the result is a dict by path. `rename` maps prefixes of saved paths to prefixes of `like`'s, `cast` gives
    floating tensors the dtype that `like` has; all three speak of paths below `at`. `device` is where tensors go, each
    as soon as it is read. Without `verify`, tensors are not hashed: sizes, names, shapes and dtypes alone are checked.
    `progress` counts bytes of tensors.

    Peak memory: the result, and one tensor on its way to a device, a dtype or an order of dimensions.
    Raises: MissingError, VersionError, IntegrityError, HeaderError, StorageError, MismatchError, UnknownTypeError;
    UnsupportedError for a `like` with tensors that are not plain; ValueError for `rename` or `cast` without `like`, and
    for the meta device.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.checkpoint.save(f"{folder}/mine", {"body": {"w": torch.ones(2)}, "head": torch.zeros(3)})
    ...     ft.checkpoint.load(path, at="body"), ft.checkpoint.load(path, only="body/**")
    ({'w': tensor([1., 1.])}, {'body/w': tensor([1., 1.])})
    """
    if like is None and (rename is not None or cast):
        raise ValueError("load: rename= and cast= say how the checkpoint becomes like=; pass like= too")
    to = None if device is None else torch.device(device)
    if to is not None and to.type == "meta":
        raise ValueError("load: expected a device that holds values, came device='meta'; see checkpoint.contents")
    path, where = Path(folder), str(folder)
    _, root, files = opened(path)
    node = _descend(root, at, where)
    saved = leaves(node)
    if like is None:
        chosen = choose(only, saved, where)
        placing = Placing({p: saved[p] for p in chosen}, {}, to or torch.device("cpu"), cast=False)
        read_tensors(path, files, {p: saved[p] for p in chosen}, placing.taking(progress), hashed=verify)
        if only is not None:
            return {p: placing.leaf(saved[p], None) for p in saved if p in chosen}
        return build(node, lambda node: placing.leaf(node, None), where, at)
    renaming = Renaming(rename)
    renamed = {new: saved[old] for new, old in renaming.of_all(saved, where).items()}
    wanted, structure = trees.flatten(like)
    olds = dict(zip(trees.paths(like), wanted, strict=True))
    described = describe_like(like)
    chosen = choose(only, {**dict.fromkeys(olds), **dict.fromkeys(renamed)}, where)
    have = {p: node for p, node in renamed.items() if p in chosen}
    want = {p: node for p, node in leaves(described).items() if p in chosen}
    # of a part, the leaves are asked for, whatever they stand in
    have_types = {} if only is not None else {(renaming(p), field): kind for (p, field), kind in types(node).items()}
    check(want, types(described), have, have_types, where, at, cast=cast)
    placing = Placing(have, olds, to, cast=cast)
    read_tensors(path, files, have, placing.taking(progress), hashed=verify)
    return trees.unflatten(structure, [placing.leaf(have[p], old) if p in have else old for p, old in olds.items()])


class Placing:
    """Tensors as they are read, each brought at once to every device and dtype that its leaves want.

    Tied leaves of one device and dtype get one tensor.
    """

    def __init__(
        self, have: Mapping[str, Node], olds: Mapping[str, Any], device: torch.device | None, *, cast: bool
    ) -> None:
        self._device, self._cast = device, cast
        self._made: dict[tuple[str, torch.device, torch.dtype | None], Tensor] = {}
        self._nodes: dict[str, Node] = {}
        self._keys: dict[str, set[tuple[str, torch.device, torch.dtype | None]]] = {}
        for path, node in have.items():
            if node["kind"] == "tensor":
                self._nodes[node["tensor"]] = node
                self._keys.setdefault(node["tensor"], set()).add(self._key(node, olds.get(path)))

    def taking(self, progress: Progress | None) -> Callable[[str, Tensor], None]:
        """Return `take` that tells how many of all bytes have been taken."""
        sizes = [DTYPE_NAMES[node["dtype"]].itemsize * math.prod(node["shape"]) for node in self._nodes.values()]
        add = counter(sum(sizes), progress)

        def take(name: str, tensor: Tensor) -> None:
            self.take(name, tensor)
            add(tensor.nbytes)

        return take

    def take(self, name: str, tensor: Tensor) -> None:
        stride = self._nodes[name].get("stride")
        if stride is not None:
            tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
        for key in self._keys[name]:
            self._made[key] = tensor.to(device=key[1], dtype=key[2])

    def leaf(self, node: Node, old: Any) -> Any:
        """Return what this node holds, where and as `old` is."""
        return self._made[self._key(node, old)] if node["kind"] == "tensor" else scalar(node)

    def _key(self, node: Node, old: Any) -> tuple[str, torch.device, torch.dtype | None]:
        device = self._device or old.device
        dtype = old.dtype if self._cast and old is not None else None
        return node["tensor"], torch.device("cpu") if device.type == "meta" else device, dtype


def _descend(node: Node, at: str, where: str) -> Node:
    for name in at.split("/") if at else []:
        below = dict(named_items(node)) if "items" in node else {}
        if name not in below:
            came = f"only {', '.join(list(below)[:8])}" if below else "a leaf"
            raise MissingError(where, path=at, expected=f"{name!r}", came=came, way_out="name a path that was saved")
        node = below[name]
    return node
