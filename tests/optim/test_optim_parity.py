"""Every transformation makes the trajectory that optax makes: same updates, same params, same state fields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch.utils._python_dispatch import TorchDispatchMode

import functrain.optim as ours
import functrain.schedules
import functrain.tree as tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

STEPS = 12


# ---- what both libraries are asked to build -----------------------------------------------------------------------


class Make(NamedTuple):
    """`name(*args, **kwargs)` in either library; arguments may be Makes again."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}

    def build(self, library: str) -> Any:
        homes = (ours, functrain.schedules) if library == "ours" else (optax, optax.contrib)
        home: Any = next(home for home in homes if hasattr(home, self.name))
        args = [build(x, library) for x in self.args]
        made = getattr(home, self.name)(*args, **{k: build(x, library) for k, x in self.kwargs.items()})
        if library == "optax" and hasattr(functrain.schedules, self.name):
            # jax divides an int32 count in float32, also where x64 is on
            return lambda count: made(jnp.asarray(count, float))
        return made


def make(name: str, *args: Any, **kwargs: Any) -> Make:
    return Make(name, args, kwargs)


class Dtype(str):
    """A dtype by name; "widest" is what jax has."""


class Named(str):
    """A function of that name in either library."""


class EveryOther:
    """A condition on the step."""

    def __call__(self, step: Any) -> Any:
        return step % 2 == 0


class Harmonic:
    """A decay that is exact enough in every precision."""

    def __call__(self, step: Any, rate: Any) -> Any:
        return 1.0 - 1.0 / (step * 1.0 + 2.0)


class FewerLater:
    """A number of mini-steps that depends on the steps done."""

    def __call__(self, step: Any) -> Any:
        return 3 - 1 * (step > 1)


def size_label(leaf: Any) -> str:
    return "big" if leaf.ndim > 1 else "small"


class OfTree(NamedTuple):
    """A function of a tree, given as a function of one leaf."""

    leaf: Callable[[Any], Any]


def build(value: Any, library: str) -> Any:
    if isinstance(value, Make):
        return value.build(library)
    if isinstance(value, Dtype):
        name = ("float64" if jax.config.jax_enable_x64 else "float32") if value == "widest" else value
        return getattr({"ours": torch, "optax": jnp}[library], name)
    if isinstance(value, Named):
        return getattr({"ours": ours, "optax": optax}[library], value)
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


def falling(step: int) -> float:
    return 3.0 / (step + 1)


def bumpy(step: int) -> float:
    return [3.0, 2.0, 2.0, 2.5, 1.0, 1.0, 1.0, 1.0][step % 8]


def slashes(path: str) -> int:
    return path.count("/")


first_steps = st.sampled_from([("distance", 0.1), ("heuristic", 0.01), ("learning_rate", 0.1)])
halves = st.just(0.5)


