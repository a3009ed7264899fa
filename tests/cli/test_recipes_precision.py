"""`precision = "auto"` is decided once, by what the device does fast, told, and kept by a run that goes on."""

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
from functrain import cli
from functrain.compiler import half_products
from functrain.models import gpt2
from functrain.recipes import folder, precision, pretrain, record, sweep
from functrain.recipes.config import PRESETS, Config
from functrain.train import Interrupted

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


@pytest.fixture(scope="module")
def folder_of_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"line {j} of file {i} says that {i * j} is a number" for j in range(12)]
        (where / f"f{i + 1}.txt").write_text("\n".join(lines) + "\n")
    return where


def in_float16(name: str, corpus: Path, model: dict[str, Any] | None = None, **fields: Any) -> Config:
    preset = PRESETS[name]
    data = dataclasses.replace(preset.data, corpus=str(corpus), validation=0.3)
    shape = dataclasses.replace(preset.model, **model or {})
    return dataclasses.replace(preset, data=data, model=shape, compile=False, precision="float16", **fields)


def same(a: Any, b: Any) -> bool:
    return ft.tree.structure(a) == ft.tree.structure(b) and all(map(torch.equal, ft.tree.leaves(a), ft.tree.leaves(b)))


@pytest.mark.parametrize(
    ("name", "model", "guard"),
    [
        ("smoke", {}, "spikes"),
        ("llama-smoke", {"packed": True, "experts": 4, "experts_per_token": 2, "balance": 0.01}, "nonfinite"),
        ("bert-smoke", {"dropout": 0.1}, "nonfinite"),
    ],
)
def test_a_run_in_float16_skips_overflows_by_its_scale_and_resumes_to_the_same_bits(
    name: str, model: Any, guard: Any, folder_of_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a scale from which float16 overflows, more often in a row than a guard lets pass
    monkeypatch.setattr(precision, "loss_scale_of", lambda config: ft.loss_scale.dynamic(2.0**27, growth_interval=3))
    config = in_float16(
        name, folder_of_texts, model, steps=16, accumulate=2, recompute=1.0, guard=guard, stop_after_nonfinite=2
    )
    config = dataclasses.replace(config, evaluate_every=20)
    shown = Shown()
    whole = pretrain.main(config, tmp_path / "whole", shown)
    rows = record.rows(tmp_path / "whole" / "metrics.jsonl")
    over = [row for row in rows if row["skipped"]]
    assert len(over) >= 3 and rows[-1]["skipped_in_all"] == 0 and not rows[-1]["skipped"]
    assert all(math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"]) for row in over)
    # halved after each, and doubled after three that were taken
    scales, taken = [2.0**27], 0
    for row in rows:
        assert row["loss_scale"] == scales[-1]
        taken = 0 if row["skipped"] else taken + 1
        scales.append(scales[-1] * (0.5 if row["skipped"] else 2.0 if taken == 3 else 1.0))
        taken %= 3
    assert float(whole.state.loss_scale.scale) == scales[-1]
    told = [note for note in shown.notes if note.startswith("step")]
    assert told[0].endswith(": skipped, and the loss scale of 1.34218e+08 made smaller") and len(told) == len(over)
    assert whole.validation_loss < rows[0]["loss"]

    call = record.Record.__call__

    def stopping(self: Any, t: int, *args: Any) -> None:
        if t == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        call(self, t, *args)

    with monkeypatch.context() as patched:
        patched.setattr(record.Record, "__call__", stopping)
        with pytest.raises(Interrupted):
            pretrain.main(config, tmp_path / "stopped", Shown())
    assert same(pretrain.main(config, tmp_path / "stopped", Shown()).state, whole.state)


def test_float16_is_near_float32_and_a_run_may_go_on_in_the_other(folder_of_texts: Path, tmp_path: Path) -> None:
    half = in_float16("smoke", folder_of_texts)
    plain = dataclasses.replace(half, precision="float32")
    found = {each.precision: pretrain.main(each, tmp_path / each.precision, Shown()) for each in (half, plain)}
    # 11 bits of a number, over eight steps
    assert found["float16"].validation_loss == pytest.approx(found["float32"].validation_loss, rel=2e-3)
    assert found["float16"].validation_loss != found["float32"].validation_loss
    for was, then in ((plain, half), (half, plain)):
        run, then = tmp_path / was.precision, dataclasses.replace(then, steps=10)
        with pytest.raises(ValueError, match=r"another config.*--accept-changes:\n  steps: 8 -> 10\n  precision: "):
            pretrain.main(then, run, Shown())
        state = pretrain.main(then, run, Shown(), accept_changes=True).state
        assert int(state.step) == 10
        assert (state.loss_scale is None) == (then is not half and then.precision == "float32")
        if state.loss_scale is not None:
            assert int(state.loss_scale.growth_count) == 2  # begun anew


def test_a_sweep_in_float16_has_a_scale_for_each_lane(
    folder_of_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "loss_scale_of", lambda config: ft.loss_scale.dynamic(2.0**19, growth_interval=9))
    config = in_float16("smoke", folder_of_texts, {"attention": "math"}, stop_after_nonfinite=2)
    over = {"learning_rate": [1e-3, 1e-1]}
    best, result = sweep.main(config, over, tmp_path / "run", Shown())
    alone = pretrain.main(best, tmp_path / "alone", Shown())
    assert result.validation_loss == pytest.approx(alone.validation_loss, rel=1e-2)
    lanes = [record.rows(tmp_path / "run" / "sweep" / f"lane-{i:02d}" / "metrics.jsonl") for i in (0, 1)]
    assert all(lane[0]["loss_scale"] == 2.0**19 and lane[0]["skipped"] and not lane[-1]["skipped"] for lane in lanes)
    longer = dataclasses.replace(best, steps=10)
    state = pretrain.main(longer, tmp_path / "run", Shown(), accept_changes=True).state
    assert int(state.step) == 10 and state.loss_scale.scale.shape == ()


def test_a_preset_in_float16_is_profiled_with_its_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, of = [], precision.loss_scale_of

    def noted(config: Config) -> Any:
        seen.append(of(config))
        return seen[-1]

    monkeypatch.setattr(precision, "loss_scale_of", noted)
    for name in ("float16", "float32"):
        words = ["--no-compile", "--precision", name, "--warmup", "0", "--active", "1"]
        assert cli.main(["profile", "smoke", *words, "--trace", str(tmp_path / "trace.json")]) == 0
    assert [scale is None for scale in seen] == [False, True] and "a step  " in capsys.readouterr().out
