"""Wrappers whose states or arguments are more than a tree like params, against optax and against what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from test_optim_laws import SHAPES, close, draw, draw_like, equal, run
from test_optim_parity import Comparison, numbers, to_torch

import functrain.optim as ours
import functrain.tree as tree
from functrain.schedules import linear_schedule

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

TOLERANCE = 1e-5  # float32, as for every trajectory


def test_lookahead_is_that_of_optax_and_its_params_share_no_memory() -> None:
    for reset in (False, True):
        mine = ours.lookahead(ours.adam(0.1), 3, 0.4, reset)
        theirs = optax.lookahead(optax.adam(0.1), 3, 0.4, reset)
        start = numbers(SHAPES, 1, "float32")
        p = ours.LookaheadParams.init_synced(to_torch(start))
        q = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, start))
        assert not {x.data_ptr() for x in tree.leaves(p.fast)} & {x.data_ptr() for x in tree.leaves(p.slow)}
        s, r, compare = mine.init(p), theirs.init(q), Comparison(TOLERANCE)
        for step in range(7):
            grads = numbers(SHAPES, 10 + step, "float32")
            u, s = mine.update(to_torch(grads), s, p)
            v, r = theirs.update(jax.tree.map(jnp.asarray, grads), r, q)
            p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
            compare("state", s, r)
            for name in ("fast", "slow"):
                compare(name, getattr(p, name), getattr(q, name))
    with pytest.raises(TypeError, match="expected LookaheadParams, came dict"):
        mine.init({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="sync_period must be at least 1, came 0"):
        ours.lookahead(ours.adam(0.1), 0, 0.4)


def test_injected_hyper_parameters_are_those_of_optax() -> None:
    kwargs: dict[str, Any] = dict(b1=0.8, eps=1e-3, weight_decay=0.1)
    mine = ours.inject_hyperparams(ours.adamw)(linear_schedule(0.1, 0.0, 8), **kwargs)
    theirs = optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 8), **kwargs)
    start = numbers(SHAPES, 2, "float32")
    p, q = to_torch(start), jax.tree.map(jnp.asarray, start)
    s, r, compare = mine.init(p), theirs.init(q), Comparison(TOLERANCE)
    for step in range(10):
        compare("state", s, r)
        grads = numbers(SHAPES, 10 + step, "float32")
        u, s = mine.update(to_torch(grads), s, p)
        v, r = theirs.update(jax.tree.map(jnp.asarray, grads), r, q)
        p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
        compare("params", p, q)


@pytest.mark.parametrize(
    "factory, kwargs",
    [
        (ours.sgd, dict(learning_rate=0.1, momentum=0.9, nesterov=True)),
        (ours.adamw, dict(learning_rate=0.1, weight_decay=0.1, eps_root=1e-6)),
        (ours.lion, dict(learning_rate=0.1)),
        (ours.radam, dict(learning_rate=0.1)),
        (ours.rmsprop, dict(learning_rate=0.1, momentum=0.9)),
        (ours.adagrad, dict(learning_rate=0.1)),
        (ours.adadelta, dict(learning_rate=0.1)),
        (ours.adan, dict(learning_rate=0.1)),
        (ours.rprop, dict(learning_rate=0.1)),
        (ours.novograd, dict(learning_rate=0.1)),
        (ours.lamb, dict(learning_rate=0.1)),
        (ours.lars, dict(learning_rate=0.1)),
        (ours.fromage, dict(learning_rate=0.1)),
        (ours.yogi, dict(learning_rate=0.1)),
        (ours.sm3, dict(learning_rate=0.1)),
        (ours.amsgrad, dict(learning_rate=0.1)),
        (ours.clip_by_global_norm, dict(max_norm=1.0)),
        (ours.adaptive_grad_clip, dict(clipping=0.1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_factory_takes_tensors_for_its_numbers(factory: Any, kwargs: dict[str, Any]) -> None:
    params = draw(SHAPES, 3)
    injected, state, new = run(ours.inject_hyperparams(factory)(**kwargs), params)
    plain, _, expected = run(factory(**kwargs), params)
    # hyper-parameters rounded to float32: 1e-5 of 1 - b2
    assert close(injected, plain, 1e-4) and close(new, expected, 1e-4)
    assert all(isinstance(value, torch.Tensor) for value in state.hyperparams.values())


def test_an_injected_learning_rate_can_be_changed_in_the_state() -> None:
    tx = ours.inject_hyperparams(ours.sgd)(0.1)
    params, grads = torch.ones(2), torch.ones(2)
    state = tx.init(params)
    state = tree.set_at(state, "hyperparams/learning_rate", torch.tensor(0.5))
    updates, state = tx.update(grads, state, params)
    assert torch.equal(updates, torch.full((2,), -0.5)) and float(state.hyperparams["learning_rate"]) == 0.5
    with pytest.raises(ValueError, match="'lr'.*are no arguments of the factory"):
        ours.inject_hyperparams(ours.sgd, static_args="lr")


def test_injected_numbers_are_kept_in_float32_beside_half_precision_params() -> None:
    params = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)}
    plain, injected = ours.adam(1e-3), ours.inject_hyperparams(ours.adam)(1e-3)
    states, moved = [plain.init(params), injected.init(params)], [params, params]
    for t in range(3):
        grads = {"w": torch.tensor([0.1, 0.2 * t, -1.0], dtype=torch.bfloat16)}
        for i, tx in enumerate((plain, injected)):
            updates, states[i] = tx.update(grads, states[i], moved[i])
            moved[i] = ours.apply_updates(moved[i], updates)
    assert torch.equal(moved[0]["w"], moved[1]["w"])  # a decay of 0.999 is 1 in bfloat16: NaN
    assert {number.dtype for number in states[1].hyperparams.values()} == {torch.float32}


def test_a_stateful_schedule_sees_keyword_arguments() -> None:
    class Halving:
        """Halve the rate whenever the loss is above 1."""

        def init(self) -> torch.Tensor:
            return torch.tensor(1.0)

        def update(self, state: torch.Tensor, *, value: torch.Tensor, **extra: Any) -> torch.Tensor:
            return torch.where(value > 1, state / 2, state)

        def __call__(self, state: torch.Tensor, **extra: Any) -> torch.Tensor:
            return state

    tx = ours.inject_hyperparams(ours.sgd)(Halving())
    state, rates = tx.init(torch.ones(2)), []
    for value in (2.0, 0.5, 3.0, 0.5):
        updates, state = tx.update(torch.ones(2), state, torch.ones(2), value=torch.tensor(value))
        rates.append(-float(updates[0]))
    assert rates == [1.0, 0.5, 0.5, 0.25]


def test_partition_equals_each_group_by_itself() -> None:
    params = draw(SHAPES, 4)
    groups = {"a": ours.adamw(0.1), "b": ours.sgd(0.1, 0.9)}
    updates, state, new = run(ours.partition(groups, {"a": "a", "b": "b"}), params)
    for label, tx in groups.items():
        alone = params[label]
        inner = tx.init(alone)
        for step in range(4):
            grads = draw_like(params, step)[label]
            _, inner = (result := tx.update(grads, inner, alone))
            alone = ours.apply_updates(alone, result[0])
        assert equal(new[label], alone)
    assert sorted(state.inner_states) == ["a", "b"]
    with pytest.raises(ValueError, match=r"no transformation for a: 'c'; there is \['a', 'b'\]"):
        ours.partition(groups, {"a": "c", "b": "b"}).init(params)


def test_a_selective_transformation_keeps_the_frozen() -> None:
    params = draw(SHAPES, 5)
    _, _, new = run(ours.selective_transform(ours.adam(0.1), freeze_mask={"a": False, "b": True}), params)
    assert equal(new["b"], params["b"]) and not torch.equal(new["a"], params["a"])


def test_keyword_arguments_like_updates_are_masked_if_wanted() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, hessian: Any, **extra: Any) -> Any:
        seen.append(tree.paths(hessian))
        return updates, state

    tx = ours.GradientTransformationExtraArgs(ours.init_empty_state, update)
    params = draw(SHAPES, 5)
    for compatible in (False, True):
        masked = ours.masked(tx, {"a": True, "b": False}, mask_compatible_extra_args=compatible)
        masked.update(params, masked.init(params), params, hessian=params)
    assert seen == [["a", "b/0", "b/2"], ["a"]]


def test_measurements_are_those_of_optax_and_keep_the_structure_of_the_state() -> None:
    def build(lib: Any, norm: Any) -> Any:
        measures = {
            "norm": norm,
            "mean": lib.measure_with_ema(norm, 0.9) if lib is ours else optax.measure_with_ema(norm, 0.9),
        }
        return lib.chain(lib.monitor(measures), lib.snapshot("after", norm))

    mine, theirs = build(ours, tree.norm), build(optax, optax.tree.norm)
    start = numbers(SHAPES, 6, "float32")
    p, q = to_torch(start), jax.tree.map(jnp.asarray, start)
    s, r, compare = mine.init(p), theirs.init(q), Comparison(TOLERANCE)
    paths = tree.paths(s)
    for step in range(4):
        grads = numbers(SHAPES, 10 + step, "float32")
        u, s = mine.update(to_torch(grads), s, p)
        _, r = theirs.update(jax.tree.map(jnp.asarray, grads), r, q)
        compare("state", s, r)
        assert tree.paths(s) == paths and equal(u, to_torch(grads))


def test_a_measurement_shares_no_memory_with_what_it_measured() -> None:
    params = torch.ones(3)
    for tx in (ours.snapshot("all", lambda u: u), ours.monitor({"all": lambda u: u})):
        for state in (tx.init(params), tx.update(params, tx.init(params))[1]):
            assert params.data_ptr() not in {leaf.data_ptr() for leaf in tree.leaves(state)}


def test_steps_over_several_updates_equal_one_over_their_mean() -> None:
    params = draw(SHAPES, 7)
    inner = ours.adamw(0.1)
    many = ours.MultiSteps(inner, 3)
    state, expected_state = many.init(params), inner.init(params)
    for round_ in range(3):
        gathered = [draw_like(params, 10 * round_ + i) for i in range(3)]
        mean = tree.map(lambda *gs: sum(gs) / 3, *gathered)
        for i, grads in enumerate(gathered):
            updates, state = many.update(grads, state, params)
            assert bool(many.has_updated(state)) == (i == 2)
            assert i == 2 or all(not leaf.any() for leaf in tree.leaves(updates))
        expected, expected_state = inner.update(mean, expected_state, params)
        # a running mean of three: a few roundings of 6e-8
        assert close(updates, expected, 1e-5)


@pytest.mark.parametrize("every", [0, lambda step: 0])
def test_multi_steps_of_no_steps_are_refused(every: Any) -> None:
    many = ours.MultiSteps(ours.sgd(0.1), every)
    with pytest.raises(ValueError, match="every_k_schedule of at least 1, came 0"):
        many.update(torch.ones(2), many.init(torch.ones(2)))


def test_skipped_updates_change_nothing_but_what_is_remembered_of_them() -> None:
    params = draw(SHAPES, 8)
    many = ours.MultiSteps(ours.adam(0.1), 2, should_skip_update_fn=ours.skip_not_finite)
    _, state = many.update(draw_like(params, 1), many.init(params), params)
    bad = tree.map(lambda p: p * float("nan"), params)
    updates, after = many.update(bad, state, params)
    assert all(not leaf.any() for leaf in tree.leaves(updates))
    assert equal(after._replace(skip_state=()), state._replace(skip_state=()))
    assert int(after.skip_state["num_not_finite"]) == tree.size(params)
    skip, _ = ours.skip_large_updates(params, state.gradient_step, None, max_squared_norm=1e-6)
    assert bool(skip)


def test_updates_that_are_not_finite_are_left_out_and_counted_until_there_are_too_many() -> None:
    tx = ours.apply_if_finite(ours.sgd(1.0), 1)
    state, seen = tx.init(torch.ones(2)), []
    for value in (1.0, float("inf"), float("nan"), 1.0):
        updates, state = tx.update(torch.full((2,), value), state)
        seen.append(
            (float(updates[0]), int(state.notfinite_count), bool(state.last_finite), int(state.total_notfinite))
        )
    assert seen[0] == (-1.0, 0, True, 0) and seen[1] == (0.0, 1, False, 1) and seen[3] == (-1.0, 0, True, 2)
    assert seen[2][0] != seen[2][0] and seen[2][1:] == (2, False, 2)


@pytest.mark.parametrize("bound", [0.1, 1.0, 100.0])
def test_per_example_clipping_is_that_of_optax(bound: float) -> None:
    grads = numbers({"a": (5, 2, 3), "b": [(5,), (5, 4)]}, 9, "float32")
    mine = ours.per_example_global_norm_clip(to_torch(grads), bound)
    theirs = optax.per_example_global_norm_clip(jax.tree.map(jnp.asarray, grads), bound)
    Comparison(TOLERANCE)("global", mine, theirs)
    for uniform in (True, False):
        mine = ours.per_example_layer_norm_clip(to_torch(grads), bound, uniform)
        theirs = optax.per_example_layer_norm_clip(jax.tree.map(jnp.asarray, grads), bound, uniform)
        Comparison(TOLERANCE)("layer", mine, theirs)
    with pytest.raises(ValueError, match="b: expected one gradient for each of"):
        ours.per_example_global_norm_clip({"a": torch.ones(5, 2), "b": torch.ones(4)}, bound)


def test_units_are_those_of_optax() -> None:
    draw_ = np.random.default_rng(0)
    for shape in [(), (3,), (1, 3), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 4, 5)]:
        x = np.asarray(draw_.normal(size=shape), np.float32)
        # sums in two orders
        np.testing.assert_allclose(ours.unitwise_norm(torch.tensor(x)), optax.transforms.unitwise_norm(x), rtol=1e-6)
    with pytest.raises(ValueError, match="a tensor of 6 dimensions is not known; pass axis="):
        ours.unitwise_norm(torch.ones(1, 1, 1, 1, 2, 2))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        ours.scale_by_lion(mode="loud")
    with pytest.raises(ValueError, match="variant must be 'sps' or"):
        ours.scale_by_polyak(variant="best")
    for tx in (ours.scale_by_trust_ratio(), ours.scale_by_novograd(), ours.adaptive_grad_clip(0.1)):
        with pytest.raises(ValueError, match="needs the current params"):
            tx.update(torch.ones(2), tx.init(torch.ones(2)))
