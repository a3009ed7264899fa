"""Every loss of optax: its value and its gradient are optax's, for drawn shapes, arguments and edge inputs."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from later import Later

import functrain.losses as ours

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

# float32: sums of some twenty roundings of 6e-8, relative to the largest number; float64's are 5e8 times smaller
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
EXAMPLES = {"float32": 3, "float64": 2}
# loops and many operations, and few arguments that are no arrays: jax compiles them once, and not for every example
COMPILED = {
    "ctc_loss_with_forward_probs", "multiclass_sparsemax_loss", "ntxent", "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss", "softmax_cross_entropy_with_integer_labels",
}  # fmt: skip
# beside log 0 = -1e5 a float32 has steps of 0.008
WIDER = {("ctc_loss_with_forward_probs", "float32"): 1e-2}


class Draw:
    """Arrays and choices of one example; two libraries are given the same."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.random, self.dtype = np.random.default_rng(seed), dtype

    def normal(self, *shape: int, zeros: float = 0.15) -> np.ndarray:
        """Numbers of several sizes, some of them exactly zero."""
        values = self.random.normal(size=shape) * self.random.choice([0.1, 1.0, 5.0])
        return np.asarray(np.where(self.random.random(shape) < zeros, 0.0, values), self.dtype)

    def signs(self, *shape: int) -> np.ndarray:
        return np.asarray(self.random.choice([-1.0, 1.0], shape), self.dtype)

    def bits(self, *shape: int) -> np.ndarray:
        return np.asarray(self.random.integers(0, 2, shape), self.dtype)

    def soft(self, *shape: int) -> np.ndarray:
        return np.asarray(self.random.uniform(0.05, 0.95, shape), self.dtype)

    def distribution(self, *shape: int) -> np.ndarray:
        values = self.random.gamma(1.0, size=shape) + 0.01
        return np.asarray(values / values.sum(-1, keepdims=True), self.dtype)

    def classes(self, n: int, *shape: int) -> np.ndarray:
        return self.random.integers(0, n, shape)

    def one_hot(self, n: int, *shape: int) -> np.ndarray:
        return np.asarray(np.eye(n)[self.classes(n, *shape)], self.dtype)

    def mask(self, *shape: int) -> np.ndarray | None:
        return None if self.random.random() < 0.3 else self.random.random(shape) < 0.6

    def choose(self, *values: Any) -> Any:
        return values[self.random.integers(len(values))]


class Arguments(NamedTuple):
    differentiated: tuple[np.ndarray, ...]
    others: tuple[Any, ...] = ()
    named: dict[str, Any] = {}


# few shapes: jax compiles every operation once for each
SHAPE = (2, 3, 4)


def dims(d: Draw) -> dict[str, Any]:
    """A dim, and a mask like the whole tensor."""
    return {"dim": d.choose(-1, 0, (1, 2), (0, -1), None), "where": d.mask(*SHAPE)}


def some_logits(d: Draw) -> np.ndarray:
    logits = d.normal(3, 4)
    logits[0, 1] = -np.inf
    return logits


def ctc(d: Draw) -> Arguments:
    frames, labels = 6, 3
    lengths, label_lengths = d.random.integers(4, frames + 1, 2), d.random.integers(0, labels + 1, 2)
    # 4 frames for up to 3 labels: a sequence with more repeats than that is impossible, and its loss is log_epsilon's
    logit_paddings = np.asarray(np.arange(frames) >= lengths[:, None], d.dtype)
    label_paddings = np.asarray(np.arange(labels) >= label_lengths[:, None], d.dtype)
    ids = np.where(label_paddings == 1, d.choose(0, -1, 99), d.classes(2, 2, labels) + 1)
    blank = d.choose(0, 3)
    return Arguments(
        (d.normal(2, frames, 4),), (logit_paddings, ids, label_paddings), {"blank_id": blank, "log_epsilon": -1e5}
    )


def ranking(d: Draw) -> Arguments:
    reduce_fn = d.choose("mean", "sum", None)
    named = {"where": d.mask(3, 4), "weights": d.choose(None, d.soft(3, 4)), "reduce_fn": reduce_fn}
    return Arguments((d.normal(3, 4),), (d.choose(d.one_hot(4, 3), d.soft(3, 4)),), named)


def dice(d: Draw) -> Arguments:
    n = d.choose(1, 3)
    named = {
        "class_weights": d.choose(None, d.soft(n)),
        "smooth": d.choose(1.0, 0.1),
        "alpha": d.choose(0.5, 0.3),
        "beta": d.choose(0.5, 0.7),
        "reduction": d.choose("mean", "sum", "none"),
        "ignore_background": d.choose(True, False),
        "dim": d.choose(None, 1, (0, 1)),
    }
    targets = d.one_hot(n, 2, 3, 2) if n > 1 else d.bits(2, 3, 2, 1)
    return Arguments((d.normal(2, 3, 2, n),), (targets,), named)


def generalized_dice(d: Draw) -> Arguments:
    logits, targets = d.normal(2, 3, 3), d.one_hot(3, 2, 3)
    named = {"smooth": d.choose(1.0, 0.1), "ignore_background": d.choose(True, False)}
    if d.choose(True, False):
        return Arguments((d.distribution(2, 3, 3),), (targets,), named | {"apply_softmax": False})
    return Arguments((logits,), (targets,), named)


