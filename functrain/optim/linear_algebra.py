"""Eigenvectors, roots of matrices and non-negative least squares, by iterations that trace.

Iterations have a fixed number; where optax stops early, these go on without changing the result, because nothing in a
step may wait to read whether it has converged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.schedules import Scalar
from functrain.tree import Tree


def power_iteration(
    matrix: Tensor | Callable[[Tree], Tree],
    *,
    v0: Tree | None = None,
    num_iters: int = 100,
    error_tolerance: Scalar = 1e-6,
    key: Tensor | None = None,
) -> tuple[Tensor, Tree]:
    """Return the eigenvalue of largest absolute value and its eigenvector, of norm 1.

    `matrix` is a symmetric matrix, or a function that multiplies a tree by it; then `v0` is a tree to start from. For a
    matrix it is drawn from `key`, or key 0. Equals `optax.power_iteration`.

    Shapes: matrix (n, n), v0 and the eigenvector (n,).
    Raises: ValueError for a function without `v0`, and for no iterations.
    """
    if callable(matrix):
        if v0 is None:
            raise ValueError("power_iteration: expected v0, a tree that the function multiplies, came None")
        multiply: Callable[[Tree], Tree] = matrix
    else:
        multiply = _product(matrix)
        if v0 is None:
            start = random.key(0).to(matrix.device) if key is None else key
            v0 = random.uniform(start, (matrix.shape[-1],), matrix.dtype, -1.0, 1.0)
    if num_iters < 1:
        raise ValueError(f"power_iteration: expected at least one iteration, came {num_iters}")
    vector = _normalized(multiply(_normalized(v0)))
    image = multiply(vector)
    value = tree.vdot(vector, image)
    for _ in range(num_iters - 1):
        residual = tree.norm(tree.sub(image, tree.scale(value, vector)))
        done = torch.abs(residual / value) < error_tolerance
        vector = tree.where(done, vector, _normalized(image))
        image = multiply(vector)
        value = tree.vdot(vector, image)
    return value, _normalized(image)


def _normalized(vector: Tree) -> Tree:
    return tree.scale(1.0 / tree.norm(vector), vector)


def matrix_inverse_pth_root(
    matrix: Tensor,
    p: int,
    num_iters: int = 100,
    ridge_epsilon: Scalar = 1e-6,
    error_tolerance: Scalar = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return matrix ** (-1 / p) and the largest error of its equation, by coupled Newton iterations.

    The matrix is symmetric and positive semi-definite; `ridge_epsilon` times its largest eigenvalue is added to the
    diagonal. Equals `optax.matrix_inverse_pth_root`.

    Source: Higham 2008, Functions of Matrices, equation 7.18 (as optax gives it).

    Shapes: matrix (n, n), the root (n, n), the error ().
    """
    n, alpha = matrix.shape[-1], -1.0 / p
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    largest, _ = power_iteration(matrix, num_iters=100, error_tolerance=1e-6)
    ridge = ridge_epsilon * torch.clamp(largest, min=1e-16)
    if n == 1:
        return (matrix + ridge) ** alpha, matrix.new_zeros(())
    damped = matrix + ridge * identity
    z = (1 + p) / (2 * torch.linalg.norm(damped))
    m, root = damped * z, identity * z ** (1.0 / p)
    best, error = root, torch.amax(torch.abs(m - identity))
    going = torch.ones((), dtype=torch.bool, device=matrix.device)
    for _ in range(num_iters):
        step = (1 - alpha) * identity + alpha * m
        new_m, new_root = torch.linalg.matrix_power(step, p) @ m, root @ step
        new_error = torch.amax(torch.abs(new_m - identity))
        active = going & (error > error_tolerance)
        # an error may grow a little before it falls; beyond a fifth it diverges, and the root before it is the result
        fine = new_error < error * 1.2
        best = torch.where(active, torch.where(fine, new_root, root), best)
        m, root = torch.where(active, new_m, m), torch.where(active, new_root, root)
        error, going = torch.where(active, new_error, error), torch.where(active, fine, going)
    return best, torch.amax(torch.abs(m - identity))


def nnls(A: Tensor, b: Tensor, iters: int, L: Scalar | None = None) -> Tensor:
    """Return the x without negative elements that makes ‖A x - b‖ smallest, by accelerated projected gradients.

    `L` is a bound of the largest eigenvalue of A'A, found when it is None. Equals `optax.nnls`.

    Source: Polyak 2015, Projected gradient method for non-negative least square.

    Shapes: A (M, N), b (M,) or (M, K); the result is (N,) or (N, K).
    Raises: ValueError for other shapes.
    """
    if A.ndim != 2 or b.ndim not in (1, 2) or b.shape[0] != A.shape[0]:
        raise ValueError(
            f"nnls: expected A (M, N) and b (M,) or (M, K), came {tuple(A.shape)} and {tuple(b.shape)}; transpose one"
        )
    square, right = A.mT @ A, A.mT @ b  # (N, N), (N,) or (N, K)
    if L is None:
        columns = torch.amax(torch.sum(torch.abs(square), 0)) if square.numel() else square.new_zeros(())
        L = torch.minimum(torch.linalg.norm(square), columns)
    bound = L if isinstance(L, Tensor) else square.new_full((), L)
    bound = torch.where(bound == 0, 1.0, bound)
    x = p = torch.zeros_like(right)
    c = 0.0
    for _ in range(iters):
        next_c = (1 + (1 + 4 * c * c) ** 0.5) / 2
        new = torch.relu(p - (square @ p - right) / bound)
        p = new + (c - 1) / next_c * (new - x)
        x, c = new, next_c
    return x


def _product(matrix: Tensor) -> Callable[[Tree], Tree]:
    return lambda vector: matrix @ vector
