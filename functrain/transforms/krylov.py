"""Matrices known by their products alone: eigenvalues, solutions, traces.

A matrix is a function `matvec(tree) -> tree` that is linear and symmetric, such as `lambda v: hvp(loss_fn, params,
batch, v)`. None of these functions reads a number to the host, so that all of them compile and map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functrain import random, tree
from functrain.tree import Tree

Matvec = Callable[[Tree], Tree]


class Solution(NamedTuple):
    x: Tree  # like b
    residual_norm: Tensor  # (): norm of b - A x, as the recurrence has it


def conjugate_gradients(
    matvec: Matvec, b: Tree, *, steps: int, tolerance: float = 0.0, damping: float | Tensor = 0.0
) -> Solution:
    """Solve (A + damping) x = b for a positive definite matrix, from x = 0.

    A solution whose residual is at most `tolerance` times the norm of b stays as it is in the steps that are left.

    Source: Hestenes and Stiefel 1952; `jax.scipy.sparse.linalg.cg`.
    Raises: ValueError for steps < 1.
    """
    _check_steps("conjugate_gradients", steps)
    x, r, p = tree.zeros_like(b), b, b
    square = start = tree.norm(b, squared=True)
    for _ in range(steps):
        done = square <= tolerance**2 * start
        product = tree.add_scale(matvec(p), damping, p)
        # where it is done, divisors may be zero
        alpha = torch.where(done, 0.0, square / torch.where(done, 1.0, tree.vdot(p, product)))
        x, r = tree.add_scale(x, alpha, p), tree.add_scale(r, -alpha, product)
        new = tree.norm(r, squared=True)
        p = tree.add_scale(r, torch.where(done, 0.0, new / torch.where(done, 1.0, square)), p)
        square = torch.where(done, square, new)
    return Solution(x, torch.sqrt(square))


class Spectrum(NamedTuple):
    values: Tensor  # (steps,), ascending: Ritz values, of which the outermost are eigenvalues first
    weights: Tensor  # (steps,): squared components of the start along their vectors, which sum to 1
    vectors: Tree  # (steps, ...): Ritz vectors of norm 1


def lanczos(matvec: Matvec, start: Tree, *, steps: int) -> Spectrum:
    """Return the Ritz values and vectors of the matrix in the Krylov space of `start`.

    With as many steps as there are parameters they are its eigenvalues and eigenvectors. Each new vector is made
    orthogonal to all before it, twice, so that no eigenvalue comes again by rounding: `steps` vectors are kept.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.3; Ghorbani et al. 2019 (arXiv:1901.10159).
    Raises: ValueError for steps < 1 or more than the elements of start.
    """
    _check_steps("lanczos", steps)
    if steps > tree.size(start):
        raise ValueError(f"lanczos: expected at most {tree.size(start)} steps, one an element of start, came {steps}")
    basis = [tree.scale(1 / tree.norm(start), start)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for i in range(steps):
        w = matvec(basis[i])
        diagonal.append(tree.vdot(basis[i], w))
        if i + 1 == steps:
            break
        for _ in range(2):
            for v in basis:
                w = tree.add_scale(w, -tree.vdot(v, w), v)
        norm = tree.norm(w)
        beside.append(norm)
        basis.append(tree.scale(1 / norm, w))
    t = torch.diag(torch.stack(diagonal))
    if beside:
        t = t + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
    values, rotation = torch.linalg.eigh(t)  # (steps,), (steps, steps)
    stacked = tree.map(lambda *leaves: torch.stack(leaves, -1), *basis)  # (..., steps)
    vectors = tree.map(lambda leaf: (leaf @ rotation.to(leaf.dtype)).movedim(-1, 0), stacked)
    return Spectrum(values, rotation[0] ** 2, vectors)


class Estimate(NamedTuple):
    trace: Tensor  # ()
    trace_error: Tensor  # (): standard error of trace; NaN from one sample
    diagonal: Tree  # like the parameters


def hutchinson(matvec: Matvec, like: Tree, key: Tensor, *, samples: int) -> Estimate:
    """Estimate the matrix's trace and diagonal, both without bias, from random vectors of signs.

    Exact in one sample for a diagonal matrix.

    Source: Hutchinson 1989; Bekas et al. 2007 for the diagonal.
    Raises: ValueError for samples < 1.
    """
    _check_steps("hutchinson", samples, "samples")
    traces: list[Tensor] = []
    total = tree.zeros_like(like)
    leaves, structure = tree.flatten(like)
    for i in range(samples):
        keys = random.split(random.fold_in(key, i), len(leaves))
        signs = [
            (2 * random.bernoulli(k, 0.5, leaf.shape).to(leaf.dtype) - 1) for k, leaf in zip(keys, leaves, strict=True)
        ]
        probe = tree.unflatten(structure, signs)
        diagonal = tree.mul(probe, matvec(probe))
        traces.append(tree.sum(diagonal))
        total = tree.add(total, diagonal)
    found = torch.stack(traces)
    # a sum of squares divided by zero is NaN, which is what one sample says about its error
    spread = torch.sum((found - found.mean()) ** 2) / torch.full_like(found[0], samples - 1)
    return Estimate(found.mean(), torch.sqrt(spread / samples), tree.scale(1 / samples, total))


def _check_steps(what: str, steps: int, name: str = "steps") -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{what}: expected {name} of at least 1, came {steps!r}")
