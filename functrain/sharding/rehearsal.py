"""A step of many ranks on one machine without them: what each holds, computes and sends, on tensors without values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from functrain import tree
from functrain.sharding.plan import Plan


class Collective(NamedTuple):
    """Collectives of one kind along the same axes, in a step."""

    kind: str  # gather, scatter, sum, shift, exchange
    axes: str  # with commas between
    calls: int
    size_bytes: int  # of the whole: what comes of a gather, what a scatter takes


class Rehearsal(NamedTuple):
    """What one rank does in a step."""

    state_bytes: int
    peak_bytes: int  # of all tensors at once
    at_peak: dict[str, int]  # bytes by what they are of: state, gathered params, forward, backward, update
    collectives: tuple[Collective, ...]
    flops: int  # of products, forward and backward, those computed again too


@contextmanager
def pretended(world: int) -> Iterator[None]:
    """Be rank 0 of so many, of which there are no others: a `Plan` made inside may be run on fake tensors alone.

    Raises: RuntimeError where torch.distributed runs.
    """
    if distributed.is_initialized():
        raise RuntimeError(
            "sharding: expected a process without ranks for a rehearsal, came one where torch.distributed runs"
        )
    # torch's own group for tests: what is sent goes nowhere
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rehearse(plan: Plan, make: Callable[[], tuple[Any, Any, Any]]) -> Rehearsal:
    """Run one step in eager on fake tensors, and count.

    `make()` returns (step, state, batch), the step of `ft.train_step(..., plan=plan)`, with rows of this rank. Call it
    inside of `pretended`, where a mesh of any size fits; a real rank may call it too, and gets the numbers of its own.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if plan.mesh.world > 1:
        _ = plan.mesh.devices  # has values
    with FakeTensorMode(allow_non_fake_inputs=True):
        step, state, batch = make()
        return measured(plan, step, state, batch)


def measured(plan: Plan, step: Any, state: Any, batch: Any) -> Rehearsal:
    """Count what one step in eager does, on tensors of any kind."""
    from torch.utils.flop_counter import FlopCounterMode

    ledger = Ledger(plan)
    for leaf in [*tree.leaves(state), *tree.leaves(batch)]:
        if isinstance(leaf, Tensor):
            ledger.hold(_here(leaf), "state")
    state_bytes = ledger.live
    flops = FlopCounterMode(display=False)
    with flops, ledger:
        found = step.first(state, batch)
        ledger.phase = "update"
        after = step.second(state, found)
    del found, after
    return Rehearsal(state_bytes, ledger.peak, ledger.at_peak, ledger.collectives(), int(flops.get_total_flops()))


def _here(leaf: Any) -> Tensor:
    found: Tensor = leaf.to_local() if hasattr(leaf, "to_local") else leaf
    return found


_OURS = {"gather": "gather", "scatter": "scatter", "begin_sum": "sum", "shift": "shift", "exchange": "exchange"}
_TORCHS = {
    "all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "all_reduce": "sum",
    "all_to_all_single": "exchange", "all_gather_into_tensor_coalesced": "gather", "all_reduce_coalesced": "sum",
    "reduce_scatter_tensor_coalesced": "scatter",
}  # fmt: skip


class Ledger(TorchDispatchMode):
    """Memory by what it is of, and collectives by kind and axes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.phase = "forward"
        self.live = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._by: Counter[str] = Counter()
        self._held: dict[int, tuple[int, str]] = {}
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._axes: dict[str, str] = {}  # of torch's groups, which DTensor names
        if plan.mesh.world > 1:
            self._axes = {name: ",".join(axes) for name, axes in plan.mesh.axes_of_groups().items()}

    def hold(self, x: Tensor, what: str) -> None:
        """Count a tensor's memory, once, until it is given back."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes(), what
        self.live += storage.nbytes()
        self._by[what] += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self._by)

    def _free(self, key: int) -> None:
        size, what = self._held.pop(key, (0, ""))
        self.live -= size
        self._by[what] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it computes with its part, which comes here
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        what = self.phase
        if what == "forward" and torch._C._current_graph_task_id() != -1:
            what = "backward"
        if func.namespace == "functrain_ranks" and name in _OURS:
            self._count(_OURS[name], args[-1], _size(args[0]), _size(out))
            what = "gathered params" if name == "gather" else what
        elif name == "clone":  # of gathered leaves, each laid out as it is used
            what = self._of(args[0], what)
        elif func.namespace == "_c10d_functional" and name in _TORCHS:
            group = [value for value in args if isinstance(value, str)][-1]
            self._count(_TORCHS[name], self._axes.get(group, "all"), _size(args[0]), _size(out))
        for x in tree.leaves(out) if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.hold(x, what)
        return out

    def _of(self, x: Tensor, otherwise: str) -> str:
        """Return what a copy of a tensor's is of."""
        _, found = self._held.get(x.untyped_storage()._cdata, (0, ""))
        return found if found == "gathered params" else otherwise

    def _count(self, kind: str, axes: str, before: int, after: int) -> None:
        self._calls[kind, axes] += 1
        self._bytes[kind, axes] += max(before, after)

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(Collective(*key, self._calls[key], self._bytes[key]) for key in sorted(self._calls))


def _size(values: Any) -> int:
    found = values if isinstance(values, list | tuple) else [values]
    return sum(x.nbytes for x in found if isinstance(x, Tensor))
