"""Memory for time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.transforms import captured, checkpointed, rematerialized
from functrain.transforms.precision import with_autocast
from functrain.transforms.rematerialized import Call, Rematerialized
from functrain.transforms.tape import DOTS, Policy, Tape, name_value

P = ParamSpec("P")
R = TypeVar("R")


def recompute(fn: Callable[P, R], policy: Policy = "nothing", *, offload: int | Sequence[int] = ()) -> Callable[P, R]:
    """Make a function that keeps its arguments alone for the backward pass, which runs `fn` again.

    Equals `fn`, to the last bit where `fn` is differentiated once in eager. Arguments and results are any trees;
    leaves that are no tensors are what they are. Random numbers come from keys and are the same the second time.
    Composes with every transform; forward mode inside of forward mode is an error, because torch's is wrong there.

    `policy` says what is kept beside the arguments, and not computed again: "nothing"; "dots", the results of matrix
    products, convolutions and attention; a tuple of names, what `checkpoint_name` gave one of them; or a number in
    [0, 1], the part of the memory that `fn` would keep, spent on what takes longest to compute for its size. Compiled,
    such a number holds for the whole loss that `fn` is a part of.

    The tensors of the positional arguments `offload`, those on an accelerator, wait in host memory for the backward
    pass; in eager only.

    Source: Chen et al. 2016 (arXiv:1604.06174); `jax.checkpoint` and its policies.
    Raises: ValueError when `fn` uses a tensor that is differentiated or mapped over and is no argument, when it draws
    from torch's global generator or writes into an argument, and for another policy.

    >>> def layer(params, x):
    ...     return torch.tanh(params["w"] * x)
    >>> params, x = {"w": torch.zeros(2)}, torch.tensor([1.0, 2.0])
    >>> ft.grad(lambda params, x: ft.recompute(layer)(params, x).sum())(params, x)
    {'w': tensor([1., 2.])}
    """
    _check_policy(policy)
    policy = float(policy) if isinstance(policy, int) else policy
    offloaded = (offload,) if isinstance(offload, int) else tuple(offload)
    by_checkpoint = policy == "nothing" and not offloaded
    if policy == 1.0 and not offloaded:
        return fn

    @wraps(fn)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        nonlocal by_checkpoint
        if not torch.is_grad_enabled() or engine.here.plain:
            return fn(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            raise NotImplementedError("recompute: a torch.compile of your own cannot recompute; use ft.compile")
        if engine.partitions():
            return _tagged(fn, policy, offloaded, args, kwargs)
        leaves, structure = tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def of_tensors(*tensors: Tensor) -> Any:
            full = list(static)  # and not the tensors: what holds them is the graph
            for i, value in zip(places, tensors, strict=True):
                full[i] = value
            args, kwargs = tree.unflatten(structure, full)
            return fn(*args, **kwargs)

        again = with_autocast(engine.as_here(of_tensors), tensors)
        if by_checkpoint and outside_of_torch_func():
            try:
                return checkpointed.run(again, tensors)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                by_checkpoint = False  # fn differentiates by torch.func
        chosen = _places(args, offloaded)
        waiting = [i for i, p in enumerate(places) if p in chosen and not rematerialized.in_host_memory(tensors[i])]
        return _rematerialized(again, tensors, policy, _check(fn), waiting)

    return recomputed


def checkpoint_name(x: Tensor, name: str) -> Tensor:
    """Return x, which `recompute` with the policy `(name,)` keeps; equals `jax.ad_checkpoint.checkpoint_name`.

    In eager the operation that made x is not done again, those before it are: name the result of what takes long.

    >>> def layer(x):
    ...     return torch.exp(ft.checkpoint_name(x * x, "square"))
    >>> ft.grad(ft.recompute(layer, ("square",)))(torch.tensor(1.0))
    tensor(5.4366)
    """
    if engine.partitions():
        named = name_value(x, name)
        engine.here.cutter.name_value(named, name)
        return named
    return name_value(x, name)


def _tagged(fn: Callable[..., Any], policy: Policy, offloaded: Sequence[int], args: Any, kwargs: Any) -> Any:
    """Run `fn` so that the partitioner of a trace knows what to keep of it."""
    if offloaded:
        raise NotImplementedError(
            "recompute: arguments wait in host memory in eager only; leave out offload or compile"
        )
    cutter = engine.here.cutter
    if isinstance(policy, float):
        cutter.keep_part(policy)
        return fn(*args, **kwargs)
    with cutter.recomputing(DOTS if policy == "dots" else (), policy if isinstance(policy, tuple) else ()):
        return fn(*args, **kwargs)


def _check_policy(policy: Any) -> None:
    if isinstance(policy, bool) or not isinstance(policy, (str, float, int, tuple)):
        came = type(policy).__name__
    elif isinstance(policy, tuple):
        if all(isinstance(name, str) for name in policy):
            return
        came = repr(policy)
    elif policy in ("nothing", "dots") if isinstance(policy, str) else 0.0 <= policy <= 1.0:
        return
    else:
        came = repr(policy)
    raise ValueError(
        f"recompute: expected the policy 'nothing', 'dots', a tuple of names, or a part of the memory in [0, 1], "
        f"came {came}"
    )


def recompute_layers(
    fn: Callable[P, R], *, budget: float = 0.0, policy: Policy = "nothing", offload: bool = False
) -> Callable[P, R]:
    """Make a function that runs `fn` with the layers of every `nn.stack` inside recomputed, up to a memory budget.

    `budget` is the part of their activation memory that stays, a twelfth of a layer's for the input that a recomputed
    layer keeps; it is met to the nearest number of layers. The last layers keep theirs, which the backward pass needs
    first and frees before it recomputes. Recomputed layers keep what `policy` says, and with `offload` their inputs
    wait in host memory. Equals `fn`; see `recompute`.

    Raises: ValueError for a budget outside [0, 1] and for another policy.

    >>> def loss_fn(params, x):
    ...     return ft.nn.stack(lambda layer, x: x * layer["w"], params["layers"], x)
    >>> params = {"layers": [{"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}]}
    >>> ft.grad(ft.recompute_layers(loss_fn, budget=0.5))(params, torch.tensor(1.0))
    {'layers': [{'w': tensor(3.)}, {'w': tensor(2.)}]}
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"recompute_layers: expected a budget in [0, 1], came {budget}; 0.5 keeps half")
    _check_policy(policy)

    return wraps(fn)(engine.running(fn, layers=(budget, policy, (1,) if offload else ())))


def recomputed_blocks(block: Callable[..., Any], count: int) -> tuple[list[Callable[..., Any]], int]:
    """Return the block `count` times, the first of them recomputed, and how many are, under the budget in force."""
    part, policy, offload = engine.here.layers
    kept = (part - _INPUT) / (1.0 - _INPUT) * count
    first = count - max(0, int(kept + 0.5))
    again = [recompute(block, policy, offload=offload)] * first if first else []
    return [*again, *[block] * (count - first)], first


# what the input of a layer is of its activations: a tenth in an MLP block, a sixteenth in a transformer's
_INPUT = 1 / 12


def _rematerialized(
    fn: Callable[..., Any], tensors: list[Tensor], policy: Policy, check: Callable[[], Any], waiting: Sequence[int]
) -> Any:
    static: list[Any] = []
    made: Any = None

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal static, made
        values, made = tree.flatten(fn(*tensors))
        # no tensor stays here, which would keep the graph behind it
        static = [None if isinstance(value, Tensor) else (value,) for value in values]
        return tuple([value for value in values if isinstance(value, Tensor)])

    tape = Tape(policy) if policy != "nothing" else None
    call = Call(function, [x.requires_grad for x in tensors], check, tape, waiting)
    values = iter(Rematerialized.apply(call, *tensors))
    return tree.unflatten(made, [next(values) if value is None else value[0] for value in static])


def _places(args: tuple[Any, ...], chosen: Sequence[int]) -> set[int]:
    """Return the numbers of the leaves of the chosen arguments."""
    edges = [0]
    for arg in args:
        edges.append(edges[-1] + len(tree.leaves(arg)))
    if any(not 0 <= i < len(args) for i in chosen):
        raise ValueError(f"recompute: offload={tuple(chosen)}: came {len(args)} arguments by position")
    return {place for i in chosen for place in range(edges[i], edges[i + 1])}


def outside_of_torch_func() -> bool:
    """Tell whether hooks of saved tensors may be set here."""
    # in the forward pass of an autograd.Function there is no transform to see, but the hooks stay forbidden
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return torch._C._functorch.peek_interpreter_stack() is None and forbidden is None


def _check(fn: Callable[..., Any]) -> Callable[[], Any]:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext
    return lambda: captured.Checked("recompute", fn)
