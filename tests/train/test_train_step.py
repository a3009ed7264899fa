"""Laws of train_step beyond the gradient: buffers, and what may be accumulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import tree
from functrain.compiler import compilation

KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalized(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
    """A batch norm and a linear layer, as torch.nn.BatchNorm1d(3) and torch.nn.Linear(3, 1) have them."""
    x = batch["x"]  # (B, 3)
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    new = {
        "mean": 0.9 * buffers["mean"] + 0.1 * mean.detach(),
        "var": 0.9 * buffers["var"] + 0.1 * x.var(0).detach(),
        "count": buffers["count"] + 1,
    }
    h = (x - mean) * torch.rsqrt(variance + 1e-5) * params["scale"] + params["shift"]
    errors = h @ params["w"] - batch["y"]
    return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {}), new


def problem(rows: int) -> tuple[Any, Any, Any]:
    params = {"scale": torch.ones(3), "shift": torch.zeros(3), "w": draw(0, 3)}
    buffers = {"mean": torch.zeros(3), "var": torch.ones(3), "count": torch.tensor(0)}
    return params, buffers, {"x": draw(1, rows, 3) * 2 + 1, "y": draw(2, rows)}


@pytest.mark.parametrize(("way", "accumulate"), [("eager", 1), ("eager", 3), ("whole", 1), ("piecewise", 3)])
def test_buffers_equal_those_of_the_stateful_loop(way: str, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0 if way == "piecewise" else 2**62)
    params, buffers, batch = problem(12)
    tx = ft.optim.sgd(0.01)
    step = ft.train_step(normalized, tx, accumulate=accumulate, buffers=True)
    step = step if way == "eager" else ft.compile(step, donate=True)
    state = ft.init_state(tree.map(torch.clone, params), tx, key=KEY, buffers=buffers)

    norm, linear = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(params["w"][None])
    theirs = [*norm.parameters(), *linear.parameters()]
    sgd = torch.optim.SGD(theirs, lr=0.01)
    for _ in range(3):
        state, _ = step(state, batch)
        sgd.zero_grad()
        for x, y in zip(batch["x"].chunk(accumulate), batch["y"].chunk(accumulate), strict=True):
            (torch.sum((linear(norm(x)).squeeze(1) - y) ** 2) / 12).backward()
        sgd.step()
    # float32 sums of twelve terms in another order, over three steps
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(state.buffers["mean"], norm.running_mean, **close)
    torch.testing.assert_close(state.buffers["var"], norm.running_var, **close)
    assert int(state.buffers["count"]) == int(norm.num_batches_tracked) == 3 * accumulate
    torch.testing.assert_close(state.params["w"], linear.weight[0], **close)
    torch.testing.assert_close(state.params["scale"], norm.weight, **close)


def test_a_skipped_step_leaves_the_buffers() -> None:
    params, buffers, batch = problem(4)
    tx, scale = ft.optim.sgd(0.1), ft.loss_scale.static(2.0)
    state = ft.init_state(params, tx, key=KEY, buffers=buffers, loss_scale=scale)
    step = ft.train_step(normalized, tx, buffers=True, loss_scale=scale)
    bad, metrics = step(state, batch | {"y": torch.full((4,), torch.inf)})
    assert float(metrics["skipped"]) == 1.0
    assert all(tree.leaves(tree.map(torch.equal, bad.buffers, state.buffers)))
    assert int(step(state, batch)[0].buffers["count"]) == 1


def test_init_state_copies_buffers_and_wants_tensors() -> None:
    params, buffers, _ = problem(1)
    state = ft.init_state(params, ft.optim.sgd(0.1), key=KEY, buffers=buffers)
    assert state.buffers["mean"].data_ptr() != buffers["mean"].data_ptr()
    with pytest.raises(TypeError, match="buffers: norm/count: expected a tensor, came int 0"):
        ft.init_state(params, ft.optim.sgd(0.1), key=KEY, buffers={"norm": {"count": 0}})


def test_buffers_that_the_step_does_not_know_are_refused_and_the_reverse() -> None:
    params, buffers, batch = problem(4)
    tx = ft.optim.sgd(0.1)
    state = ft.init_state(params, tx, key=KEY, buffers=buffers)
    with pytest.raises(ValueError, match="the state has buffers that the step does not update; pass buffers=True"):
        ft.train_step(lambda p, b, k: torch.sum(p["w"]), tx)(state, batch)
    with pytest.raises(TypeError, match=r"expected loss_fn to return \(loss, new_buffers\), came Loss"):
        ft.train_step(lambda p, buffers, b, k: normalized(p, buffers, b, k)[0], tx, buffers=True)(state, batch)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate_rows": 2}, {"accumulate_rows": 9}])
def test_a_mean_cannot_be_accumulated(options: Any) -> None:
    params, _, batch = problem(5)
    tx = ft.optim.sgd(0.1)
    state = ft.init_state(params, tx, key=KEY)

    def mean(params: Any, batch: Any, key: Tensor) -> Tensor:
        return torch.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    for loss_fn in (mean, lambda p, b, k: (mean(p, b, k), {"metric": torch.ones(())})):
        with pytest.raises(TypeError, match="return ft.Loss"):
            ft.train_step(loss_fn, tx, **options)(state, batch)
        ft.train_step(loss_fn, tx)(state, batch)


def test_slices_by_rows_equal_the_whole_batch_of_any_size() -> None:
    params, buffers, _ = problem(1)

    def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        errors = torch.tanh(batch["x"] @ params["w"]) - batch["y"]
        return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {"largest": torch.sum(errors)})

    tx = ft.optim.sgd(0.1)
    state = ft.init_state(params, tx, key=KEY)
    whole, by_rows = ft.train_step(loss_fn, tx), ft.train_step(loss_fn, tx, accumulate_rows=4)
    for rows in (1, 4, 5, 8, 11):
        batch = problem(rows)[2]
        # float32 sums of eleven terms in another order
        for a, b in zip(tree.leaves(by_rows(state, batch)), tree.leaves(whole(state, batch)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parts_and_rows_are_not_both() -> None:
    with pytest.raises(ValueError, match="either a number of parts or rows, came parts=2 and rows=3"):
        ft.train_step(lambda p, b, k: p, ft.optim.sgd(0.1), accumulate=2, accumulate_rows=3)
    with pytest.raises(ValueError, match="expected rows >= 1, came 0"):
        ft.train_step(lambda p, b, k: p, ft.optim.sgd(0.1), accumulate_rows=0)


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_optimizer_that_reads_the_loss_gets_that_of_the_whole_batch(way: str, accumulate: int) -> None:
    params, _, batch = problem(12)
    tx = ft.optim.chain(ft.optim.skip_loss_spikes(ft.optim.polyak_sgd(0.1), window=2))

    def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        errors = batch["x"] @ params["w"] - batch["y"]
        return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {})

    step = ft.train_step(loss_fn, tx, accumulate=accumulate)
    step = step if way == "eager" else ft.compile(step)
    params = {"w": params["w"]}
    state, opt_state = ft.init_state(params, tx, key=KEY), tx.init(params)
    for _ in range(3):
        state, metrics = step(state, batch)
        loss, grads = ft.value_and_grad(lambda p: loss_fn(p, batch, KEY).total / 12)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = ft.optim.apply_updates(params, updates)
        # slices add in another order: a few roundings of 6e-8
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-5, atol=1e-6)
        assert tree.allclose(state.params, params, rtol=1e-5, atol=1e-6)
    assert tree.allclose(state.opt_state, opt_state, rtol=1e-5, atol=1e-6)


def test_arguments_in_another_order_or_kind_are_told_apart() -> None:
    params, tx, x = {"w": torch.ones(3)}, ft.optim.sgd(0.1), torch.ones(2, 3)

    def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        return ft.Loss(torch.sum(batch @ params["w"]), len(batch), {})  # type: ignore[arg-type]

    step: Any = ft.train_step
    state = ft.init_state(params, tx, key=KEY)
    with pytest.raises(TypeError, match="weight is a .. tensor, came 2"):
        step(loss_fn, tx)(state, x)
    with pytest.raises(TypeError, match=r"expected \(state, batch\).* came Tensor first"):
        step(loss_fn, tx)(x, state)
    with pytest.raises(TypeError, match=r"expected \(loss_fn, optimizer\)"):
        step(tx, loss_fn)
    init: Any = ft.init_state
    with pytest.raises(TypeError, match="came dict second"):
        init(tx, params, key=KEY)
    for key in (0, torch.Generator()):
        with pytest.raises(TypeError, match="expected a key"):
            init(params, tx, key=key)


def test_params_whose_graph_would_grow_with_every_step_are_refused() -> None:
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(lambda p, batch, key: torch.sum(p["w"] * batch), tx)
    with pytest.raises(ValueError, match="w: expected a tensor, came a Parameter"):
        ft.init_state({"w": torch.nn.Parameter(torch.ones(3))}, tx, key=KEY)
    state = ft.init_state({"w": torch.ones(3, requires_grad=True)}, tx, key=KEY)  # which an unrolled run may ask for
    with pytest.raises(ValueError, match="params/w: expected a tensor that does not require grad"):
        ft.fit(step, state, [torch.ones(3)], steps=1)
