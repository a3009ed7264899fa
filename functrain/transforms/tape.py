"""What the first run of a recomputed function did, so that its second run need not do all of it again.

Both runs are watched below every transform, operation by operation. A policy keeps some results, which the second run
takes instead of computing them; and what comes after the last value that the backward pass reads is not computed the
second time. The second run must do what the first did, operation for operation: as soon as it does not, because the
function is not pure or torch takes another way through a transform, everything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from functrain.transforms.captured import tensors_in

aten = torch.ops.aten

Policy = str | float | tuple[str, ...]  # "nothing", "dots", a part of the memory, or names
Operation = Any  # torch's type for it is private

# what a matrix product, or attention, ends up as
DOTS = {
    getattr(aten, name).default
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "_scaled_mm", "convolution"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    )
    if hasattr(aten, name)
}
_VIEWS = {aten._unsafe_view.default, aten._reshape_alias.default}  # their schemas do not say so


class Diverged(BaseException):
    """The second run did something else after it had begun to leave out values. Not for the user to catch."""


class Tape:
    """The operations of a run, what is kept of them, and where values that nobody reads begin."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls: list[tuple[Operation, Any]] = []
        self.results: list[Any] = []  # of each operation: whether it is one tensor; size, stride, dtype, device of all
        self.kept: dict[int, Any] = {}
        self.end: int | None = None


_naming: list[str] = []


def name_value(x: Tensor, name: str) -> Tensor:
    """Return x, and tell every recording that x is the value called `name`."""
    _naming.append(name)
    try:
        return aten.alias(x)  # an operation, because only operations go down through the transforms
    finally:
        _naming.pop()