class Case(NamedTuple):
    """A transformation, and the hyper-parameters to draw for it."""

    name: str
    draw: dict[str, Any]
    args: tuple[Any, ...] = ()
    loss: Callable[[int], float] | None = None  # the value= of each step, for those that read it
    least_dims: int = 0  # leaves with fewer dimensions are not drawn
    matrix: bool = False  # a matrix is drawn besides
    updates: bool = True  # False where they are differences of params, with the roundings of params
    float32: float = 1e-5  # how far float32 may be from optax
    float64: float = 1e-10  # how far float64 may be from optax
    parity: bool = True  # False where optax is at fault: then another witness is in test_optim_laws.py
    compiled: bool = False  # optax has a cond or a loop in it, which is traced at every step unless it is compiled
    nan_at_zero: bool = False  # optax is NaN where no gradient was other than 0 yet, and ours is finite
    cancels: bool = False  # numbers are differences of larger ones: float32 is compared as `Sensitivity` says

    @property
    def is_optimizer(self) -> bool:
        return "learning_rate" in self.draw

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
    Case("scale_by_stddev", dict(decay=decays, eps=st.just(0.1), eps_in_sqrt=flags, initial_scale=rates), cancels=True),
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
        cancels=True,
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
    Case("scale_by_novograd", dict(b1=decays, b2=decays, eps=epss, weight_decay=rates), compiled=True),
    Case("novograd", dict(learning_rate=lrs, b1=decays, weight_decay=rates), compiled=True),
    Case("scale_by_adan", dict(b1=decays, b2=decays, b3=b2s, eps=epss), cancels=True),
    Case("adan", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks), cancels=True),
    Case("scale_by_rprop", dict(learning_rate=rates, eta_plus=st.just(1.5)), parity=False),
    Case("rprop", dict(learning_rate=rates), parity=False),
    Case("add_noise", dict(eta=rates, gamma=decays, key=st.integers(0, 9)), parity=False),  # normal to rounding only
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
    Case("fromage", dict(learning_rate=lrs, min_norm=st.sampled_from([1e-6, 0.1])), cancels=True),
    Case("scale_by_polyak", dict(f_min=rates, variant=st.sampled_from(["sps", "sps+"]), eps=epss), loss=falling),
    Case("polyak_sgd", dict(scaling=lrs, max_learning_rate=rates), loss=falling),
    Case("scale_by_optimistic_gradient", dict(alpha=rates, beta=rates)),
    Case("optimistic_gradient_descent", dict(learning_rate=lrs, alpha=rates, beta=rates)),
    Case("optimistic_adam_v2", dict(learning_rate=lrs, alpha=rates, beta=rates, nesterov=flags), cancels=True),
    Case(
        "scale_by_factored_rms",
        dict(factored=flags, min_dim_size_to_factor=st.just(2), decay_rate_fn=st.just(Harmonic())),
    ),
    Case(
        "adafactor",
        dict(
            learning_rate=st.one_of(st.none(), lrs),
            min_dim_size_to_factor=st.just(2),
            multiply_by_parameter_scale=flags,
            clipping_threshold=st.one_of(st.none(), rates),
            momentum=st.one_of(st.none(), st.just(0.9)),
            weight_decay_rate=st.one_of(st.none(), weight_decays),
            dtype_momentum=st.just(Dtype("widest")),
        ),
        float64=1e-6,  # optax computes its decay in float32, also where x64 is on
    ),
    # optax fails on () leaves
    Case("scale_by_sm3", dict(b1=decays, b2=st.sampled_from([1.0, 0.9]), eps=epss), least_dims=1),
    Case("sm3", dict(learning_rate=rates, momentum=decays), least_dims=1),
    # optax makes (1,) of () leaves
    Case(
        "scale_by_distance_over_gradients",
        dict(global_scale=rates, eps=epss, param_dtype=st.just(Dtype("widest"))),
        least_dims=1,
    ),
    Case("partition", {}, (dict(big=make("adam", 0.1), small=make("sgd", 0.1, 0.9)), OfTree(size_label))),
    Case("multi_transform", {}, (dict(big=make("set_to_zero"), small=make("adamw", 0.1)), OfTree(size_label))),
    Case("adaptive_grad_clip", dict(clipping=rates, eps=epss)),
    Case("keep_params_nonnegative", {}),
    Case("zero_nans", {}),
    Case("centralize", {}),
    Case("normalize_by_update_norm", dict(scale_factor=rates, eps=epss)),
    Case("apply_every", dict(k=st.integers(1, 4))),
    Case(
        "MultiSteps",
        dict(
            opt=st.just(make("adamw", 0.1)),
            every_k_schedule=st.sampled_from([1, 3, FewerLater()]),
            use_grad_mean=flags,
            should_skip_update_fn=st.sampled_from([None, Named("skip_not_finite")]),
            accumulator_dtype=st.just(Dtype("widest")),
        ),
        compiled=True,
    ),
    Case(
        "conditionally_transform", dict(should_transform_fn=st.just(EveryOther())), (make("trace", 0.9),), compiled=True
    ),
    Case("conditionally_mask", dict(should_transform_fn=st.just(EveryOther())), (make("trace", 0.9),), compiled=True),
    Case("apply_if_finite", dict(max_consecutive_errors=st.integers(0, 2)), (make("adam", 0.1),), compiled=True),
    Case("flatten", {}, (make("adamw", 0.1),)),
    Case("scale_by_ademamix", adam_like | dict(b3=st.just(make("linear_schedule", 0.9, 0.99, 5)), alpha=rates)),
    Case("ademamix", adam_like | dict(learning_rate=lrs, alpha=rates, weight_decay=weight_decays, mask=masks)),
    # b2=0.9: where optax has 1 - b2 in float32, it is off by 1e-5 with 0.999
    Case("scale_by_simplified_ademamix", adam_like | dict(b2=st.just(0.9), alpha=rates)),
    Case("simplified_ademamix", dict(learning_rate=lrs, b1=decays, alpha=rates)),
    # float64: optax's decays of each step are float32
    Case(
        "scale_by_adopt",
        dict(b1=decays, b2=st.just(0.9), eps=epss, nesterov=flags, use_clipping=flags),
        float64=1e-6,
    ),
    Case("adopt", dict(learning_rate=lrs, b1=decays, b2=st.just(0.9), nesterov=flags), float64=1e-6),
    Case("scale_by_acprop", adam_like),
    Case("acprop", dict(learning_rate=lrs, eps=epss, weight_decay=weight_decays)),
    # float64: optax's root of the count is float32
    Case("scale_by_madgrad", dict(learning_rate=lrs, momentum=decays, eps=epss), updates=False, float64=1e-6),
    Case("madgrad", dict(learning_rate=lrs, weight_decay=st.sampled_from([0.0, 0.1])), updates=False, float64=1e-6),
    Case("scale_by_cocob", dict(alpha=st.sampled_from([2.0, 100.0])), updates=False),
    Case("cocob", dict(learning_rate=lrs, weight_decay=st.sampled_from([0.0, 0.1])), updates=False),
    Case("dog", dict(learning_rate=lrs, init_step=first_steps, weight_decay=st.sampled_from([None, 0.1]))),
    Case("dowg", dict(learning_rate=lrs, init_estim_sq_dist=st.sampled_from([None, 0.1]))),
    Case(
        "prodigy",
        dict(learning_rate=lrs, betas=st.just((0.8, 0.9)), safeguard_warmup=flags, estim_lr0=rates),
        nan_at_zero=True,
        cancels=True,
    ),
    Case(
        "dadapt_adamw",
        dict(learning_rate=lrs, betas=st.just((0.8, 0.9)), weight_decay=rates, estim_lr0=rates),
        nan_at_zero=True,
        cancels=True,
    ),
    # float64: optax's decay of each step is float32
    Case(
        "momo",
        dict(learning_rate=lrs, adapt_lower_bound=flags, weight_decay=rates),
        loss=falling,
        float64=1e-6,
        compiled=True,
        cancels=True,
    ),
    Case(
        "momo_adam",
        dict(b2=st.just(0.9), learning_rate=lrs, adapt_lower_bound=flags, weight_decay=rates),
        loss=falling,
        cancels=True,
    ),
    Case("mechanize", dict(weight_decay=rates, s_init=rates), (make("adam", 0.1),), compiled=True, cancels=True),
    Case("normalize", {}, nan_at_zero=True),
    Case(
        "sam",
        dict(sync_period=st.integers(1, 3), reset_state=flags),
        (make("sgd", 0.1), make("sgd", 0.05, 0.9)),
    ),
    Case(
        "reduce_on_plateau",
        dict(
            patience=st.integers(1, 2), cooldown=st.integers(0, 2), accumulation_size=st.integers(1, 2), factor=halves
        ),
        loss=bumpy,
        compiled=True,
    ),
    Case("schedule_free", dict(b1=st.just(0.8)), (make("sgd", 0.1), st.sampled_from([0.1, 0.3])), updates=False),
    # without a warm-up, in which optax takes the rate of the step after: see test_numbers_of_papers.py
    Case(
        "schedule_free_sgd",
        dict(learning_rate=rates, weight_decay=rates),
        updates=False,
        float64=1e-6,
    ),
    Case(
        "schedule_free_adamw",
        dict(learning_rate=rates),
        updates=False,
        float64=1e-6,
    ),
    Case("split_real_and_imaginary", {}, (make("adam", 0.1),)),
    # each Newton-Schulz step magnifies what is small, rounding too, by up to 3.4445: 480 in five
    Case(
        "muon",
        dict(
            learning_rate=lrs,
            nesterov=flags,
            adaptive=flags,
            ns_coeffs=st.sampled_from(["standard", "dion"]),
            preconditioning=st.sampled_from(["frobenius", "spectral", "aol"]),
            weight_decay=weight_decays,
            consistent_rms=st.sampled_from([None, 0.2]),
        ),
        matrix=True,
        compiled=True,
        float32=1e-2,
        float64=1e-8,
    ),
    # singular vectors have signs of their own in each library: compared in test_optim_curvature.py
    Case(
        "galore",
        dict(learning_rate=lrs, rank=st.integers(1, 3), update_proj_gap=st.integers(1, 3), weight_decay=weight_decays),
        matrix=True,
        parity=False,
    ),
    Case("scale_by_lion", dict(b1=decays, b2=b2s, mode=st.sampled_from(["hard", "smooth", "refined"]))),
    Case("lion", dict(learning_rate=lrs, b1=decays, b2=b2s, weight_decay=weight_decays, mask=masks)),
    # what optax does not have: the witnesses are in test_optim_preconditioners.py
    Case("scale_by_soap", dict(b1=decays, b2=b2s, eps=epss, precondition_frequency=st.integers(1, 3)), parity=False),
    Case("soap", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks), matrix=True, parity=False),
    Case(
        "scale_by_kron",
        dict(b1=decays, preconditioner_update_probability=st.sampled_from([1.0, 0.5]), damping=epss),
        matrix=True,
        parity=False,
    ),
    Case("kron", dict(learning_rate=lrs, weight_decay=weight_decays, mask=masks), parity=False),
    # and in test_optim_beyond.py
    Case("layerwise_decay", dict(decay_rate=st.one_of(decays, lrs), depth=st.just(slashes)), parity=False),
    Case(
        "skip_loss_spikes",
        dict(window=st.integers(2, 4), sigma_factor=st.just(1.0)),
        (make("adam", 0.1),),
        loss=bumpy,
        parity=False,
    ),
    Case("round_state_stochastically", {}, (make("adam", 0.1),), parity=False),
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


