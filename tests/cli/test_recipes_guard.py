"""`functrain train` skips what is not finite, shows it, and goes back past it where it is asked to."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from shown import Shown

import functrain as ft
from functrain import checkpoint, tree
from functrain.recipes import folder, pretrain, record, texts, toml
from functrain.recipes.config import PRESETS, Config
from functrain.train import Diverged, Interrupted
from functrain.train.watching.rows import OF_THE_MACHINE


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = tmp_path_factory.mktemp("corpus") / "text.txt"
    text.write_text("".join(f"line {i} says that {i} and {i * i} are numbers\n" for i in range(200)))
    smoke = PRESETS["smoke"]
    data = dataclasses.replace(smoke.data, corpus=str(text))
    return dataclasses.replace(
        smoke, data=data, compile=False, steps=24, checkpoint_every=6, log_every=4, stop_after_nonfinite=4
    )


@pytest.fixture
def poisoned(config: Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the loss of some batches of the run NaN, told by their tokens; none until it is called."""
    loss_of, bad = pretrain.loss_of, set[int]()

    def of(*args: Any) -> Any:
        loss_fn = loss_of(*args)

        def poisoned_loss(params: Any, batch: Any, key: Any) -> ft.Loss:
            loss = loss_fn(params, batch, key)
            return loss._replace(total=loss.total * (math.nan if _number(batch) in bad else 1.0))

        return poisoned_loss

    monkeypatch.setattr(pretrain, "loss_of", of)

    def poison(*stretch: int) -> None:
        ids = ft.data.tokenize(texts.read(config.data).train)
        windows = ft.data.windows(ids, batch=config.batch, context=config.model.context, seed=config.seed)
        bad.update(_number(windows[t]) for t in stretch)

    return poison


def _number(batch: Any) -> int:
    tokens = batch["tokens"].reshape(-1)
    return int((tokens * torch.arange(1, len(tokens) + 1)).sum())


def numbers(run: Path) -> list[Any]:
    rows = record.rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def same(a: Any, b: Any) -> bool:
    return tree.structure(a) == tree.structure(b) and all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(config: Config, poisoned: Any, tmp_path: Path) -> None:
    poisoned(9, 10, 17)
    show = Shown()
    state = pretrain.main(config, tmp_path, show).state
    assert int(state.step) == 24 and all(torch.isfinite(leaf).all() for leaf in tree.leaves(state))
    assert [note for note in show.notes if note.startswith("step")] == [
        f"step {t}: loss nan, gradient norm nan: skipped ({row} in a row)" for t, row in [(10, 1), (11, 2), (18, 1)]
    ]
    rows = numbers(tmp_path)
    assert [row["step"] for row in rows if row["skipped"]] == [10, 11, 18] and rows[-1]["skipped_in_all"] == 3
    assert [path.name[-2:] for path in checkpoint.list(tmp_path)] == ["12", "24"], "18 is within a row"


@pytest.mark.parametrize("stops", [[], [15], [9, 10, 16]])
def test_a_run_goes_back_past_bad_batches_whatever_stops_it(
    stops: list[int], config: Config, poisoned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, roll_backs=1, roll_back_skip=1)
    poisoned(*range(13, 20))
    for stop in stops:
        with monkeypatch.context() as patched:
            call = record.Record.__call__

            def stopping(self: Any, t: int, *args: Any, call: Any = call, stop: int = stop) -> None:
                if t == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                call(self, t, *args)

            patched.setattr(record.Record, "__call__", stopping)
            with pytest.raises(Interrupted):
                pretrain.main(config, tmp_path / "run", Shown())
    state = pretrain.main(config, tmp_path / "run", Shown()).state
    # 4 skipped steps in a row are seen at step 20; it goes back to 12, and with one more left out begins at batch 21
    assert int(state.guard.rolled_back) == 1 and int(state.guard.left_out) == 9
    rows = numbers(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert [row["rolled_back"] for row in rows] == [0] * 12 + [1] * 12 and not any(row["skipped"] for row in rows)

    real = ft.data.Windows.__getitem__
    monkeypatch.setattr(ft.data.Windows, "__getitem__", lambda self, t: real(self, t if t < 12 else t + 9))
    wanted = pretrain.main(dataclasses.replace(config, roll_backs=0), tmp_path / "lacking", Shown()).state
    assert same(state._replace(guard=None), wanted._replace(guard=None))


def test_a_run_in_float16_goes_back_to_the_loss_scale_of_its_checkpoint(
    config: Config, poisoned: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, precision="float16", roll_backs=1)
    poisoned(*range(13, 20))
    state = pretrain.main(config, tmp_path, Shown()).state
    assert int(state.guard.rolled_back) == 1 and int(state.step) == 24
    rows = numbers(tmp_path)
    assert [row["loss_scale"] for row in rows] == [2.0**16] * 24 and not any(row["skipped"] for row in rows)


def test_bad_batches_from_the_first_on_lead_back_to_the_beginning(
    config: Config, poisoned: Any, tmp_path: Path
) -> None:
    poisoned(*range(0, 8))
    with pytest.raises(Diverged, match="step 4: 4 steps in a row were skipped"):
        pretrain.main(config, tmp_path / "none", Shown())
    state = pretrain.main(dataclasses.replace(config, roll_backs=2), tmp_path / "two", Shown()).state
    assert int(state.guard.left_out) == 8 and int(state.step) == 24


def test_a_run_of_before_there_were_guards_goes_on_to_the_same_bits(config: Config, tmp_path: Path) -> None:
    whole = pretrain.main(config, tmp_path / "whole", Shown()).state
    with pytest.raises(ValueError, match="steps: 24 -> 12"):
        pretrain.main(dataclasses.replace(config, steps=12), tmp_path / "whole", Shown())
    run = tmp_path / "old"
    run.mkdir()
    sides = texts.read(config.data)
    saved = {"text": {"train": sides.train.fingerprint, "validation": sides.validation.fingerprint}}
    middle = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-00000018")
    checkpoint.every(6, run, metadata=saved)(18, middle._replace(guard=None))
    lines = toml.dumps(config).splitlines(keepends=True)
    new = ("guard", "roll_back")
    folder.write(run / "config.toml", "".join(line for line in lines if not line.startswith(new)))
    folder.write(run / "tokenizer.json", (tmp_path / "whole" / "tokenizer.json").read_text())
    found = pretrain.main(config, run, Shown()).state
    assert same(found, whole)


def test_another_guard_takes_over_what_both_count(config: Config, tmp_path: Path) -> None:
    optimizer = ft.optim.sgd(1e-2)

    def start(guard: Any) -> ft.TrainState:
        return ft.init_state({"w": torch.ones(2)}, optimizer, key=ft.random.key(0), guard=guard)

    state = start(ft.train.skip_nonfinite())
    state = state._replace(step=torch.tensor(5), guard=state.guard._replace(left_out=torch.tensor(7)))
    saved = checkpoint.save(tmp_path / "c", state)
    found = folder.load_state(saved, start(ft.train.skip_spikes()))
    assert int(found.step) == 5 and int(found.guard.left_out) == 7 and len(found.guard.losses) == 128
    back = folder.load_state(checkpoint.save(tmp_path / "d", found), start(ft.train.skip_nonfinite()))
    assert same(back, state)
