"""A sweep from the command line: lanes that are solo runs, a folder that is the best one's, and going on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shown import Shown

import functrain as ft
from functrain import cli
from functrain.recipes import folder, pretrain, record, sweep
from functrain.recipes.config import PRESETS, Config

OVER = {"learning_rate": [1e-3, 1e-2, 1e30], "weight_decay": [0.0, 0.1]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {i} says that {i} and {i * i} are numbers\n" for i in range(200)))
    smoke = PRESETS["smoke"]
    model = dataclasses.replace(smoke.model, attention="math")
    data = dataclasses.replace(smoke.data, corpus=str(file))
    return dataclasses.replace(smoke, data=data, model=model, compile=False)


@pytest.fixture(scope="module")
def swept(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Any, Shown]:
    run, show = tmp_path_factory.mktemp("sweep") / "run", Shown()
    best, result = sweep.main(config, OVER, run, show)
    return run, best, result, show


def test_the_best_lane_is_the_solo_run_with_its_numbers(swept: Any, tmp_path: Path) -> None:
    run, best, result, _ = swept
    assert best.optimizer.learning_rate == 1e-2
    alone = pretrain.main(best, tmp_path / "alone", Shown())
    ft.tree.check_same_structure(alone.state, result.state)
    # float32: other orders of sums, over eight steps of Adam
    assert result.validation_loss == pytest.approx(alone.validation_loss, rel=1e-4)
    for a, b in zip(ft.tree.leaves(alone.state.params), ft.tree.leaves(result.state.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    theirs, ours = (record.rows(path / "metrics.jsonl") for path in (tmp_path / "alone", run))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 9))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "weight"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name


def test_the_folder_is_that_of_the_best_lane_and_trains_on(swept: Any) -> None:
    run, best, result, show = swept
    assert folder.read_config(run) == best
    said = json.loads((run / "sweep" / "sweep.json").read_text())
    losses = [float(lane["validation_loss"]) for lane in said["lanes"]]
    assert len(losses) == 6 and said["best"] == min(range(4), key=losses.__getitem__)
    assert said["lanes"][said["best"]]["learning_rate"] == 1e-2
    assert losses[4] != losses[4], "a lane that diverges ends as NaN and ends nobody's run"
    assert (
        result.validation_loss
        == losses[said["best"]]
        == json.loads((run / "summary.json").read_text())["validation_loss"]
    )
    for i in range(6):
        rows = record.rows(run / "sweep" / f"lane-{i:02d}" / "metrics.jsonl")
        assert len(rows) == 8 and rows[-1]["learning_rate"] <= said["lanes"][i]["learning_rate"]
    assert [row["step"] for row in show.rows] == [1, 2, 4, 6, 8]
    assert show.evaluated[0] == show.evaluated[1] > 6
    again = pretrain.main(best, run, Shown())  # from the lane's checkpoint, at its last step
    assert again.validation_loss == result.validation_loss


def test_a_stopped_sweep_goes_on_to_the_same_end(
    swept: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, show = tmp_path / "run", Shown()
    fit = ft.fit

    def stopped(step: Any, states: Any, batches: Any, *, steps: int, every: Any) -> Any:
        def killed(t: int, states: Any, metrics: Any) -> None:
            if t == 3:  # right after a save, and between two steps that are logged
                raise KeyboardInterrupt

        vars(killed)["due"] = lambda t, metrics: False  # among the hooks that save, so after them
        return fit(step, states, batches, steps=steps, every=[*every, killed])

    with monkeypatch.context() as patch:
        patch.setattr(ft, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(config, OVER, run, show)
    _, result = sweep.main(config, OVER, run, show)
    assert show.done == 3
    rows = record.rows(run / "sweep" / "lane-01" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert result.validation_loss == swept[2].validation_loss
    for a, b in zip(ft.tree.leaves(result.state), ft.tree.leaves(swept[2].state), strict=True):
        assert torch.equal(a, b)


def test_another_sweep_or_run_in_the_folder_is_refused(swept: Any, config: Config, tmp_path: Path) -> None:
    run = swept[0]
    with pytest.raises(ValueError, match="holds a sweep over .* choose another --run, or sweep the same again"):
        sweep.main(config, {"learning_rate": [1e-3]}, run, Shown())
    with pytest.raises(ValueError, match="was started with another config"):
        sweep.main(dataclasses.replace(config, steps=9), OVER, run, Shown())
    pretrain.main(config, tmp_path / "solo", Shown())
    with pytest.raises(ValueError, match="expected a folder for a sweep, and it holds another run"):
        sweep.main(config, OVER, tmp_path / "solo", Shown())


def test_a_sweep_whose_lanes_all_skip_a_row_of_steps_stops(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, stop_after_nonfinite=3)
    with pytest.raises(ft.train.Diverged, match="step 6: 4 steps in a row were skipped"):
        sweep.main(config, {"learning_rate": [1e30, 1e31]}, tmp_path, Shown())


def test_a_sweep_that_ends_as_nan_is_no_wrong_option(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "smoke", "--no-compile", "--data.corpus", config.data.corpus, "--run", str(tmp_path)]
    assert cli.main([*words, "--optimizer.learning-rate", "1e30", "--sweep", "b1=0.8,0.9"]) == 1
    assert "the validation loss of every lane is nan at the end" in capsys.readouterr().err
    assert (tmp_path / "loss.png").exists()
    lanes = json.loads((tmp_path / "sweep" / "sweep.json").read_text(), parse_constant=pytest.fail)["lanes"]
    assert [lane["validation_loss"] for lane in lanes] == ["nan", "nan"]
    (tmp_path / "sweep" / "sweep.json").write_text("")
    assert cli.main([*words, "--optimizer.learning-rate", "1e30", "--sweep", "b1=0.8,0.9"]) == 2
    assert "sweep.json: expected the numbers of a sweep, and it is damaged" in capsys.readouterr().err


def test_the_command_sweeps(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "smoke",
        "--no-compile",
        "--steps",
        "2",
        "--data.corpus",
        config.data.corpus,
        "--run",
        str(tmp_path),
    ]
    assert cli.main([*words, "--sweep", "learning_rate=0.001,0.1"]) == 0
    said = capsys.readouterr().out
    assert "best lane 1: learning_rate 0.1: loss " in said and "a sample:" in said and "by its formula" in said
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learning_rat=1"], "'learning_rat' is no number of the optimizer; there are learning_rate, "),
        (["warmup=0.1"], "'warmup' is no number of the optimizer"),
        (["learning_rate"], "expected NAME=NUMBER,NUMBER,... and each name once, came 'learning_rate'"),
        (["learning_rate=1,x"], "came 'learning_rate=1,x'"),
        (["b1=0.9", "b1=0.8"], "each name once, came 'b1=0.8'"),
    ],
)
def test_what_cannot_be_swept_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "smoke", *[word for given in words for word in ("--sweep", given)]]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
