"""Early stopping stops where Keras' rule does, and a run that is killed stops where one that was not does."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from functrain import checkpoint
from functrain.train import Diverged, TrainState, early_stopping, fit

LAW = settings(deadline=None, derandomize=True, max_examples=40)
VALUES = st.sampled_from([0.0, 1.0, 1.5, 2.0, 2.05, 3.0, -1.0, 5.0])
ODD = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf])


def step(state: Any, batch: Any) -> Any:
    return state._replace(step=state.step + 1), {"loss": torch.tensor(0.0)}


def start(t: int = 0) -> TrainState:
    return TrainState(torch.tensor(t), torch.tensor(1.0), (), torch.zeros(2, dtype=torch.int32))


def measuring(values: list[float], n: int = 1) -> Any:
    """Value number i comes at step (i + 1) * n."""

    def measure(t: int, state: Any, metrics: Any) -> Any:
        return {"validation_loss": torch.tensor(values[t // n - 1])} if t % n == 0 else None

    measure.measures = True  # type: ignore[attr-defined]
    return measure


def stopped(values: list[float], n: int = 1, **options: Any) -> int:
    stop = early_stopping("validation_loss", **options)
    return int(fit(step, start(), range(999), steps=n * len(values), every=[stop, measuring(values, n)]).step)


def keras(values: list[float], patience: int, min_delta: float, mode: str) -> int:
    """Where EarlyStopping of Keras 3 stops: its on_epoch_end, without baseline and start_from_epoch."""
    better = (lambda a, b: a + min_delta < b) if mode == "min" else (lambda a, b: a - min_delta > b)
    best, wait = None, 0
    for epoch, current in enumerate(values):
        wait += 1
        if best is None or better(current, best):
            best, wait = current, 0
            continue
        if wait >= patience and epoch > 0:
            return epoch + 1
    return len(values)


@LAW
@given(
    st.lists(VALUES, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.1]), st.booleans(),
)  # fmt: skip
@example([2.05, 2.0, 1.0], 1, 0.1, True)  # better, and not by enough
@example([2.0, 2.05, 3.0], 1, 0.1, False)
def test_it_stops_where_keras_does(values: list[float], patience: int, min_delta: float, lowest: bool) -> None:
    mode = "min" if lowest else "max"
    assert stopped(values, patience=patience, min_delta=min_delta, mode=mode) == keras(
        values, patience, min_delta, mode
    )


@LAW
@given(st.lists(ODD, min_size=1, max_size=10), st.integers(1, 3))
def test_what_is_not_finite_is_never_better(values: list[float], patience: int) -> None:
    # as if it were worse than all, but for the first, which Keras takes whatever it is
    ordinary = [1e9 + i if not math.isfinite(value) else value for i, value in enumerate(values)]
    assert stopped([1e8, *values], patience=patience) == keras([1e8, *ordinary], patience, 0.0, "min")


def test_only_steps_that_have_the_metric_count() -> None:
    assert stopped([3.0, 2.0, 2.5, 2.5, 1.0], n=10, patience=2) == 40
    assert stopped([math.nan] * 5, n=10, patience=3) == 30


@settings(LAW, max_examples=12)
@given(st.lists(ODD, min_size=1, max_size=8), st.integers(1, 3), st.lists(st.integers(1, 16), max_size=3))
def test_killed_and_started_again_it_stops_at_the_same_step(
    values: list[float], patience: int, kills: list[int]
) -> None:
    wanted = stopped(values, n=2, patience=patience)

    def run(folder: Path, kill: int | None) -> int:
        def killed(t: int, state: Any, metrics: Any) -> None:
            if t == kill:
                raise KeyboardInterrupt

        hooks = [
            checkpoint.every(3, folder), killed, measuring(values, 2),
            early_stopping("validation_loss", patience=patience, run=folder),
        ]  # fmt: skip
        state = checkpoint.resume(folder, start())
        return int(fit(step, state, range(999), steps=2 * len(values), every=hooks).step)

    with tempfile.TemporaryDirectory() as folder:
        for kill in [*kills, None, None]:  # the last time, it is stopped or done already
            try:
                found = run(Path(folder), kill)
            except KeyboardInterrupt:
                continue
            assert found == wanted


def test_without_a_run_it_counts_anew_and_after_going_back_it_forgets() -> None:
    stop = early_stopping("loss", patience=2)
    for t, value in enumerate([3.0, 2.0, 1.0, 5.0], 1):
        assert stop(t, start(t), {"loss": value}) is None
    assert (stop.best, stop.best_step) == (1.0, 3)
    assert stop.begin(2, 9, start(2)) is None and (stop.best, stop.best_step) == (2.0, 2)
    assert stop(3, start(3), {"loss": 4.0}) is None
    reason = stop(4, start(4), {"loss": 4.0})
    assert reason is not None and reason.reason == "loss has not improved in 2 measurements; the best was 2 at step 2"
    assert early_stopping("loss", patience=2).begin(4, 9, start(4)) is None


def test_two_metrics_share_the_file_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    for metric in ("a", "b"):
        early_stopping(metric, patience=1, run=tmp_path)(1, start(1), {metric: math.inf})
    file = tmp_path / "early_stopping.json"
    assert json.loads(file.read_text()) == {"a": [[1, "inf"]], "b": [[1, "inf"]]}
    assert [path.name for path in tmp_path.iterdir()] == ["early_stopping.json"]
    file.write_text("[1")
    with pytest.raises(ValueError, match="it is damaged; remove it to count anew"):
        early_stopping("a", patience=1, run=tmp_path).begin(1, 9, start(1))


def test_a_metric_that_never_came_is_an_error_at_the_end_that_names_the_others() -> None:
    words = "expected a metric 'validaton_loss' in some step, came only loss, validation_loss"
    with pytest.raises(ValueError, match=words):
        fit(
            step,
            start(),
            range(9),
            steps=2,
            every=[early_stopping("validaton_loss", patience=1), measuring([1.0, 2.0])],
        )

    def broken(t: int, state: Any, metrics: Any) -> None:
        raise Diverged(t, 1, state)

    with pytest.raises(Diverged):
        fit(step, start(), range(9), steps=2, every=[early_stopping("validaton_loss", patience=1), broken])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 0}, "patience of at least 1 measurement, came 0; 1 stops at the first"),
        ({"patience": 1, "min_delta": -1.0}, "min_delta of at least 0"),
        ({"patience": 1, "mode": "auto"}, "mode 'min' or 'max', came 'auto'"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        early_stopping("loss", **options)
    with pytest.raises(ValueError, match=r"loss: expected one number, came a tensor \(2,\)"):
        early_stopping("loss", patience=1)(1, start(), {"loss": torch.zeros(2)})
