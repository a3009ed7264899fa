"""Memory for time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from functrain import tree
from functrain.transforms import captured, engine
from functrain.transforms.rematerialized import Call, Rematerialized


def recompute(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that keeps its arguments alone for the backward pass, which runs `fn` again.

    Equals `fn`, to the last bit where `fn` is differentiated once in eager. Arguments and results are any trees;
    leaves that are no tensors are what they are. Random numbers come from keys and are the same the second time.
    Composes with every transform; forward mode inside of forward mode is an error, because torch's is wrong there.

    Source: Chen et al. 2016 (arXiv:1604.06174); `jax.checkpoint`.
    Raises: ValueError when `fn` uses a tensor that is differentiated or mapped over and is no argument.
    """

    @wraps(fn)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        leaves, structure = tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]

        def of_tensors(*tensors: Tensor) -> Any:
            full = list(leaves)
            for i, value in zip(places, tensors, strict=True):
                full[i] = value
            args, kwargs = tree.unflatten(structure, full)
            return fn(*args, **kwargs)

        if torch.compiler.is_compiling():
            if engine.depth > 1:
                raise NotImplementedError(
                    "recompute: a gradient or map inside of a loss that ft.compile compiles in pieces cannot recompute "
                    "in torch 2.13; take recompute out of the inner function, or leave out ft.compile"
                )
            before, engine.recomputing = engine.recomputing, True
            result = checkpoint(of_tensors, *tensors, use_reentrant=False, preserve_rng_state=False)
            engine.recomputing = before
            return result
        return _rematerialized(of_tensors, tensors, _check(fn))

    return recomputed


def recompute_layers(fn: Callable[..., Any], *, budget: float = 0.0) -> Callable[..., Any]:
    """Make a function that runs `fn` with the layers of every `nn.stack` inside recomputed, up to a memory budget.

    `budget` is the part of their activation memory that stays, a twelfth of a layer's for the input that a recomputed
    layer keeps; it is met to the nearest number of layers. The last layers keep theirs, which the backward pass needs
    first and frees before it recomputes. Equals `fn`; see `recompute`.

    Raises: ValueError for a budget outside [0, 1].
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"recompute_layers: expected a budget in [0, 1], came {budget}; 0.5 keeps half")

    @wraps(fn)
    def with_layers_recomputed(*args: Any, **kwargs: Any) -> Any:
        before, engine.layers_kept = engine.layers_kept, budget
        try:
            return fn(*args, **kwargs)
        finally:
            engine.layers_kept = before

    return with_layers_recomputed


def recomputed_layers(count: int) -> int:
    """Return how many of `count` layers are recomputed, the first ones, under the budget in force."""
    kept = (engine.layers_kept - _INPUT) / (1.0 - _INPUT) * count
    return count - max(0, int(kept + 0.5))


# what the input of a layer is of its activations: a tenth in an MLP block, a sixteenth in a transformer's
_INPUT = 1 / 12


def _rematerialized(fn: Callable[..., Any], tensors: list[Tensor], check: Callable[[], Any]) -> Any:
    static: list[Any] = []
    made: Any = None

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal static, made
        values, made = tree.flatten(fn(*tensors))
        # no tensor stays here, which would keep the graph behind it
        static = [None if isinstance(value, Tensor) else (value,) for value in values]
        return tuple([value for value in values if isinstance(value, Tensor)])

    call = Call(function, [x.requires_grad for x in tensors], check)
    values = iter(Rematerialized.apply(call, *tensors))
    return tree.unflatten(made, [next(values) if value is None else value[0] for value in static])


def _check(fn: Callable[..., Any]) -> Callable[[], Any]:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext
    return lambda: captured.Checked("recompute", fn)
