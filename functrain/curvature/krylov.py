"""Matrices known by their products alone: eigenvalues, solutions, traces.

A matrix is a function `matvec(tree) -> tree` that is linear and symmetric, such as `lambda v: hvp(loss_fn, params,
batch, v)`. None of these functions reads a number to the host, so that all of them compile and map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import random, tree
from functrain.curvature.vectors import check_floating, check_vector, flat, like, wide
from functrain.tree import Tree

Matvec = Callable[[Tree], Tree]


class Solution(NamedTuple):
    """The solution of a linear system, as `conjugate_gradients` finds it."""

    x: Tree  # like b
    residual_norm: Tensor  # (): norm of b - A x, as the recurrence has it
    positive: Tensor  # (), bool: no direction was met in which the matrix has no positive curvature


def conjugate_gradients(
    matvec: Matvec, b: Tree, *, steps: int, tolerance: float = 0.0, damping: float | Tensor = 0.0
) -> Solution:
    """Solve (A + damping) x = b for a positive definite matrix, from x = 0.

    A solution whose residual is at most `tolerance` times the norm of b stays as it is in the steps that are left. So
    does one from which the next direction p has p' (A + damping) p <= 0, and `positive` is then false: the matrix is
    not positive definite, and x is no solution, but the best one in the directions before, as a truncated Newton step
    wants it. Vectors are at least float32 between the products.

    Source: Hestenes and Stiefel 1952; `jax.scipy.sparse.linalg.cg`; Steihaug 1983 for what is not positive.
    Raises: ValueError for steps < 1, and naming the paths where a product is not like b; TypeError naming a leaf of b
    that is no floating-point tensor.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> found = ft.curvature.conjugate_gradients(lambda v: matrix @ v, torch.tensor([1.0, 2.0]), steps=2)
    >>> found.x, found.positive
    (tensor([0.0909, 0.6364]), tensor(True))
    """
    _check_steps("conjugate_gradients", steps)
    check_floating("conjugate_gradients: b", b)
    scale = _near_one(b)
    r = p = tree.scale(scale, wide(b))
    x = tree.zeros_like(r)
    square = start = tree.norm(r, squared=True)
    # below eps**2 the recurrence has left the residual far behind, and its squares come near to underflow
    limit = max(tolerance, torch.finfo(square.dtype).eps ** 2) ** 2 * start
    positive = torch.ones_like(square, dtype=torch.bool)
    for _ in range(steps):
        product = matvec(tree.cast_like(p, b))
        check_vector("conjugate_gradients: a product", b, product)
        product = tree.add_scale(wide(product), damping, p)
        curvature = tree.vdot(p, product)
        positive = positive & ~((curvature <= 0) & (square > limit))  # NaN goes on into x
        done = (square <= limit) | ~positive
        # where it is done, divisors may be zero
        alpha = torch.where(done, 0.0, square / torch.where(done, 1.0, curvature))
        x, r = tree.add_scale(x, alpha, p), tree.add_scale(r, -alpha, product)
        new = tree.norm(r, squared=True)
        p = tree.add_scale(r, torch.where(done, 0.0, new / torch.where(done, 1.0, square)), p)
        square = torch.where(done, square, new)
    return Solution(tree.cast_like(tree.scale(1 / scale, x), b), torch.sqrt(square) / scale, positive)


class Spectrum(NamedTuple):
    """Eigenvalues of a matrix, as `lanczos` finds them."""

    values: Tensor  # (steps,), ascending: Ritz values, of which the outermost are eigenvalues first
    weights: Tensor  # (steps,): squared components of the start along their vectors, which sum to 1
    vectors: Tree  # (steps, ...): Ritz vectors of norm 1


def lanczos(matvec: Matvec, start: Tree, *, steps: int) -> Spectrum:
    """Return the Ritz values and vectors of the matrix in the Krylov space of `start`, which is not zero.

    With as many steps as there are parameters they are its eigenvalues, as often as each occurs, and eigenvectors:
    where the Krylov space ends before, a new one begins with a vector orthogonal to it, and has no weight. Each new
    vector is made orthogonal to all before it, twice, so that no eigenvalue comes again by rounding: `steps` vectors
    are kept, at least in float32.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.3; Ghorbani et al. 2019 (arXiv:1901.10159).
    Raises: ValueError for steps < 1 or more than the elements of start; for a start of zeros and products that are not
    finite, where torch's eigenvalues are an error; naming the paths where a product is not like start. TypeError naming
    a leaf of start that is no floating-point tensor.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> ft.curvature.lanczos(lambda v: matrix @ v, torch.tensor([1.0, 0.0]), steps=2).values
    tensor([1.3820, 3.6180])
    """
    _check_steps("lanczos", steps)
    check_floating("lanczos: start", start)
    first = flat(start)  # (n,)
    if steps > len(first):
        raise ValueError(f"lanczos: expected at most {len(first)} steps, one an element of start, came {steps}")
    basis = (first / torch.linalg.vector_norm(first))[None]  # (steps so far, n)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    size = torch.zeros_like(first[0])  # of the matrix
    for i in range(steps):
        product = matvec(like(basis[i], start))
        check_vector("lanczos: a product", start, product)
        w = flat(product).to(first.dtype)
        diagonal.append(torch.dot(basis[i], w))
        if i + 1 == steps:
            break
        size = torch.maximum(size, torch.linalg.vector_norm(w))
        w = _orthogonal(w, basis)
        norm = torch.linalg.vector_norm(w)
        # what is left is rounding, and no direction: the coordinate that the basis covers least has at least 1 - i / n
        ended = norm <= 10 * torch.finfo(first.dtype).eps * size
        least = torch.argmin(torch.sum(basis**2, 0))
        other = _orthogonal((torch.arange(len(first), device=first.device) == least).to(first.dtype), basis)
        beside.append(torch.where(ended, 0.0, norm))
        w = torch.where(ended, other, w)
        basis = torch.cat([basis, (w / torch.linalg.vector_norm(w))[None]])
    t = torch.diag(torch.stack(diagonal))
    if beside:
        t = t + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
    values, rotation = _eigh(t)  # (steps,), (steps, steps)
    vectors = [like(vector, start) for vector in torch.unbind(rotation.T @ basis)]
    return Spectrum(values, rotation[0] ** 2, tree.map(lambda *leaves: torch.stack(leaves), *vectors))


class Estimate(NamedTuple):
    """Trace and diagonal of a matrix, as `hutchinson` estimates them."""

    trace: Tensor  # ()
    trace_error: Tensor  # (): standard error of trace; NaN from one sample
    diagonal: Tree  # like the parameters


def hutchinson(matvec: Matvec, like: Tree, key: Tensor, *, samples: int) -> Estimate:
    """Estimate the matrix's trace and diagonal, both without bias, from random vectors of signs.

    Exact in one sample for a diagonal matrix. The variance of one sample is twice the sum of the squares off the
    diagonal for the trace, and for element i of the diagonal the sum of those in row i.

    Source: Hutchinson 1989; Bekas et al. 2007 for the diagonal.
    Raises: ValueError for samples < 1, and naming the paths where a product is not like the parameters; TypeError
    naming one that is no floating-point tensor.

    >>> diagonal = torch.tensor([1.0, 2.0, 3.0])
    >>> found = ft.curvature.hutchinson(lambda v: diagonal * v, torch.zeros(3), ft.random.key(0), samples=2)
    >>> found.trace, found.diagonal
    (tensor(6.), tensor([1., 2., 3.]))
    """
    _check_steps("hutchinson", samples, "samples")
    check_floating("hutchinson: like", like)
    traces: list[Tensor] = []
    total = tree.zeros_like(like)
    leaves, structure = tree.flatten(like)
    for i in range(samples):
        keys = random.split(random.fold_in(key, i), len(leaves))
        signs = [
            (2 * random.bernoulli(k, 0.5, leaf.shape).to(leaf.dtype) - 1) for k, leaf in zip(keys, leaves, strict=True)
        ]
        probe = tree.unflatten(structure, signs)
        product = matvec(probe)
        check_vector("hutchinson: a product", like, product)
        diagonal = tree.mul(wide(probe), wide(product))
        traces.append(tree.sum(diagonal))
        total = tree.add(total, diagonal)
    found = torch.stack(traces)
    # a sum of squares divided by zero is NaN, which is what one sample says about its error
    spread = torch.sum((found - found.mean()) ** 2) / torch.full_like(found[0], samples - 1)
    return Estimate(found.mean(), torch.sqrt(spread / samples), tree.cast_like(tree.scale(1 / samples, total), like))


def _near_one(b: Tree) -> Tensor:
    """Return the power of two, (), by which the largest element of b comes to between 1 and 2; 1 for zeros.

    Its square, and those of what is smaller by eps**2, are then far from the ends of float32, and no digit is rounded.
    """
    sizes = [torch.amax(torch.abs(leaf.detach())) for leaf in tree.leaves(wide(b)) if leaf.numel()]
    size = torch.stack(sizes).amax() if sizes else torch.ones(())
    smallest = torch.finfo(size.dtype).smallest_normal
    exponent = torch.floor(torch.log2(torch.clamp(size, smallest, 1 / smallest)))
    return torch.where(size > 0, torch.exp2(-exponent), 1.0)


def _eigh(t: Tensor) -> Any:
    try:
        return torch.linalg.eigh(t)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise ValueError(
            "lanczos: expected a start that is not zero and finite products, came NaN; draw the start from a key, and "
            "look at the loss and its gradient"
        ) from error


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        w = w - (basis @ w) @ basis
    return w


def _check_steps(what: str, steps: int, name: str = "steps") -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{what}: expected {name} of at least 1, came {steps!r}")
