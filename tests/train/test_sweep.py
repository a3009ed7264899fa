"""Laws of sweeps: each lane is the run that it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import optim, tree
from functrain.train import grid

KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    hidden = ft.nn.dropout(torch.tanh(batch["x"] @ params["w"]), 0.3, key)  # (B, 4)
    errors = hidden @ params["v"] - batch["y"]  # (B,)
    return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {"largest": errors.abs().sum()})


def problem() -> tuple[Any, list[Any]]:
    params = {"w": draw(0, 3, 4), "v": draw(1, 4)}
    return params, [{"x": draw(10 + i, 6, 3), "y": draw(20 + i, 6)} for i in range(3)]


def build(learning_rate: Any = 0.1, weight_decay: Any = 0.0) -> Any:
    decayed = optim.adamw(learning_rate, weight_decay=weight_decay)
    return optim.chain(optim.clip_by_global_norm(1.0), decayed)


INJECTED = optim.inject_hyperparams(build)()


def run(step: Any, state: Any, batches: list[Any]) -> tuple[Any, list[Any]]:
    metrics = []
    for batch in batches:
        state, found = step(state, batch)
        metrics.append(found)
    return state, metrics


def kept(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("loss_scale", "guard") if name in options}


def solo(given: dict[str, Any], params: Any, batches: list[Any], **options: Any) -> tuple[Any, list[Any]]:
    """The run of one lane, with its numbers as Python numbers in an optimizer that keeps none in its state."""
    given = dict(given)
    key = ft.random.key(given.pop("seed", 0))
    tx = build(**given)
    state = ft.init_state(params, tx, key=key, **kept(options))
    return run(ft.train_step(loss_fn, tx, **options), state, batches)


def assert_lanes(swept: Any, found: Any, metrics: list[Any], params: Any, batches: Any, **options: Any) -> None:
    for i in range(swept.lanes):
        theirs = batches if not swept.batches else [swept.lane(batch, i) for batch in batches]
        state, rows = solo(swept.values(i), params, theirs, **options)
        lane = swept.lane(found, i)
        # float64: a batched product adds in another order, and Adam divides by small roots
        for a, b in ((lane.params, state.params), (swept.lane(metrics, i), rows)):
            tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), a, b)
        assert torch.equal(lane.key, state.key) and torch.equal(lane.step, state.step)


OVER = {"learning_rate": [0.1, 0.01, 0.3], "weight_decay": [0.0, 0.5, 0.1], "seed": [5, 5, 7]}


@pytest.mark.parametrize("compiled", [False, True])
def test_each_lane_is_its_solo_run(compiled: bool) -> None:
    params, batches = problem()
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), OVER)
    states = swept.init(ft.init_state(params, INJECTED, key=KEY))
    step = ft.compile(swept, donate=True) if compiled else swept
    found, metrics = run(step, states, batches)
    assert_lanes(swept, found, metrics, params, batches)


OPTIONS = [
    {"accumulate": 2},
    {"loss_scale": ft.loss_scale.dynamic()},
    {"guard": ft.train.skip_nonfinite()},
    {"guard": ft.train.skip_spikes(2), "loss_scale": ft.loss_scale.dynamic(), "accumulate_rows": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_of_a_step_hold_in_every_lane(options: Any) -> None:
    params, batches = problem()
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED, **options), OVER)
    states = swept.init(ft.init_state(params, INJECTED, key=KEY, **kept(options)))
    found, metrics = run(swept, states, batches)
    assert_lanes(swept, found, metrics, params, batches, **options)


def test_each_lane_may_have_its_own_batches() -> None:
    params, batches = problem()
    own = [tree.map(lambda leaf: torch.stack([leaf, 2 * leaf, -leaf]), batch) for batch in batches]
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), OVER, batches=True)
    found, metrics = run(swept, swept.init(ft.init_state(params, INJECTED, key=KEY)), own)
    assert_lanes(swept, found, metrics, params, own)


def test_seeds_alone_are_an_ensemble() -> None:
    tx = optim.adam(0.1)

    def init(key: Tensor) -> ft.TrainState:
        first, second = ft.random.split(key)
        params = {
            "w": ft.random.normal(first, (3, 4), torch.float64),
            "v": ft.random.normal(second, (4,), torch.float64),
        }
        return ft.init_state(params, tx, key=key)

    _, batches = problem()
    step = ft.train_step(loss_fn, tx)
    swept = ft.sweep(step, {"seed": range(4)})
    found, _ = run(swept, swept.init(init), batches)
    for i in range(4):
        alone, _ = run(step, init(ft.random.key(i)), batches)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), swept.lane(found, i), alone)
    with pytest.raises(ValueError, match='expected "seed" in over'):
        ft.sweep(step, {"learning_rate": [0.1]}).init(init)


def test_any_path_of_the_state_can_be_swept() -> None:
    params, batches = problem()
    other = tree.scale(0.5, params)
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), {"params": [params, other]})
    found, _ = run(swept, swept.init(ft.init_state(params, INJECTED, key=KEY)), batches)
    for i, start in enumerate((params, other)):
        state, _ = solo({}, start, batches)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), swept.lane(found, i).params,
                 state.params)  # fmt: skip


def test_a_lane_that_diverges_leaves_the_others_and_is_not_the_best() -> None:
    params, batches = problem()
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), {"learning_rate": [torch.inf, 0.01, 0.1]})
    found, metrics = run(swept, swept.init(ft.init_state(params, INJECTED, key=KEY)), batches)
    losses = metrics[-1]["loss"]
    assert torch.isnan(losses[0]) and torch.isfinite(losses[1:]).all()
    assert swept.best(losses) == 1 + int(torch.argmin(losses[1:]))
    assert swept.values(1) == {"learning_rate": 0.01}
    assert swept.best(torch.tensor([torch.nan, torch.inf, 3.0])) == 2
    assert swept.best(torch.tensor([torch.nan, torch.inf, torch.nan])) == 1
    with pytest.raises(ValueError, match="expected a lane that is not NaN"):
        swept.best(torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match=r"\(3,\), came \(2,\)"):
        swept.best(losses[1:])


def test_a_lane_that_is_not_finite_is_skipped_alone() -> None:
    params, batches = problem()
    guard, tx = ft.train.skip_nonfinite(), optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    worse = tree.map(lambda leaf: torch.stack([leaf, leaf * torch.nan]), batches[1])
    swept = ft.sweep(ft.train_step(loss_fn, tx, guard=guard), {"learning_rate": [0.1, 0.1]}, batches=True)
    own = [tree.map(lambda leaf: torch.stack([leaf, leaf]), batch) for batch in batches]
    states = swept.init(ft.init_state(params, tx, key=KEY, guard=guard))
    found, metrics = run(swept, states, [own[0], worse, own[2]])
    assert [m["skipped"].tolist() for m in metrics] == [[0, 0], [0, 1], [0, 0]]
    assert found.guard.skipped.tolist() == [0, 1] and all(torch.isfinite(leaf).all() for leaf in tree.leaves(found))
    assert not torch.allclose(found.params["w"][0], found.params["w"][1])


def test_half_precision_scales_each_lane_by_itself() -> None:
    params, batches = problem()
    params, batches = tree.cast((params, batches), torch.float32)
    scale, tx = ft.loss_scale.dynamic(2.0**15, growth_interval=2), optim.inject_hyperparams(optim.sgd)(0.01)
    step = ft.train_step(ft.mixed_precision(loss_fn, "fp16"), tx, loss_scale=scale)
    # the gradients of a hundred times larger params overflow
    swept = ft.sweep(step, {"params": [params, tree.scale(100.0, params)]})
    start = ft.init_state(params, tx, key=KEY, loss_scale=scale)
    found, metrics = run(swept, swept.init(start), batches)
    assert metrics[0]["skipped"].tolist() == [0, 1]
    for i, first in enumerate((params, tree.scale(100.0, params))):
        alone, rows = run(step, start._replace(params=first), batches)
        # float16 products of a batch are added in another order: 2**-11 of each term
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2), swept.lane(found, i), alone)
        assert [row["loss_scale"][i].item() for row in metrics] == [row["loss_scale"].item() for row in rows]


def test_buffers_are_those_of_each_lane() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    ).double()
    functional, tx = ft.from_module(module), optim.inject_hyperparams(optim.adam)(0.1)

    def loss(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
        found, new = functional.apply(params, buffers, key, batch["x"])
        return ft.Loss(torch.sum((found[:, 0] - batch["y"]) ** 2), found.new_full((), len(found)), {}), new

    step = ft.train_step(loss, tx, buffers=True, accumulate=2)
    start = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    swept = ft.sweep(step, {"learning_rate": [0.1, 0.01, 0.0]})
    found, metrics = run(swept, swept.init(start), problem()[1])
    for i in range(3):
        alone = ft.sweep(step, {"learning_rate": [swept.values(i)["learning_rate"]]})
        state, rows = run(step, alone.lane(alone.init(start), 0), problem()[1])
        for a, b in ((swept.lane(found, i), state), (swept.lane(metrics, i), rows)):
            tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), a, b)
    assert found.buffers["1"]["num_batches_tracked"].tolist() == [6, 6, 6]


STARTING: dict[str, tuple[Any, str, list[float]]] = {
    "rprop": (optim.rprop, "learning_rate", [0.1, 0.01]),
    "adagrad": (lambda learning_rate, first: optim.adagrad(learning_rate, first), "first", [0.1, 1.0]),
    "prodigy": (lambda learning_rate, d0: optim.prodigy(learning_rate, estim_lr0=d0), "d0", [1e-6, 1e-2]),
}


@pytest.mark.parametrize("name", STARTING)
def test_a_number_that_an_optimizer_begins_with_is_the_lanes(name: str) -> None:
    factory, swept_name, values = STARTING[name]
    params, batches = problem()

    def solo_of(value: float) -> Any:
        return factory(**{"learning_rate": 0.1} | {swept_name: value})

    tx = optim.inject_hyperparams(factory)(**{"learning_rate": 0.1} | {swept_name: values[0]})
    swept = ft.sweep(ft.train_step(loss_fn, tx), {swept_name: values})
    start = ft.init_state(params, tx, key=KEY)
    found, _ = run(swept, swept.init(start), batches)
    for i, value in enumerate(values):
        alone = solo_of(value)
        state, _ = run(ft.train_step(loss_fn, alone), ft.init_state(params, alone, key=KEY), batches)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), swept.lane(found, i).params,
                 state.params)  # fmt: skip
    went_on, _ = run(swept.step, start, batches)
    with pytest.raises(ValueError, match="and the state has gone on from there"):
        swept.init(went_on)


def test_of_two_optimizers_with_one_name_the_named_one_begins_anew() -> None:
    params, _ = problem()
    tx = optim.chain(*[optim.inject_hyperparams(optim.scale_by_rprop)(learning_rate=0.1)] * 2)
    path = "opt_state/1/hyperparams/learning_rate"
    states = ft.sweep(ft.train_step(loss_fn, tx), {path: [0.1, 0.5]}).init(ft.init_state(params, tx, key=KEY))
    sizes = [state.inner_state.step_sizes["v"][:, 0].tolist() for state in states.opt_state]
    assert sizes == [[0.1, 0.1], [0.1, 0.5]]


@pytest.mark.parametrize("tx", [optim.schedule_free_sgd(0.1), optim.dog(0.1)], ids=["schedule_free", "dog"])
def test_what_an_optimizer_keeps_of_the_first_params_is_the_lanes(tx: Any) -> None:
    params, batches = problem()
    other = tree.scale(0.5, params)
    swept = ft.sweep(ft.train_step(loss_fn, tx), {"params": [params, other]})
    found, _ = run(swept, swept.init(ft.init_state(params, tx, key=KEY)), batches)
    alone, _ = run(swept.step, ft.init_state(other, tx, key=KEY), batches)
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), swept.lane(found, 1), alone)


def test_beginnings_can_be_swept_with_numbers() -> None:
    params, batches = problem()
    first = ft.init_state(params, INJECTED, key=KEY)

    def drawn(key: Tensor) -> ft.TrainState:
        return ft.init_state({"w": ft.random.normal(key, (3, 4), torch.float64), "v": params["v"]}, INJECTED, key=key)

    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), {"init": [first, drawn], "seed": [3, 4], "weight_decay": [0, 1]})
    found, _ = run(swept, swept.init(), batches)
    for i, begun in enumerate([first.params, drawn(ft.random.key(4)).params]):
        alone, _ = solo({"weight_decay": float(i), "seed": 3 + i}, begun, batches)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), swept.lane(found, i).params,
                 alone.params)  # fmt: skip
    with pytest.raises(ValueError, match="came a state and one for each lane"):
        swept.init(first)
    with pytest.raises(ValueError, match="came none and none"):
        ft.sweep(swept.step, {"seed": [0]}).init()
    with pytest.raises(ValueError, match='expected "seed" in over'):
        ft.sweep(swept.step, {"init": [drawn]}).init()


def test_a_sweep_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Any) -> None:
    params, batches = problem()
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED), OVER)
    states = swept.init(ft.init_state(params, INJECTED, key=KEY))
    whole, _ = run(swept, states, batches)
    half, _ = run(swept, states, batches[:1])
    ft.checkpoint.save(tmp_path / "states", half)
    again, _ = run(swept, ft.checkpoint.load(tmp_path / "states", like=states), batches[1:])
    assert all(tree.leaves(tree.map(torch.equal, whole, again)))


def test_grid_is_every_combination_once() -> None:
    found = grid({"learning_rate": [0.1, 0.2], "seed": range(3)})
    assert found == {"learning_rate": [0.1] * 3 + [0.2] * 3, "seed": [0, 1, 2] * 2}


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({}, "expected lists of one length"),
        ({"seed": []}, "expected lists of one length"),
        ({"seed": [0, 1], "learning_rate": [0.1]}, r"came \{'seed': 2, 'learning_rate': 1\}"),
    ],
)
def test_lists_that_make_no_lanes_are_refused(over: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ft.sweep(lambda state, batch: (state, {}), over)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"learningrate": [0.1]}, r"came 'learningrate' \(did you mean 'learning_rate'\?\)"),
        ({"lr": [0.1]}, r"of which there is \['learning_rate', 'weight_decay'\].*came 'lr'"),
        ({"learning_rate": [torch.zeros(2)]}, r"expected torch.float64 \(\), as in the state, came .*\(2,\)"),
        ({"params": [{"w": torch.zeros(2)}]}, "sweep: params"),
        ({"params/v": [torch.zeros(5)]}, r"params/v: expected torch.float64 \(4,\)"),
    ],
)
def test_what_the_state_does_not_have_is_named(over: Any, says: str) -> None:
    state = ft.init_state(problem()[0], INJECTED, key=KEY)
    with pytest.raises(ValueError, match=says):
        ft.sweep(ft.train_step(loss_fn, INJECTED), over).init(state)


def test_a_value_that_the_state_cannot_hold_is_refused() -> None:
    tx = optim.inject_hyperparams(build)(learning_rate=0.1, weight_decay=0)
    state, step = ft.init_state(problem()[0], tx, key=KEY), ft.train_step(loss_fn, tx)
    assert ft.sweep(step, {"weight_decay": [0, 1]}).init(state).opt_state.hyperparams["weight_decay"].tolist() == [0, 1]
    with pytest.raises(TypeError, match=r"weight_decay: expected a number that fits torch.int64, .*came 0.5; .*0.0"):
        ft.sweep(step, {"weight_decay": [0, 0.5]}).init(state)
    for value in (None, "a", lambda count: 0.1):
        with pytest.raises(TypeError, match="hyperparams/learning_rate: expected numbers, one for each lane, came "):
            ft.sweep(step, {"learning_rate": [value]}).init(state)


def test_a_schedule_and_a_name_of_two_are_refused() -> None:
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=lambda count: 0.1 / (1 + count))
    with pytest.raises(ValueError, match="hyperparams/learning_rate: expected a number, came a schedule"):
        ft.sweep(ft.train_step(loss_fn, tx), {"learning_rate": [0.1]}).init(ft.init_state(problem()[0], tx, key=KEY))
    tx = optim.chain(INJECTED, INJECTED)
    with pytest.raises(ValueError, match="is the name of several hyper-parameters"):
        ft.sweep(ft.train_step(loss_fn, tx), {"learning_rate": [0.1]}).init(ft.init_state(problem()[0], tx, key=KEY))


def test_what_is_no_tensor_of_every_lane_is_refused() -> None:
    params, batches = problem()
    step, state = ft.train_step(loss_fn, INJECTED), ft.init_state(params, INJECTED, key=KEY)
    for other, says in (
        (
            tree.cast(params, torch.float32),
            r"params/v: expected torch.float64 \(4,\) in all lanes, .*float32 .* lane 1",
        ),
        (
            {"w": draw(0, 3, 5), "v": draw(1, 5)},
            r"params/v: expected torch.float64 \(4,\) in all lanes, .*\(5,\) in lane 1",
        ),
        ({"w": params["w"]}, "the states of lane 0 and lane 1: expected one structure"),
    ):
        with pytest.raises(ValueError, match=says):
            ft.sweep(step, {"init": [state, ft.init_state(other, INJECTED, key=KEY)]}).init()
    seeds = ft.sweep(step, {"seed": [0, 1]})
    with pytest.raises(TypeError, match="expected a state of init_state, or a function to one, came dict"):
        seeds.init(lambda key: params)
    with pytest.raises(ValueError, match=r"seed: expected a state with one key \(2,\), came \(2, 2\)"):
        ft.sweep(seeds, {"seed": [0, 1]}).init(seeds.init(state))
    counting = ft.sweep(lambda state, batch: (state, {"rows": 6}), {"seed": [0, 1]})
    with pytest.raises(TypeError, match="the result of the step: 1/rows: expected a tensor, .* came int 6"):
        counting(counting.init(state), batches[0])
    with pytest.raises(TypeError, match="expected a dict from names to lists, came list"):
        ft.sweep(step, [0, 1])  # type: ignore[arg-type]


def test_a_number_that_an_optimizer_reads_is_told_to_be_static() -> None:
    params, batches = problem()
    for static in ((), ("ns_steps", "ns_coeffs")):
        tx = optim.inject_hyperparams(optim.muon, static_args=static)(learning_rate=0.1)
        swept = ft.sweep(ft.train_step(loss_fn, tx), {"learning_rate": [0.1, 0.2]})
        states = swept.init(ft.init_state(params, tx, key=KEY))
        if static:
            swept(states, batches[0])
            continue
        with pytest.raises(
            TypeError, match=r"optim/preconditioning/newton_schulz.py:.*name it in static_args of ft.optim.inject_hyper"
        ):
            swept(states, batches[0])


def test_a_sweep_stops_when_all_lanes_have_a_row_of_skipped_steps(tmp_path: Any) -> None:
    params, batches = problem()
    guard = ft.train.skip_nonfinite()
    swept = ft.sweep(ft.train_step(loss_fn, INJECTED, guard=guard), {"seed": [0, 1]}, batches=True)
    states = swept.init(ft.init_state(params, INJECTED, key=KEY, guard=guard))
    bad = torch.tensor([[torch.nan, 1.0], [torch.nan, torch.nan], [1.0, torch.nan], [torch.nan, torch.nan]])  # by step
    own = [tree.map(lambda leaf, f=f: torch.stack([f[0] * leaf, f[1] * leaf]), batches[0]) for f in bad.double()]
    with pytest.raises(ft.train.Diverged, match="step 2: 1 steps in a row"):
        ft.fit(swept, states, own, steps=4, every=[ft.train.stop_after(1)])
    assert ft.fit(swept, states, own, steps=4, every=[ft.train.stop_after(2)]).step.tolist() == [4, 4]
    back = ft.train.roll_back(ft.checkpoint.every(1, tmp_path), after=1)
    with pytest.raises(ValueError, match="roll_back: expected the state of one run, came the lanes of a sweep"):
        ft.fit(swept, states, own, steps=4, every=[back])


def test_states_and_batches_of_other_lanes_are_refused() -> None:
    params, batches = problem()
    state = ft.init_state(params, INJECTED, key=KEY)
    two, three = (ft.sweep(ft.train_step(loss_fn, INJECTED), {"seed": list(range(n))}) for n in (2, 3))
    with pytest.raises(ValueError, match=r"states: step: expected \(2, ...\), came \(\)"):
        two(state, batches[0])
    with pytest.raises(ValueError, match=r"states: step: expected \(2, ...\), came \(3,\)"):
        two(three.init(state), batches[0])
    own = ft.sweep(ft.train_step(loss_fn, INJECTED), {"seed": [0, 1]}, batches=True)
    with pytest.raises(ValueError, match=r"batch: x: expected \(2, ...\), came \(6, 3\)"):
        own(own.init(state), batches[0])
    with pytest.raises(TypeError, match="learning_rate: expected a list"):
        ft.sweep(ft.train_step(loss_fn, INJECTED), {"learning_rate": 0.1})  # type: ignore[dict-item]