class Recording(TorchDispatchMode):
    """Write the operations of a run on a tape; `inputs` are the tensors that the function gets."""

    def __init__(self, tape: Tape, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.tape = tape
        self.makers: dict[int, int] = {_storage(x): -1 for x in inputs}  # which operation made a storage
        self.values: dict[int, Any] = {}  # those that the policy may keep
        self.costs: dict[int, float] = {}
        self.live = 0  # operations before this one are done in every run

    def __torch_dispatch__(self, func: Operation, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tape = kwargs or {}, self.tape
        results = func(*args, **kwargs)
        if _is_view(func):
            if _naming and func is aten.alias.default:
                self._name(args[0])
            return results
        i = len(tape.calls)
        tape.calls.append((func, _signature((args, kwargs))))
        tensors = list(tensors_in(results))
        tape.results.append((isinstance(results, Tensor), [(x.size(), x.stride(), x.dtype, x.device) for x in tensors]))
        read = {_storage(x) for x in tensors_in((args, kwargs))}
        made = {_storage(x) for x in tensors}
        # an operation whose effect is more than its results, or that reads what came past us, is done in every run
        if func._schema.is_mutable or read & made or not tensors or not read <= self.makers.keys():
            self.live = i + 1
        if func._schema.is_mutable:
            for storage in read:
                self._forget(self.makers.get(storage, -1))
        self.makers.update(dict.fromkeys(made - read, i))
        if tape.policy == "dots" and func in DOTS:
            # autograd writes on the results themselves what made them, and would keep all of it
            tape.kept[i] = _map(Tensor.detach, results)
        elif not isinstance(tape.policy, str):
            self.values[i] = _map(Tensor.detach, results)
        if isinstance(tape.policy, float):
            self.costs[i] = _cost(func, args, kwargs, results)
        return results

    def _forget(self, maker: int) -> None:
        """What is written over, perhaps, is no longer the result of the operation that made it."""
        for values in (self.values, self.tape.kept):
            values.pop(maker, None)

    def _name(self, x: Tensor) -> None:
        maker = self.makers.get(_storage(x), -1)
        if isinstance(self.tape.policy, tuple) and _naming[-1] in self.tape.policy and maker in self.values:
            self.tape.kept[maker] = self.values[maker]

    def close(self, results: Iterable[Tensor]) -> None:
        """Find in the graph behind the results which values the backward pass reads."""
        saved = _saved(results)
        if saved is None:
            return
        makers = {self.makers.get(storage, -1): size for storage, size in saved.items()}
        end = self.tape.end = max([self.live, *[i + 1 for i in makers]])
        if isinstance(self.tape.policy, float):
            self._keep_part(self.tape.policy, {i: size for i, size in makers.items() if i >= 0})
        self.tape.kept = {i: kept for i, kept in self.tape.kept.items() if i < end}

    def _keep_part(self, part: float, sizes: dict[int, int]) -> None:
        """Keep what costs most to compute for its size, as much as fits in a part of what the graph saves."""
        room = part * sum(sizes.values())
        # a product that nobody saves may be what costs in a value that somebody does
        for i, (func, _) in enumerate(self.tape.calls[: self.tape.end]):
            if func in DOTS and i in self.values:
                sizes.setdefault(i, sum(x.nbytes for x in tensors_in(self.values[i])))
        fitting = [i for i in sizes if sizes[i] <= room and i in self.values]
        chosen: list[int] = []
        for i in sorted(fitting, key=lambda i: self.costs[i] / max(1, sizes[i]), reverse=True):
            if sum(sizes[j] for j in chosen) + sizes[i] <= room:
                chosen.append(i)
        # a large value that small ones leave no room for may be worth more than they: half of the best choice, at least
        costliest = max(fitting, key=lambda i: self.costs[i], default=None)
        if costliest is not None and self.costs[costliest] > sum(self.costs[i] for i in chosen):
            chosen = [costliest]
        self.tape.kept.update({i: self.values[i] for i in chosen})


class Replay(TorchDispatchMode):
    """Give a run the kept values; with `shorten`, nothing that its backward pass does not read is computed."""

    def __init__(self, tape: Tape, *, shorten: bool) -> None:
        super().__init__()
        self.tape, self.at, self.same = tape, 0, True
        self.end = tape.end if shorten else None

    def __torch_dispatch__(self, func: Operation, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tape, i = kwargs or {}, self.tape, self.at
        if _is_view(func) or not self.same:
            return func(*args, **kwargs)
        self.at += 1
        if i >= len(tape.calls) or tape.calls[i] != (func, _signature((args, kwargs))):
            if self.end is not None and i > self.end:
                raise Diverged
            self.same = False
            return func(*args, **kwargs)
        if i in tape.kept:
            return _map(Tensor.detach, tape.kept[i])
        if self.end is None or i < self.end:
            return func(*args, **kwargs)
        single, kinds = tape.results[i]
        found = [torch.empty_strided(n, s, dtype=t, device=d).zero_() for n, s, t, d in kinds]
        return found[0] if single else tuple(found)


def _saved(results: Iterable[Tensor]) -> dict[int, int] | None:
    """Return the storages that the graph saves, and their bytes; None where a node does not show what it saves."""
    queue = [x.grad_fn for x in results if x.grad_fn is not None]
    seen, found = set(queue), {}
    while queue:
        node: Any = queue.pop()
        kind = type(node)
        if kind not in _FIELDS:
            _FIELDS[kind] = [name for name in dir(kind) if name.startswith("_saved_")]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            tape = getattr(node, "tape", None)  # one of ours
            if tape is None:
                return None
            tensors = [*node.saved_tensors, *tensors_in(tape.kept)]
        elif not kind.__name__.rstrip("0123456789").endswith(("Backward", "AccumulateGrad")):
            return None
        else:
            tensors = [x for name in _FIELDS[kind] for x in tensors_in(getattr(node, name))]
        found.update({_storage(x): x.untyped_storage().nbytes() for x in tensors})
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return found


_FIELDS: dict[type, list[str]] = {}


def _cost(func: Operation, args: Any, kwargs: Any, results: Any) -> float:
    """Estimate the time of an operation, in bytes moved; a byte takes as long as some fifty multiplications."""
    count = flop_registry.get(func.overloadpacket)
    flops = count(*args, **kwargs, out_val=results) if count is not None else 0
    return flops / 50 + sum(x.nbytes for x in tensors_in((args, kwargs, results)))


def _is_view(func: Operation) -> bool:
    return func.is_view or func in _VIEWS


def _storage(x: Tensor) -> int:
    # an address: not data_ptr, which tensors without data and without elements share
    return x.untyped_storage()._cdata


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple([_signature(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _signature(item)) for name, item in value.items()])
    return value


def _map(fn: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return type(value)([_map(fn, item) for item in value]) if isinstance(value, (tuple, list)) else value
