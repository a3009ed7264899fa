"""Gradients of functions of trees.

One name, two engines. Outermost, `torch.autograd.grad` on detached leaves: half of torch.func's peak memory in eager.
Inside another transform, or when the caller differentiates the arguments, `torch.func`, which composes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import donation, engine
from functrain.losses import Loss
from functrain.transforms import gradient_checks
from functrain.transforms.differentiation import any_differentiated, by_autograd, by_functorch, detach
from functrain.transforms.loss_scale import wide, wide_dtype

Argnums = int | Sequence[int]
P = ParamSpec("P")
Argument = TypeVar("Argument")  # a tree of tensors; its gradient is a tree like it
Value = TypeVar("Value", bound=Tensor | Loss)
Aux = TypeVar("Aux")
Result = TypeVar("Result")


@overload
def value_and_grad(
    fn: Callable[Concatenate[Argument, P], Value], *, has_aux: Literal[False] = False
) -> Callable[Concatenate[Argument, P], tuple[Value, Argument]]: ...
@overload
def value_and_grad(
    fn: Callable[Concatenate[Argument, P], tuple[Value, Aux]], *, has_aux: Literal[True]
) -> Callable[Concatenate[Argument, P], tuple[tuple[Value, Aux], Argument]]: ...
@overload
def value_and_grad(
    fn: Callable[P, Result], *, argnums: Argnums, has_aux: bool = False
) -> Callable[P, tuple[Result, Any]]: ...
def value_and_grad(fn: Callable[..., Any], *, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Make a function that returns `(fn's result, gradients)`, the gradients a tree like the argument.

    `fn` returns a () tensor or a `Loss`, whose total is differentiated, or `(that, aux)` with `has_aux`. With a
    tuple of argnums the gradients are a tuple. A leaf that the value does not depend on has a zero gradient.
    Equals `jax.value_and_grad`; a complex leaf's gradient is torch's, the conjugate of JAX's.

    Raises: TypeError naming the path of a leaf that is no floating-point tensor, and for a result that is no scalar;
    ValueError for argnums that name no positional argument, or one twice, and when the result does not depend on any
    leaf, or depends on a differentiated tensor that is no argument.

    >>> def loss_fn(params, x):
    ...     return torch.sum(params["w"] * x)
    >>> params, x = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0])
    >>> ft.value_and_grad(loss_fn)(params, x)
    (tensor(11.), {'w': tensor([3., 4.])})
    >>> ft.value_and_grad(loss_fn, argnums=1)(params, x)
    (tensor(11.), tensor([1., 2.]))
    """
    return _value_and_grad(fn, argnums, has_aux)


