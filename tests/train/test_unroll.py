"""Laws of unroll: gradients through training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import peak_bytes
from torch import Tensor

import functrain as ft
from functrain import optim, tree

KEY = ft.random.key(0)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64: some hundred roundings


def draw(seed: int, *shape: int) -> Tensor:
    return ft.random.normal(ft.random.key(seed), shape, torch.float64)


def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    hidden = ft.nn.dropout(torch.tanh(batch["x"] @ params["w"]), 0.2, key)  # (B, 4)
    errors = hidden @ params["v"] - batch["y"]  # (B,)
    return ft.Loss(torch.sum(batch["weight"] * errors**2), torch.sum(batch["weight"]), {})


def problem(steps: int) -> tuple[Any, list[Any]]:
    params = {"w": draw(0, 3, 4), "v": draw(1, 4)}
    ones = torch.ones(5, dtype=torch.float64)
    return params, [{"x": draw(10 + i, 5, 3), "y": draw(50 + i, 5), "weight": ones} for i in range(steps)]


TX = optim.inject_hyperparams(optim.adam)(learning_rate=0.1, eps_root=1e-8)


def after(argument: Any, steps: int, unrolled: Any = ft.unroll, **options: Any) -> Tensor:
    """The loss on the first batch after training, as a function of first params, learning rate and weights."""
    params, rate, weight = argument
    _, batches = problem(steps)
    state = ft.init_state(problem(1)[0], TX, key=KEY)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": rate}
    state = state._replace(params=params, opt_state=state.opt_state._replace(hyperparams=hyperparams))
    batches = [batch | {"weight": weight[i]} for i, batch in enumerate(batches)]
    state, metrics = unrolled(ft.train_step(loss_fn, TX), state, batches, **options)
    return loss_fn(state.params, problem(1)[1][0], KEY).total + metrics["loss"].mean()


def argument(steps: int) -> Any:
    return problem(1)[0], torch.tensor(0.05, dtype=torch.float64), torch.ones(steps, 5, dtype=torch.float64)


def test_gradients_are_differences_of_whole_runs() -> None:
    start = argument(4)
    value, grads = ft.value_and_grad(after)(start, 4)
    for seed in range(3):
        direction = tree.map(lambda leaf, seed=seed: draw(seed, *leaf.shape), start)
        along = [after(tree.add_scale(start, h, direction), 4) for h in (-1e-5, 1e-5)]
        # central difference: error h**2 times a third derivative, and 1e-16 / h
        torch.testing.assert_close(tree.vdot(grads, direction), (along[1] - along[0]) / 2e-5, rtol=1e-5, atol=1e-7)
    assert torch.equal(value, after(start, 4))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_recomputed_windows_change_nothing(steps: int) -> None:
    plain = ft.value_and_grad(after)(argument(steps), steps)
    again = ft.value_and_grad(after)(argument(steps), steps, recompute=True)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **CLOSE), again, plain)


def test_sgd_on_a_parabola_has_its_closed_form() -> None:
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    a = torch.tensor(1.5, dtype=torch.float64)
    step = ft.train_step(lambda p, batch, key: 0.5 * batch * p**2, tx)

    def last(p: Tensor, rate: Tensor) -> Tensor:
        state = ft.init_state(p.detach(), tx, key=KEY)
        hyperparams = {"learning_rate": rate}
        state = state._replace(params=p, opt_state=state.opt_state._replace(hyperparams=hyperparams))
        return ft.unroll(step, state, [a] * 7)[0].params

    p, rate = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    grads = ft.grad(last, argnums=(0, 1))(p, rate)
    shrink = 1 - rate * a
    torch.testing.assert_close(grads[0], shrink**7, **CLOSE)
    torch.testing.assert_close(grads[1], -7 * a * shrink**6 * p, **CLOSE)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_truncated_gradient_is_that_of_the_last_window(recompute: bool) -> None:
    def by_hand(step: Any, state: Any, batches: list[Any]) -> Any:
        rows = []
        for t, batch in enumerate(batches):
            if t in (3, 6):
                kept = state.opt_state.hyperparams
                state = tree.map(torch.Tensor.detach, state)
                state = state._replace(opt_state=state.opt_state._replace(hyperparams=kept))
            state, metrics = step(state, batch)
            rows.append(metrics)
        return state, tree.map(lambda *leaves: torch.stack(leaves), *rows)

    want = ft.value_and_grad(after)(argument(8), 8, by_hand)
    got = ft.value_and_grad(after)(argument(8), 8, recompute=recompute, truncate=3)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **CLOSE), got, want)
    plain = ft.value_and_grad(after)(argument(8), 8)
    assert torch.equal(got[0], plain[0]) and not torch.allclose(got[1][1], plain[1][1])


KEPT = {
    "guard": (TX, {"guard": ft.train.skip_nonfinite()}),
    "loss_scale": (TX, {"loss_scale": ft.loss_scale.static(2.0)}),
    "MultiSteps": (optim.MultiSteps(TX, 1, accumulator_dtype=torch.float64).gradient_transformation(), {}),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_or_not_by_a_condition_is_passed_on_through_a_cut(name: str) -> None:
    def rate_gradient(tx: Any, options: Any) -> Tensor:
        state = ft.init_state(problem(1)[0], tx, key=KEY, **options)
        (path,) = [path for path in tree.paths(state) if path.endswith("hyperparams/learning_rate")]

        def last(rate: Tensor) -> Tensor:
            found, _ = ft.unroll(
                ft.train_step(loss_fn, tx, **options), tree.set_at(state, path, rate), problem(5)[1], truncate=2
            )
            return torch.sum(found.params["w"])

        return ft.grad(last)(torch.tensor(0.05, dtype=torch.float64))

    torch.testing.assert_close(rate_gradient(*KEPT[name]), rate_gradient(TX, {}), **CLOSE)


def test_compiled_equals_eager() -> None:
    tx = optim.sgd(0.1)
    step = ft.train_step(lambda p, batch, key: torch.mean(torch.tanh(batch @ p) ** 2), tx)
    state = ft.init_state(draw(0, 3), tx, key=KEY)

    def last(p: Tensor) -> Tensor:
        return torch.sum(ft.unroll(step, state._replace(params=p), [draw(1, 4, 3)] * 2, recompute=True)[0].params)

    fn = ft.value_and_grad(last)
    got, want = ft.compile(fn)(draw(0, 3)), fn(draw(0, 3))
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **CLOSE), got, want)


def peak(steps: int, **options: Any) -> int:
    params = torch.ones(64, 64) / 64
    tx = optim.sgd(0.1, momentum=0.9)
    step = ft.train_step(lambda p, batch, key: torch.mean(torch.tanh(batch @ p) ** 2), tx)
    batches = [torch.ones(16, 64)] * steps

    def last(p: Tensor) -> Tensor:
        state = ft.init_state(params, tx, key=KEY)._replace(params=p)
        return torch.sum(ft.unroll(step, state, batches, **options)[0].params)

    return peak_bytes(lambda: ft.grad(last)(params))


def test_memory_grows_with_the_square_root_of_the_steps() -> None:
    plain, recomputed = ([peak(steps, recompute=flag) for steps in (16, 64)] for flag in (False, True))
    # four times the steps: four times the memory, and twice with windows, plus what does not grow
    assert 3.0 < plain[1] / plain[0] < 4.5, plain
    assert recomputed[1] / recomputed[0] < 2.3, recomputed
    assert recomputed[1] < 0.4 * plain[1], (recomputed, plain)


def test_what_cannot_be_unrolled_is_refused() -> None:
    state = ft.init_state(problem(1)[0], TX, key=KEY)
    step = ft.train_step(loss_fn, TX)
    with pytest.raises(ValueError, match="expected at least one batch"):
        ft.unroll(step, state, [])
    endless = ft.data.windows(torch.arange(99), batch=2, context=4, seed=0)
    for batches in (endless, problem(1)[1][0]):
        with pytest.raises(
            TypeError, match=r"expected a list of batches, one for each step, came \w+; write \[batches"
        ):
            ft.unroll(step, state, batches)
    with pytest.raises(TypeError, match="expected recompute=True or False, came 3"):
        ft.unroll(step, state, problem(1)[1], recompute=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected truncate of at least 1 step, came 0"):
        ft.unroll(step, state, problem(1)[1], truncate=0)
