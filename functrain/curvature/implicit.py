"""Derivatives of an optimum: how trained parameters answer to what they were trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.curvature.krylov import conjugate_gradients
from functrain.curvature.products import Batch, LossFn, Params, hvp, mean_of, tensor_of, times, total_of, zero
from functrain.curvature.vectors import check_floating, check_vector
from functrain.losses import Loss, LossResult
from functrain.transforms.gradient import grad
from functrain.transforms.per_example import chunks, per_example_grad
from functrain.tree import Tree

Argument = TypeVar("Argument")


def implicit_grad(
    loss: Callable[[Params, Argument], LossResult],
    params: Params,
    argument: Argument,
    cotangent: Params,
    *,
    steps: int,
    damping: float | Tensor = 0.0,
) -> Argument:
    """Return the gradient in `argument` of a function of params, the optimum of `loss(params, argument)`.

    `cotangent` is that function's gradient at params. By the implicit function theorem the result is minus its product
    with the inverse Hessian and the mixed second derivative, however params were found; `steps` of conjugate gradients
    solve for the inverse, of the Hessian plus `damping`. Of a `Loss` the mean counts, as in `hvp`.

    Source: Bengio 2000; Lorraine et al. 2020 (arXiv:1911.02590), theorem 1.
    Raises: ValueError naming the paths where the cotangent is not like params; for a Hessian that is not positive
    definite, which is no optimum's (inside of `ft.compile` and `ft.vmap` the result is NaN).

    >>> def loss(params, decay):  # which 1 / (1 + decay) minimizes
    ...     return (params - 1) ** 2 + decay * params**2
    >>> decay = torch.tensor(1.0)
    >>> ft.curvature.implicit_grad(loss, 1 / (1 + decay), decay, torch.tensor(1.0), steps=1)
    tensor(-0.2500)
    """

    mean = mean_of(loss)

    def product(v: Tree) -> Tree:
        return hvp(lambda p, a, key: mean(p, a), params, argument, v)

    check_vector("implicit_grad: the cotangent", params, cotangent)
    solved = _solved("implicit_grad", product, cotangent, steps, damping)
    return grad(lambda a, p, s: -tree.vdot(grad(mean)(p, a), s) + zero(a))(argument, params, solved)


def influence(
    loss_fn: LossFn[Params, Batch],
    params: Params,
    batch: Batch,
    test_grad: Params,
    *,
    steps: int,
    damping: float | Tensor = 0.0,
    key: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return for each example of `batch`, on whose mean loss params were trained, what its weight does to a test loss.

    Element i is the derivative of the test loss, whose gradient at params is `test_grad`, by the weight of example i in
    the sum of losses: negative for an example that helps. Minus it is, to first order, what leaving the example out
    adds to the test loss. `damping` is added to the Hessian of that sum: of a `Loss` its total, else the mean times B.

    Shapes: every batch leaf is (B, ...), the result (B,), at least float32.
    Source: Koh and Liang 2017 (arXiv:1703.04730), equation 2.
    Raises: ValueError naming the paths where `test_grad` is not like params, and a leaf of the batch that is not
    (B, ...); for a Hessian that is not positive definite, as far from an optimum (inside of `ft.compile` and `ft.vmap`
    the result is NaN).

    >>> def loss_fn(params, batch, key):
    ...     return torch.mean((params["w"] - batch["x"]) ** 2)
    >>> params, batch = {"w": torch.tensor(1.0)}, {"x": torch.tensor([0.0, 2.0])}
    >>> test_grad = ft.grad(loss_fn)(params, {"x": torch.tensor([2.0])}, None)
    >>> ft.curvature.influence(loss_fn, params, batch, test_grad, steps=1)
    tensor([ 1., -1.])
    """
    check_vector("influence: test_grad", params, test_grad)
    count = len(next(chunks("influence", batch, None))[1])

    def of_sum(*args: Any) -> Any:
        loss = loss_fn(*args)
        return loss.total if isinstance(loss, Loss) else count * tensor_of(loss)

    solved = _solved("influence", lambda v: hvp(of_sum, params, batch, v, key=key), test_grad, steps, damping)
    grads = per_example_grad(total_of(loss_fn), chunk_size=chunk_size)(params, batch, key)  # (B, ...)
    pairs = zip(tree.leaves(grads), tree.leaves(solved), strict=True)
    return -torch.stack([times(g, along) for g, along in pairs]).sum(0)


def _solved(what: str, product: Callable[[Tree], Tree], b: Tree, steps: int, damping: float | Tensor) -> Tree:
    """Solve with the Hessian, which must be positive definite: else the linear equations are not about an optimum."""
    check_floating(f"{what}: the gradient", b)
    x, _, positive = conjugate_gradients(product, b, steps=steps, damping=damping)
    if engine.concrete() and not bool(positive):
        raise ValueError(
            f"{what}: expected a positive definite Hessian, came a direction without positive curvature; train params "
            "to an optimum first, or give a damping above the most negative eigenvalue"
        )
    return tree.map(lambda leaf: torch.where(positive, leaf, torch.nan), x)