def kl(targets: Callable[[Draw], np.ndarray]) -> Callable[[Draw], Arguments]:
    return lambda d: Arguments((d.normal(*SHAPE), targets(d)), (), dims(d))


def pair(d: Draw) -> Arguments:
    return Arguments((d.normal(3, 4), d.normal(3, 4))) if d.choose(True, False) else Arguments((d.normal(3, 4),))


def with_zeros(d: Draw) -> Arguments:
    return Arguments((d.normal(*SHAPE),), (d.one_hot(4, 2, 3),), dims(d))


CASES: dict[str, Callable[[Draw], Arguments]] = {
    "sigmoid_binary_cross_entropy": lambda d: Arguments((d.normal(3, 4), d.soft(3, 4))),
    "sigmoid_binary_cross_entropy of bits": lambda d: Arguments((d.normal(3, 4) * 30,), (d.classes(2, 4),)),
    "sigmoid_focal_loss": lambda d: Arguments(
        (d.normal(3, 4), d.soft(3, 4)), (), {"alpha": d.choose(None, 0.25), "gamma": d.choose(2.0, 0.5)}
    ),
    "sigmoid_focal_loss of bits": lambda d: Arguments((d.normal(3, 4) * 30,), (d.classes(2, 3, 4),)),
    "hinge_loss": lambda d: Arguments((d.choose(d.signs(3, 4), d.normal(3, 4)), d.signs(3, 4))),
    "perceptron_loss": lambda d: Arguments((d.normal(3, 4), d.signs(3, 4))),
    "sparsemax_loss": lambda d: Arguments((d.normal(3, 4),), (d.classes(2, 3, 4),)),
    "multiclass_hinge_loss": lambda d: Arguments((d.normal(2, 3, 4),), (d.classes(4, 2, 3),)),
    "multiclass_perceptron_loss": lambda d: Arguments((d.normal(2, 3, 4, zeros=0.5),), (d.classes(4, 2, 3),)),
    "multiclass_sparsemax_loss": lambda d: Arguments((d.normal(3, 4),), (d.classes(4, 3),)),
    "softmax_cross_entropy": lambda d: Arguments((d.normal(*SHAPE), d.distribution(*SHAPE)), (), dims(d)),
    "softmax_cross_entropy of masked rows": lambda d: Arguments(
        (d.normal(*SHAPE),), (d.one_hot(4, 2, 3),), {"where": d.random.random((2, 3)) < 0.7}
    ),
    "softmax_cross_entropy_with_integer_labels": lambda d: Arguments((d.normal(*SHAPE),), (d.classes(4, 2, 3),)),
    "safe_softmax_cross_entropy": lambda d: Arguments((d.normal(3, 4), d.choose(d.one_hot(4, 3), d.distribution(4)))),
    "safe_softmax_cross_entropy of -inf": lambda d: Arguments((some_logits(d),), (np.eye(4, dtype=d.dtype)[:3],)),
    "poly_loss_cross_entropy": lambda d: Arguments(
        (d.normal(*SHAPE), d.distribution(*SHAPE)), (), dims(d) | {"epsilon": d.choose(2.0, -1.0)}
    ),
    "smooth_labels": lambda d: Arguments((d.one_hot(4, 2, 3),), (d.choose(0.0, 0.1),), dims(d)),
    "kl_divergence": kl(lambda d: d.distribution(*SHAPE)),
    "kl_divergence of zeros": with_zeros,
    "kl_divergence_with_log_targets": kl(lambda d: np.log(d.distribution(*SHAPE))),
    "generalized_kl_divergence": kl(lambda d: d.soft(*SHAPE)),
    "convex_kl_divergence": kl(lambda d: d.soft(*SHAPE)),
    "squared_error": pair,
    "l2_loss": pair,
    "huber_loss": lambda d: pair(d)._replace(named={"delta": d.choose(1.0, 0.1)}),
    "log_cosh": pair,
    "cosine_similarity": lambda d: Arguments(
        (d.normal(*SHAPE), d.normal(*SHAPE)), (), dims(d) | {"epsilon": d.choose(1e-6, 0.5)}
    ),
    "cosine_similarity of any length": lambda d: Arguments((d.normal(3, 4, zeros=0), d.normal(3, 4, zeros=0))),
    "cosine_distance": lambda d: Arguments((d.normal(*SHAPE), d.normal(*SHAPE)), (), dims(d) | {"epsilon": 1e-3}),
    "ctc_loss_with_forward_probs": ctc,
    "ntxent": lambda d: Arguments((d.normal(5, 3),), (np.asarray([0, 1, 0, 2, d.choose(0, 1)]), d.choose(0.07, 1.0))),
    "triplet_margin_loss": lambda d: Arguments(
        (d.normal(3, 4), d.normal(3, 4), d.normal(3, 4)),
        (),
        {"dim": d.choose(-1, 0), "norm_degree": d.choose(2, 4), "margin": d.choose(1.0, 0.2), "eps": 1e-4},
    ),
    "dice_loss": dice,
    "multiclass_generalized_dice_loss": generalized_dice,
    "binary_dice_loss": lambda d: Arguments(
        (d.choose(d.normal(2, 3, 2), d.normal(2, 3, 2, 1)),), (), {"smooth": d.choose(1.0, 0.1)}
    ),
    "ranking_softmax_loss": ranking,
}  # fmt: skip