def assert_parity(case: Case, what: Make, shape_tree: Any, seed: int, dtype: str) -> None:
    with precision(dtype):
        # 12 steps add up a few dozen roundings of 6e-8, and quotients of small second moments magnify them; roundings
        # of float64 are 5e8 times smaller
        compare = Comparison(getattr(case, dtype))
        shape_tree = jax.tree.map(lambda s: s if len(s) >= case.least_dims else (3,), shape_tree, is_leaf=is_shape)
        shape_tree = {"matrix": (2, 3), "rest": shape_tree} if case.matrix else shape_tree
        params = numbers(shape_tree, seed, dtype)
        mine, theirs = what.build("ours"), what.build("optax")
        their_update = jax.jit(theirs.update) if case.compiled else theirs.update
        p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
        s, r = mine.init(p), theirs.init(q)
        compare("state", s, r)
        compare("params", p, q)  # a new parameter has the roundings of the old one
        sensitivity = Sensitivity(mine, params) if case.cancels and dtype == "float32" else None
        for step in range(STEPS):
            grads = numbers(shape_tree, 1000 * seed + step, dtype)
            more = {"value": case.loss(step)} if case.loss else {}
            u, s = mine.update(to_torch(grads), s, p, **more)
            v, r = their_update(jax.tree.map(jnp.asarray, grads), r, q, **more)
            if has_nan((v, r)):
                # optax has divided 0 by 0, after a gradient or a rate of 0: there is nothing left to compare with
                assert not has_nan(jax.tree.map(lambda leaf: leaf.numpy(), tree.leaves((u, s))))
                return
            p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
            if case.nan_at_zero and any(np.isnan(leaf).any() for leaf in jax.tree.leaves((v, r))):
                assert all(leaf.isfinite().all() for leaf in tree.leaves((u, s, p)))
                return
            slack = sensitivity.step(grads, u, s, p, **more) if sensitivity else [None] * 3
            if case.updates:
                compare("updates", u, v, slack[0])
            compare("state", s, r, slack[1])
            compare("params", p, q, slack[2])


