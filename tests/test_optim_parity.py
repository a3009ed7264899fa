"""Every transformation makes the trajectory that optax makes: same updates, same params, same state fields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain.optim as ours
import functrain.schedules
import functrain.tree as tree

STEPS = 12


# ---- what both libraries are asked to build -----------------------------------------------------------------------


class Make(NamedTuple):
    """`name(*args, **kwargs)` in either library; arguments may be Makes again."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}

    def build(self, library: str) -> Any:
        home: Any = {"ours": ours, "optax": optax}[library]
        if library == "ours" and not hasattr(home, self.name):
            home = functrain.schedules
        args = [build(x, library) for x in self.args]
        made = getattr(home, self.name)(*args, **{k: build(x, library) for k, x in self.kwargs.items()})
        if library == "optax" and hasattr(functrain.schedules, self.name):
            # jax divides an int32 count in float32, also where x64 is on
            return lambda count: made(jnp.asarray(count, float))
        return made


def make(name: str, *args: Any, **kwargs: Any) -> Make:
    return Make(name, args, kwargs)


class Dtype(str):
    """A dtype by name."""


class OfTree(NamedTuple):
    """A function of a tree, given as a function of one leaf."""

    leaf: Callable[[Any], Any]


def build(value: Any, library: str) -> Any:
    if isinstance(value, Make):
        return value.build(library)
    if isinstance(value, Dtype):
        return getattr({"ours": torch, "optax": jnp}[library], value)
    if isinstance(value, OfTree):
        tree_map = {"ours": tree.map, "optax": jax.tree.map}[library]
        return lambda t: tree_map(value.leaf, t)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(build(x, library) for x in value)
    if isinstance(value, dict):
        return {k: build(x, library) for k, x in value.items()}
    return value


rates = st.sampled_from([0.1, 0.003, 1.0])
lrs = st.one_of(
    rates,
    st.just(make("warmup_cosine_decay_schedule", 0.0, 0.1, 3, 9, 0.01)),
    st.just(make("exponential_decay", 0.3, 2, 0.7)),
)
decays = st.sampled_from([0.0, 0.5, 0.9, 0.99])
b2s = st.sampled_from([0.9, 0.999])
epss = st.sampled_from([1e-8, 1e-3, 0.1])
flags = st.booleans()
weight_decays = st.one_of(st.sampled_from([0.0, 0.1]), st.just(make("linear_schedule", 0.2, 0.0, 8)))
masks = st.sampled_from([None, OfTree(lambda x: x.ndim > 1), OfTree(lambda x: x.ndim <= 1)])

adam_like = dict(b1=decays, b2=b2s, eps=epss, eps_root=st.sampled_from([0.0, 1e-4]))


class Case(NamedTuple):
    """A transformation, the hyper-parameters to draw for it, and how far from optax float32 may take it."""

    name: str
    draw: dict[str, Any]
    args: tuple[Any, ...] = ()
    extra: tuple[str, ...] = ()  # keyword arguments of update that it reads

    @property
    def strategy(self) -> st.SearchStrategy[Make]:
        return st.builds(
            lambda args, kwargs: Make(self.name, tuple(args), kwargs),
            st.tuples(*[x if isinstance(x, st.SearchStrategy) else st.just(x) for x in self.args]),
            st.fixed_dictionaries(self.draw),
        )


