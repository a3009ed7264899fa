"""What a run may meet and stay the same to the bit: kills in a step, ends of epochs, workers, signals, evaluation."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_crashes import forked
from shown import Shown

import functrain as ft
from functrain import checkpoint, data, tree
from functrain.recipes import pretrain
from functrain.recipes.config import PRESETS
from functrain.train import Interrupted, fit

OPTIMIZER = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))
IDS = ft.random.randint(ft.random.key(1), (104,), 0, 8)
EPOCH = 6  # batches: 12 windows of 8 tokens, 2 in a batch


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    hidden = params["e"][batch["tokens"]] * ft.random.bernoulli(key, 0.9, (4,))
    return ft.losses.next_token(hidden @ params["w"], batch["targets"], batch["mask"])


def start() -> Any:
    key = ft.random.key(0)
    params = {"e": ft.random.normal(key, (8, 4)), "w": ft.random.normal(ft.random.fold_in(key, 1), (4, 8))}
    return ft.init_state(params, OPTIMIZER, key=key)


def step(loss: Any = loss_fn) -> Any:
    return ft.train_step(loss, OPTIMIZER, accumulate=2)


def batches() -> Any:
    return data.windows(IDS, batch=2, context=8, seed=0)


def resumed(run: Path) -> Any:
    newest = checkpoint.latest(run)
    return start() if newest is None else checkpoint.load(newest, like=start())


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return tree.structure(a) == tree.structure(b) and all(torch.equal(x, y) for x, y in pairs)


def test_an_epoch_has_as_many_batches_as_the_tests_say() -> None:
    assert batches().order.windows_per_epoch == 2 * EPOCH


@pytest.mark.parametrize("stop", [EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH])
@pytest.mark.parametrize("workers", [1, 3])
def test_stopped_around_the_end_of_an_epoch_and_read_by_other_workers(stop: int, workers: int, tmp_path: Path) -> None:
    whole = fit(step(), start(), batches(), steps=2 * EPOCH + 3)
    fit(step(), start(), batches(), steps=stop, every=[checkpoint.every(100, tmp_path)])
    rest = data.prefetch(batches(), stop, 2 * EPOCH + 3, workers=workers)
    assert same(whole, fit(step(), resumed(tmp_path), rest, steps=2 * EPOCH + 3))


@pytest.mark.parametrize("slices", [1, 2, 5, 8])
def test_killed_between_two_micro_batches_of_a_step(slices: int, tmp_path: Path) -> None:
    """The process dies when so many slices are done: an odd number is the middle of a step."""
    left = slices

    def dying(params: Any, batch: Any, key: Any) -> ft.Loss:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return loss_fn(params, batch, key)

    def work() -> None:
        fit(step(dying), start(), batches(), steps=9, every=[checkpoint.every(1, tmp_path)])

    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL
    state = resumed(tmp_path)
    assert int(state.step) == slices // 2
    assert same(fit(step(), start(), batches(), steps=9), fit(step(), state, batches(), steps=9))


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_signal_within_a_save_waits_for_it(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(os, call)
    hook = checkpoint.every(2, tmp_path)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, signalled)
        with pytest.raises(Interrupted) as stopped:
            fit(step(), start(), batches(), steps=9, every=[hook])
    assert stopped.value.code == 143 and int(stopped.value.state.step) == 2
    assert [path.name for path in checkpoint.list(tmp_path)] == ["step-00000002"]
    assert same(stopped.value.state, resumed(tmp_path))
    assert same(fit(step(), start(), batches(), steps=9), fit(step(), resumed(tmp_path), batches(), steps=9))


def test_a_signal_within_the_compilation_ends_after_the_first_step_which_is_saved(tmp_path: Path) -> None:
    compiled, sent = ft.compile(step()), list[float]()

    def signalled(state: Any, batch: Any) -> Any:
        def send() -> None:
            time.sleep(0.2)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=send)
        thread.start()
        result = compiled(state, batch)
        assert sent and time.monotonic() > sent[0], "the compilation took less time than the signal"
        thread.join()
        return result

    with pytest.raises(Interrupted) as stopped:
        fit(signalled, start(), batches(), steps=9, every=[checkpoint.every(100, tmp_path)])
    assert int(stopped.value.state.step) == 1 and same(stopped.value.state, resumed(tmp_path))
    assert same(compiled(start(), batches()[0])[0], stopped.value.state)


def test_evaluating_logging_and_saving_change_no_bit_of_training(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    plain = dataclasses.replace(
        PRESETS["smoke"],
        compile=False,
        steps=12,
        data=dataclasses.replace(PRESETS["smoke"].data, corpus=str(tmp_path / "text.txt")),
        model=dataclasses.replace(PRESETS["smoke"].model, dropout=0.1),
    )
    rare = dataclasses.replace(plain, evaluate_every=1000, log_every=1000, checkpoint_every=1000)
    often = dataclasses.replace(plain, evaluate_every=1, evaluate_batches=3, log_every=1, checkpoint_every=1)
    before = torch.random.get_rng_state()
    ends = [
        pretrain.main(config, tmp_path / name, Shown()).state for name, config in (("rare", rare), ("often", often))
    ]
    assert same(*ends)
    assert torch.equal(torch.random.get_rng_state(), before), "nothing reads the global generator"
