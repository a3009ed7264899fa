"""Posteriors from the curvature of the loss, in one pass over the data.

B examples in a batch, C outputs of one example, n chosen parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.curvature.laplace.posterior import Diagonal, Full, precisions
from functrain.curvature.products import LossFn, check_outputs, hvp, total_of
from functrain.curvature.vectors import flat, like, wide
from functrain.losses import LossResult
from functrain.transforms.gradient import grad, vmap
from functrain.transforms.per_example import chunks, per_example_value_and_grad
from functrain.tree import Batch, Params, Tree, Where

OutputsFn = Callable[[Params, Batch, Any], Tensor]  # (params, batch, key)


def diagonal_ggn(
    outputs_fn: OutputsFn,
    loss_of_outputs: Callable[[Tensor, Batch], LossResult],
    params: Params,
    batches: Iterable[Batch],
    *,
    where: Where = "**",
    prior_precision: Tree = 1.0,
    chunk_size: int | None = None,
) -> Diagonal:
    """Fit independent Gaussians, whose curvature is the diagonal of the generalized Gauss-Newton matrix, exactly.

    `outputs_fn(params, batch, None)` and `loss_of_outputs(outputs, batch)` are those of `ggnvp`. The curvature is the
    sum over the examples, each a batch of one, of which the loss is the total of a `Loss`, or a () tensor. It is minus
    the log likelihood, without weight decay: that is the prior, and `prior_precision` the decay times the number of
    examples where it was added to a mean. `where` chooses, by path, the parameters that are uncertain.

    At most `chunk_size` examples are in flight, each with C gradients of n numbers.

    Source: MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Daxberger et al. 2021
    (arXiv:2106.14806).
    Raises: tree.PathError for a pattern that fits no path; TypeError for one batch instead of several; ValueError for
    none, and naming the leaf of a batch that is not (B, ...), or of a prior precision that does not broadcast, and for
    a negative one (which inside of `ft.compile` and `ft.vmap` nobody sees).

    >>> def outputs_fn(params, batch, key):
    ...     return batch["x"] @ params["w"]
    >>> def loss_of_outputs(outputs, batch):
    ...     return torch.sum((outputs - batch["y"]) ** 2) / 2
    >>> batch = {"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "y": torch.tensor([1.0, 2.0])}
    >>> ft.curvature.laplace.diagonal_ggn(outputs_fn, loss_of_outputs, {"w": torch.ones(2)}, [batch]).curvature
    {'w': tensor([1., 4.])}
    """
    chosen, fixed = _chosen(where, params)
    curvature, loss = flat(chosen).new_zeros(tree.size(chosen)), flat(chosen).new_zeros(())
    for part in _parts(batches, chunk_size):
        _, jacobian, curved, losses = jacobians(outputs_fn, chosen, fixed, part, loss_of_outputs)
        curvature = curvature + torch.sum(jacobian * curved, (0, 1))
        loss = loss + torch.sum(losses)
    return _checked(Diagonal(chosen, fixed, like(curvature, wide(chosen)), loss, _tensors(prior_precision, chosen)))


def full_ggn(
    outputs_fn: OutputsFn,
    loss_of_outputs: Callable[[Tensor, Batch], LossResult],
    params: Params,
    batches: Iterable[Batch],
    *,
    where: Where = "**",
    prior_precision: Tree = 1.0,
    chunk_size: int | None = None,
) -> Full:
    """Fit one Gaussian, whose curvature is the whole generalized Gauss-Newton matrix of the chosen parameters.

    Everything is as in `diagonal_ggn`. The matrix has n * n numbers, so `where` chooses some thousand parameters at
    most: those of the last layer, in which the outputs are linear, so that the matrix is the Hessian of the loss. Their
    Jacobian goes back through that layer alone.

    Source: Kristiadi et al. 2020 (arXiv:2002.10118) for the last layer.

    >>> def outputs_fn(params, batch, key):
    ...     return batch["x"] @ params["w"]
    >>> def loss_of_outputs(outputs, batch):
    ...     return torch.sum((outputs - batch["y"]) ** 2) / 2
    >>> batch = {"x": torch.tensor([[1.0, 1.0], [0.0, 2.0]]), "y": torch.tensor([2.0, 2.0])}
    >>> ft.curvature.laplace.full_ggn(outputs_fn, loss_of_outputs, {"w": torch.ones(2)}, [batch]).curvature
    tensor([[1., 1.],
            [1., 5.]])
    """
    chosen, fixed = _chosen(where, params)
    n = tree.size(chosen)
    curvature, loss = flat(chosen).new_zeros(n, n), flat(chosen).new_zeros(())
    for part in _parts(batches, chunk_size):
        _, jacobian, curved, losses = jacobians(outputs_fn, chosen, fixed, part, loss_of_outputs)
        curvature = curvature + jacobian.flatten(0, 1).T @ curved.flatten(0, 1)
        loss = loss + torch.sum(losses)
    curvature = (curvature + curvature.T) / 2  # symmetric to the last bit
    return _checked(Full(chosen, fixed, curvature, loss, _tensors(prior_precision, chosen)))


def diagonal_fisher(
    loss_fn: LossFn[Params, Batch],
    params: Params,
    batches: Iterable[Batch],
    *,
    where: Where = "**",
    prior_precision: Tree = 1.0,
    chunk_size: int | None = None,
) -> Diagonal:
    """Fit independent Gaussians, whose curvature is the sum of the squared gradients of the examples.

    That is the empirical Fisher matrix's diagonal, from `loss_fn(params, batch, None)` alone, at one gradient an
    example whatever C is. At the optimum of a model that is right it comes close to that of `diagonal_ggn`, as the data
    grow; of one that is wrong, or fits every example, it does not. Everything else is as there.

    Source: Kunstner et al. 2019 (arXiv:1905.12558) for the difference.

    >>> def loss_fn(params, batch, key):
    ...     return torch.sum((batch["x"] @ params["w"] - batch["y"]) ** 2) / 2
    >>> batch = {"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "y": torch.zeros(2)}
    >>> ft.curvature.laplace.diagonal_fisher(loss_fn, {"w": torch.ones(2)}, [batch]).curvature
    {'w': tensor([ 1., 16.])}
    """
    chosen, fixed = _chosen(where, params)
    total = total_of(loss_fn)
    both = per_example_value_and_grad(lambda c, batch: total(tree.combine(c, fixed), batch, None))
    curvature, loss = flat(chosen).new_zeros(tree.size(chosen)), flat(chosen).new_zeros(())
    for part in _parts(batches, chunk_size):
        losses, grads = both(chosen, part)  # (B,), (B, ...)
        curvature = curvature + torch.sum(flat(grads, batched=1) ** 2, 0)
        loss = loss + torch.sum(losses)
    return _checked(Diagonal(chosen, fixed, like(curvature, wide(chosen)), loss, _tensors(prior_precision, chosen)))


def jacobians(
    outputs_fn: OutputsFn,
    chosen: Tree,
    fixed: Tree,
    batch: Batch,
    loss_of_outputs: Callable[[Tensor, Batch], LossResult] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return outputs (B, C), their Jacobians J (B, C, n), H J (B, C, n) of the loss's Hessian H in the outputs, and
    losses (B,); without a loss, J and zeros in the place of the last two."""
    rows, structure = tree.flatten(batch)

    def of_one(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        example = tree.unflatten(structure, [row.unsqueeze(0) for row in rows])

        def outputs(c: Tree) -> Tensor:
            return outputs_fn(tree.combine(c, fixed), example, None)

        z = outputs(chosen)  # (1, ...)
        check_outputs("laplace", z)
        units = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
        jacobian = vmap(lambda u: flat(grad(lambda c: torch.sum(outputs(c) * u))(chosen)))(units)  # (C, n)
        if loss_of_outputs is None:
            return z.reshape(-1), jacobian, jacobian, torch.zeros_like(z.sum())

        def loss(z: Tensor, batch: Batch, key: None = None) -> Tensor:
            return total_of(loss_of_outputs)(z, batch)

        hessian = vmap(lambda u: flat(hvp(loss, z, example, u)))(units)  # (C, C)
        return z.reshape(-1), jacobian, hessian.to(jacobian.dtype) @ jacobian, loss(z, example)

    return vmap(of_one)(rows)


def _chosen(where: Where, params: Params) -> tuple[Tree, Tree]:
    chosen, fixed = tree.partition(where, params)
    if not tree.leaves(chosen):
        raise ValueError("laplace: expected `where` to choose at least one leaf of params, it chose none")
    return chosen, fixed


def _parts(batches: Iterable[Batch], chunk_size: int | None) -> Iterator[Batch]:
    if isinstance(batches, (dict, Tensor)):
        raise TypeError(f"laplace: expected several batches, came one, a {type(batches).__name__}; pass [batch]")
    some = False
    for batch in batches:
        for part, _ in chunks("laplace", batch, chunk_size):
            some = True
            yield part
    if not some:
        raise ValueError("laplace: expected at least one batch, came none; an iterator may be used up")


def _tensors(prior: Tree, chosen: Tree) -> Tree:
    first = flat(chosen)
    return tree.map(lambda p: p if isinstance(p, Tensor) else first.new_full((), p), prior)


def _checked(posterior: Any) -> Any:
    prior = precisions(posterior)
    if engine.concrete() and bool(torch.any(prior < 0)):
        raise ValueError(f"laplace: expected a prior_precision of at least 0, came {prior.min().item():.4g}")
    return posterior
