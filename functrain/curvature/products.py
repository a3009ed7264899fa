"""Products with the curvature matrices of a loss, without the matrices.

The loss is the one that trains, `loss_fn(params, batch, key)`: a `Loss`, of which the mean counts, a () tensor, or
`(tensor, metrics)`. n parameters in all, B examples; a vector over the parameters is a tree like them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from functrain import tree
from functrain.curvature.vectors import check_vector
from functrain.losses import Loss, LossResult
from functrain.transforms.gradient import grad
from functrain.transforms.per_example import per_example_grad
from functrain.tree import Tree

Params = TypeVar("Params")  # a tree; a vector over the parameters is a tree like them
Batch = TypeVar("Batch")
LossFn: TypeAlias = Callable[[Params, Batch, Any], LossResult]  # (params, batch, key)


def hvp(
    loss_fn: LossFn[Params, Batch], params: Params, batch: Batch, v: Params, *, key: Tensor | None = None
) -> Params:
    """Return the product of the mean loss's Hessian and v. Equals `jax.hessian` times v.

    Raises: ValueError naming the paths where v is not like params.

    >>> def loss_fn(params, batch, key):
    ...     return batch["a"] * params["w"][0] ** 2 + params["w"][0] * params["w"][1]
    >>> params, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
    >>> ft.hvp(loss_fn, params, {"a": torch.tensor(3.0)}, v)
    {'w': tensor([6., 1.])}
    """
    check_vector("hvp: v", params, v)
    mean = mean_of(loss_fn)
    # whatever the caller may differentiate is an argument of what is differentiated, so that no gradient is lost
    return grad(lambda p, batch, v: tree.vdot(grad(mean)(p, batch, key), v) + zero(p))(params, batch, v)


def ggnvp(
    outputs_fn: Callable[[Params, Batch, Any], Tensor],
    loss_of_outputs: Callable[[Tensor, Batch], LossResult],
    params: Params,
    batch: Batch,
    v: Params,
    *,
    key: Tensor | None = None,
) -> Params:
    """Return the product of the mean loss's generalized Gauss-Newton matrix and v.

    The matrix is J' H J, J of `outputs_fn(params, batch, key)` and H the Hessian of `loss_of_outputs(outputs, batch)`,
    which is convex in the outputs for the usual losses, so that the matrix has no negative eigenvalue. Where the
    outputs are linear in params it equals the Hessian.

    Source: Schraudolph 2002, section 3; Martens 2014 (arXiv:1412.1193), section 8.
    Raises: ValueError naming the paths where v is not like params; TypeError for outputs that are not one tensor.

    >>> def outputs_fn(params, batch, key):
    ...     return batch["x"] @ params["w"]
    >>> def loss_of_outputs(outputs, batch):
    ...     return torch.mean((outputs - batch["y"]) ** 2)
    >>> batch = {"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "y": torch.zeros(2)}
    >>> v = {"w": torch.ones(2)}
    >>> ft.ggnvp(outputs_fn, loss_of_outputs, {"w": torch.zeros(2)}, batch, v)
    {'w': tensor([1., 4.])}
    """
    check_vector("ggnvp: v", params, v)
    outputs = outputs_fn(params, batch, key)
    check_outputs("ggnvp", outputs)

    pull = grad(lambda p, batch, u: torch.sum(outputs_fn(p, batch, key) * u))  # J' u
    # J v, as the derivative of what is linear in u
    push = grad(lambda u, p, batch, v: tree.vdot(pull(p, batch, u), v))(torch.zeros_like(outputs), params, batch, v)
    return pull(params, batch, hvp(lambda z, batch, key: mean_of(loss_of_outputs)(z, batch), outputs, batch, push))


def fisher_vp(
    loss_fn: LossFn[Params, Batch],
    params: Params,
    batch: Batch,
    v: Params,
    *,
    key: Tensor | None = None,
    chunk_size: int | None = None,
) -> Params:
    """Return the product of the empirical Fisher matrix and v: the mean of g (g . v) over the examples' gradients g.

    The loss is one for each example, as `per_example_grad` has it; the gradients are those of the totals. An example of
    weight 0 (a padded row) is none.

    Shapes: every batch leaf is (B, ...).
    Raises: ValueError naming the paths where v is not like params.

    >>> def loss_fn(params, batch, key):
    ...     return torch.mean(batch["x"] @ params["w"])
    >>> batch = {"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}  # the examples' gradients
    >>> ft.curvature.fisher_vp(loss_fn, {"w": torch.zeros(2)}, batch, {"w": torch.ones(2)})
    {'w': tensor([0.5000, 2.0000])}
    """
    check_vector("fisher_vp: v", params, v)

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        loss = loss_fn(*args)
        weighs = loss.weight != 0 if isinstance(loss, Loss) else torch.ones_like(tensor_of(loss), dtype=torch.bool)
        return loss.total if isinstance(loss, Loss) else tensor_of(loss), weighs

    grads, weighs = per_example_grad(counted, has_aux=True, chunk_size=chunk_size)(params, batch, key)  # (B, ...)
    count = torch.clamp(torch.sum(weighs), min=1)
    along: Any = sum([times(g, d) for g, d in zip(tree.leaves(grads), tree.leaves(v), strict=True)])

    def weighed(g: Tensor) -> Tensor:
        rows = _rows(g)
        return (along.to(rows.dtype) @ rows / count).view(g.shape[1:]).to(g.dtype)

    return tree.map(weighed, grads)


def mean_of(loss_fn: Callable[..., Any]) -> Callable[..., Tensor]:
    """Make the function that returns the mean loss, of a `Loss`, a tensor or `(tensor, metrics)`."""

    def mean(*args: Any) -> Tensor:
        loss = loss_fn(*args)
        return loss.total / loss.weight if isinstance(loss, Loss) else tensor_of(loss)

    return mean


def total_of(loss_fn: Callable[..., Any]) -> Callable[..., Tensor]:
    """Make the function that returns the sum of the losses; of a tensor, which is a mean, for a batch of one only."""

    def total(*args: Any) -> Tensor:
        loss = loss_fn(*args)
        return loss.total if isinstance(loss, Loss) else tensor_of(loss)

    return total


def check_outputs(what: str, outputs: Any) -> None:
    """Raise TypeError unless the outputs are one floating-point tensor."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        came = outputs.dtype if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise TypeError(
            f"{what}: expected outputs_fn to return one floating-point tensor, came {came}; return the outputs that "
            "the loss reads, several of them by torch.cat"
        )


def tensor_of(loss: Any) -> Any:
    """Return the tensor of a loss that is no `Loss`."""
    return loss[0] if isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[1], dict) else loss


def zero(params: Tree) -> Tensor:
    """Return zero, as a function of params: a gradient that does not depend on them would be an error without it."""
    return 0 * tree.sum(tree.leaves(params)[:1])


def times(grads: Tensor, leaf: Tensor) -> Tensor:
    """Return the product of each example's gradient, (B, ...), and a leaf of a vector, (B,), at least float32."""
    rows = _rows(grads)
    return rows @ leaf.flatten().to(rows.dtype)


def _rows(g: Tensor) -> Tensor:
    # float32: a product of bfloat16 rows would be summed in bfloat16
    return g.reshape(len(g), -1).to(torch.promote_types(g.dtype, torch.float32))  # (B, n)