CASES = [
    Case("identity", {}),
    Case("set_to_zero", {}),
    Case("scale", dict(step_size=rates)),
    Case("scale_by_schedule", dict(step_size_fn=lrs.filter(lambda lr: isinstance(lr, Make)))),
    Case("scale_by_learning_rate", dict(learning_rate=st.one_of(st.none(), lrs), flip_sign=flags)),
    Case("add_decayed_weights", dict(weight_decay=weight_decays, mask=masks)),
    Case("masked", {}, (make("trace", 0.9), masks.filter(lambda m: m is not None))),
    Case("chain", {}, (make("clip_by_global_norm", 1.0), make("trace", 0.9), make("scale", -0.1))),
    Case("named_chain", {}, (("b", make("trace", 0.9)), ("a", make("scale_by_adam")), ("c", make("scale", -0.1)))),
    Case("clip", dict(max_delta=rates)),
    Case("clip_by_global_norm", dict(max_norm=rates)),
    Case("clip_by_block_rms", dict(threshold=rates)),
    Case("freeze", dict(mask=masks.filter(lambda m: m is not None))),
    Case("trace", dict(decay=decays, nesterov=flags)),
    Case("ema", dict(decay=decays, debias=flags)),
    Case("sgd", dict(learning_rate=lrs, momentum=st.one_of(st.none(), decays), nesterov=flags)),
    Case("scale_by_adam", adam_like | dict(nesterov=flags)),
    Case("adam", dict(learning_rate=lrs, nesterov=flags) | adam_like),
    Case("adamw", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks, nesterov=flags) | adam_like),
    Case("nadam", dict(learning_rate=lrs) | adam_like),
    Case("nadamw", dict(learning_rate=lrs, weight_decay=weight_decays) | adam_like),
    Case("scale_by_rss", dict(initial_accumulator_value=rates, eps=epss)),
    Case("adagrad", dict(learning_rate=lrs, initial_accumulator_value=st.sampled_from([0.0, 0.1]))),
    Case("scale_by_adadelta", dict(rho=b2s, eps=epss)),
    Case("adadelta", dict(learning_rate=lrs, rho=decays, weight_decay=weight_decays, weight_decay_mask=masks)),
    Case("scale_by_rms", dict(decay=decays, eps=epss, initial_scale=rates, eps_in_sqrt=flags, bias_correction=flags)),
    # eps=0.1: at the first update the variance is rounding alone
    Case("scale_by_stddev", dict(decay=decays, eps=st.just(0.1), eps_in_sqrt=flags, initial_scale=rates)),
    Case(
        "rmsprop",
        dict(
            learning_rate=lrs,
            decay=st.sampled_from([0.5, 0.9]),
            eps=st.just(0.1),
            centered=flags,
            momentum=st.one_of(st.none(), decays),
            nesterov=flags,
            bias_correction=flags,
        ),
    ),
    Case("scale_by_adamax", dict(b1=decays, b2=b2s, eps=epss)),
    Case("adamax", dict(learning_rate=lrs, b1=decays)),
    Case("adamaxw", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks)),
    Case("scale_by_amsgrad", adam_like | dict(bias_correction_mu=flags, bias_correction_nu=flags)),
    Case("amsgrad", adam_like | dict(learning_rate=lrs)),
    Case("scale_by_belief", dict(b1=decays, b2=b2s, eps=epss, eps_root=epss, nesterov=flags)),
    Case("adabelief", dict(learning_rate=lrs, eps=epss, nesterov=flags)),
    Case("scale_by_yogi", adam_like | dict(initial_accumulator_value=rates)),
    Case("yogi", dict(learning_rate=lrs, b1=decays)),
    # b2=0.9: near the threshold optax's float32 rectification is off by percents with 0.999
    Case("scale_by_radam", adam_like | dict(b2=st.just(0.9), threshold=st.sampled_from([5.0, 6.0]), nesterov=flags)),
    Case("radam", dict(learning_rate=lrs, b2=st.just(0.8), nesterov=flags)),
    Case("scale_by_novograd", dict(b1=decays, b2=decays, eps=epss, weight_decay=rates)),
    Case("novograd", dict(learning_rate=lrs, b1=decays, weight_decay=rates)),
    Case("scale_by_adan", dict(b1=decays, b2=decays, b3=b2s, eps=epss)),
    Case("adan", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks)),
    Case("scale_by_sign", {}),
    Case("sign_sgd", dict(learning_rate=lrs)),
    Case("signum", dict(learning_rate=lrs, beta=decays)),
    Case("scale_by_trust_ratio", dict(min_norm=st.sampled_from([0.0, 0.5]), trust_coefficient=rates, eps=epss)),
    Case("scale_by_param_block_norm", dict(min_scale=rates)),
    Case("scale_by_param_block_rms", dict(min_scale=rates)),
    Case(
        "lars",
        dict(
            learning_rate=lrs,
            weight_decay=weight_decays,
            weight_decay_mask=st.one_of(st.just(True), masks),
            trust_ratio_mask=st.one_of(st.just(True), st.just(OfTree(lambda x: x.ndim > 1))),
            momentum=decays,
            nesterov=flags,
        ),
    ),
    Case("lamb", adam_like | dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks)),
    Case("fromage", dict(learning_rate=lrs, min_norm=st.sampled_from([1e-6, 0.1]))),
    Case("scale_by_polyak", dict(f_min=rates, variant=st.sampled_from(["sps", "sps+"]), eps=epss), extra=("value",)),
    Case("polyak_sgd", dict(scaling=lrs, max_learning_rate=rates), extra=("value",)),
    Case("scale_by_optimistic_gradient", dict(alpha=rates, beta=rates)),
    Case("optimistic_gradient_descent", dict(learning_rate=lrs, alpha=rates, beta=rates)),
    Case("optimistic_adam_v2", dict(learning_rate=lrs, alpha=rates, beta=rates, nesterov=flags)),
    Case("scale_by_lion", dict(b1=decays, b2=b2s, mode=st.sampled_from(["hard", "smooth", "refined"]))),
    Case("lion", dict(learning_rate=lrs, b1=decays, b2=b2s, weight_decay=weight_decays, mask=masks)),
]


