"""Laws of transformations that `functrain.testing.laws` does not ask for; those it does: test_testing_builtins.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from test_optim_parity import CASES, Case, Make, numbers, shapes, to_torch

import functrain.optim as ours
import functrain.tree as tree
from functrain.compiler.compilation import interpret
from functrain.tree.reductions import stays_finite

jax = Later("jax")

law = settings(deadline=None, derandomize=True, max_examples=4, database=None)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = {"b": [(2, 3), None, (3,)], "a": ()}
FULL = {"b": [(2, 3), (3,)], "a": ()}  # torch.func.vmap refuses None


def draw(shape_tree: Any, seed: int) -> Any:
    return to_torch(numbers(shape_tree, seed, "float32"))


def run(tx: Any, params: Any, case: Case | None = None, *, steps: int = 4, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return the last updates, the state and the params after some steps."""
    state, updates = tx.init(params), None
    for step in range(steps):
        updates, state = step_of(tx, case, step)(draw_like(params, 100 * seed + step), state, params)
        params = ours.apply_updates(params, updates)
    return updates, state, params


def step_of(tx: Any, case: Case | None, step: int) -> Callable[..., Any]:
    extra = {"value": case.loss(step)} if case and case.loss else {}
    return lambda updates, state, params: tx.update(updates, state, params, **extra)


def draw_like(params: Any, seed: int) -> Any:
    make = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=make).to(p.dtype), params)


def equal(a: Any, b: Any) -> bool:
    tree.check_same_structure(a, b)
    return all(
        x.dtype == y.dtype and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)
    )


def close(a: Any, b: Any, rtol: float) -> bool:
    tree.check_same_structure(a, b)
    return all(
        torch.allclose(x.double(), y.double(), rtol=rtol, atol=rtol * float(y.double().abs().max()))
        for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)
        if y.numel()
    )


# ---- each transformation by itself --------------------------------------------------------------------------------


@every_case
def test_a_guard_skips_no_ordinary_step(case: Case) -> None:
    @law
    @given(what=case.strategy)
    def holds(what: Make) -> None:
        params = draw(SHAPES, 3)
        tx = what.build("ours")
        state = tx.init(params)
        for step in range(4):
            updates, new = step_of(tx, case, step)(draw_like(params, step), state, params)
            moved = ours.apply_updates(params, updates)
            assert stays_finite((params, state), (moved, new))
            params, state = moved, new

    holds()


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_updates_and_state_keep_the_dtype_of_the_params(case: Case, dtype: torch.dtype) -> None:
    @law
    @given(what=case.strategy)
    def holds(what: Make) -> None:
        params = tree.cast(draw(SHAPES, 3), dtype)
        tx = what.build("ours")
        first = tx.init(params)
        updates, state, _ = run(tx, params, case, steps=2)
        # a float32 average of bfloat16 updates is a float32 update
        wider = {torch.promote_types(dtype, torch.float32)} if case.name == "adafactor" else {dtype}
        assert {leaf.dtype for leaf in tree.leaves(updates)} <= {dtype, *wider}
        dtypes = [leaf.dtype for leaf in tree.leaves(first)]
        assert [leaf.dtype for leaf in tree.leaves(state)] == dtypes

    holds()


@every_case
def test_a_traced_update_equals_the_eager_one(case: Case) -> None:
    params = draw(SHAPES, 5)
    for what in examples(case, 1):
        tx = what.build("ours")
        state = tx.init(params)
        update = step_of(tx, case, 0)
        # the tracer alone: what the compiler makes of the graph is tested once, below
        grads = draw_like(params, 1)
        assert equal(interpret(update)(grads, state, params), update(grads, state, params))


@pytest.mark.parametrize("name", ["adamw", "multi_transform", "masked", "lamb", "muon", "adafactor"])
def test_a_torch_compile_of_ones_own_takes_an_update_as_one_graph(name: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    params = draw(SHAPES, 5)
    (what,) = examples(case, 1)
    tx = what.build("ours")
    state, update, grads = tx.init(params), step_of(tx, case, 0), draw_like(params, 1)
    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend="eager")
    assert equal(compiled(grads, state, params), update(grads, state, params))


