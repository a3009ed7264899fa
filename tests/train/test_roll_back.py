"""A run that goes back past bad batches equals the run whose data lacked them, whatever stops it on the way."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_crashes import forked
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain import checkpoint, tree
from functrain.train import Diverged, Interrupted, fit, roll_back, skip_nonfinite, skip_spikes

EVERY, AFTER = 5, 3
SCHEDULE = ft.schedules.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 30)
OPTIMIZER = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(SCHEDULE))


def loss_fn(params: Any, batch: Any, key: Any) -> Any:
    kept = batch["x"] * ft.random.bernoulli(key, 0.8, (3,))
    return torch.mean((kept @ params["w"] - 1.0) ** 2) * batch["times"]


class Batches:
    """Batch t, of the numbers t if no other is given, not finite where `bad` has it."""

    def __init__(self, bad: Any = (), order: Callable[[int], int] = int, times: float = math.nan) -> None:
        self.bad, self.order, self.times = frozenset(bad), order, times

    def __getitem__(self, t: int) -> Any:
        t = self.order(t)
        factor = torch.tensor(self.times if t in self.bad else 1.0)
        return {"x": ft.random.normal(ft.random.key(t), (4, 3)), "times": factor}


STEP = ft.train_step(loss_fn, OPTIMIZER, guard=skip_nonfinite())


def start(guard: Any = None) -> Any:
    params = {"w": torch.zeros(3)}
    return ft.init_state(params, OPTIMIZER, key=ft.random.key(0), guard=skip_nonfinite() if guard is None else guard)


def run(folder: Path, batches: Any, steps: int = 20, step: Any = STEP, first: Any = start, **options: Any) -> Any:
    """Go on with the run in a folder, as a program that is started again does."""
    saves = checkpoint.every(EVERY, folder)
    newest = checkpoint.latest(folder)
    state = first() if newest is None else checkpoint.load(newest, like=first())
    if newest is None:
        saves(0, state)
    back = roll_back(saves, **{"after": AFTER, **options})
    return fit(step, state, batches, steps=steps, every=[back])


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return tree.structure(a) == tree.structure(b) and all(torch.equal(x, y) for x, y in pairs)


def without_counts(state: Any) -> Any:
    zero = torch.tensor(0)
    return state._replace(guard=state.guard._replace(rolled_back=zero, left_out=zero))


def plain(order: Callable[[int], int], bad: Any = (), steps: int = 20) -> Any:
    return fit(STEP, start(), Batches(bad, order), steps=steps)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 16), st.integers(1, 8), st.integers(0, 4))
def test_a_poisoned_stretch_is_left_out_as_if_the_data_lacked_it(
    tmp_path_factory: pytest.TempPathFactory, first: int, length: int, skip: int
) -> None:
    bad = range(first, first + length)
    found = run(tmp_path_factory.mktemp("run"), Batches(bad), skip=skip)
    # the rule in its own words: of every AFTER bad batches, and `skip` after them, none is there from the checkpoint on
    saved, read, gone = first - first % EVERY, first, 0
    while sum(t in bad for t in range(read, read + AFTER)) == AFTER:
        gone, read = gone + 1, read + AFTER + skip
        if gone and read not in bad:
            break
    wanted = plain(lambda t: t if not gone or t < saved else t - saved + read, bad)
    assert int(found.guard.rolled_back) == gone and int(found.guard.left_out) == (read - saved if gone else 0)
    assert same(without_counts(found), without_counts(wanted))
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(found))


def test_a_loss_that_stays_high_sends_back_too(tmp_path: Path) -> None:
    guard = skip_spikes(window=4, deviations=4.0)
    step = ft.train_step(loss_fn, OPTIMIZER, guard=guard)
    high = Batches(range(11, 15), times=1e4)
    found = run(tmp_path, high, step=step, first=lambda: start(guard), skip=1)
    lacking = Batches(order=lambda t: t if t < 10 else t + 5)
    wanted = fit(step, start(guard), lacking, steps=20)
    assert int(found.guard.rolled_back) == 1 and same(without_counts(found), without_counts(wanted))


BAD = [*range(7, 10), 13, *range(18, 21)]


class Dying(Batches):
    """The process is killed when so many batches were asked for."""

    left = 10**9

    def __getitem__(self, t: int) -> Any:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().__getitem__(t)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    state = run(tmp_path_factory.mktemp("whole"), Batches(BAD))
    assert int(state.guard.rolled_back) == 2 and int(state.guard.skipped) == 1
    return state


@pytest.mark.parametrize("lives", [[9], [12], [17], [13, 4], [24], [18, 3, 3, 9], [31]])
def test_killed_before_within_and_after_going_back_it_has_the_same_bits(
    lives: list[int], whole: Any, tmp_path: Path
) -> None:
    for left in lives:

        def work(left: int = left) -> None:
            batches = Dying(BAD)
            batches.left = left
            run(tmp_path, batches)

        assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL
    assert same(run(tmp_path, Batches(BAD)), whole)


@pytest.mark.parametrize("stops", [[6], [8], [11, 2, 2], [6, 1, 1, 2, 3, 3], [1] * 9])
def test_stopped_by_signals_it_goes_back_to_the_same_checkpoint(stops: list[int], whole: Any, tmp_path: Path) -> None:
    """What a signal saves in between is no place to go back to, and pushes none out."""
    for calls in stops:
        left = calls

        def stepping(state: Any, batch: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return STEP(state, batch)

        with pytest.raises(Interrupted):
            run(tmp_path, Batches(BAD), step=stepping)
    assert same(run(tmp_path, Batches(BAD)), whole)


@pytest.mark.parametrize("before", [True, False])
def test_killed_while_a_checkpoint_is_set_aside(before: bool, whole: Any, tmp_path: Path) -> None:
    saves = checkpoint.every(EVERY, tmp_path)
    saves.save(6, fit(STEP, start(), Batches(BAD), steps=6, every=[saves]))
    del saves

    def work() -> None:
        rename = os.rename

        def dying(old: Any, new: Any) -> None:
            if "abandoned" in str(new):
                if not before:
                    rename(old, new)
                os.kill(os.getpid(), signal.SIGKILL)
            rename(old, new)

        os.rename = dying
        run(tmp_path, Batches(BAD))

    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL
    assert [path.name for path in checkpoint.list(tmp_path)] == ["step-00000005"] + ["step-00000006"] * before
    assert same(run(tmp_path, Batches(BAD)), whole)
    assert len(list((tmp_path / "checkpoints").glob("abandoned-step-00000006-*"))) == 1


def test_what_is_never_finite_again_ends_the_run_and_loses_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Batches(range(12, 10**6))
    with caplog.at_level(logging.WARNING), pytest.raises(Diverged, match="step 13: .*after going back 2 times") as end:
        run(tmp_path, bad, steps=99, times=2)
    assert [record.getMessage() for record in caplog.records] == [
        "step 15: 3 steps in a row were skipped; going back to step 10, from batch 15 on (1 of 2 times)",
        "step 13: 3 steps in a row were skipped; going back to step 10, from batch 18 on (2 of 2 times)",
    ]
    assert [path.name for path in checkpoint.list(tmp_path)] == ["step-00000005", "step-00000010"]
    good = plain(int, steps=10)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and same(checkpoint.load(newest, like=start()), good)
    assert same((end.value.state.params, end.value.state.opt_state), (good.params, good.opt_state))
    with pytest.raises(Diverged, match="after going back 2 times"):
        run(tmp_path, bad, steps=99, times=2)
    assert int(run(tmp_path, Batches(range(12, 19)), steps=20, times=3).guard.rolled_back) == 2


def test_without_a_checkpoint_before_the_row_it_ends(tmp_path: Path) -> None:
    hook = roll_back(checkpoint.every(EVERY, tmp_path), after=AFTER)
    with pytest.raises(Diverged, match="with no checkpoint before them to go back to"):
        fit(STEP, start(), Batches(range(3, 6)), steps=9, every=[hook])
    assert checkpoint.list(tmp_path) == []


def test_what_another_hook_saves_within_the_row_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    saves = checkpoint.every(EVERY, tmp_path)
    found = fit(STEP, start(), Batches(range(8, 11)), steps=20, every=[saves, roll_back(saves, after=AFTER)])
    assert same(without_counts(found), without_counts(plain(lambda t: t if t < 5 else t + 6)))


def test_a_signal_after_going_back_saves_though_that_step_was_saved_before(tmp_path: Path) -> None:
    hook = roll_back(checkpoint.every(EVERY, tmp_path), after=AFTER)
    hook.save(6, fit(STEP, start(), Batches(BAD), steps=6, every=[hook]))

    def stopping(t: int, state: Any, metrics: Any) -> None:
        if int(state.guard.rolled_back) and t == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        fit(STEP, checkpoint.load(checkpoint.list(tmp_path)[-1]), Batches(BAD), steps=20, every=[stopping, hook])
    assert int(stopped.value.state.guard.left_out) == 5
    assert same(checkpoint.load(tmp_path / "checkpoints" / "step-00000006"), stopped.value.state)


def test_within_a_row_a_stop_alone_saves_and_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    bad = range(8, 12)
    for stop in (10, 11):

        def stopping(t: int, state: Any, metrics: Any, stop: int = stop) -> None:
            if t == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        hook = roll_back(checkpoint.every(EVERY, tmp_path), after=4)
        newest = checkpoint.latest(tmp_path)
        state = start() if newest is None else checkpoint.load(newest, like=start())
        with pytest.raises(Interrupted):
            fit(STEP, state, Batches(bad), steps=20, every=[stopping, hook])
    # 10 is an n-th step, and was not saved as one
    assert [path.name[-2:] for path in checkpoint.list(tmp_path)] == ["05", "10", "11"]
    assert int(run(tmp_path, Batches(bad), after=4).guard.left_out) == 7


@pytest.mark.parametrize("skip", [0, 2])
def test_an_iterator_goes_on_after_the_row(skip: int, tmp_path: Path) -> None:
    def rows() -> Iterator[Any]:
        return (Batches(range(7, 10))[t] for t in itertools.count())

    found = run(tmp_path / "a", rows(), skip=skip)
    assert int(found.guard.rolled_back) == 1
    assert same(found, run(tmp_path / "b", Batches(range(7, 10)), skip=skip))


def test_an_iterator_of_a_run_that_was_stopped_begins_after_what_is_left_out(whole: Any, tmp_path: Path) -> None:
    state = run(tmp_path, Batches(BAD), steps=12)
    first = int(state.step) + int(state.guard.left_out)
    assert first == 17
    assert same(run(tmp_path, (Batches(BAD)[t] for t in itertools.count(first))), whole)


def test_too_few_batches_for_what_is_left_out_are_told(tmp_path: Path) -> None:
    few = [Batches(range(7, 10))[t] for t in range(20)]
    with pytest.raises(ValueError, match="20 batches for steps=20 after 5 that are left out"):
        run(tmp_path, few)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    saves = checkpoint.every(EVERY, tmp_path)
    for options in ({"times": -1}, {"skip": 0.5}, {"after": 0}, {"read_every": 0}):
        with pytest.raises(ValueError, match="expected"):
            roll_back(saves, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_checkpoint_that_is_not_finite_is_passed_over(where: str, tmp_path: Path, caplog: Any) -> None:
    saves = checkpoint.every(1, tmp_path)
    state = start()
    for t in range(4):
        saves(t, state._replace(step=torch.tensor(t)), {})
    nan = tree.map(lambda leaf: leaf * math.nan if leaf.is_floating_point() else leaf, getattr(state, where))
    spoilt = state._replace(step=torch.tensor(4), **{where: nan})
    saves(4, spoilt, {})
    back = roll_back(saves, after=2)
    with caplog.at_level(logging.WARNING):
        got = back.go_back(Diverged(6, 2, spoilt))
    assert int(got.step) == 3 and int(got.guard.rolled_back) == 1 and same(got.params, state.params)
    assert "step-00000004: its params, or what else is trained, are not finite; passing over it" in caplog.text
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000003"


def test_with_no_finite_checkpoint_the_run_ends(tmp_path: Path) -> None:
    saves = checkpoint.every(1, tmp_path)
    spoilt = start()._replace(params={"w": torch.full((3,), math.nan)})
    saves(0, spoilt, {})
    with pytest.raises(Diverged, match="with no checkpoint before them whose params are finite to go back to"):
        roll_back(saves, after=2).go_back(Diverged(2, 2, spoilt))
