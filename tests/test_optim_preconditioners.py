"""Preconditioners that optax does not have, against slow references written from their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_optim_parity import numbers, to_torch

import functrain.optim as ours
import functrain.tree as tree

SHAPES = {"w": (4, 3), "t": (2, 3, 2), "b": (3,), "a": ()}


def draw(seed: int, shapes: Any = None) -> Any:
    return to_torch(numbers(shapes or SHAPES, seed, "float64"))


# ---- soap -----------------------------------------------------------------------------------------------------------


def soap_of_the_paper(grads: list[np.ndarray], b1: float, b2: float, eps: float, frequency: int) -> list[np.ndarray]:
    """Return the updates of algorithm 3 for a matrix, the first gradient spent on the eigenvectors."""
    m, n = grads[0].shape
    left, right = (1 - b2) * grads[0] @ grads[0].T, (1 - b2) * grads[0].T @ grads[0]
    q_left, q_right = (np.linalg.eigh(c)[1][:, ::-1] for c in (left, right))
    moment, second, made = np.zeros((m, n)), np.zeros((m, n)), [np.zeros((m, n))]
    for t, g in enumerate(grads[1:], 1):
        rotated = q_left.T @ g @ q_right
        moment = b1 * moment + (1 - b1) * g
        second = b2 * second + (1 - b2) * rotated**2
        moment_rotated = q_left.T @ moment @ q_right / (1 - b1**t)
        made.append(q_left @ (moment_rotated / (np.sqrt(second / (1 - b2**t)) + eps)) @ q_right.T)
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % frequency == 0:
            q_left, q_right = np.linalg.qr(left @ q_left)[0], np.linalg.qr(right @ q_right)[0]
    return made


@pytest.mark.parametrize("frequency", [1, 3])
def test_soap_is_the_algorithm_of_the_paper(frequency: int) -> None:
    grads = [draw(step, {"w": (4, 3)}) for step in range(10)]
    tx = ours.scale_by_soap(0.9, 0.8, 1e-3, precondition_frequency=frequency)
    state = tx.init(grads[0])
    expected = soap_of_the_paper([g["w"].numpy() for g in grads], 0.9, 0.8, 1e-3, frequency)
    for g, u in zip(grads, expected, strict=True):
        updates, state = tx.update(g, state)
        # ten steps of products of 4x4 matrices; covariances of a condition of up to 1e6
        np.testing.assert_allclose(updates["w"].numpy(), u, rtol=1e-8, atol=1e-8)


def test_soap_without_a_basis_is_adam_one_update_later() -> None:
    mine, adam = ours.scale_by_soap(0.9, 0.99, 1e-3, max_precond_dim=1), ours.scale_by_adam(0.9, 0.99, 1e-3)
    s, r = mine.init(draw(0)), adam.init(draw(0))
    first, s = mine.update(draw(0), s)
    assert all(not u.any() for u in tree.leaves(first))
    for step in range(1, 6):
        u, s = mine.update(draw(step), s)
        v, r = adam.update(draw(step), r)
        # (1 - b1) times 1.0 is one rounding more
        assert tree.allclose(u, v, rtol=1e-12, atol=1e-12)
    assert tree.allclose((s.mu, s.nu), (r.mu, r.nu), rtol=1e-12, atol=1e-12)


def test_soap_in_another_basis_is_soap() -> None:
    turns = [torch.linalg.qr(torch.tensor(np.random.default_rng(0).normal(size=(n, n))))[0] for n in (2, 3, 2)]
    tx = ours.scale_by_soap(0.9, 0.8, 1e-3, precondition_frequency=2)
    plain, turned = tx.init(draw(0)), tx.init(draw(0))
    for step in range(7):
        g = draw(step)
        u, plain = tx.update(g, plain)
        v, turned = tx.update(g | {"t": turn(g["t"], turns)}, turned)
        # as above
        torch.testing.assert_close(v["t"], turn(u["t"], turns), rtol=1e-8, atol=1e-8)


def turn(x: torch.Tensor, turns: list[torch.Tensor]) -> torch.Tensor:
    return torch.einsum("abc,ia,jb,kc->ijk", x, *turns)