def run_lane(tx: Any, case: Case, params: Any) -> Any:
    state = tx.init(params)
    for step in range(2):
        grads = tree.map(lambda p, step=step: torch.cos(7 * p + step), params)
        updates, state = step_of(tx, case, step)(grads, state, params)
        params = ours.apply_updates(params, updates)
    return params, state


def examples(case: Case, number: int) -> list[Make]:
    """Draw a few settings of a case, always the same ones."""
    found: list[Make] = []

    @settings(deadline=None, derandomize=True, max_examples=number, database=None)
    @given(what=case.strategy)
    def collect(what: Make) -> None:
        found.append(what)

    collect()
    return found[:number]


# ---- learning rates and other hyper-parameters as tensors -----------------------------------------------------------

TENSORS: dict[str, Callable[..., Any]] = {
    "scale": lambda x: ours.scale(x),
    "sgd": lambda x: ours.sgd(x, momentum=1 - x, nesterov=True),
    "clip_by_global_norm": lambda x: ours.chain(ours.clip_by_global_norm(10 * x), ours.scale(-0.1)),
    "clip": lambda x: ours.clip(x),
    "clip_by_block_rms": lambda x: ours.clip_by_block_rms(x),
    "adamw": lambda x: ours.adamw(x, b1=1 - x, b2=1 - x / 10, eps=x, eps_root=x / 100, weight_decay=x),
    "nadamw": lambda x: ours.nadamw(x, b1=1 - x, weight_decay=x, mask=True),
    "lion": lambda x: ours.lion(x, b1=1 - x, b2=1 - x / 10, weight_decay=x),
    "ema": lambda x: ours.ema(1 - x),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_lane_of_a_vmapped_hyper_parameter_equals_the_float(name: str) -> None:
    params, values = draw(FULL, 9), torch.tensor([0.01, 0.1, 0.3])

    def go(x: Any) -> Any:
        return run_lane(TENSORS[name](x), CASES[0], params)[0]

    together = torch.func.vmap(go)(values)
    for i, value in enumerate(values.tolist()):
        # 1 - x / 10 is made in float32 here and in float64 there: up to 1e-5 of 1 - b2
        assert close(tree.map(lambda leaf, i=i: leaf[i], together), go(value), 1e-4)


@pytest.mark.parametrize("name", TENSORS)
def test_a_hyper_parameter_tensor_keeps_the_dtype_of_every_leaf(name: str) -> None:
    params = tree.cast(draw(SHAPES, 9), torch.bfloat16)
    new, _ = run_lane(TENSORS[name](torch.tensor(0.1)), CASES[0], params)
    tx = TENSORS[name](torch.tensor(0.1))
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.dtype for leaf in tree.leaves((updates, new))} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree.leaves(state)} <= {torch.bfloat16, torch.int64}


