"""A skipped step changes nothing but the counts, a kept one keeps its bits, and a row of skips ends the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain import checkpoint, tree
from functrain.train import Diverged, fit, skip_nonfinite, skip_spikes, stop_after

LAW = settings(deadline=None, derandomize=True, max_examples=25)
OPTIMIZER = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))


def loss_fn(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    loss = ft.Loss((error**2).sum() * batch["times"], torch.tensor(float(len(error))), {})
    return loss, {"seen": buffers["seen"] * 0.9 + batch["x"].mean(0)}


def batch(number: int, times: float = 1.0) -> Any:
    key = ft.random.key(number)
    x = ft.random.normal(key, (4, 3))
    return {"x": x, "y": x.sum(1), "times": torch.full((4,), times)}


def start(guard: Any, loss_scale: Any = None) -> Any:
    params = {"w": torch.ones(3) * 0.1, "b": torch.zeros(())}
    buffers = {"seen": torch.zeros(3)}
    return ft.init_state(params, OPTIMIZER, key=ft.random.key(0), buffers=buffers, guard=guard, loss_scale=loss_scale)


def made(guard: Any, accumulate: int = 1, loss_scale: Any = None) -> Any:
    def one(params: Any, buffers: Any, rows: Any, key: Any) -> Any:
        return loss_fn(params, buffers, {**rows, "times": rows["times"][0]}, key)

    return ft.train_step(
        one, OPTIMIZER, accumulate=accumulate, buffers=True, guard=guard, loss_scale=loss_scale
    )  # fmt: skip


def trained(state: Any) -> Any:
    return state.params, state.opt_state, state.buffers


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@LAW
@given(st.lists(st.sampled_from([1.0, 1.0, math.nan, math.inf, -math.inf]), max_size=9), st.sampled_from([1, 2]))
def test_skipped_steps_are_as_if_they_had_not_been(times: list[float], accumulate: int) -> None:
    guard = skip_nonfinite()
    guarded, plain = made(guard, accumulate), made(None, accumulate)
    state, wanted, in_row = start(guard), start(None), 0
    for number, factor in enumerate(times):
        before = state
        state, metrics = guarded(state, batch(number, factor))
        good = math.isfinite(factor)
        in_row = 0 if good else in_row + 1
        if good:
            wanted, other = plain(wanted, batch(number))
            assert torch.equal(metrics["loss"], other["loss"])
        else:
            assert same(trained(state), trained(before))
        assert same(trained(state), trained(wanted))
        assert (float(metrics["skipped"]), int(metrics["skipped_in_row"])) == (float(not good), in_row)
    assert int(state.step) == len(times)
    assert int(state.guard.skipped) == sum(not math.isfinite(factor) for factor in times)


@pytest.mark.parametrize("made_guard", [skip_nonfinite, lambda: skip_spikes(4, 3.0)], ids=["nonfinite", "spikes"])
def test_compiled_and_donated_equals_eager_and_guarding_changes_no_bit(made_guard: Any) -> None:
    guard = made_guard()
    eager, compiled, plain = made(guard), ft.compile(made(guard), donate=True), ft.compile(made(None))
    a, b, c = start(guard), start(guard), start(None)
    for number, factor in enumerate((1.0, 1.0, math.nan, 1.0, 1e6, 1.0)):
        a, seen = eager(a, batch(number, factor))
        b, found = compiled(b, batch(number, factor))
        assert torch.equal(seen["skipped"], found["skipped"])
        assert torch.equal(seen["skipped_in_all"], found["skipped_in_all"])
        if not seen["skipped"]:
            c, _ = plain(c, batch(number, factor))
        assert same(trained(b), trained(c))
    # one rounding of the error's sum of squares, compiled as a product and a sum in one
    torch.testing.assert_close(trained(a), trained(b), rtol=1e-5, atol=1e-6)


def test_a_spike_is_skipped_and_a_window_of_losses_decides() -> None:
    guard = skip_spikes(window=6, deviations=4.0)
    state, good = guard.init(), torch.tensor(True)
    seen: list[float] = []
    for loss in (9.0, 5.0, 100.0, 4.0, 4.2, 4.1, 300.0, math.nan, 4.0, 3.9, 6.0):
        finite = torch.tensor(math.isfinite(loss))
        kept = seen[-6:]
        limit = math.inf if len(kept) < 3 else torch.tensor(kept).mean() + 4.0 * torch.tensor(kept).std()
        keep, state = guard.judge(state, torch.tensor(loss), good & finite)
        assert bool(keep) == (math.isfinite(loss) and loss <= limit), loss
        seen += [loss] if keep else []
    # the third was before half a window; it left the window before the 6.0 came
    assert seen == [9.0, 5.0, 100.0, 4.0, 4.2, 4.1, 4.0, 3.9, 6.0] and int(state.skipped) == 2


def test_with_a_loss_scale_both_skip_and_the_scale_follows_overflow_alone() -> None:
    guard, scale = skip_spikes(2, 2.0), ft.loss_scale.dynamic(4.0)
    step, state = made(guard, loss_scale=scale), start(guard, scale)
    for number, factor in enumerate((1.0, 1.0, 1.0, 1e6)):
        state, metrics = step(state, batch(number, factor))
    assert float(metrics["skipped"]) == 1.0 and float(state.loss_scale.scale) == 4.0
    state, metrics = step(state, batch(9, math.inf))
    assert float(metrics["skipped"]) == 1.0 and float(state.loss_scale.scale) == 2.0
    assert int(metrics["skipped_in_row"]) == 2 and int(metrics["skipped_in_all"]) >= 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflow_that_a_smaller_scale_mends_is_no_skip_of_the_guard(accumulate: int) -> None:
    optimizer, guard = ft.optim.sgd(0.1), skip_nonfinite()

    def loss_fn(params: Any, rows: Any, key: Any) -> Any:
        # its gradient is the mean of the rows, however large, and its value 0
        return ft.Loss(torch.sum((params["w"] - params["w"].detach()) * rows), rows.new_tensor(float(len(rows))), {})

    def run(scale: Any, slopes: list[float]) -> tuple[list[tuple[float, ...]], Any]:
        options: Any = {"loss_scale": scale, "guard": guard}
        step = ft.train_step(loss_fn, optimizer, accumulate=accumulate, **options)
        state = ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0), **options)
        seen = []
        for slope in slopes:
            state, metrics = step(state, torch.full((2,), slope))
            seen.append(tuple(float(metrics[name]) for name in ("loss_scale", "skipped", "skipped_in_row")))
        return seen, state

    large = 1e38 / accumulate  # whose sum is infinite in float32 at a scale above 3
    seen, state = run(ft.loss_scale.dynamic(8.0), [large] * 3)
    assert seen == [(8.0, 1.0, 0.0), (4.0, 1.0, 0.0), (2.0, 0.0, 0.0)] and int(state.guard.skipped) == 0
    # where no scale is the reason: the loss is not finite, it is as small as it may be, or it stays as it is
    assert run(ft.loss_scale.dynamic(8.0), [math.nan, math.nan])[0] == [(8.0, 1.0, 1.0), (4.0, 1.0, 2.0)]
    assert run(ft.loss_scale.static(8.0), [large] * 2)[0] == [(8.0, 1.0, 1.0), (8.0, 1.0, 2.0)]
    # one between steps that count neither counts nor ends their row
    seen, state = run(ft.loss_scale.dynamic(16.0), [math.nan, large, math.nan, 1.0])
    assert [row[2] for row in seen] == [1.0, 1.0, 2.0, 0.0] and int(state.guard.skipped) == 2


def test_gradients_that_no_scale_makes_finite_count_once_it_is_at_1() -> None:
    optimizer, guard, scale = ft.optim.sgd(0.1), skip_nonfinite(), ft.loss_scale.dynamic(4.0)
    # of 0 the value is 0, and the slope infinite
    step = ft.train_step(lambda params, x, key: torch.sqrt(params["w"]), optimizer, loss_scale=scale, guard=guard)
    state = ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0), loss_scale=scale, guard=guard)
    with pytest.raises(Diverged, match="step 5: 3 steps in a row were skipped"):
        fit(step, state, [torch.zeros(())] * 9, steps=9, every=[stop_after(3)])


class Batches:
    """Batch t, not finite from `bad` on."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __getitem__(self, t: int) -> Any:
        return batch(t, math.nan if t >= self.bad else 1.0)


