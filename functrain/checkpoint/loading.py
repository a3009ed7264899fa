"""A folder back to a tree: as it was saved, or as the caller's own tree wants it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functrain import tree as trees
from functrain.checkpoint.choosing import Renaming, choose
from functrain.checkpoint.crew import Crew
from functrain.checkpoint.description import Node, leaves, named_items, scalar
from functrain.checkpoint.errors import MissingError
from functrain.checkpoint.like import check, describe_like, types
from functrain.checkpoint.parts import Box, Piece, boxes_of, room
from functrain.checkpoint.reading import Folder, opened, read_tensors, verify_share
from functrain.checkpoint.registry import build
from functrain.checkpoint.tensors import DTYPE_NAMES, Wanted
from functrain.progress import Progress, counter
from functrain.sharding import Plan
from functrain.sharding.pieces import is_split, wrapped
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
    plan: Plan | None = None,
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

    A checkpoint of many ranks loads as one of a single process does, and on any other mesh: of a leaf of `like` that is
    split over ranks each reads and gets its part. Every rank then checks all bytes; with `plan`, which every rank must
    give, they share this work, each checks some of the files, and reads of the others what it needs.

    Peak memory: the result, and one tensor on its way to a device, a dtype or an order of dimensions.
    Raises: MissingError, VersionError, IntegrityError, HeaderError, StorageError, MismatchError, UnknownTypeError;
    UnsupportedError for a `like` with tensors that are not plain, or not split as a plan does it; ValueError for
    `rename` or `cast` without `like`, and for the meta device.

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
    if plan is not None and verify and (crew := Crew(plan)).count > 1:
        verify_share(path, crew)
        verify = False
    _, root, files = opened(path)
    node = _descend(root, at, where)
    saved = leaves(node)
    if like is None:
        chosen = choose(only, saved, where)
        asked = {p: saved[p] for p in saved if p in chosen}
        placing = Placing(asked, {}, to or torch.device("cpu"), cast=False)
        read_tensors(path, files, asked, placing.told(progress), hashed=verify)
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
    read_tensors(path, files, have, placing.told(progress), hashed=verify)
    return trees.unflatten(structure, [placing.leaf(have[p], old) if p in have else old for p, old in olds.items()])


Boxes: TypeAlias = tuple[tuple[Box, tuple[int, ...]], ...]  # what of a tensor, and where each begins here


class Key(NamedTuple):
    """What of a tensor is wanted, where and as what."""

    tensor: str
    device: torch.device
    dtype: torch.dtype | None  # None: that of the file
    boxes: Boxes | None  # None: all of it
    shape: tuple[int, ...]  # of what is made


class Placing:
    """Tensors as they are read, each brought at once to every device and dtype that its leaves want.

    Tied leaves of one device and dtype get one tensor.
    """

    def __init__(
        self, have: Mapping[str, Node], olds: Mapping[str, Any], device: torch.device | None, *, cast: bool
    ) -> None:
        self._device, self._cast = device, cast
        self._made: dict[Key, Tensor] = {}
        self._wrapped: dict[Key, Any] = {}  # those of split leaves
        self._keys: dict[str, set[Key]] = {}
        self._size_bytes = 0
        self._add: Callable[[int], object] = lambda size_bytes: None
        for path, node in have.items():
            if node["kind"] == "tensor":
                keys = self._keys.setdefault(node["tensor"], set())
                self._size_bytes += 0 if keys else DTYPE_NAMES[node["dtype"]].itemsize * math.prod(node["shape"])
                keys.add(self._key(node, olds.get(path)))

    def told(self, progress: Progress | None) -> Placing:
        """Tell `progress` how many of all bytes have been taken; return this."""
        self._add = counter(self._size_bytes, progress)
        return self

    def wanted(self, piece: Piece) -> Wanted:
        """Return what of a tensor in the files any leaf wants: of several leaves, all."""
        boxes = [box for key in self._keys[piece.node["tensor"]] for box, _ in _common(piece, key)]
        if len(boxes) == 1 and boxes[0] != piece.box:
            return boxes[0].within(piece.box)
        return bool(boxes)

    def take(self, piece: Piece, tensor: Tensor) -> None:
        """Take what is wanted of a tensor in the files."""
        node = piece.node
        for key in self._keys[node["tensor"]]:
            if key.boxes is None and piece.is_whole:
                if "stride" in node:
                    tensor = torch.empty_strided(tensor.shape, node["stride"], dtype=tensor.dtype).copy_(tensor)
                self._made[key] = tensor.to(device=key.device, dtype=key.dtype)
                continue
            for box, begin in _common(piece, key):
                if key not in self._made:
                    self._made[key] = room(key.shape, node.get("stride"), key.dtype or tensor.dtype, key.device)
                there = tuple(slice(a, a + n) for a, n in zip(begin, box.shape, strict=True))
                some = tensor if tuple(tensor.shape) == box.shape else tensor[box.within(piece.box)]
                self._made[key][there] = some
        self._add(tensor.nbytes)

    def leaf(self, node: Node, old: Any) -> Any:
        """Return what this node holds, where and as `old` is."""
        if node["kind"] != "tensor":
            return scalar(node)
        key = self._key(node, old)
        if key not in self._made and math.prod(key.shape) == 0:  # of no elements, no piece has one in common with it
            self._made[key] = room(key.shape, None, key.dtype or DTYPE_NAMES[node["dtype"]], key.device)
        if not is_split(old):
            return self._made[key]
        if key not in self._wrapped:
            self._wrapped[key] = wrapped(self._made[key], old)
        return self._wrapped[key]

    def _key(self, node: Node, old: Any) -> Key:
        device = self._device or old.device
        dtype = old.dtype if self._cast and old is not None else None
        split = is_split(old)
        shape = tuple(old.to_local().shape) if split else tuple(node["shape"])
        where = torch.device("cpu") if device.type == "meta" else device
        return Key(node["tensor"], where, dtype, boxes_of(old) if split else None, shape)


def _common(piece: Piece, key: Key) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Give what of a piece a leaf wants, and where it begins there."""
    if key.boxes is None:
        yield piece.box, piece.box.begin
        return
    for box, begin in key.boxes:
        common = piece.box.common(box)
        if common is not None:
            yield common, tuple(a - b + at for a, b, at in zip(common.begin, box.begin, begin, strict=True))


def _descend(node: Node, at: str, where: str) -> Node:
    for name in at.split("/") if at else []:
        below = dict(named_items(node)) if "items" in node else {}
        if name not in below:
            came = f"only {', '.join(list(below)[:8])}" if below else "a leaf"
            raise MissingError(where, path=at, expected=f"{name!r}", came=came, way_out="name a path that was saved")
        node = below[name]
    return node