@pytest.mark.parametrize("name", TENSORS)
def test_the_gradient_through_a_trajectory_equals_finite_differences(name: str) -> None:
    params = tree.cast(draw(SHAPES, 10), torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        new, _ = run_lane(TENSORS[name](x), CASES[0], params)
        return tree.norm(new)

    x, h = torch.tensor(0.1, dtype=torch.float64), 1e-6
    slope = (loss(x + h) - loss(x - h)) / (2 * h)
    # central differences of float64: h² from the third derivative, 1e-16 / h from rounding
    torch.testing.assert_close(torch.func.grad(loss)(x), slope, rtol=1e-6, atol=1e-8)


def test_the_gradient_through_adam_is_finite_with_eps_root_where_gradients_are_zero() -> None:
    def loss(g: torch.Tensor) -> torch.Tensor:
        tx = ours.adam(0.1, eps_root=1e-8)
        return tx.update(g, tx.init(g))[0].sum()

    assert torch.isfinite(torch.func.grad(loss)(torch.tensor([0.0, 1.0]))).all()


# ---- clipping -------------------------------------------------------------------------------------------------------


@law
@given(shape_tree=shapes, seed=st.integers(0, 99), bound=st.sampled_from([1e-3, 0.1, 1.0, 100.0]))
def test_clipping_is_bounded_and_idempotent_and_leaves_small_updates_alone(
    shape_tree: Any, seed: int, bound: float
) -> None:
    grads = draw(shape_tree, seed)
    tx = ours.clip_by_global_norm(bound)
    once, _ = tx.update(grads, tx.init(grads))
    twice, _ = tx.update(once, tx.init(grads))
    # three roundings of 6e-8: the quotient, the products and the norm
    assert float(ours.global_norm(once)) <= bound * (1 + 1e-6)
    assert close(twice, once, 1e-6)
    if float(ours.global_norm(grads)) < bound:
        assert equal(once, grads)


def test_clipping_passes_what_is_not_finite_on_to_be_seen() -> None:
    tx = ours.clip_by_global_norm(1.0)
    for bad in (float("nan"), float("inf")):
        updates, _ = tx.update({"w": torch.tensor([1.0, bad])}, tx.init({}))
        assert not torch.isfinite(updates["w"]).all()


# ---- apply_updates and masks ----------------------------------------------------------------------------------------


def test_apply_updates_keeps_the_dtype_and_passes_over_none() -> None:
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": {"c": torch.ones(3), "n": torch.tensor(3)}, "d": None}
    new = ours.apply_updates(params, {"a": torch.ones(2), "b": {"c": None, "n": None}, "d": None})
    assert new["a"].dtype == torch.bfloat16 and torch.equal(new["a"].float(), torch.full((2,), 2.0))
    assert new["b"]["c"] is params["b"]["c"] and new["b"]["n"] is params["b"]["n"] and new["d"] is None


@pytest.mark.parametrize(
    "updates, message",
    [
        ({"w": torch.ones(2)}, "missing: 'b'"),
        ({"w": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, "unexpected: 'c'"),
        ({"w": torch.ones(2), "bb": torch.ones(2), "b": None}, "'bb'"),
        ({"w": None}, "w"),
    ],
)
def test_apply_updates_names_the_paths_that_do_not_fit(updates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.apply_updates({"w": torch.ones(2), "b": torch.ones(2)}, updates)


def test_an_integer_parameter_is_refused_by_path_and_can_be_masked() -> None:
    params = {"layer": {"w": torch.ones(2), "steps": torch.tensor(3)}}
    for tx in (ours.adamw(0.1), ours.sgd(0.1, momentum=0.9), ours.lion(0.1)):
        with pytest.raises(
            TypeError, match=r"layer/steps: expected a floating-point .*int64; leave it out with masked"
        ):
            tx.init(params)
        where = tree.map(lambda p: p.is_floating_point(), params)
        masked = ours.masked(tx, where)
        grads = {"layer": {"w": torch.ones(2), "steps": torch.tensor(0)}}
        updates, _ = masked.update(grads, masked.init(params), params)
        new = ours.apply_updates(params, updates)
        assert new["layer"]["steps"].dtype == torch.int64 and int(new["layer"]["steps"]) == 3
    with pytest.raises(TypeError, match="layer/steps: an update of torch.float32 would be cut"):
        ours.apply_updates(params, tree.map(lambda p: torch.ones_like(p, dtype=torch.float32), params))


def test_a_transformation_that_needs_params_says_so() -> None:
    grads = {"w": torch.ones(2)}
    for tx in (ours.add_decayed_weights(0.1), ours.adamw(0.1), ours.adamw(0.1, mask=True)):
        with pytest.raises(ValueError, match=r"add_decayed_weights needs the current params: call update\("):
            tx.update(grads, tx.init(grads))


def test_updates_that_do_not_fit_the_state_are_named() -> None:
    tx = ours.adam(0.1)
    state = tx.init({"w": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="'c'"):
        tx.update({"w": torch.ones(2), "c": torch.ones(2)}, state)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ({"w": True}, ValueError, "nothing for 'b/0'"),
        ({"w": True, "c": True}, KeyError, "no 'c' here"),
        ({"w": True, "b": 1.0}, TypeError, "mask: b/0: expected True or False, came 1.0"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask: Any, error: type[Exception], message: str) -> None:
    params = {"w": torch.ones(2), "b": [torch.ones(2)]}
    with pytest.raises(error, match=message):
        ours.masked(ours.trace(0.9), mask).init(params)


def test_a_mask_may_be_a_prefix_and_the_state_holds_only_what_it_lets_through() -> None:
    params = {"w": torch.ones(2), "b": [torch.ones(2), torch.ones(1)]}
    state = ours.masked(ours.trace(0.9), {"w": False, "b": True}).init(params)
    assert tree.paths(state) == ["inner_state/trace/b/0", "inner_state/trace/b/1"]


def test_a_chain_refuses_the_state_of_another() -> None:
    with pytest.raises(ValueError, match="chain of 2: came a state of 1"):
        ours.chain(ours.identity(), ours.identity()).update({}, (ours.EmptyState(),))
    with pytest.raises(ValueError, match="names must differ"):
        ours.named_chain(("a", ours.identity()), ("a", ours.identity()))


# ---- a second witness, and the compiler -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mine, theirs",
    [
        (ours.adamw(0.01, weight_decay=0.1, b1=0.8), lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.999), 1e-8, 0.1)),
        (ours.adam(0.01, eps=1e-3), lambda p: torch.optim.Adam(p, 0.01, eps=1e-3)),
        (ours.sgd(0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.9)),
        (ours.sgd(0.01, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.01, 0.9, nesterov=True)),
        (
            ours.chain(ours.clip_by_global_norm(1.0), ours.sgd(0.1)),
            lambda p: torch.optim.SGD(p, 0.1),
        ),
        (ours.radam(0.01), lambda p: torch.optim.RAdam(p, 0.01)),
        (ours.rprop(0.01), lambda p: torch.optim.Rprop(p, 0.01)),
        (ours.adamax(0.01), lambda p: torch.optim.Adamax(p, 0.01)),
        (
            ours.rmsprop(0.01, eps=1e-3, eps_in_sqrt=False, momentum=0.9),
            lambda p: torch.optim.RMSprop(p, 0.01, 0.9, eps=1e-3, momentum=0.9),
        ),
        (ours.adadelta(0.1, rho=0.8), lambda p: torch.optim.Adadelta(p, 0.1, rho=0.8)),
        (
            ours.adagrad(0.1, initial_accumulator_value=0.5, eps=0.0),
            lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.5),
        ),
    ],
    ids=[
        "adamw",
        "adam",
        "sgd",
        "nesterov",
        "clip",
        "radam",
        "rprop",
        "adamax",
        "rmsprop",
        "adadelta",
        "adagrad",
    ],
)
def test_it_equals_torch_optim(mine: Any, theirs: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    params = draw(SHAPES, 11)
    leaves = [p.clone().requires_grad_() for p in tree.leaves(params)]
    optimizer = theirs(leaves)
    state = mine.init(params)
    for step in range(12):
        grads = draw_like(params, step)
        updates, state = mine.update(grads, state, params)
        params = ours.apply_updates(params, updates)
        for leaf, grad in zip(leaves, tree.leaves(grads), strict=True):
            leaf.grad = grad.clone()
        if "clip" in request.node.name:
            # torch adds 1e-6 to the norm, of about 3
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
    for got, expected in zip(tree.leaves(params), leaves, strict=True):
        # 12 steps of a few roundings of 6e-8 each; the corrections are made in float32 here, in float64 there
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_one_compiled_step_equals_eager_and_never_compiles_again() -> None:
    from functrain.schedules import warmup_cosine_decay_schedule

    tx = ours.chain(
        ours.clip_by_global_norm(1.0),
        ours.adamw(warmup_cosine_decay_schedule(0.0, 0.1, 2, 8), weight_decay=0.1, mask={"a": False, "b": True}),
    )

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return ours.apply_updates(params, updates), state

    params = draw(SHAPES, 12)
    eager = compiled_state = (params, tx.init(params))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(5):
            grads = draw_like(params, i)
            eager = step(*eager, grads)
            compiled_state = compiled(*compiled_state, grads)
    # a fused kernel may contract a * b + c into one rounding: a few of 6e-8 a step
    assert close(compiled_state, eager, 2e-6)


# what optax does not have
BEYOND_OPTAX = {
    "LayerwiseDecayState", "MasterCopiesState", "ParamsEmaState", "ParamsMeanState", "RoundedParamsState",
    "RoundedState", "ScaleByKronState", "ScaleBySoapState", "SkipLossSpikesState", "from_torch_state", "keep_ema",
    "keep_master_copies", "keep_swa", "kron", "layerwise_decay", "round_params_stochastically",
    "round_state_stochastically", "round_stochastically", "scale_by_kron", "scale_by_soap", "skip_loss_spikes",
    "soap", "to_torch_state",
}  # fmt: skip


def test_every_public_name_of_the_room_is_a_name_of_optax() -> None:
    import importlib
    import pkgutil

    import optax

    homes = [name for _, name, _ in pkgutil.walk_packages(optax.__path__, "optax.") if "test" not in name]
    there = {name for home in ["optax", "optax._src.transform", *homes] for name in vars(importlib.import_module(home))}
    modules = {name for name, value in vars(ours).items() if isinstance(value, type(ours))}
    names = {name for name in vars(ours) if not name.startswith("_")} - modules
    assert names - there == BEYOND_OPTAX


# ---- what differs from optax, or is drawn ---------------------------------------------------------------------------


def test_the_noise_is_the_noise_of_optax() -> None:
    import jax.numpy as jnp
    import optax

    grads = numbers(SHAPES, 13, "float32")
    mine, theirs = ours.add_noise(0.1, 0.55, 7), optax.add_noise(0.1, 0.55, 7)
    s, r = mine.init(to_torch(grads)), theirs.init(jax.tree.map(jnp.asarray, grads))
    for _ in range(3):
        u, s = mine.update(to_torch(grads), s)
        v, r = theirs.update(jax.tree.map(jnp.asarray, grads), r)
        # inverse error functions of two libraries: a few roundings of 6e-8 of values up to 10
        assert close(u, to_torch(v), 1e-5)
        assert s.rng_key.tolist() == jax.random.key_data(r.rng_key).view(jnp.int32).tolist()


def test_noise_needs_a_key_and_does_not_keep_the_callers() -> None:
    with pytest.raises(ValueError, match="add_noise: pass key="):
        ours.noisy_sgd(0.1)
    key = torch.tensor([0, 7], dtype=torch.int32)
    assert ours.add_noise(0.1, 0.5, key).init({}).rng_key.data_ptr() != key.data_ptr()


def test_rprop_moves_in_the_step_whose_gradient_it_was_given() -> None:
    tx = ours.rprop(0.1)
    updates, state = tx.update(torch.tensor([2.0, -3.0]), tx.init(torch.zeros(2)))
    assert torch.equal(updates, torch.tensor([-0.1, 0.1]))
    updates, _ = tx.update(torch.tensor([1.0, 1.0]), state)
    assert torch.allclose(updates, torch.tensor([-0.12, 0.0]))


def test_a_standard_deviation_of_nothing_is_not_nan() -> None:
    tx = ours.scale_by_stddev(0.3, bias_correction=True, eps_in_sqrt=False)
    state = tx.init(torch.zeros(64))
    for _ in range(5):
        updates, state = tx.update(torch.linspace(0.1, 1, 64), state)
        assert torch.isfinite(updates).all()


def test_a_tensor_kept_from_a_gradient_is_a_copy_of_it() -> None:
    grads = torch.ones(3)
    for tx in (ours.scale_by_adan(), ours.scale_by_optimistic_gradient()):
        _, state = tx.update(grads, tx.init(grads))
        assert grads.data_ptr() not in {leaf.data_ptr() for leaf in tree.leaves(state)}


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_a_step_of_rate_zero_leaves_an_estimate_as_it_was(name: str) -> None:
    tx = getattr(ours, name)(lambda step: torch.where(step == 0, 0.0, 0.1), estim_lr0=0.1)
    params = draw(SHAPES, 3)
    updates, state = tx.update(draw_like(params, 0), tx.init(params), params)
    assert all(bool((leaf == 0).all()) for leaf in tree.leaves(updates)) and float(state.estim_lr) == pytest.approx(0.1)