@pytest.mark.parametrize(("read_every", "stops"), [(1, 8), (5, 10)])
def test_a_row_of_skipped_steps_ends_the_run_with_the_last_good_state(read_every: int, stops: int) -> None:
    guard = skip_nonfinite()
    step = made(guard)
    with pytest.raises(Diverged, match=f"step {stops}: {stops - 5} steps in a row were skipped") as caught:
        fit(step, start(guard), Batches(5), steps=99, every=[stop_after(3, read_every=read_every)])
    assert same(trained(caught.value.state), trained(fit(step, start(guard), Batches(5), steps=5)))


def test_counts_are_saved_so_a_run_that_is_started_again_stops_at_the_same_step(tmp_path: Path) -> None:
    guard = skip_spikes(4)
    step = made(guard)
    state = fit(step, start(guard), Batches(5), steps=6, every=[checkpoint.every(1, tmp_path)])
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    again = checkpoint.load(newest, like=start(guard))
    assert same(again, state) and tree.structure(again) == tree.structure(state)
    with pytest.raises(Diverged, match="step 8: 3 steps"):
        fit(step, again, Batches(5), steps=99, every=[stop_after(3)])


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="the state has no guard and the step one; give init_state and train_step the"):
        made(skip_nonfinite())(start(None), batch(0))
    with pytest.raises(ValueError, match="the state has one guard and the step none"):
        made(None)(start(skip_nonfinite()), batch(0))
    with pytest.raises(ValueError, match="expected a metric 'skipped_in_row', came loss; give train_step a guard="):
        stop_after(3)(1, None, {"loss": torch.tensor(1.0)})
    for bad in (lambda: stop_after(0), lambda: stop_after(1, read_every=0), lambda: skip_spikes(1)):
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(ValueError, match="positive deviations"):
        skip_spikes(4, -1.0)


