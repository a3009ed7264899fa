"""Eigenvalues, roots and least squares of matrices, by iterations of matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.numerics.looping import while_loop
from functrain.schedules import Scalar
from functrain.tree import Tree

Newton: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # m, h, h before, error, whether it converges
MatrixOrProduct: TypeAlias = Tensor | Callable[[Tree], Tree]


def power_iteration(
    matrix: MatrixOrProduct,
    *,
    v0: Tree | None = None,
    num_iters: int = 100,
    error_tolerance: Scalar = 1e-6,
    key: Tensor | None = None,
) -> tuple[Tensor, Tree]:
    """Return the eigenvalue of largest size and its eigenvector of norm 1: v becomes matrix v, again and again.

    `matrix` is (n, n), or a function from a tree to the product with it. It stops when the product differs from
    eigenvalue times vector by less than `error_tolerance` of the eigenvalue. Without `v0` the start is drawn from
    [-1, 1) by `key`. Equals `optax.power_iteration`.

    Raises: ValueError for a function without `v0`, and for a tensor that is no square matrix.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> value, vector = ft.optim.power_iteration(matrix, v0=torch.tensor([1.0, 0.5]))
    >>> round(value.item(), 4), vector
    (3.0, tensor([0.7071, 0.7071]))
    """
    if isinstance(matrix, Tensor):
        _check_square("power_iteration", matrix)
        product: Callable[[Tree], Tree] = lambda v: matrix @ v  # noqa: E731
        if v0 is None:
            start = random.key(0, matrix.device) if key is None else key
            v0 = random.uniform(start, matrix.shape[-1:], matrix.dtype, -1.0, 1.0)
    else:
        product = matrix
    if v0 is None:
        raise ValueError("power_iteration: a function does not tell what it multiplies; pass v0, a tree that it takes")

    def go_on(carry: tuple[Tree, Tree, Tensor]) -> Tensor:
        v, z, eigenvalue = carry
        residual = tree.norm(tree.add_scale(z, -eigenvalue, v))
        return ~(torch.abs(residual / eigenvalue) < error_tolerance)

    def body(carry: tuple[Tree, Tree, Tensor]) -> tuple[Tree, Tree, Tensor]:
        v = _normalized(carry[1])
        z = product(v)
        return v, z, tree.vdot(v, z)

    v = _normalized(v0)
    z = product(v)
    _, z, eigenvalue = while_loop(go_on, body, (v, z, torch.zeros_like(tree.vdot(v, z))), num_iters)
    return eigenvalue, _normalized(z)


def matrix_inverse_pth_root(
    matrix: Tensor, p: int, num_iters: int = 100, ridge_epsilon: Scalar = 1e-6, error_tolerance: Scalar = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return matrix ** (-1 / p) of a symmetric positive matrix, and how far its product is from the identity.

    `ridge_epsilon` times the largest eigenvalue is added to the diagonal first. Equals
    `optax.matrix_inverse_pth_root` for p of 1, 2, 4, 8; optax takes the nearest of them for other p, here p is p.

    Source: Higham 2008, Functions of Matrices, equation 7.18: coupled Newton iterations.

    Raises: ValueError for a tensor that is no square matrix, and for p < 1.

    >>> root, error = ft.optim.matrix_inverse_pth_root(torch.diag(torch.tensor([4.0, 16.0])), p=2)
    >>> root.round(decimals=3), bool(error < 1e-4)
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]]), True)
    """
    _check_square("matrix_inverse_pth_root", matrix)
    if p < 1:
        raise ValueError(f"matrix_inverse_pth_root: expected a positive p, came {p}")
    size, alpha = matrix.shape[0], -1.0 / p
    largest, _ = power_iteration(matrix)
    ridge = ridge_epsilon * torch.clamp(largest, min=1e-16).to(matrix.dtype)
    if size == 1:
        return (matrix + ridge) ** alpha, torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    damped = matrix + ridge * identity
    z = (1 + p) / (2 * torch.linalg.matrix_norm(damped))

    def error_of(m: Tensor) -> Tensor:
        return torch.amax(torch.abs(m - identity))

    def body(carry: Newton) -> Newton:
        m, h, _, error, _ = carry
        step = (1 - alpha) * identity + alpha * m
        m, new_h = torch.linalg.matrix_power(step, p) @ m, h @ step
        # an error may grow before it shrinks; by more than this it diverges
        return m, new_h, h, error_of(m), error_of(m) < 1.2 * error

    def go_on(carry: Newton) -> Tensor:
        return (carry[3] > error_tolerance) & carry[4]

    m, h = damped * z, identity * z ** (1.0 / p)
    start: Newton = (m, h, h, error_of(m), torch.ones_like(z, dtype=torch.bool))
    m, h, before, error, converging = while_loop(go_on, body, start, num_iters)
    return torch.where(converging, h, before), error


def nnls(A: Tensor, b: Tensor, iters: int, L: Scalar | None = None) -> Tensor:
    """Return x >= 0 that minimizes the norm of A x - b, after `iters` steps of accelerated projected gradient.

    `L` bounds the largest eigenvalue of Aᵀ A from above; without it a bound is computed. Equals `optax.nnls`.

    Shapes: A (m, n), b (m,) or (m, k) to x (n,) or (n, k).
    Source: Polyak 2015, Projected gradient method for non-negative least square.

    Raises: ValueError for other shapes.

    >>> ft.optim.nnls(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([3.0, -4.0]), iters=100).round(decimals=3)
    tensor([3., 0.])
    """
    if A.dim() != 2 or b.dim() not in (1, 2) or b.shape[0] != A.shape[0]:
        raise ValueError(f"nnls: expected A (m, n) and b (m,) or (m, k), came {tuple(A.shape)} and {tuple(b.shape)}")
    gram, target = A.mT @ A, A.mT @ b
    bound = _spectral_radius_bound(gram) if L is None else torch.as_tensor(L, dtype=A.dtype, device=A.device)
    bound = torch.where(bound == 0, 1.0, bound)
    x = torch.zeros_like(target)
    ahead, c = x, 0.0
    for _ in range(iters):
        c_new = (1 + math.sqrt(1 + 4 * c**2)) / 2
        new = torch.clamp(ahead - (gram @ ahead - target) / bound, min=0)
        ahead = new + (c - 1) / c_new * (new - x)
        x, c = new, c_new
    return x


def _spectral_radius_bound(matrix: Tensor) -> Tensor:
    if matrix.numel() == 0:
        return torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    return torch.minimum(torch.linalg.matrix_norm(matrix), torch.linalg.matrix_norm(matrix, 1))


def _normalized(v: Tree) -> Tree:
    return tree.scale(1 / tree.norm(v), v)


def _check_square(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: expected a square matrix (n, n), came {tuple(matrix.shape)}")
