"""Numbers that cannot be are refused by name, before anything is read or written; others are what was asked for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain import cli
from functrain.recipes import folder, optimizers, texts
from functrain.recipes.config import CADENCES, PRESETS, Config, Data, Optimizer
from functrain.recipes.model_config import GPT2, Bert, Llama


@pytest.mark.parametrize(
    ("cls", "numbers"),
    [
        (Data, {"validation": [0.0, 1.0, -0.1, math.nan], "vocabulary": [255, 0, -1]}),
        (GPT2, {"heads": [3, 0], "layers": [0], "width": [0, -4], "context": [0], "dropout": [1.0, -0.1, math.nan]}),
        (Llama, {"heads": [3, 0], "key_heads": [3, 0], "inner": [0], "window": [0], "rope_base": [1.0, math.inf]}),
        (Llama, {"experts_per_token": [2], "balance": [0.01]}),
        (Bert, {"inner": [0], "context": [4], "dropout": [1.0, math.nan], "mask_rate": [0.0, 1.0, math.nan]}),
        (Optimizer, {name: [-1e-9, math.nan, math.inf] for name in ("learning_rate", "final_learning_rate")}),
        (Optimizer, {"weight_decay": [-0.1, math.nan, math.inf]}),
        (Optimizer, {name: [1.0, -0.1, math.nan] for name in ("b1", "b2", "warmup")}),
        (Optimizer, {"clip_norm": [0.0, -1.0, math.nan, math.inf]}),
        (Config, {name: [0, -1] for name in ("steps", "batch", "accumulate", *CADENCES, "stop_after_nonfinite")}),
        (Config, {"seed": [-1, 2**64], "accumulate": [17], "recompute": [1.5, math.nan], "roll_backs": [-1]}),
    ],
)
def test_a_number_that_cannot_be_is_named(cls: Any, numbers: dict[str, list[Any]]) -> None:
    room = {Config: "", Data: "data.", Optimizer: "optimizer."}.get(cls, "model.")
    for name, values in numbers.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{room}{name}: expected .*, came {value}"):
                cls(**{name: value})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.heads", "3"], "model.heads: expected a number that divides the width 16, came 3"),
        (["--optimizer.clip-norm", "-1"], "optimizer.clip_norm: expected a finite number above 0, or none, came -1.0"),
        (["--optimizer.clip-norm", "off"], "--optimizer.clip-norm: no type matching FLOAT|{none}"),
        (["--data.validation", "0"], "data.validation: expected a part of the text above 0 and below 1, came 0.0"),
        (["--sweep", "clip_norm=0.1,-1"], "optimizer.clip_norm: expected a finite number above 0"),
        (["--accumulate", "5"], "accumulate: expected at most the batch of 4, came 5"),
    ],
)
def test_a_config_is_checked_before_a_text_is_read(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(texts, "read", lambda data: pytest.fail("a text was read"))
    assert cli.main(["train", "smoke", "--run", str(tmp_path / "run"), *words]) == 2
    found = capsys.readouterr().err
    assert says in found and found.count("\n") == 1 and "Error parsing config" not in found
    assert not (tmp_path / "run").exists()


def test_without_a_clip_a_gradient_keeps_its_length() -> None:
    smoke = PRESETS["smoke"]

    def after_a_step(clip: Any) -> Any:
        optimizer = dataclasses.replace(smoke.optimizer, clip_norm=clip, warmup=0.0, b1=0.0)
        made = optimizers.optimizer_of(dataclasses.replace(smoke, optimizer=optimizer))
        return made.update({"w": torch.tensor([300.0, 400.0])}, made.init({"w": torch.ones(2)}), {"w": torch.ones(2)})

    def second_moment(clip: Any) -> Any:
        return next(leaf for path, leaf in ft.tree.items(after_a_step(clip)[1]) if path.endswith("nu/w"))

    g = torch.tensor([300.0, 400.0])
    torch.testing.assert_close(second_moment("none"), 0.01 * g**2)
    torch.testing.assert_close(second_moment(1.0), 0.01 * (g / 500) ** 2)
    # the states are alike, so that a run may go on with the other
    ft.tree.check_same_structure(after_a_step("none")[1], after_a_step(1.0)[1])


def sides(path: Path, *lengths: int) -> texts.Sides:
    path.write_text("ab" * (sum(lengths) // 2 + 1))
    made = texts.read(Data(corpus=str(path)))
    return texts.Sides(*(
        side._replace(documents=(ft.data.text.Document("text", "a" * n),))
        for side, n in zip(made, lengths, strict=True)
    ))  # fmt: skip


def test_a_side_that_is_too_short_is_told(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    check = texts.check_lengths
    assert check(sides(file, 17, 17), ft.data.Bytes(), 16) is None
    assert check(sides(file, 17, 16), ft.data.Bytes(), 16) == (
        "the validation side has 16 tokens, less than a window of 17: its loss says little"
    )
    with pytest.raises(ValueError, match=r"text.txt: expected a text to train on of 17 tokens, .*, came 16; give more"):
        check(sides(file, 16, 16), ft.data.Bytes(), 16)
    with pytest.raises(ValueError, match=r"text.txt: expected a validation side of two tokens, .* came 1; give more"):
        check(sides(file, 17, 1), ft.data.Bytes(), 16)


def test_cadences_are_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    smoke = PRESETS["smoke"]
    folder.write(tmp_path / "config.toml", folder.toml.dumps(smoke))
    folder.check_same_config(tmp_path, dataclasses.replace(smoke, **dict.fromkeys(CADENCES, 77)))
    with pytest.raises(ValueError, match=r"another config; .*:\n  batch: 4 -> 5$"):
        folder.check_same_config(tmp_path, dataclasses.replace(smoke, batch=5, log_every=3))
    folder.check_same_config(tmp_path, dataclasses.replace(smoke, batch=5), accept_changes=True)


@pytest.mark.parametrize("change", [{"layers": 3}, {"width": 18}, {"context": 8}])
def test_another_shape_is_refused_whatever_is_accepted(change: dict[str, int], tmp_path: Path) -> None:
    smoke = PRESETS["smoke"]
    folder.write(tmp_path / "config.toml", folder.toml.dumps(smoke))
    changed = dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, **change))
    with pytest.raises(
        ValueError, match=r"holds a model of another shape; choose another --run:\n  model\.\w+: \d+ ->"
    ):
        folder.check_same_config(tmp_path, changed, accept_changes=True)
