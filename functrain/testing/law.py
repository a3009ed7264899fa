"""What a law is, what it is about, and how it is shown that it is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.optim import GradientTransformation, OptState, Updates, apply_updates
from functrain.testing.differing import Difference, different_bits, far_apart, kind
from functrain.tree import Params, Tree

STEPS = 3
RATE = 0.1  # the hyper-parameter of a factory where the law is not about it


class Trial(NamedTuple):
    """What one check of a law runs on."""

    params: Params
    seed: int  # of the gradients


class Law(NamedTuple):
    """A sentence that is true of every transformation, or of one that declares it."""

    holds: Callable[..., None]  # of what is under test; raises Broken
    way_out: str

    @property
    def name(self) -> str:
        return self.holds.__name__

    @property
    def sentence(self) -> str:
        return (self.holds.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").rstrip(".")


class Broken(Exception):
    """A law does not hold, at this path."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path, self.text = path, text


class LawError(AssertionError):
    """A law is broken: `law` is its name, `path` the leaf, `params` the smallest tree that shows it."""

    def __init__(self, law: Law, params: Params, path: str, text: str, on: str) -> None:
        super().__init__(
            f"the law {law.name!r} is broken: {law.sentence}\n  {path + ': ' if path else ''}{text}\n  {on}\n"
            f"  way out: {law.way_out}"
        )
        self.law, self.path, self.params = law.name, path, params


def error_of(law: Law, run: Callable[[], None], params: Params, on: str) -> LawError | None:
    """Run a law, and return the error that says that it is broken, if it is; `on` says on what it was run."""
    try:
        run()
    except Broken as broken:
        return LawError(law, params, broken.path, broken.text, on)
    except Exception as error:
        made = LawError(law, params, "", f"{type(error).__name__}: {error}", on)
        made.__cause__ = error
        return made
    return None


def shown(values: Tree) -> str:
    """Describe a tree with its tensors' dtypes and shapes in place of their numbers."""
    return repr(tree.map(lambda leaf: _Shown(kind(leaf)) if isinstance(leaf, Tensor) else leaf, values))


class _Shown(str):
    def __repr__(self) -> str:
        return str(self)


class Subject(NamedTuple):
    """A transformation under test, and what its owner said about it."""

    build: Callable[[], GradientTransformation]
    of_rate: Callable[[Any], GradientTransformation] | None  # from a hyper-parameter, a number or a () tensor
    gradients: Callable[[Params, int], Updates]  # of params and a seed
    extra_args: Callable[[int], Mapping[str, Any]]  # of the step
    rtol: float  # of float32, where operations may be done in another order
    bounded: tuple[Callable[[Updates], Any], float] | None  # a measure of updates, and what it is at most

    def update(
        self, tx: GradientTransformation, updates: Updates, state: OptState, params: Params, step: int = 0
    ) -> tuple[Updates, OptState]:
        return tx.update(updates, state, params, **self.extra_args(step))

    def grads(self, trial: Trial, steps: int = STEPS) -> list[Updates]:
        """Return the gradients of some steps."""
        return [self.gradients(trial.params, 1000 * trial.seed + step) for step in range(steps)]

    def run(
        self, tx: GradientTransformation, params: Params, grads: Sequence[Updates], start: Run | None = None
    ) -> Run:
        """Take a step for each of `grads` from params, or all those that `start` has not taken."""
        updates, state, params, done = start or Run(None, tx.init(params), params, 0)
        for step in range(done, len(grads)):
            updates, state = self.update(tx, grads[step], state, params, step)
            params = apply_updates(params, updates)
        return Run(updates, state, params, len(grads))


class Run(NamedTuple):
    """Where some steps led."""

    updates: Updates  # the last ones
    state: OptState
    params: Params
    done: int  # steps


def check_equal(came: Tree, expected: Tree, what: str = "") -> None:
    """Raise Broken at the first leaf that has not the same bits."""
    _check(came, expected, what, different_bits)


def check_close(came: Tree, expected: Tree, rtol: float, what: str = "") -> None:
    """Raise Broken at the first leaf that is off by more than `rtol` of its largest element, or 84 roundings in a
    dtype that is shorter than float32."""
    _check_structure(came, expected, what)
    for (path, want), leaf in zip(tree.items(expected), tree.leaves(came), strict=True):
        near, atol = 0.0, 0.0
        if isinstance(want, Tensor) and (want.is_floating_point() or want.is_complex()):
            near = rtol * max(1.0, torch.finfo(want.dtype).eps / torch.finfo(torch.float32).eps)
            finite = torch.where(torch.isfinite(want), torch.abs(want).double(), 0.0)
            atol = near * float(finite.max()) if want.numel() else 0.0
        for found in far_apart(leaf, want, rtol=near, atol=atol):
            raise Broken(path, f"{what}{found.text}")


def check_like(came: Tree, expected: Tree, what: str = "") -> None:
    """Raise Broken at the first leaf of another shape, dtype or device."""
    _check(came, expected, what, _unlike)


def _unlike(came: Tree, expected: Tree) -> list[Difference]:
    pairs = zip(tree.items(expected), tree.leaves(came), strict=True)
    return [Difference(p, f"expected {kind(a)}, came {kind(b)}") for (p, a), b in pairs if kind(a) != kind(b)]


def _check(came: Tree, expected: Tree, what: str, compare: Callable[[Tree, Tree], list[Difference]]) -> None:
    _check_structure(came, expected, what)
    for path, text in compare(came, expected):
        raise Broken(path, f"{what}{text}")


def _check_structure(came: Tree, expected: Tree, what: str) -> None:
    try:
        tree.check_same_structure(expected, came, what=f"{what}trees")
    except ValueError as error:
        have, want = tree.paths(came), tree.paths(expected)
        other = [path for path in [*want, *have] if path not in want or path not in have]
        raise Broken(other[0] if other else "", str(error)) from None


def cloned(values: Tree) -> Tree:
    """Return a copy of a tree in memory of its own."""
    return tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)
