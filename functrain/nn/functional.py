"""Any `torch.nn.Module` as a pure function, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.nn.attributes import check_attributes
from functrain.nn.keyed import Keyed, check_generator
from functrain.nn.normalization import Formulas
from functrain.tree import Params, Tree
from functrain.tree.registering import register_outputs


class Functional(NamedTuple):
    """A module as functions of its parameters and buffers, as `from_module` returns it."""

    apply: Callable[..., tuple[Any, Tree]]  # (params, buffers, key, *args, **kwargs) -> (result, new buffers)
    params: Params  # nested dicts by the parts of the module's names: what is trained
    buffers: Tree  # the same for the module's buffers, and its parameters that do not require a gradient
    evaluate: Callable[..., tuple[Any, Tree]]  # apply of the module in evaluation mode, on the same params and buffers


def from_module(module: torch.nn.Module) -> Functional:
    """Return a module as a pure function of its tensors, with copies of them.

    `apply(params, buffers, key, *args, **kwargs)` equals `module(*args, **kwargs)` in the mode, training or evaluation,
    that the module is in now, and returns the new buffers beside the result: the module and its tensors stay
    untouched. Draw n of random numbers is from `fold_in(key, n)`: of the same distribution as in torch, other numbers;
    the key may be None where nothing is drawn. A parameter that stands at several places of the module is one leaf,
    under its first name. `train_step(..., buffers=True)` carries the buffers.

    `evaluate`, with the same arguments, is the module in evaluation mode, as after `module.eval()`: no dropout, running
    statistics as they are. A loss for training and `ft.evaluate` calls `net.evaluate if key is None else net.apply`.

    Results of transformers, `ModelOutput`s, are tree nodes from here on.

    Raises: ValueError for a lazy module that has not seen a batch, for one of torch.jit, for a tensor that a hook made
    of parameters, and for gradient checkpointing of transformers; at the call, ValueError naming the paths where params
    or buffers are not the module's, and RuntimeError for a module that draws random numbers without a key or in a way
    that a key cannot replace, for one that remembers something in an attribute that is no buffer, for
    torch.utils.checkpoint inside, and for an embedding with `max_norm` or sparse gradients; ValueError for running
    statistics in half precision that the module has wider.

    >>> net = ft.nn.from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5)))
    >>> ft.tree.paths(net.params)
    ['0/bias', '0/weight']
    >>> y, buffers = net.apply(net.params, net.buffers, ft.random.key(0), torch.ones(4, 2))
    >>> y.shape
    torch.Size([4, 3])
    """
    _check(module)
    register_outputs()
    fixed = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    params = _nested((name, p) for name, p in module.named_parameters() if p.requires_grad)
    buffers = _nested([*fixed.items(), *module.named_buffers()])
    names = _nested_names(n for n, p in module.named_parameters() if p.requires_grad)
    buffer_names = _nested_names([*fixed, *(name for name, _ in module.named_buffers())])
    writable = {name for name, _ in module.named_buffers()}
    # the module that is called holds no numbers: a forgotten tensor is an error of the device, never an old value
    shell = _with(module, lambda _, old: old.to("meta"))

    # eval() moves flags alone, so both are functions of the same tensors
    in_evaluation = copy.deepcopy(shell).eval()

    def of(shell: torch.nn.Module, statistics: list[str]) -> Callable[..., tuple[Any, Tree]]:
        def apply(
            params: Params, buffers: Tree = _MISSING, key: Tensor | None = _MISSING, *args: Any, **kwargs: Any
        ) -> tuple[Any, Tree]:
            _check_call(module, buffers, key)
            named: dict[str, Tensor] = {}
            _match("params", names, params, named)
            _match("buffers", buffer_names, buffers, named)
            _check_statistics(statistics, named)
            written = [name for name in named if name in writable]
            named.update(zip(written, _owned([named[name] for name in written], (params, args, kwargs)), strict=True))

            def call(named: dict[str, Tensor]) -> Any:
                with Keyed(key), Formulas() if engine.twice() else nullcontext():
                    return torch.func.functional_call(shell, named, args, kwargs)

            with check_generator(lambda: call({name: x.clone() for name, x in named.items()})), check_attributes(shell):
                result = call(named)
            # a module may write into a buffer or put another in its place: torch leaves both in `named`
            new = tree.map(lambda name: named[name].detach() if name in writable else named[name], buffer_names)
            return result, new

        return apply

    return Functional(of(shell, _running_statistics(module)), params, buffers, of(in_evaluation, []))


_MISSING: Any = object()  # stands for an argument that was left out, of which torch would say that the module lacks one


def _check_call(module: torch.nn.Module, buffers: Any, key: Any) -> None:
    came = None
    if buffers is _MISSING or key is _MISSING or isinstance(buffers, Tensor):
        came = "fewer arguments, or a tensor in the place of buffers"
    elif key is not None and not (isinstance(key, Tensor) and key.shape == (2,) and not key.is_floating_point()):
        came = f"a key of shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"a key {type(key).__name__}"
    if came is not None:
        raise TypeError(
            f"from_module: expected apply(params, buffers, key, *inputs of {type(module).__name__}), came {came}; pass "
            "the field `buffers`, and a key of ft.random.key, or None where nothing is drawn"
        )


def to_module(module: torch.nn.Module, params: Params, buffers: Tree) -> torch.nn.Module:
    """Return a copy of the module with these numbers, such as training left them; tied parameters are tied again.

    Equals the module for the params and buffers of its `from_module`.
    Raises: ValueError naming the paths, or the shape, in which they are not the module's.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> net = ft.nn.from_module(module)
    >>> ft.nn.to_module(module, ft.tree.ones_like(net.params), net.buffers).weight
    Parameter containing:
    tensor([[1., 1.]], requires_grad=True)
    """
    _check(module)
    named: dict[str, Tensor] = {}
    names = _nested_names(n for n, p in module.named_parameters() if p.requires_grad)
    others = [name for name, p in module.named_parameters() if not p.requires_grad]
    _match("params", names, params, named)
    _match("buffers", _nested_names([*others, *(name for name, _ in module.named_buffers())]), buffers, named)
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        if old.shape != named[name].shape:
            came = tuple(named[name].shape)
            raise ValueError(f"to_module: {name}: expected shape {tuple(old.shape)}, came {came}; pass one lane's")
    return _with(module, lambda name, _: named[name].detach().clone())


def _with(module: torch.nn.Module, fn: Callable[[str, Tensor], Tensor]) -> torch.nn.Module:
    """Return a copy of the module with `fn(name, old)` in all places of each of its tensors."""
    memo: dict[int, Any] = {id(old): fn(name, old) for name, old in module.named_buffers()}
    for name, old in module.named_parameters():
        memo[id(old)] = torch.nn.Parameter(fn(name, old.detach()), requires_grad=old.requires_grad)
    return copy.deepcopy(module, memo)


def _owned(buffers: list[Tensor], inputs: Any) -> list[Tensor]:
    """Return copies that a module may write into, under vmap too: what is mapped over goes into no other tensor."""
    if not buffers or not engine.nested():
        return [torch.clone(b) for b in buffers]
    tensors = [leaf for leaf in tree.leaves(inputs) if isinstance(leaf, Tensor)]
    zero: Any = sum(torch.zeros_like(leaf.reshape(-1)[:1], dtype=torch.int8).sum() for leaf in tensors)
    return [(b | zero.bool()) if b.dtype == torch.bool else b + zero.to(b.dtype) for b in buffers]


def _running_statistics(module: torch.nn.Module) -> list[str]:
    """Return the names of the float32 or wider buffers that normalizations move a little in each call."""
    return [
        f"{place}.{name}" if place else name
        for place, part in module.named_modules()
        if part.training and getattr(part, "track_running_stats", False)
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.dtype in (torch.float32, torch.float64)
    ]


def _check_statistics(names: list[str], named: dict[str, Tensor]) -> None:
    for name in names:
        dtype = named[name].dtype
        if dtype in (torch.bfloat16, torch.float16):  # eight bits take no step below a 512th: the mean would stop
            raise ValueError(
                f"from_module: buffers: {name.replace('.', '/')}: expected float32, as a running statistic loses small "
                f"steps below, came {dtype}; for ft.mixed_precision, give its Policy "
                "exceptions={'**running_*': torch.float32}, or take ft.autocast"
            )


def _match(what: str, names: Tree, values: Tree, named: dict[str, Tensor]) -> None:
    try:
        tree.map(named.__setitem__, names, values)
    except ValueError as error:
        raise ValueError(f"from_module: {what} are not the module's\n{error}") from error


def _nested(pairs: Iterable[tuple[str, Tensor]]) -> Tree:
    pairs = list(pairs)
    tensors = dict(pairs)
    return tree.map(lambda name: tensors[name].detach().clone(), _nested_names(tensors))


def _nested_names(names: Iterable[str]) -> Tree:
    top: dict[str, Any] = {}
    for name in names:
        *above, last = name.split(".")
        place = top
        for part in above:
            place = place.setdefault(part, {})
        place[last] = name
    return top


def _check(module: torch.nn.Module) -> None:
    if not isinstance(module, torch.nn.Module):
        came = f"the class {module.__name__}" if isinstance(module, type) else f"{type(module).__name__}"
        raise TypeError(f"from_module: expected a torch.nn.Module, came {came}; make one of it first")
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"from_module: {name}: expected a shape, came a lazy tensor; call the module on a batch first"
            )
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"from_module: {name or 'the module'}: expected a module of Python, came one of torch.jit, which takes "
                "no other params than its own; pass the module that it was made of"
            )
        if part.training and getattr(part, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"from_module: {name or 'the module'}: recomputes by torch.utils.checkpoint, whose second run does not "
                "see the params it is given; turn gradient checkpointing off, and put ft.recompute around apply"
            )
        for attribute, value in vars(part).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise ValueError(
                    f"from_module: {'.'.join(filter(None, (name, attribute)))}: expected a parameter or a buffer, came "
                    "a tensor made of parameters, as torch.nn.utils.weight_norm makes by a hook; take "
                    "torch.nn.utils.parametrizations.weight_norm, or make it in forward"
                )