def has_nan(values: Any) -> bool:
    return any(bool(np.isnan(leaf).any()) for leaf in jax.tree.leaves(values) if np.issubdtype(leaf.dtype, np.floating))


class Sensitivity:
    """How far float32 may be off in a trajectory, measured by Monte Carlo arithmetic.

    A number that is a small difference of large ones, such as an inner product, has the roundings of the large ones,
    and so has what depends on it: how many of its digits are right, nobody can tell from the number itself. So the
    trajectory is run eight times more, every result of an operation off by a random sign times 2**-21, eight roundings
    of float32, and what the eight differ from the first by is what a library that rounds elsewhere may differ by: two
    libraries differ by two roundings an operation. Eight, because behind a max all but one may see no difference.

    Source: Parker 1997, Monte Carlo arithmetic.
    """

    def __init__(self, tx: Any, params: Any) -> None:
        self.tx = tx
        self.lanes = [(to_torch(params), tx.init(to_torch(params))) for _ in range(8)]
        self.inexact = Inexact()

    def step(self, grads: Any, updates: Any, state: Any, params: Any, **more: Any) -> list[Any]:
        """Return how far each leaf of the new updates, state and params may be off."""
        lanes = []
        for p, s in self.lanes:
            with self.inexact:
                u, s = self.tx.update(to_torch(grads), s, p, **more)
                lanes.append((u, s, ours.apply_updates(p, u)))
        self.lanes = [(p, s) for _, s, p in lanes]
        return [tree.map(spread, *trees) for trees in zip((updates, state, params), *lanes, strict=True)]


