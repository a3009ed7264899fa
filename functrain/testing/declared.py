"""Laws of transformations that declare them."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain import tree
from functrain.optim import apply_updates
from functrain.testing.law import RATE, Broken, Law, Subject, Trial, check_close, check_equal
from functrain.tree import Tree


def bounded(subject: Subject, trial: Trial) -> None:
    """What is above the bound comes down to it, what is within it stays, and clipping twice is clipping once
    (declared)."""
    assert subject.bounded is not None
    measure, bound = subject.bounded
    tx = subject.build()
    for size in (1e-3, 1.0, 1e3):
        grads = tree.scale(size, subject.gradients(trial.params, trial.seed))
        once, _ = subject.update(tx, grads, tx.init(trial.params), trial.params)
        twice, _ = subject.update(tx, once, tx.init(trial.params), trial.params)
        # a short dtype rounds each element of what is measured
        slack = 1 + subject.rtol * max([_roundings(leaf) for leaf in tree.leaves(once)], default=1.0)
        before, after = float(measure(grads)), float(measure(once))
        if not min(before, bound) / slack <= after <= bound * slack:
            raise Broken("", f"the bound is {bound} and updates measured {before}; clipped they measure {after}")
        check_close(twice, once, subject.rtol, "clipped twice: ")
        if before * slack < bound:
            check_equal(once, grads, f"within the bound {bound}: ")


def debiased(subject: Subject, trial: Trial) -> None:
    """Constant gradients give the same update at every step, to rounding (declared)."""
    tx = subject.build()
    grads = subject.gradients(trial.params, trial.seed)
    first, state = subject.update(tx, grads, tx.init(trial.params), trial.params)
    for step in range(1, 5):
        updates, state = subject.update(tx, grads, state, trial.params, step)
        check_close(updates, first, subject.rtol, f"the update of step {step} against the first: ")


def descends(subject: Subject, trial: Trial) -> None:
    """The first update points against the gradient (declared)."""
    tx = subject.build()
    grads = subject.gradients(trial.params, trial.seed)
    updates, _ = subject.update(tx, grads, tx.init(trial.params), trial.params)
    for (path, g), u in zip(tree.items(grads), tree.leaves(updates), strict=True):
        slope = float(torch.sum(u.double() * g.double()))
        if not slope <= 0 or (slope == 0 and bool(g.double().square().sum() > 0)):
            raise Broken(path, f"expected a negative product of update and gradient, came {slope:.3g}")


def differentiable(subject: Subject, trial: Trial) -> None:
    """The derivative through a trajectory is the quotient of differences, in float64: by the gradients, of which some
    are exactly 0, and by the hyper-parameter (declared)."""
    params = tree.cast(tree.map(torch.clone, trial.params), torch.float64)
    start, along = [_dense(params, 2 * trial.seed + i) for i in range(2)]
    alive = _alive(params, trial.seed)
    weights = _dense(params, 2 * trial.seed + 2)

    def after(x: Tensor, rate: Tensor) -> Tensor:
        tx = subject.build() if subject.of_rate is None else subject.of_rate(rate)
        state, new = tx.init(params), params
        for step in range(3):
            grads = tree.map(lambda g, v, a, step=step: a * (torch.cos(g * (step + 1)) + x * v), start, along, alive)
            updates, state = subject.update(tx, grads, state, new, step)
            new = apply_updates(new, updates)
        return tree.vdot(weights, tree.sub(new, params)).double()

    x, rate = torch.tensor([0.0, RATE], dtype=torch.float64)
    slopes = torch.func.grad(after, argnums=(0, 1))(x, rate)
    # central differences of float64: the square of the step from the third derivative, 1e-16 / step from rounding
    h = 1e-6
    by_x = (after(x + h, rate) - after(x - h, rate)) / (2 * h)
    by_rate = (after(x, rate + h) - after(x, rate - h)) / (2 * h)
    size = float(tree.vdot(tree.map(torch.abs, weights), tree.map(torch.abs, along)))
    for what, slope, want in (("gradients", slopes[0], by_x), ("hyper-parameter", slopes[1], by_rate)):
        if not abs(float(slope - want)) <= 1e-5 * max(abs(float(want)), 1e-3 * size):
            raise Broken("", f"by the {what}: expected {float(want):.9g}, came {float(slope):.9g}")


def _dense(params: Tree, seed: int) -> Tree:
    # without zeros, where |g| and sqrt have no derivative
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: 0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64), params)


def _alive(params: Tree, seed: int) -> Tree:
    # a quarter of the units are dead: their gradients are 0 at every step and along every way
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: (torch.rand(p.shape, generator=generator) > 0.25).double(), params)


def _roundings(leaf: Tensor) -> float:
    return max(1.0, torch.finfo(leaf.dtype).eps / torch.finfo(torch.float32).eps)


BOUNDED = Law(bounded, "scale by bound / measure where the measure is above the bound, and by 1 elsewhere")
DEBIASED = Law(debiased, "divide an average that starts at zero by 1 - decay ** count, count from 1")
DESCENDS = Law(descends, "end with scale_by_learning_rate, which turns the sign")
DIFFERENTIABLE = Law(
    differentiable,
    "detach nothing, and give roots and norms a derivative at 0: torch.sqrt(torch.clamp(x, min=tiny)), ft.tree.norm",
)
