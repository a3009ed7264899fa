"""Ranks in a grid whose axes have names."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from functrain.sharding.beginning import begin

Axes = str | Sequence[str]

_MESHES: dict[str, Mesh] = {}  # by name, under which programs know them: no program contains its rank
_here = threading.local()


class Mesh:
    """The ranks of a job in a grid: of `Mesh({"data": 2, "tensor": 4})`, neighbours differ along "tensor".

    Begins torch.distributed where nobody has, from what torchrun tells: with gloo on a CPU, with nccl on CUDA. Every
    rank must make the same meshes in the same order. A mesh of one rank needs no torchrun.

    Raises: ValueError for a size below 1, a name that is none, a grid that has not as many places as there are ranks,
    and, on all of them, ranks that make another mesh or run another version of torch or of this code.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str | None = None) -> None:
        if not sizes:
            raise ValueError('sharding: expected a mesh with an axis, such as {"data": 2}, came one without')
        for axis, size in sizes.items():
            if not isinstance(axis, str) or not axis.isidentifier():
                raise ValueError(f'sharding: expected names of axes, such as "data", came {axis!r}')
            if type(size) is not int or size < 1:
                raise ValueError(f"sharding: expected a mesh axis of at least 1 rank, came {axis}={size!r}")
        self.sizes: dict[str, int] = dict(sizes)
        self.axes: tuple[str, ...] = tuple(sizes)
        self.world: int = math.prod(sizes.values())
        self.name: str = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        self.device: torch.device = _begin(self, device)
        if self.world > 1:  # before groups are made, in which ranks of other meshes would wait for each other
            check_alike({"mesh": self.name, "torch": torch.__version__, "code": _own_code()})
        self.rank: int = distributed.get_rank() if self.world > 1 else 0
        self._devices: Any = None
        self._products: dict[tuple[str, ...], Any] = {}
        self._groups: dict[tuple[str, ...], Any] = {}
        for axis in self.axes:
            self.group(axis)
        self.group(self.axes)
        _MESHES[self.name] = self

    def __repr__(self) -> str:
        return f"Mesh({self.name})"

    @property
    def devices(self) -> Any:
        """The same as torch's DeviceMesh, of which DTensors are."""
        if self._devices is None:
            from torch.distributed.device_mesh import init_device_mesh

            sizes = tuple(self.sizes.values())
            self._devices = init_device_mesh(self.device.type, sizes, mesh_dim_names=self.axes)
            # what is to be added along several axes DTensor adds at once, where it knows their product: one collective,
            # in which every rank gets the same bits
            for count in range(2, len(self.axes) + 1):
                for axes in itertools.combinations(self.axes, count):
                    self._products[axes] = self._devices[axes]._flatten("_".join(axes))
        return self._devices

    def axes_of_groups(self) -> dict[str, tuple[str, ...]]:
        """Return the axes of each group of torch's DeviceMesh, by its name."""
        single = {self.devices.get_group(axis).group_name: (axis,) for axis in self.axes}
        return {found.get_group().group_name: axes for axes, found in self._products.items()} | single

    def ordered(self, axes: Axes) -> tuple[str, ...]:
        """Return the axes in the order of the mesh. Raises: ValueError for one that is not there, or is there twice."""
        chosen = (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in chosen:
            if axis not in self.sizes:
                raise ValueError(f"sharding: expected an axis of the mesh {self.name}, came {axis!r}")
            if chosen.count(axis) > 1:
                raise ValueError(f"sharding: expected each axis once, came {axis!r} twice in {chosen}")
        by_name = {str(axis): axis for axis in chosen}  # what says more than its name stays
        return tuple(by_name[axis] for axis in self.axes if axis in by_name)

    def size(self, axes: Axes) -> int:
        """Return the number of ranks along the axes."""
        return math.prod(self.sizes[axis] for axis in self.ordered(axes))

    def index(self, axes: Axes, rank: int | None = None) -> int:
        """Return the place of a rank, by default this one, along the axes, those of the mesh's end the fastest."""
        rest, places = self.rank if rank is None else rank, {}
        for axis in reversed(self.axes):
            rest, places[axis] = divmod(rest, self.sizes[axis])
        found = 0
        for axis in self.ordered(axes):
            found = found * self.sizes[axis] + places[axis]
        return found

    def ranks(self, axes: Axes) -> list[list[int]]:
        """Return the ranks that differ along the axes alone, each such row in order."""
        chosen = self.ordered(axes)
        others = [axis for axis in self.axes if axis not in chosen]
        rows: dict[int, list[int]] = {}
        for rank in range(self.world):
            rows.setdefault(self.index(others, rank) if others else 0, []).append(rank)
        return list(rows.values())

    def group(self, axes: Axes) -> Any:
        """Return the process group of the ranks that differ from this one along the axes alone, None for one rank."""
        chosen = self.ordered(axes)
        if self.size(chosen) == 1:
            return None
        if chosen not in self._groups:
            if self.size(chosen) == self.world:
                self._groups[chosen] = distributed.group.WORLD
            else:
                self._groups[chosen], _ = distributed.new_subgroups_by_enumeration(self.ranks(chosen))
        return self._groups[chosen]


def named(name: str) -> Mesh:
    """Return the mesh of that name."""
    return _MESHES[name]


def current() -> Mesh:
    """Return the mesh of the step that runs. Raises: RuntimeError where none does."""
    mesh: Mesh | None = getattr(_here, "mesh", None)
    if mesh is None:
        raise RuntimeError(
            "sharding: expected a call inside of a step with a plan, or of a function of ft.sharding.shard_map, where "
            "axes have ranks; came one elsewhere"
        )
    return mesh


def tensor_axis() -> str | None:
    """Return the axis along which layers of the step that runs are split."""
    axis: str | None = getattr(_here, "tensor", None)
    return axis


@contextmanager
def entered(mesh: Mesh, tensor: str | None = None) -> Iterator[None]:
    """Let the collectives that are called inside know the mesh, and its axis that splits layers."""
    before = getattr(_here, "mesh", None), getattr(_here, "tensor", None)
    _here.mesh, _here.tensor = mesh, tensor
    try:
        yield
    finally:
        _here.mesh, _here.tensor = before


def check_alike(facts: Mapping[str, str]) -> None:
    """Return when all ranks of torch.distributed say the same of each name. Every one of them must call it.

    Raises: ValueError, on all ranks, which names a rank and what it says.
    """
    if distributed.get_backend() == "fake":  # of a rehearsal, in which nobody else is there
        return
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, dict(facts))
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"sharding: rank {rank}: expected the {name} of rank 0, {value}, came {other.get(name)}; start all "
                    "ranks alike"
                )


@cache
def _own_code() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join([file.read_bytes() for file in files])).hexdigest()[:16]


def _begin(mesh: Mesh, device: torch.device | str | None) -> torch.device:
    """Begin torch.distributed where it is needed and nobody has; return the device of this rank."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(found)
    started = distributed.is_available() and distributed.is_initialized()
    if not started and "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        begin("nccl" if found.type == "cuda" else "gloo")
        started = True
    there = distributed.get_world_size() if started else 1
    if there != mesh.world:
        way_out = f"; start it by torchrun --nproc-per-node {mesh.world}" if there == 1 else "; change the mesh"
        raise ValueError(
            f"sharding: expected as many ranks as the mesh {mesh.name} has places, {mesh.world}, came {there}{way_out}"
        )
    return found