def spread(x: torch.Tensor, *others: torch.Tensor) -> float:
    differences = [(x.double() - y.double()).abs().nan_to_num(0.0, posinf=0.0) for y in others]
    return max(float(d.max()) if d.numel() else 0.0 for d in differences)


class Inexact(TorchDispatchMode):
    """Every operation that rounds to float32 is off by eight roundings, up or down at random."""

    aten = torch.ops.aten
    exact = {aten.clone, aten._to_copy, aten.where, aten.maximum, aten.minimum, aten.clamp, aten.neg, aten.abs,
             aten.sign, aten.zeros_like, aten.full, aten.full_like, aten.cat, aten.stack, aten.zeros}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.dtype != torch.float32 or op.overloadpacket in self.exact:
            return result
        aliases = op._schema.returns[0].alias_info
        if aliases is not None and not aliases.is_write:
            return result  # a view
        return result.mul_(1 + 2.0**-21 * (2 * torch.randint(0, 2, result.shape, generator=self.draw) - 1))


class Comparison:
    """Compares containers, field names, shapes, dtypes, and values relative to the largest that the leaf ever had.

    `slack` is a tree of how much further the values may be off.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.largest: dict[str, float] = {}

    def __call__(self, where: str, mine: Any, theirs: Any, slack: Any = None) -> None:
        if not (isinstance(theirs, (dict, tuple, list)) or theirs is None):
            return self.leaf(where, mine, np.asarray(theirs), slack or 0.0)
        assert kind(mine) == kind(theirs), where
        slacks = [x for _, x in below(slack)] or [None] * len(below(mine))
        for (name, mine_below), (_, theirs_below), slack_below in zip(below(mine), below(theirs), slacks, strict=True):
            self(f"{where}/{name}", mine_below, theirs_below, slack_below)

    def leaf(self, where: str, mine: Any, theirs: np.ndarray, slack: float) -> None:
        assert isinstance(mine, torch.Tensor), f"{where}: {mine!r} is no tensor"
        assert tuple(mine.shape) == theirs.shape, where
        assert str(mine.dtype).removeprefix("torch.") == str(theirs.dtype).replace("int32", "int64"), where
        if not mine.is_floating_point():
            assert np.array_equal(mine.numpy(), theirs), where
            return
        now = np.abs(theirs).max(initial=0.0, where=np.isfinite(theirs))
        scale = self.largest[where] = max(self.largest.get(where, 0.0), now)
        atol = self.tolerance * scale + slack
        np.testing.assert_allclose(mine.double().numpy(), theirs.astype(np.float64), rtol=0, atol=atol, err_msg=where)


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
@pytest.mark.parametrize("case", [case for case in CASES if case.parity], ids=lambda case: case.name)
def test_the_trajectory_is_the_one_of_optax(case: Case, dtype: str) -> None:
    # the formula is compared in float64, of which float32 is a rounding: JAX compiles each operation for each shape
    examples = 3 if case.compiled or dtype == "float32" else 6

    @settings(deadline=None, derandomize=True, max_examples=examples, database=None)
    @given(what=case.strategy, shape_tree=shapes, seed=st.integers(0, 99))
    def law(what: Make, shape_tree: Any, seed: int) -> None:
        assert_parity(case, what, shape_tree, seed, dtype)

    law()


def test_the_state_has_the_fields_of_optax_and_lives_where_the_params_do() -> None:
    state = ours.adamw(0.1).init({"w": torch.zeros(2, device="meta")})
    assert tree.paths(state) == ["0/count", "0/mu/w", "0/nu/w"]
    assert {leaf.device.type for leaf in tree.leaves(state)} == {"meta"}
    assert state[0].count.dtype == torch.int64
