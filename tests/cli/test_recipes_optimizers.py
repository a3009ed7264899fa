"""What a run's optimizer is asked for: Muon with AdamW, how the learning rate falls, and an average of the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shown import Shown

import functrain as ft
from functrain.recipes import architectures, folder, optimizers, pretrain, record, sweep
from functrain.recipes.config import PRESETS, Config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"line {i} says that {i} and {i * i} are numbers\n" for i in range(60)))
    smoke = PRESETS["llama-smoke"]
    return dataclasses.replace(smoke, data=dataclasses.replace(smoke.data, corpus=str(text)), compile=False)


def asked(config: Config, **numbers: Any) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **numbers))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.8875, 0.1]),
        ("stable-decay", [0.0, 0.5, 1.0, 1.0, 0.1]),
        ("cosine", [0.0, 0.5, 1.0, 0.9658, 0.1]),
    ],
)
def test_the_learning_rate_falls_as_asked(schedule: Any, expected: list[float]) -> None:
    config = dataclasses.replace(
        asked(Config(), schedule=schedule, learning_rate=1.0, final_learning_rate=0.1, warmup=0.2), steps=100
    )
    found = optimizers.schedule_of(config)(torch.tensor([0, 10, 20, 30, 100]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
    if schedule == "stable-decay":
        assert optimizers.schedule_of(config)(torch.tensor([80, 90])).tolist() == pytest.approx([1.0, 0.55])


@pytest.mark.parametrize("name", ["smoke", "llama-smoke", "bert-smoke"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(name: str) -> None:
    config = asked(PRESETS[name], name="muon", schedule="stable-decay", warmup=0.0, clip_norm="none", weight_decay=0.0)
    architecture = architectures.of(config.model)
    params = architecture.module.init(architecture.model(config.model, 256), ft.random.key(0))
    grads = ft.tree.map(lambda leaf: ft.random.normal(ft.random.key(leaf.numel()), leaf.shape), params)
    made = optimizers.optimizer_of(config)
    updates, _ = made.update(grads, made.init(params), params)
    matrices = set()
    for path, update in ft.tree.items(updates):
        # AdamW's first update has numbers of one size; that of Muon singular values of nearly one size
        if update.abs().max() < 1.001 * update.abs().min():
            continue
        singular = torch.linalg.svdvals(update)
        assert singular.max() < 2.5 * singular.min(), path
        matrices.add(path)
    assert matrices == {p for p, leaf in ft.tree.items(params) if p.startswith("blocks/") and leaf.ndim == 2}


def test_an_average_is_validated_beside_the_weights_and_goes_on(config: Config, tmp_path: Path) -> None:
    config = asked(config, name="muon", ema=0.5)
    result = pretrain.main(config, tmp_path / "run", show := Shown())
    assert show.evaluated is not None and show.evaluated[0] == show.evaluated[1]
    rows = [row for row in record.rows(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in row]
    assert all(row["validation_ema_loss"] > row["validation_loss"] for row in rows), "it lags behind"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = pretrain.model_of(config, 256)
    again = pretrain.validation(ft.train.averaged(result.state), model, config, result.texts)
    assert summary["validation_ema_loss"] == again["loss"] != summary["validation_loss"]
    for other in (asked(config, name="adamw"), asked(config, ema="none")):
        with pytest.raises(ValueError, match="holds the state of another optimizer; choose another --run"):
            folder.check_same_config(tmp_path / "run", other, accept_changes=True)
    folder.check_same_config(tmp_path / "run", asked(config, ema=0.9), accept_changes=True)


def test_a_sweep_has_its_average_and_muon_too(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(asked(config, name="muon", ema=0.5, schedule="linear"), steps=4)
    best, result = sweep.main(config, {"learning_rate": [1e-3, 1e-2]}, tmp_path / "run", Shown())
    alone = pretrain.main(best, tmp_path / "alone", Shown())
    for name in ("loss", "ema_loss"):
        # float32: other orders of sums, over four steps
        assert result.validation[name] == pytest.approx(alone.validation[name], rel=1e-4)


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.1])
def test_a_decay_that_cannot_be_is_named(ema: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^optimizer.ema: expected a number above 0 and below 1, or none, came {ema}"
    ):
        asked(Config(), ema=ema)
