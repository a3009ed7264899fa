"""The law of numbers at the edges of their dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain import tree
from functrain.testing.law import Broken, Law, Subject, Trial
from functrain.tree import Params, Tree

# sizes of gradients: none, those whose squares underflow, and those whose squares overflow
_SIZES: dict[torch.dtype, Sequence[float]] = {torch.float16: (0.0, 1e-7, 1e4)}
_ELSEWHERE = (0.0, 1e-25, 1e20)


def finite_at_edges(subject: Subject, trial: Trial) -> None:
    """Gradients of 0, of 1e-25 and of 1e20, and of 1e-7 and 1e4 for float16 leaves, make finite updates and a finite
    state, or float16 is refused by name."""
    _check(subject, trial, trial.params, refusal=False)
    _check(subject, trial, tree.map(_as_half, trial.params), refusal=True)


def _check(subject: Subject, trial: Trial, params: Params, refusal: bool) -> None:
    directions = subject.gradients(params, trial.seed)
    for number in range(3):
        grads = tree.map(lambda g, number=number: _sized(g, number), directions)
        tx = subject.build()
        try:
            state = tx.init(params)
            for step in range(2):
                updates, state = subject.update(tx, grads, state, params, step)
                for what, values in (("updates", updates), ("the state", state)):
                    _check_finite(values, f"gradients of {_shown(params, number)}, step {step}: {what}: ")
        except (TypeError, ValueError) as error:
            if refusal and "float16" in str(error):
                return
            raise


def _check_finite(values: Tree, what: str) -> None:
    for path, leaf in tree.items(values):
        if isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()):
            raise Broken(path, f"{what}expected finite numbers, came {leaf.flatten()[~leaf.flatten().isfinite()][0]}")


def _sized(g: Tensor, number: int) -> Tensor:
    if not g.is_floating_point() and not g.is_complex():
        return g
    return (torch.sgn(g) * _SIZES.get(g.dtype, _ELSEWHERE)[number]).to(g.dtype)


def _as_half(leaf: Tensor) -> Tensor:
    return leaf.to(torch.float16) if leaf.is_floating_point() else leaf


def _shown(params: Params, number: int) -> str:
    dtypes = {leaf.dtype for leaf in tree.leaves(params)}
    return " and ".join(sorted({f"{_SIZES.get(dtype, _ELSEWHERE)[number]:g}" for dtype in dtypes}))


LAWS = [
    Law(
        finite_at_edges,
        "compute squares, roots and quotients in float32 (leaf.float()), norms with ft.tree.norm, divide by nothing "
        "that may be 0; what float16 cannot do, refuse with a TypeError that says float16",
    ),
]
