"""Gradients of functions of trees.

One name, two engines. Outermost, `torch.autograd.grad` on detached leaves: half of torch.func's peak memory in eager.
Inside another transform, or when the caller differentiates the arguments, `torch.func`, which composes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import donation, engine
from functrain.losses import Loss
from functrain.transforms import gradient_checks
from functrain.transforms.loss_scale import wide, wide_dtype

Argnums = int | Sequence[int]


def value_and_grad(fn: Callable[..., Any], *, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Make a function that returns `(fn's result, gradients)`, the gradients a tree like the argument.

    `fn` returns a () tensor or a `Loss`, whose total is differentiated, or `(that, aux)` with `has_aux`. With a
    tuple of argnums the gradients are a tuple. A leaf that the value does not depend on has a zero gradient.
    Equals `jax.value_and_grad`; a complex leaf's gradient is torch's, the conjugate of JAX's.

    Raises: TypeError naming the path of a leaf that is no floating-point tensor, and for a result that is no scalar;
    ValueError for argnums that name no positional argument, or one twice, and when the result does not depend on any
    leaf, or depends on a differentiated tensor that is no argument.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @wraps(fn)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        gradient_checks.check_positions(positions, args)
        chosen = tuple(args[i] for i in positions)
        leaves, structure = tree.flatten(chosen)
        gradient_checks.check_leaves(chosen, leaves)
        if engine.nested() or (torch.is_grad_enabled() and _any_differentiated(args, kwargs)):
            result, grads = _by_functorch(fn, positions, has_aux, args, kwargs, leaves, structure)
        else:
            if _any_differentiated(args, kwargs):  # under no_grad, where nobody asks for their gradients
                args, kwargs = tree.map(_detach, (args, kwargs))

            def run(args: Any, kwargs: Any, tangent: Any = None) -> Any:
                leaves, structure = tree.flatten(tuple(args[i] for i in positions))
                result, found = _by_autograd(fn, positions, has_aux, args, kwargs, leaves, structure, tangent=tangent)
                return result, tree.unflatten(structure, found)

            if engine.cuts_losses():
                cutter = engine.here.cutter

                def cut(args: Any, kwargs: Any) -> Any:
                    result, grads = run(args, kwargs, cutter.tangent)
                    # torch lays gradients of convolutions out in its own way, and an update goes by one dimension
                    return result, tree.map(lambda g: g.contiguous(), grads)

                result, grads = cutter.call(value_and_grad_of, cut, (args, kwargs), first=_value)
            else:
                result, grads = run(args, kwargs)
        return result, (grads[0] if isinstance(argnums, int) else grads)

    return value_and_grad_of


def add_gradients(
    fn: Callable[..., Any], *, has_aux: bool = False, factor_of: Callable[[Any], Tensor] | None = None
) -> Callable[..., Any]:
    """Make a function `(total, params, *args) -> fn(params, *args)` that adds the gradients to the list `total`.

    `total` is empty, or holds the leaves of a sum that nobody else sees: it is overwritten. The gradient of a large
    leaf is added as soon as it is made, so that the gradients of all leaves never lie beside their sum. Equals
    `value_and_grad` and an addition; half-precision gradients are added in float32, and multiplied there by the ()
    tensor `factor_of(fn's result)`, which is not 0.
    """
    both = value_and_grad(fn, has_aux=has_aux)

    def giving(params: Any, total: Any, *args: Any) -> Any:
        return fn(tree.map(lambda p, t: donation.give_gradient(p, t) if _is_large(p) else p, params, total), *args)

    def run(params: Any, total: Any, args: Any) -> Any:
        leaves, structure = tree.flatten((params,))
        tangent = engine.here.cutter.tangent
        result, grads = _by_autograd(fn, (0,), has_aux, (params, *args), {}, leaves, structure, tangent=tangent)
        factor = None if factor_of is None else factor_of(result)
        wider = [wide(g) if factor is None else wide(g) * factor.to(wide_dtype(g.dtype)) for g in grads]
        return result, [t + g for t, g in zip(total, wider, strict=True)]

    def added(total: list[Tensor], params: Any, *args: Any) -> Any:
        differentiated = _any_differentiated(params, args)
        if engine.cuts_losses() and not engine.nested():
            if not total:
                half = [wide_dtype(leaf.dtype) != leaf.dtype for leaf in tree.leaves(params)]
                total.extend(engine.here.cutter.zeros(tree.leaves(params), half))
            params, args = tree.map(_detach, (params, args))
            result, total[:] = engine.here.cutter.call(added, run, (params, list(total), args), _sums, _value)
            return result
        if engine.nested() or engine.here.tracing or (torch.is_grad_enabled() and differentiated):
            result, grads = both(params, *args)
            if factor_of is not None:
                factor = factor_of(result)
                grads = tree.map(lambda grad: wide(grad) * factor.to(wide_dtype(grad.dtype)), grads)
            add_leaves(total, tree.leaves(grads))
            return result
        leaves, structure = tree.flatten((params,))
        gradient_checks.check_leaves((params,), leaves)
        if not total:
            total.extend([torch.zeros_like(leaf, dtype=wide_dtype(leaf.dtype)) for leaf in leaves])
        if differentiated:
            params, args = tree.map(_detach, (params, args))
        everything = (params, tree.unflatten(tree.structure(params), total), *args)
        factors: list[Tensor] = []

        def divide(result: Any) -> None:
            # the sum is in units of the factor while the backward pass adds to it
            if factor_of is not None:
                factors.append(factor_of(result))
                donation.multiply(total, 1 / factors[0])

        result, grads = _by_autograd(giving, (0,), has_aux, everything, {}, leaves, structure, divide, zeros=False)
        for leaf, grad, into in zip(leaves, grads, total, strict=True):
            if grad is not None and not _is_large(leaf):
                donation.add(into, grad)
        for factor in factors:
            donation.multiply(total, factor)
        return result

    return added


def add_leaves(total: list[Tensor], grads: list[Tensor]) -> None:
    """Add gradients to the leaves of a sum, or make them the sum where there is none; both lists are used up."""
    if not total:
        total.extend([wide(grad) for grad in grads])
        return
    grads.reverse()
    # a third copy of all gradients would be the peak of the step
    for i in range(len(total)):
        total[i] = total[i] + wide(grads.pop())


def _is_large(leaf: Tensor) -> bool:
    # an addition in the backward program takes 60 ms to compile; the biases and norms together are a hundredth
    return leaf.nbytes >= 2**16


def _value(result: Any) -> Any:
    return result[0]


def _sums(inputs: Any, result: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs[1], result[1], strict=True))


def grad(fn: Callable[..., Any], *, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Make a function that returns the gradients, or `(gradients, aux)` with `has_aux`; see `value_and_grad`.

    Equals `jax.grad`.
    """
    both = value_and_grad(fn, argnums=argnums, has_aux=has_aux)

    @wraps(fn)
    def grad_of(*args: Any, **kwargs: Any) -> Any:
        result, grads = both(*args, **kwargs)
        return (grads, result[1]) if has_aux else grads

    return grad_of


