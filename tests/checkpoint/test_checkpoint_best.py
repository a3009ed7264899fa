"""The best by a metric that is measured now and then: saved at its step, kept, found again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from functrain import checkpoint
from functrain.train import TrainState, fit, roll_back

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: float("nan"), 12: 2.5, 14: float("-inf")}


def step(state: Any, batch: Any) -> Any:
    return state._replace(step=state.step + 1, params=state.params + 1), {"loss": torch.tensor(1.0)}


def start() -> TrainState:
    return TrainState(torch.tensor(0), torch.tensor(0.0), (), torch.zeros(2, dtype=torch.int32))


def measure(t: int, state: Any, metrics: Any) -> Any:
    return {"validation_loss": LOSSES[t]} if t in LOSSES else None


measure.measures = True  # type: ignore[attr-defined]


def run(folder: Path, steps: int, n: int = 5, best: Any = None, **options: Any) -> Any:
    best = best or checkpoint.Best("validation_loss")
    hook = checkpoint.every(n, folder, keep_best=best, keep_last=1, **options)
    return fit(step, checkpoint.resume(folder, start()), range(99), steps=steps, every=[hook, measure])


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list(folder)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_is_saved_at_its_own_step_and_stays(asynchronous: bool, tmp_path: Path) -> None:
    for stop, kept in ((3, [2, 3]), (7, [4, 5, 7]), (9, [5, 8, 9]), (16, [8, 15, 16])):
        run(tmp_path, stop, asynchronous=asynchronous)
        assert steps(tmp_path) == kept, stop
    found = checkpoint.best(tmp_path)
    assert found.name == "step-00000008" and float(checkpoint.load(found, like=start()).params) == 8.0
    about = checkpoint.contents(found).metadata
    assert about["metrics"] == {"validation_loss": 2.0} and about["unplanned"] is True
    assert about["keep_best"] == {"metric": "validation_loss", "mode": "min"}
    assert "metrics" not in checkpoint.contents(checkpoint.list(tmp_path)[-1]).metadata


def test_a_run_that_was_stopped_has_the_best_of_one_that_was_not(tmp_path: Path) -> None:
    for count in (1, 2):
        best = checkpoint.Best("validation_loss", count)
        whole, parts = tmp_path / f"whole-{count}", tmp_path / f"parts-{count}"
        run(whole, 16, best=best)
        for stop in (4, 6, 9, 13, 16):
            run(parts, stop, best=best)
        assert checkpoint.best(whole).name == checkpoint.best(parts).name == "step-00000008"
        assert set(steps(whole)) <= set(steps(parts)) | {15}


def test_the_highest_and_other_metrics_are_found_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=None, keep_best=checkpoint.Best("accuracy", mode="max"))
    for t, accuracy in enumerate([0.1, 0.5, 0.4, 0.5, 0.2], 1):
        hook(t, start(), {"accuracy": accuracy})
    assert checkpoint.best(tmp_path).name == "step-00000004"
    assert checkpoint.best(tmp_path, "accuracy").name == "step-00000004"
    assert checkpoint.best(tmp_path, "accuracy", "min").name == "step-00000001"
    file = checkpoint.best(tmp_path) / "tensors.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert checkpoint.best(tmp_path).name == "step-00000002"
    with pytest.raises(checkpoint.MissingError, match="a checkpoint with the metric 'acuracy', came only accuracy"):
        checkpoint.best(tmp_path, "acuracy")
    with pytest.raises(checkpoint.MissingError, match="a checkpoint with a metric, came none"):
        checkpoint.best(tmp_path / "none")


def test_a_metric_that_never_came_is_an_error_at_the_end_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_best: expected a metric 'validaton_loss' in some step, came only loss"):
        run(tmp_path, 6, best=checkpoint.Best("validaton_loss"))
    assert steps(tmp_path) == [5, 6], "what was trained is saved"
    run(tmp_path / "late", 16)
    run(tmp_path / "late", 17)  # it came before this process began


def test_the_best_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    hook = checkpoint.every(5, tmp_path, keep_best=checkpoint.Best("validation_loss"))
    fit(step, start(), range(99), steps=9, every=[hook, measure])
    assert hook.rewind(8) == tmp_path / "checkpoints" / "step-00000005"
    assert steps(tmp_path) == [4, 5] and checkpoint.best(tmp_path).name == "step-00000004"
    hook(9, start(), {"validation_loss": 2.5})  # the 2.0 of step 8 went with the steps after 5
    assert checkpoint.best(tmp_path).name == "step-00000009"


def test_roll_back_saves_the_best_too(tmp_path: Path) -> None:
    saves = checkpoint.every(5, tmp_path, keep_best=checkpoint.Best("validation_loss"))
    counted = lambda state, batch: (step(state, batch)[0], {"skipped_in_row": torch.tensor(0)})  # noqa: E731
    fit(counted, start(), range(99), steps=6, every=[roll_back(saves), measure])
    assert checkpoint.best(tmp_path).name == "step-00000004"


def test_of_equal_values_the_newer_is_saved_as_the_best(tmp_path: Path) -> None:
    hook = checkpoint.every(100, tmp_path, keep_last=1, keep_best=checkpoint.Best("accuracy", mode="max"))
    for t, accuracy in enumerate([0.5, 0.5, 0.4], 1):
        hook(t, start(), {"accuracy": accuracy})
    assert steps(tmp_path) == [1, 2] and checkpoint.best(tmp_path).name == "step-00000002"