# Where optax's gradient is NaN: a mask times the logarithm of nothing, 0 log 0, a row that keeps nothing. Ours is
# finite there, and optax's everywhere else.
FINITE_HERE: dict[str, str] = {
    "softmax_cross_entropy": "the log-softmax of what the mask leaves out is the derivative by its label",
    "poly_loss_cross_entropy": "the same",
}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def ours_of(name: str, given: Arguments) -> tuple[list[Any], list[Any]]:
    inputs = [torch.tensor(x).requires_grad_() for x in given.differentiated]
    named = {k: getattr(torch, v) if k == "reduce_fn" and v else v for k, v in given.named.items()}
    named = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in named.items()}
    others = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in given.others]
    out = getattr(ours, name)(*inputs, *others, **named)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(sum((x * weights(x.shape, x.dtype)).sum() for x in outs), inputs)
    return [x.detach().numpy() for x in outs], [g.numpy() for g in grads]


def weights(shape: Any, dtype: Any) -> Any:
    """A cotangent unlike for every element."""
    n = int(np.prod(shape))
    return torch.cos(torch.arange(n, dtype=torch.float64)).reshape(tuple(shape)).to(dtype)


def optax_of(name: str, given: Arguments) -> tuple[list[Any], list[Any]]:
    named = {k: getattr(jnp, v) if k == "reduce_fn" and v else v for k, v in given.named.items()}
    named = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in named.items()}
    named |= {"axis": named.pop("dim")} if "dim" in named else {}
    others = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in given.others]
    inputs = [jnp.asarray(x) for x in given.differentiated]
    if name in COMPILED:
        return scanned(name, tuple(named.items()))(inputs, others)
    return both(name, named, inputs, others)


def both(name: str, named: dict[str, Any], inputs: list[Any], others: list[Any]) -> tuple[list[Any], list[Any]]:
    def outputs(*inputs: Any) -> list[Any]:
        out = getattr(optax.losses, name)(*inputs, *others, **named)
        return list(out) if isinstance(out, tuple) else [out]

    outs, pull_back = jax.vjp(outputs, *inputs)
    return outs, list(pull_back([jnp.asarray(weights(x.shape, torch.float64).numpy(), x.dtype) for x in outs]))


@functools.cache
def scanned(name: str, named: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(both, name, dict(named)))


def assert_close(mine: Any, theirs: Any, tolerance: float, where: str, finite_here: bool = False) -> None:
    if finite_here and np.isnan(theirs).any():
        assert np.isfinite(mine).all(), where
        mine, theirs = (np.where(np.isnan(theirs), 0, x).astype(x.dtype) for x in (mine, theirs))
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (where, mine, theirs)
    scale = np.abs(theirs).max(initial=1e-3, where=np.isfinite(theirs))
    np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * scale, err_msg=where)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
def test_value_and_gradient_are_those_of_optax(case: str, dtype: str) -> None:
    name = case.split()[0]

    # no shrinking: a seed has nothing to shrink
    @settings(deadline=None, derandomize=True, max_examples=EXAMPLES[dtype], database=None, phases=[Phase.generate])
    @given(seed=st.integers(0, 10**6))
    def law(seed: int) -> None:
        given = CASES[case](Draw(seed, dtype))
        if name == "binary_dice_loss":
            given = given._replace(others=(Draw(seed, dtype).bits(*given.differentiated[0].shape),))
        with precision(dtype):
            mine, theirs = ours_of(name, given), optax_of(name, given)
        for kind, a, b in zip(("value", "gradient"), mine, theirs, strict=True):
            for i, (x, y) in enumerate(zip(a, map(np.asarray, b), strict=True)):
                tolerance = WIDER.get((name, dtype), TOLERANCE[dtype])
                finite_here = kind == "gradient" and case in FINITE_HERE
                assert_close(x, y, tolerance, f"{kind} {i} of {name}", finite_here)

    law()


def test_every_loss_of_optax_has_a_case_and_its_signature() -> None:
    names = {n for n in dir(optax.losses) if not n.startswith("_")}
    # ctc_loss is the first of ctc_loss_with_forward_probs; both have torch as their witness in test_losses_edges.py
    assert names - {case.split()[0] for case in CASES} == {"ctc_loss", "make_fenchel_young_loss"}
    for name in names:
        mine, theirs = (inspect.signature(getattr(x, name)).parameters.values() for x in (ours, optax.losses))
        shown = [(p.name, p.kind, p.default) for p in mine]
        want = [({"axis": "dim"}.get(p.name, p.name), p.kind, p.default) for p in theirs]
        if name == "ranking_softmax_loss":
            want[-1] = (*want[-1][:2], torch.mean)  # optax's is jnp.mean
        assert shown == want, name