# ---- trees --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


# few shapes: jax compiles every operation once for each
leaves = st.sampled_from([(), (3,), (2, 3), (2, 1, 2)])
shapes = st.one_of(
    leaves,
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from(["b", "a", "10", "9"]), inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=2),
            st.builds(Pair, inner, st.one_of(st.none(), inner)),
        ),
        max_leaves=4,
    ),
)


def is_shape(node: Any) -> bool:
    return type(node) is tuple


def numbers(shape_tree: Any, seed: int, dtype: str) -> Any:
    """Draw a tree of numpy arrays, leaves of unlike sizes, some zeros among them."""
    draw = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        values = draw.normal(size=shape) * 10.0 ** draw.integers(-2, 2)
        return np.asarray(np.where(draw.random(shape) < 0.1, 0.0, values), dtype)

    return jax.tree.map(leaf, shape_tree, is_leaf=is_shape)


def to_torch(t: Any) -> Any:
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x)), t)


# ---- running both -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def assert_parity(what: Make, shape_tree: Any, seed: int, dtype: str, *, extra: tuple[str, ...] = ()) -> None:
    with precision(dtype):
        compare = Comparison(dtype)
        params = numbers(shape_tree, seed, dtype)
        mine, theirs = what.build("ours"), what.build("optax")
        p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
        s, r = mine.init(p), theirs.init(q)
        compare("state", s, r)
        for step in range(STEPS):
            grads = numbers(shape_tree, 1000 * seed + step, dtype)
            more = {name: EXTRA[name](step) for name in extra}
            u, s = mine.update(to_torch(grads), s, p, **more)
            v, r = theirs.update(jax.tree.map(jnp.asarray, grads), r, q, **more)
            compare("updates", u, v)
            compare("state", s, r)
            p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
            compare("params", p, q)


EXTRA: dict[str, Callable[[int], Any]] = {"value": lambda step: 3.0 / (step + 1)}


class Comparison:
    """Compares containers, field names, shapes, dtypes, and values relative to the largest that the leaf ever had."""

    def __init__(self, dtype: str) -> None:
        # 12 steps add up a few dozen roundings of 6e-8, and quotients of small second moments magnify them; roundings
        # of float64 are 5e8 times smaller
        self.tolerance = 1e-5 if dtype == "float32" else 1e-10
        self.largest: dict[str, float] = {}

    def __call__(self, where: str, mine: Any, theirs: Any) -> None:
        if not (isinstance(theirs, (dict, tuple, list)) or theirs is None):
            return self.leaf(where, mine, np.asarray(theirs))
        assert kind(mine) == kind(theirs), where
        for (name, mine_below), (_, theirs_below) in zip(below(mine), below(theirs), strict=True):
            self(f"{where}/{name}", mine_below, theirs_below)

    def leaf(self, where: str, mine: Any, theirs: np.ndarray) -> None:
        assert isinstance(mine, torch.Tensor), f"{where}: {mine!r} is no tensor"
        assert tuple(mine.shape) == theirs.shape, where
        assert str(mine.dtype).removeprefix("torch.") == str(theirs.dtype).replace("int32", "int64"), where
        if not mine.is_floating_point():
            assert np.array_equal(mine.numpy(), theirs), where
            return
        now = np.abs(theirs).max(initial=0.0, where=np.isfinite(theirs))
        scale = self.largest[where] = max(self.largest.get(where, 0.0), now)
        np.testing.assert_allclose(
            mine.double().numpy(), theirs.astype(np.float64), rtol=0, atol=self.tolerance * scale, err_msg=where
        )


def below(node: Any) -> list[tuple[Any, Any]]:
    if hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, dict):
        return sorted(node.items())
    return list(enumerate(node or ()))


def kind(node: Any) -> Any:
    if hasattr(node, "_fields"):
        return type(node).__name__, node._fields
    return (dict, *sorted(node)) if isinstance(node, dict) else type(node)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trajectory_is_the_one_of_optax(case: Case, dtype: str) -> None:
    @settings(deadline=None, derandomize=True, max_examples=8, database=None)
    @given(what=case.strategy, shape_tree=shapes, seed=st.integers(0, 99))
    def law(what: Make, shape_tree: Any, seed: int) -> None:
        assert_parity(what, shape_tree, seed, dtype, extra=case.extra)

    law()


def test_the_state_has_the_fields_of_optax_and_lives_where_the_params_do() -> None:
    state = ours.adamw(0.1).init({"w": torch.zeros(2, device="meta")})
    assert tree.paths(state) == ["0/count", "0/mu/w", "0/nu/w"]
    assert {leaf.device.type for leaf in tree.leaves(state)} == {"meta"}
    assert state[0].count.dtype == torch.int64
