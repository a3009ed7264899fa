"""Gradients of single examples: what becomes of them is what optax makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from optax import adam as optax_adam
from optax import identity as optax_identity
from optax import projections as optax_projections
from optax import stateless as optax_stateless
from optax.experimental import aggregating as theirs

import functrain as ft
from functrain import optim, tree
from functrain.optim import aggregating as mine

jax = Later("jax")
jnp = Later("jax.numpy")

SHAPES = {"b": (2,), "w": (3, 2)}


def of_examples(seed: int, batch: tuple[int, ...]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=(*batch, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def assert_close(a: Any, b: Any) -> None:
    ours, others = tree.leaves(a), jax.tree.leaves(b)
    for x, y in zip(ours, others, strict=True):
        # means of a few numbers of order 1, and an update of adam: some roundings of 6e-8
        np.testing.assert_allclose(x.numpy(), np.asarray(y), rtol=1e-5, atol=1e-6)
        assert tuple(x.shape) == np.shape(y)


def clipped(library: Any) -> Any:
    if library is mine:
        return optim.stateless(lambda gs, _: ft.vmap(optim.projections.projection_l2_ball)(gs))
    return optax_stateless(lambda gs, _: jax.vmap(optax_projections.projection_l2_ball)(gs))


def adam(library: Any) -> Any:
    return optim.adam(0.1) if library is mine else optax_adam(0.1)


def identity(library: Any) -> Any:
    return optim.identity() if library is mine else optax_identity()


CASES = {
    "clip and average": (lambda m: m.process(clipped(m), m.average_per_element_updates(0), adam(m)), (4,)),
    "two dims": (lambda m: m.average_per_element_updates((0, 1)), (2, 3)),
    "accumulate": (lambda m: m.process(identity(m), m.accumulate_avg_updates(3), adam(m)), ()),
    "accumulate one": (lambda m: m.accumulate_avg_updates(1), ()),
    "average and accumulate": (lambda m: m.process(identity(m), m.average_incrementally_updates(0, 2), adam(m)), (4,)),
    "no dim and accumulate": (lambda m: m.average_incrementally_updates(None, 2), ()),
    "mean and variance": (lambda m: m.add_mean_variance_to_opt(adam(m), 0.8, 0), (4,)),
    "mean and variance over two": (lambda m: m.add_mean_variance_to_opt(adam(m), 0.8, 0, 2), (4,)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_one_of_optax(name):
    make, batch = CASES[name]
    a, b = make(mine), make(theirs)
    params = of_examples(99, ())
    state, other = a.init(jax.tree.map(torch.tensor, params)), b.init(jax.tree.map(jnp.asarray, params))
    their_update = jax.jit(b.update)
    for step in range(5):
        grads = of_examples(step, batch)
        updates, state = a.update(jax.tree.map(torch.tensor, grads), state)
        want, other = their_update(jax.tree.map(jnp.asarray, grads), other)
        assert_close(updates, want)
        assert_close(state, other)
        if name.startswith("mean"):
            got, expected = (lib.get_unbiased_mean_and_variance_ema(s) for lib, s in ((mine, state), (theirs, other)))
            if step > 0:  # before anything came both are 0 / 0
                assert_close(got, expected)


def test_a_batch_in_two_parts_has_its_mean_and_variance():
    whole = {"w": torch.randn(6, 3, dtype=torch.float64)}
    aggregator = mine.get_per_element_mean_and_sum_sq_diff_grads(0, 2)
    state = aggregator.init({"w": whole["w"][0]})
    (zeros, _), state = aggregator.update({"w": whole["w"][:3]}, state)
    (mean, aux), state = aggregator.update({"w": whole["w"][3:]}, state)
    assert not zeros["w"].any() and state.ready and state.micro_step == 0
    assert torch.allclose(mean["w"], whole["w"].mean(0)) and aux["sample_size"] == 6
    assert torch.allclose(aux["sum_sq_diff_grads"]["w"] / 5, whole["w"].var(0))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="expected one number of examples, came {'a': 2, 'b': 3}"):
        mine.get_batch_size_from_per_elt_updates({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, 0)
    with pytest.raises(ValueError, match="at least 1 accumulation step, came 0"):
        mine.accumulate_avg_updates(0)
    with pytest.raises(ValueError, match="expected a state with a PerElementMeanAndVarianceEMAState"):
        mine.get_unbiased_mean_and_variance_ema(optim.adam(0.1).init({"w": torch.zeros(2)}))