def value_and_grad_then(fn: Callable[..., Any], then: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    """Make `value_and_grad(fn, has_aux=True)` whose result and gradients go through `then`, which is compiled with
    them: sums over ranks begin while the backward pass runs."""

    def of_first(result: Any, grads: Any) -> tuple[Any, Any]:
        result, first = then(result, grads[0])
        return result, (first,)

    return _value_and_grad(fn, 0, True, of_first)


def _value_and_grad(
    fn: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    then: Callable[[Any, Any], tuple[Any, Any]] = lambda result, grads: (result, grads),
) -> Callable[..., Any]:
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @wraps(fn)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        gradient_checks.check_positions(positions, args)
        chosen = tuple(args[i] for i in positions)
        leaves, structure = tree.flatten(chosen)
        gradient_checks.check_leaves(chosen, leaves)
        if engine.nested() or (torch.is_grad_enabled() and any_differentiated(args, kwargs)):
            result, grads = then(*by_functorch(fn, positions, has_aux, args, kwargs, leaves, structure))
        else:
            if any_differentiated(args, kwargs):  # under no_grad, where nobody asks for their gradients
                args, kwargs = tree.map(detach, (args, kwargs))

            def run(args: Any, kwargs: Any, tangent: Any = None) -> Any:
                leaves, structure = tree.flatten(tuple(args[i] for i in positions))
                result, found = by_autograd(fn, positions, has_aux, args, kwargs, leaves, structure, tangent=tangent)
                return then(result, tree.unflatten(structure, found))

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
    both: Callable[..., Any] = value_and_grad(fn, argnums=0, has_aux=has_aux)

    def giving(params: Any, total: Any, *args: Any) -> Any:
        return fn(tree.map(lambda p, t: donation.give_gradient(p, t) if _is_large(p) else p, params, total), *args)

    def run(params: Any, total: Any, args: Any) -> Any:
        leaves, structure = tree.flatten((params,))
        tangent = engine.here.cutter.tangent
        result, grads = by_autograd(fn, (0,), has_aux, (params, *args), {}, leaves, structure, tangent=tangent)
        factor = None if factor_of is None else factor_of(result)
        wider = [wide(g) if factor is None else wide(g) * factor.to(wide_dtype(g.dtype)) for g in grads]
        return result, [t + g for t, g in zip(total, wider, strict=True)]

    def added(total: list[Tensor], params: Any, *args: Any) -> Any:
        differentiated = any_differentiated(params, args)
        if engine.cuts_losses() and not engine.nested():
            if not total:
                half = [wide_dtype(leaf.dtype) != leaf.dtype for leaf in tree.leaves(params)]
                total.extend(engine.here.cutter.zeros(tree.leaves(params), half))
            params, args = tree.map(detach, (params, args))
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
            params, args = tree.map(detach, (params, args))
        everything = (params, tree.unflatten(tree.structure(params), total), *args)
        factors: list[Tensor] = []

        def divide(result: Any) -> None:
            # the sum is in units of the factor while the backward pass adds to it
            if factor_of is not None:
                factors.append(factor_of(result))
                donation.multiply(total, 1 / factors[0])

        result, grads = by_autograd(giving, (0,), has_aux, everything, {}, leaves, structure, divide, zeros=False)
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


@overload
def grad(
    fn: Callable[Concatenate[Argument, P], Tensor | Loss], *, has_aux: Literal[False] = False
) -> Callable[Concatenate[Argument, P], Argument]: ...
@overload
def grad(
    fn: Callable[Concatenate[Argument, P], tuple[Tensor | Loss, Aux]], *, has_aux: Literal[True]
) -> Callable[Concatenate[Argument, P], tuple[Argument, Aux]]: ...
@overload
def grad(fn: Callable[P, Any], *, argnums: Argnums, has_aux: bool = False) -> Callable[P, Any]: ...
def grad(fn: Callable[..., Any], *, argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Make a function that returns the gradients, or `(gradients, aux)` with `has_aux`; see `value_and_grad`.

    Equals `jax.grad`.

    >>> ft.grad(lambda params: params["w"] ** 3)({"w": torch.tensor(2.0)})
    {'w': tensor(12.)}
    >>> ft.grad(ft.grad(lambda x: x**3))(torch.tensor(2.0))
    tensor(12.)
    """
    both: Callable[..., Any] = value_and_grad(fn, argnums=argnums, has_aux=has_aux)

    @wraps(fn)
    def grad_of(*args: Any, **kwargs: Any) -> Any:
        result, grads = both(*args, **kwargs)
        return (grads, result[1]) if has_aux else grads

    return grad_of


def vmap(
    fn: Callable[P, Result], in_dims: Any = 0, out_dims: Any = 0, *, chunk_size: int | None = None
) -> Callable[P, Result]:
    """Make a function that maps `fn` over dimension `in_dims` of its arguments; equals `torch.func.vmap`, and lets
    `value_and_grad` inside know. Random numbers come from keys, so global randomness inside is an error.

    Raises: TypeError naming a line that reads the numbers of one example, or writes into what all of them share.

    >>> ft.vmap(ft.grad(torch.sin))(torch.zeros(3))
    tensor([1., 1., 1.])
    >>> ft.vmap(lambda a, x: a @ x, in_dims=(None, 0))(torch.ones(2, 3), torch.arange(6.0).view(2, 3))
    tensor([[ 3.,  3.],
            [12., 12.]])
    """

    @wraps(fn)
    def deeper(*args: P.args, **kwargs: P.kwargs) -> Result:
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
