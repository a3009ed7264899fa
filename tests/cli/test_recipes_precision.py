"""`precision = "auto"` is decided once, by what the device does fast, told, and kept by a run that goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from shown import Shown

import functrain as ft
from functrain.compiler import half_products
from functrain.models import gpt2
from functrain.recipes import folder, precision, pretrain, sweep
from functrain.recipes.config import PRESETS, Config

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says that {i} and {i * i} are numbers\n" for i in range(200)))
    smoke = PRESETS["smoke"]
    data = dataclasses.replace(smoke.data, corpus=str(text))
    return dataclasses.replace(smoke, data=data, compile=False, steps=2, precision="auto")


def _factor(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(half_products, "factor", lambda dtype: factor)
    half_products._told.clear()


@pytest.mark.parametrize(("factor", "chosen"), [(0.4, "bfloat16"), (6.0, "float32"), (190.0, "float32")])
def test_a_new_run_takes_what_is_fast(factor: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _factor(monkeypatch, factor)
    found, told = precision.decided(Config(), CPU, None)
    assert found == dataclasses.replace(Config(), precision=chosen)  # type: ignore[arg-type]
    assert told == [
        f"precision {chosen}: a matrix product in bfloat16 takes this CPU {factor:.2g} times as long as in float32"
    ]


def test_what_is_asked_for_by_name_stays_and_is_told_once_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    _factor(monkeypatch, 190.0)
    asked = dataclasses.replace(Config(), precision="bfloat16")
    found, told = precision.decided(asked, CPU, None)
    assert (
        found == asked and len(told) == 1 and "takes 190 times as long as in float32. ft.compile computes it" in told[0]
    )
    assert precision.decided(asked, CPU, None) == (asked, [])
    plain = dataclasses.replace(Config(), precision="float32")
    assert precision.decided(plain, CPU, None) == (plain, [])


def test_a_run_that_goes_on_keeps_its_precision(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _factor(monkeypatch, 0.4)
    shown = Shown()
    pretrain.main(config, tmp_path / "run", shown)
    assert folder.read_config(tmp_path / "run").precision == "bfloat16"
    assert sum("precision bfloat16: a matrix product" in note for note in shown.notes[:4]) == 1
    _factor(monkeypatch, 190.0)  # another machine
    again = Shown()
    pretrain.main(dataclasses.replace(config, steps=3), tmp_path / "run", again, accept_changes=True)
    assert folder.read_config(tmp_path / "run").precision == "bfloat16"
    assert sum("precision bfloat16: on this CPU a matrix product" in note for note in again.notes) == 1


def test_a_sweep_decides_for_all_lanes_and_keeps_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _factor(monkeypatch, 6.0)
    run, over = tmp_path / "run", {"learning_rate": [1e-3, 1e-2]}
    found, _ = sweep.main(config, over, run, Shown())
    assert found.precision == "float32"
    _factor(monkeypatch, 0.4)
    found, _ = sweep.main(config, over, run, Shown())
    assert found.precision == "float32" and folder.read_config(run / "sweep").precision == "float32"


@pytest.mark.parametrize(("factor", "compiled"), [(190.0, True), (0.4, False)])
def test_an_evaluation_in_bfloat16_is_compiled_where_eager_would_take_hours(
    factor: float, compiled: bool, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    _factor(monkeypatch, factor)
    pretrain.evaluation_of.cache_clear()
    model = gpt2.Config(vocab=11, context=8, layers=1, heads=1, width=8)
    half = dataclasses.replace(config, precision="bfloat16", compile=True)
    loss_fn, found = pretrain.evaluation_of(half, model)
    assert found == compiled and pretrain.evaluation_of(half, model)[0] is loss_fn
    tokens = torch.arange(8)[None] % 11
    batch = {"tokens": tokens, "targets": tokens, "mask": torch.ones(1, 8)}
    params = gpt2.init(model, ft.random.key(0))
    plain = pretrain.loss_of(dataclasses.replace(half, precision="float32"), model)
    loss = ft.evaluate(loss_fn, params, [batch], compile=found)["loss"]
    assert loss == pytest.approx(ft.evaluate(plain, params, [batch], compile=False)["loss"], rel=2e-2)
    assert not pretrain.evaluation_of(dataclasses.replace(half, compile=False), model)[1]
