"""A run's step on a mesh of GPUs that are not there: memory, collectives, arithmetic of one rank, and their time.

The step is run in eager on tensors without values. Times are bounds, of the makers' data sheets: what a network and a
GPU do at best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import functrain as ft
from functrain.recipes import architectures, optimizers, precision, pretrain, ranks
from functrain.recipes.config import Config
from functrain.sharding.rehearsal import Collective, Rehearsal, pretended, rehearse
from functrain.train.watching.peak import of_name


class Gpu(NamedTuple):
    """A GPU of a data sheet."""

    name: str
    memory_bytes: float
    link_bytes: float  # a second, to its neighbours in a machine, in one direction

    @property
    def peak_flops(self) -> float:
        return of_name(self.name) or math.nan


GPUS = {
    "a100": Gpu("A100", 80e9, 300e9), "h100": Gpu("H100", 80e9, 450e9), "h200": Gpu("H200", 141e9, 450e9),
    "b200": Gpu("B200", 180e9, 900e9),
}  # fmt: skip


class Estimate(NamedTuple):
    """What a step takes, of one rank."""

    found: Rehearsal
    parameters: int
    ranks: int
    compute_seconds: float
    sending_seconds: dict[str, float]  # along each axis
    model_flops: float  # of a step, all ranks together, as a record counts them

    @property
    def best_seconds(self) -> float:
        """The time if all that is sent goes beside what is computed."""
        return max(self.compute_seconds, *self.sending_seconds.values(), 0.0)

    @property
    def worst_seconds(self) -> float:
        """The time if nothing does."""
        return self.compute_seconds + sum(self.sending_seconds.values())


def estimate(config: Config, mesh: Mapping[str, int], gpu: Gpu, *, network_bytes: float, node: int) -> Estimate:
    """Rehearse a step of the config on a mesh, and bound its time on machines of `node` such GPUs each.

    Raises: ValueError for a batch that has not a row for each rank, and what does not divide.
    """
    device, world = torch.device("cpu"), math.prod(mesh.values())
    if config.precision == "auto":  # what a GPU takes
        config = dataclasses.replace(config, precision="bfloat16")
    model = pretrain.model_of(config, config.data.vocabulary)
    with pretended(world):
        plan = ranks.plan_on(config, mesh, device)
        slices = ranks.slices_of(config, plan)

        def make() -> tuple[Any, Any, Any]:
            key, optimizer = ft.random.key(0), optimizers.optimizer_of(config)
            pairs: Any = {"loss_scale": precision.loss_scale_of(config), "guard": pretrain.guard_of(config)}
            params = plan.shard(architectures.of(config.model).module.init(model, key))
            state = ft.init_state(params, optimizer, key=key, **pairs)
            loss_fn = pretrain.loss_of(config, model)
            step = ft.train_step(loss_fn, optimizer, accumulate=slices, plan=plan, **pairs)
            return step, state, _rows(config, plan, slices)

        found = rehearse(plan, make)
    seconds: dict[str, float] = {}
    for row in found.collectives:
        seconds[row.axes] = seconds.get(row.axes, 0.0) + sending(row, mesh, gpu, network_bytes=network_bytes, node=node)
    parameters = sum(leaf.numel() for leaf in ft.tree.leaves(_shapes(config, model)))
    flops = config.batch * config.model.context * ft.models.training_flops_of(model)
    return Estimate(found, parameters, world, found.flops / gpu.peak_flops, seconds, flops)


class Proposal(NamedTuple):
    """A mesh, and what a step on it takes, by models of two and three layers of the same shape."""

    mesh: dict[str, int]
    peak_bytes: float
    best_seconds: float
    worst_seconds: float


def propose(config: Config, gpus: int, gpu: Gpu, *, network_bytes: float, node: int) -> list[Proposal]:
    """Return the meshes of so many GPUs on which a config can run, those that fit into one first, the fastest first.

    Memory, bytes and arithmetic grow by the same with each layer: they are drawn on from two and three layers. Fastest
    is the mean of both bounds. Raises: ValueError where there is none.
    """
    found, said = [], ""
    for mesh in meshes(gpus, node):
        few = [dataclasses.replace(config, model=dataclasses.replace(config.model, layers=n)) for n in (2, 3)]
        try:
            two, three = (estimate(one, mesh, gpu, network_bytes=network_bytes, node=node) for one in few)
        except ValueError as error:
            said = str(error)
            continue
        more = config.model.layers - 2
        numbers = [
            (
                e.found.peak_bytes,
                e.compute_seconds,
                *(e.sending_seconds.get(a, 0.0) for a in sorted(three.sending_seconds)),
            )
            for e in (two, three)
        ]
        peak, compute, *sent = (a + more * (b - a) for a, b in zip(*numbers, strict=True))
        found.append(Proposal(mesh, peak, max(compute, *sent, 0.0), compute + sum(sent)))
    if not found:
        raise ValueError(f"dry-run: expected a mesh of {gpus} ranks on which the config can run, came none; {said}")
    return sorted(found, key=lambda p: (p.peak_bytes > gpu.memory_bytes, p.best_seconds + p.worst_seconds))


def meshes(gpus: int, node: int) -> list[dict[str, int]]:
    """Return the meshes of so many ranks: along tensor a machine at most, along fsdp powers of two."""
    found = []
    for tensor in (n for n in (1, 2, 4, 8, 16) if n <= node and gpus % n == 0):
        fsdp, rest = 1, gpus // tensor
        while rest % fsdp == 0:
            mesh = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
            found.append({axis: size for axis, size in mesh.items() if size > 1} or {"data": 1})
            fsdp *= 2
    return found


def sending(row: Collective, mesh: Mapping[str, int], gpu: Gpu, *, network_bytes: float, node: int) -> float:
    """Return the seconds that collectives take in a ring, by the links of a machine if their ranks are in one."""
    count = math.prod(mesh[axis] for axis in _axes(row.axes, mesh))
    rate = gpu.link_bytes if within_machine(row.axes, mesh, node) else network_bytes
    times = 2.0 if row.kind == "sum" else 1.0
    return times * row.size_bytes * (count - 1) / count / rate


def within_machine(axes: str, mesh: Mapping[str, int], node: int) -> bool:
    """Tell whether ranks that differ along the axes are all in one machine."""
    # neighbours along the last axis are next to each other: a group reaches over all from its first axis on
    names = list(mesh)
    first = min(names.index(axis) for axis in _axes(axes, mesh))
    return math.prod(mesh[name] for name in names[first:]) <= node


def _axes(axes: str, mesh: Mapping[str, int]) -> list[str]:
    return list(mesh) if axes == "all" else axes.split(",")


def _rows(config: Config, plan: ft.sharding.Plan, slices: int) -> Any:
    rows = -(-config.batch // (plan.ranks * slices)) * slices
    batch = architectures.of(config.model).objective.drawn(config, config.data.vocabulary, [])[0]
    return ft.tree.map(lambda leaf: torch.zeros((rows, *leaf.shape[1:]), dtype=leaf.dtype), batch)


def _shapes(config: Config, model: Any) -> Any:
    return architectures.of(config.model).module.init(model, torch.zeros(2, dtype=torch.int32, device="meta"))
