"""Tensors that a function uses and did not get as arguments, where that would lose their gradient without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functrain import tree
from functrain.compiler import engine

_functorch = torch._C._functorch


@contextmanager
def drawing_nothing(what: str, tensors: Sequence[Tensor], again: Callable[[], Any]) -> Iterator[None]:
    """Raise ValueError when torch's global generators are used inside: the second run would draw other numbers.

    `again` does once more what is done inside."""
    if engine.here.tracing:  # where a draw from a generator is an error of its own
        yield
        return
    accelerators = {x.device for x in tensors if x.is_cuda}
    generators = [torch.default_generator, *[torch.cuda.default_generators[d.index] for d in accelerators]]
    before = [generator.get_state() for generator in generators]
    yield
    if have_moved(before, generators) and draws(again):
        raise ValueError(
            f"{what}: fn draws from torch's global generator, and would draw other numbers the second time; draw with "
            "functrain.random from a key that is an argument"
        )


def have_moved(before: Sequence[Tensor], generators: Sequence[torch.Generator]) -> bool:
    """Tell whether generators have other states; where tensors have no values, states have none, and nobody can."""
    try:
        return any(not torch.equal(old, g.get_state()) for old, g in zip(before, generators, strict=True))
    except DataDependentOutputException:
        return False


def draws(again: Callable[[], Any]) -> bool:
    """Tell who has drawn from a global generator: what `again` does once more, or another thread, such as a loader."""
    if threading.active_count() == 1:
        return True
    with _Draws() as seen:
        again()
    return seen.any


class _Draws(TorchDispatchMode):
    """See whether this thread draws from a global generator."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.any |= torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        return func(*args, **kwargs)


@contextmanager
def writing_nothing(what: str, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Raise ValueError when an argument is written to inside: the second run would begin with what the first left."""
    before = [None if x.is_inference() else x._version for x in tensors]
    yield
    for x, version in zip(tensors, before, strict=True):
        if version is not None and x._version != version:
            raise ValueError(
                f"{what}: fn writes into its argument, a tensor of shape {tuple(x.shape)}, and would begin with the "
                "result the second time; write into a clone"
            )


def check_graph(what: str, values: Iterable[Tensor], inputs: Sequence[Tensor] = (), begins: Iterable[Any] = ()) -> None:
    """Walk the graph behind `values` up to the nodes `begins`; raise ValueError for a leaf that is no input."""
    ours = {id(x) for x in inputs}
    seen = set(begins)
    queue = [value.grad_fn for value in values if value.grad_fn is not None and value.grad_fn not in seen]
    seen.update(queue)
    while queue:
        node = queue.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ours:
            raise _error(what, variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)


class Checked(TorchFunctionMode):
    """Raise ValueError where `fn` uses a tensor that a torch.func transform outside of it has made.

    Entered below all transforms, as the forward pass of a torch.autograd.Function is: a tensor of a transform that is
    not there now is foreign. A transform inside of `fn` may be of the same kind and level as one outside; then what
    `fn` closes over is known to be foreign, and what it finds elsewhere, as an attribute of an object, is not.
    """

    def __init__(self, what: str, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.what = what
        self.foreign = {id(x): x for x in _closed_over(fn, {}) if _functorch.is_functorch_wrapped_tensor(x)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for x in tensors_in((args, kwargs)):
            if _functorch.is_functorch_wrapped_tensor(x) and (id(x) in self.foreign or not _of_current_transform(x)):
                raise _error(self.what, x)
        return func(*args, **kwargs or {})


def _of_current_transform(x: Tensor) -> bool:
    interpreters = _functorch.get_interpreter_stack() or []
    level = _functorch.maybe_get_level(x)
    if not 1 <= level <= len(interpreters):
        return False
    maps = interpreters[level - 1].key() == _functorch.TransformType.Vmap
    return maps == _functorch.is_batchedtensor(x)


def _closed_over(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen[id(value)] = value
    if not callable(value) or isinstance(value, type):
        yield from [leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]
    for cell in getattr(value, "__closure__", None) or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
        yield from _closed_over(inside, seen)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Return the tensors among arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _error(what: str, x: Tensor) -> ValueError:
    return ValueError(
        f"{what}: fn uses a tensor of shape {tuple(x.shape)} that is being differentiated or mapped over and is no "
        "argument, so its gradient would be lost; pass it as an argument, or detach it where it is made"
    )