def vmap(fn: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, *, chunk_size: int | None = None) -> Any:
    """Make a function that maps `fn` over dimension `in_dims` of its arguments; equals `torch.func.vmap`, and lets
    `value_and_grad` inside know. Random numbers come from keys, so global randomness inside is an error.

    Raises: TypeError naming a line that reads the numbers of one example, or writes into what all of them share.
    """

    @wraps(fn)
    def deeper(*args: Any, **kwargs: Any) -> Any:
        try:
            with engine.deeper():
                return fn(*args, **kwargs)
        except RuntimeError as error:
            from functrain.compiler.untraceable import mapped

            reason = mapped(error)
            if reason is None:
                raise
            raise TypeError(f"ft.vmap: {reason}") from error

    return torch.func.vmap(deeper, in_dims=in_dims, out_dims=out_dims, randomness="error", chunk_size=chunk_size)


def _by_autograd(
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
    return tree.map(_detach, result), grads


def _by_functorch(
    fn: Callable[..., Any], positions: Sequence[int], has_aux: bool, args: Any, kwargs: Any, leaves: Any, structure: Any
) -> tuple[Any, Any]:
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


def _detach(leaf: Any) -> Any:
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


def _any_differentiated(*trees: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for t in trees for leaf in tree.leaves(t))
