"""The two engines of a gradient: `torch.autograd.grad` on detached leaves, and `torch.func.grad` where it is nested.

Each returns what the function returned, detached, and the gradients of the leaves of the chosen arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.losses import Loss
from functrain.transforms import gradient_checks


def by_autograd(
    fn: Callable[..., Any],
    positions: Sequence[int],
    has_aux: bool,
    args: Any,
    kwargs: Any,
    leaves: Any,
    structure: Any,
    forward_done: Callable[[Any], None] = lambda result: None,
    zeros: bool = True,
    tangent: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Any, Sequence[Any]]:
    """Differentiate by `torch.autograd.grad`; `leaves` are those of the arguments at `positions`, flattened.

    `forward_done(result)` is called between the two passes. Without `zeros` the gradient of a leaf that the value does
    not depend on is None; `tangent(value)` is what the backward pass begins with, 1 where there is none.
    """
    with engine.deeper():
        with torch.enable_grad(), engine.differentiating():
            inputs = [engine.start_of_gradient(leaf) for leaf in leaves]
            seen = not torch.compiler.is_dynamo_compiling()
            versions = gradient_checks.versions(inputs) if seen else []
            given = _replace(args, positions, tree.unflatten(structure, inputs))
            with gradient_checks.explained():
                result = fn(*given, **kwargs)
            value = _scalar(result, has_aux)
            if seen:
                gradient_checks.check_unwritten(inputs, versions, structure)
                gradient_checks.check_reaches(value, inputs, structure)
        forward_done(result)
        along = None if tangent is None else tangent(value)
        with gradient_checks.explained():
            grads = torch.autograd.grad(value, inputs, along, allow_unused=True, materialize_grads=zeros)
        gradient_checks.check_dense(grads, structure)
    return tree.map(detach, result), grads


def by_functorch(
    fn: Callable[..., Any], positions: Sequence[int], has_aux: bool, args: Any, kwargs: Any, leaves: Any, structure: Any
) -> tuple[Any, Any]:
    """Differentiate by `torch.func.grad`, which composes with transforms around it; the gradients are a tree."""
    found: list[Any] = []

    # flat lists of tensors in and out, because torch.func walks trees by torch's own registry, not by ours
    def scalar_of(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        result = fn(*_replace(args, positions, tree.unflatten(structure, leaves)), **kwargs)
        value = _scalar(result, has_aux)
        if not torch.compiler.is_dynamo_compiling() and not value.requires_grad:
            raise gradient_checks.unreached()
        found.extend(tree.flatten(result))
        return value, [leaf for leaf in found[0] if isinstance(leaf, Tensor)]

    outside = torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling()
    again = outside and any(map(_by_caller, leaves))
    with engine.deeper(), engine.differentiating() if again else nullcontext():
        grads, tensors = torch.func.grad(scalar_of, has_aux=True)(leaves)
    unwrapped = iter(tensors)
    result = [next(unwrapped) if isinstance(leaf, Tensor) else leaf for leaf in found[0]]
    return tree.unflatten(found[1], result), tree.unflatten(structure, grads)


def _replace(args: tuple[Any, ...], positions: Sequence[int], chosen: Sequence[Any]) -> tuple[Any, ...]:
    new = list(args)
    for position, value in zip(positions, chosen, strict=True):
        new[position] = value
    return tuple(new)


def detach(leaf: Any) -> Any:
    """Return a tensor without its graph, and what is no tensor as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _scalar(result: Any, has_aux: bool) -> Tensor:
    value = result.total if isinstance(result, Loss) else result
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"value_and_grad(has_aux=True): expected fn to return (value, aux), came {type(result)}")
        value = result[0].total if isinstance(result[0], Loss) else result[0]
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
        hint = "; pass has_aux=True for (value, aux)" if isinstance(value, tuple) else "; take its sum or mean"
        raise TypeError(
            f"value_and_grad: expected a floating-point tensor of shape () to differentiate, came {came}"
            f"{hint if isinstance(value, (tuple, Tensor)) else ''}"
        )
    return value


def _by_caller(leaf: Tensor) -> bool:
    """Tell whether torch.autograd will differentiate what is made of the leaf, a lane's tensor included."""
    while torch._C._functorch.is_batchedtensor(leaf):
        leaf = torch._C._functorch.get_unwrapped(leaf)
    return leaf.requires_grad


def any_differentiated(*trees: Any) -> bool:
    """Tell whether a leaf requires a gradient."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for t in trees for leaf in tree.leaves(t))
