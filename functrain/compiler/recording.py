"""The record of a trace: tensors without data, and a graph of what is done to them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

from functrain import tree
from functrain.compiler import forward_mode
from functrain.compiler.graph_passes import is_view
from functrain.compiler.untraceable import drawn, escaped, quiet

aten = torch.ops.aten


class Recomputed(NamedTuple):
    """A call of a function that its backward pass computes again."""

    number: int
    operations: Collection[Any]  # whose results are kept
    names: Sequence[str]  # of values that are kept


class Writes(BaseException):
    """A trace has met a write that `Functional` must see. Not for the user to catch."""


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor of its own memory that lies as x does, in order where x has gaps or overlaps."""
    return torch.empty_like(x, device="meta").stride()


_SAME = {aten.detach.default, aten.alias.default, aten.lift.default, aten.lift_fresh.default}
CONSTANTS = {aten.lift_fresh.default, aten.lift_fresh_copy.default}


_OWN = {Tensor, FakeTensor, FunctionalTensor}


class Recording(FakeTensorMode):
    """Tensors without data, and a graph of what is done to them."""

    def __init__(self, decompositions: dict[Any, Any], around: Sequence[Recording]) -> None:
        # torch's cache of programs wants an environment of shapes; here no number is read, and no shape depends on one
        shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        super().__init__(shape_env=shapes, allow_non_fake_inputs=True)
        self.around = around  # the traces that this one is a part of
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.lifted: list[Tensor] = []
        self._twins: dict[int, Tensor] = {}  # of the lifted tensors: what stands for them here
        self.tangents: list[fx.Node] = []
        self.budgets: list[float] = []
        self.recomputed: list[Recomputed] = []  # those around what is running
        self.joint = False  # the graph is that of a function and its gradient
        self.functional: Any = None  # the `Functional` above, if there is one
        self.aliases: dict[fx.Node, fx.Node] = {}  # results of opaque operations in the memory of an argument
        self.recording = True
        self._last: fx.Node | None = None
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # by identity; the tensor, that it is not used again
        self._shared: dict[int, Any] = {}  # memories of which there is a view, or that are inputs
        self._inside = False
        self._decompositions = decompositions
        self._parts: dict[Any, Any] = {}

    def new(self, x: Tensor) -> Tensor:
        """Make a tensor without data like x."""
        return self._made(x.shape, x.stride(), x.dtype, x.device)

    def _made(self, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch._C._DisableTorchDispatch():  # asking torch's mode for it takes five times as long
            data = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return FakeTensor(self, data, device)

    def input(self, name: str, fake: Tensor) -> fx.Node:
        """Add an input of the graph."""
        place = self.graph.inserting_before() if self._last is None else self.graph.inserting_after(self._last)
        with place:
            self._last = self.graph.placeholder(name)
        self._last.meta["val"] = fake
        self._nodes[id(fake)] = (fake, self._last)
        self.share(fake)
        return self._last

    def stand_in(self, x: Tensor) -> tuple[Tensor, fx.Node]:
        """Make a tensor like x, and a node for it, that stand for such a tensor until they are forgotten."""
        fake = self.new(x)
        node = self.graph.create_node("call_function", aten.empty.memory_format)
        node.meta["val"] = fake
        self.made_by(node, fake)
        self.share(fake)
        return fake, node

    def forget(self, node: fx.Node) -> None:
        """Take a node that nobody uses out of the graph."""
        self._nodes.pop(id(node.meta["val"]), None)
        self.graph.erase_node(node)

    def made_by(self, node: fx.Node, x: Tensor) -> None:
        """Let a tensor be what a node makes."""
        self._nodes[id(x)] = (x, node)

    def share(self, x: Tensor) -> None:
        """Let a write to the memory of a tensor be more than a new value of it."""
        memory = x.untyped_storage()  # kept, that its address is not another's
        self._shared[memory._cdata] = memory

    def lift(self, x: Tensor) -> Tensor:
        """Return what stands for a tensor from outside, here without data."""
        if id(x) not in self._twins:
            own = torch._from_functional_tensor(x.elem) if isinstance(x, FunctionalTensor) else x
            if isinstance(own, FakeTensor) and own.fake_mode not in self.around:
                raise escaped(x)
            fake = self.new(x)
            self.inputs.append(self.input(f"primals_{len(self.inputs) + 1}", fake))
            self.lifted.append(x)
            self._twins[id(x)] = fake
        return self._twins[id(x)]

    def tangent(self, value: Tensor) -> Tensor:
        """Return a cotangent of a value, which whoever calls the compiled function gives."""
        with _disable_current_modes(), self:
            fake = torch.empty_strided(value.shape, dense_strides(value), dtype=value.dtype, device=value.device)
            self.tangents.append(self.input(f"tangents_{len(self.tangents) + 1}", fake))
        return fake if self.functional is None else self.functional.wrapped(fake)

    def node_of(self, x: Tensor) -> fx.Node:
        """Return the node that made a tensor."""
        if isinstance(x, FunctionalTensor):
            torch._sync(x)  # type: ignore[attr-defined]
            x = torch._from_functional_tensor(x.elem)
        found = self._nodes.get(id(x)) or self._nodes[id(self.lift(x))]  # made within a decomposition
        return found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _OWN and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # what wraps tensors says what is done to them
        if self._inside or not self.recording:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for above the transforms of torch.func, where no tensor can be made
        if self.functional is None:
            if func in forward_mode.ZEROS:
                with self:
                    return forward_mode.dense_zeros(func, args, kwargs)
            if func in CONSTANTS and type(args[0]) is Tensor:
                return self.constant(args[0])
            args, kwargs = with_tensors(args, self._ours), with_tensors(kwargs, self._ours)
            if func._schema.is_mutable:
                return self._overwritten(func, args, kwargs)
        parts = self._parts.get(func, func)
        if parts is func:
            parts = self._parts[func] = self._parts_of(func)
        if parts is not None:
            with self:
                result = parts(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = self._like_before(func, args, kwargs)
        if result is None and func is aten.view.default:
            with self:
                return aten.clone.default(args[0], memory_format=torch.contiguous_format).view(args[1])
        self._record(func, args, kwargs, result)
        return result

    def _parts_of(self, func: Any) -> Any:
        """Return what does an operation by simpler ones, or None."""
        if func in self._decompositions:
            return self._decompositions[func]
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        known = torch._C._dispatch_has_kernel(func.name())  # prim::device is an operation, and is not
        composite = known and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
        return func.decompose if composite else None

    def _like_before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Find what an operation returns: an elementwise one that has met such tensors before, without asking torch."""
        key = None
        if torch.Tag.pointwise in func.tags or func in _SUMS:
            named = [(name, _kind(x)) for name, x in kwargs.items()]
            key = (func, torch.get_default_dtype(), *[_kind(x) for x in args], *named)
            try:
                known = _RESULTS.get(key)
            except TypeError:  # a list among the arguments
                key = known = None
            if known is not None:
                return self._made(*known)
        self._inside = True
        try:
            result = super().__torch_dispatch__(func, (), args, kwargs)
        except (RuntimeError, ValueError):
            # torch's compiler lays out some values in another way than eager, where the view is one
            if func is not aten.view.default:
                raise
            result = None
        finally:
            self._inside = False
        if key is not None and isinstance(result, FakeTensor) and result.constant is None:
            _RESULTS[key] = (result.shape, result.stride(), result.dtype, result.device)
        return result

    def _ours(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) and x.fake_mode is self else self.lift(x)

    def _overwritten(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute a new value in place of a write into memory that one tensor alone has."""
        name = func._schema.name.partition("::")[2]
        x: Any = args[0] if args else None
        operation = getattr(getattr(aten, name[:-1], None), func._overloadname, None)
        alone = isinstance(x, Tensor) and _memory(x) not in self._shared
        if func.namespace != "aten" or not name.endswith("_") or operation is None or not alone:
            raise Writes
        with self:
            new = operation(*args, **kwargs)
            if new.shape != x.shape or new.stride() != x.stride():
                raise Writes
            new = new.to(x.dtype)
        self.made_by(self.node_of(new), x)
        return x

    def constant(self, value: Tensor) -> Tensor:
        """Return a tensor of numbers that stand in the function's code."""
        if value.numel() != 1 or value.device.type != "cpu":
            with self:
                return aten.clone.default(self.lift(value))
        with _disable_current_modes():
            number = value.item()
        with self:
            made: Any = torch.full(value.shape, number, dtype=value.dtype)
        made.constant = value  # what is known can be read, as by float()
        return made

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in _SAME:
            self._nodes[id(result)] = (result, self.node_of(args[0]))
            self.share(result)
            return
        single = isinstance(result, Tensor)
        if is_view(func):
            self.share(args[0])
        if not single and not any(isinstance(x, Tensor) for x in tree.leaves(result)):
            return
        if torch.Tag.nondeterministic_seeded in func.tags and not quiet(func, args, kwargs):
            raise drawn(func)
        node = self.graph.create_node("call_function", func, self._of(args), self._of(kwargs))
        node.meta["val"] = result
        if self.recomputed:
            kept = all(func in r.operations for r in self.recomputed)
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = self.recomputed[0].number
        if single:
            self._nodes[id(result)] = (result, node)
            return
        for i, x in enumerate(result):
            if isinstance(x, Tensor):
                item = self.graph.call_function(operator.getitem, (node, i))
                item.meta = {**node.meta, "val": x}
                self._nodes[id(x)] = (x, item)

    def _of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self._of(x) for x in value])
        if isinstance(value, dict):
            return {name: self._of(x) for name, x in value.items()}
        return value


_RESULTS: dict[Any, Any] = {}  # what elementwise operations return
_SUMS = {aten.sum.default, aten.amax.default, aten.max.default, aten.any.default, aten.all.default}


def _kind(x: Any) -> Any:
    if isinstance(x, FakeTensor):
        return (x.shape, x.stride(), x.dtype, x.device, x.constant is None)
    return (type(x), x)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def with_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors among the arguments of an operation."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (tuple, list):
        return type(value)([with_tensors(x, fn) for x in value])
    return {name: with_tensors(x, fn) for name, x in value.items()} if isinstance(value, dict) else value