def _spoiling(at: int, where: str) -> Any:
    """SGD whose update, or state, is not finite at one step, however finite the gradient is."""

    def init(params: Any) -> Any:
        return {"count": torch.tensor(0), "mean": torch.zeros(3), "best": torch.tensor(math.inf)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        bad = torch.where(state["count"] == at, torch.tensor(math.inf), 0.0)
        new = {"count": state["count"] + 1, "mean": state["mean"] * 0.5 + 1.0, "best": state["best"]}
        if where == "state":
            return tree.map(lambda g: -0.1 * g, updates), {**new, "mean": new["mean"] + bad}
        return tree.map(lambda g: -0.1 * g + (bad - bad if where == "nan" else bad), updates), new

    return ft.optim.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("how", "where", "compiled"),
    [
        (how, where, False)
        for how in ("guard", "spikes", "loss scale", "apply_if_finite")
        for where in ("inf", "nan", "state")
    ]
    + [("guard", "state", True), ("loss scale", "nan", True), ("apply_if_finite", "inf", True)],
)
def test_a_step_whose_new_state_alone_is_not_finite_changes_nothing(where: str, how: str, compiled: bool) -> None:
    optimizer = _spoiling(2, where)
    if how == "apply_if_finite":
        optimizer = ft.optim.apply_if_finite(optimizer, 5)
    guard = {"guard": skip_nonfinite(), "spikes": skip_spikes()}.get(how)
    scale = ft.loss_scale.dynamic(8.0, growth_interval=3) if how == "loss scale" else None
    options: Any = {"guard": guard, "loss_scale": scale}
    step: Any = ft.train_step(lambda params, batch, key: torch.sum((params["w"] - batch) ** 2), optimizer, **options)
    step = ft.compile(step, donate=True) if compiled else step
    state = ft.init_state({"w": torch.zeros(3)}, optimizer, key=ft.random.key(0), **options)
    seen = []
    for t in range(4):
        before = tree.map(torch.clone, (state.params, state.opt_state))
        state, metrics = step(state, torch.arange(3.0))
        seen.append(same(before[0], state.params))
        assert state.params["w"].isfinite().all()
        if t >= 2 and how != "apply_if_finite":
            # the state is that of before the step, so that the next one meets the same fault
            assert same(before[1], state.opt_state) and metrics["skipped"] == 1
    assert seen == [False, False, True, True]
    if scale is not None:  # which follows the gradients, finite all along
        assert float(state.loss_scale.scale) == 16.0
    if how == "apply_if_finite":
        assert int(state.opt_state.total_notfinite) == 2


def test_a_sum_that_overflows_is_not_kept() -> None:
    optimizer = ft.optim.sgd(0.1, momentum=0.9)
    state = ft.init_state({"w": torch.zeros(2)}, optimizer, key=ft.random.key(0), guard=skip_nonfinite())

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        return torch.sum((params["w"] - params["w"].detach()) * batch)  # 0, and its gradient the batch

    step = ft.train_step(loss_fn, optimizer, guard=skip_nonfinite())
    for slope, skipped in ((2e38, 0), (2e38, 1), (-1.8e38, 0), (1.0, 0)):
        state, metrics = step(state, torch.tensor([slope, 1.0]))
        assert metrics["skipped"] == skipped
    assert all(leaf.isfinite().all() for leaf in tree.leaves((state.params, state.opt_state)))
