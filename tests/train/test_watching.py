"""The record of a run: every step once, whatever was killed; what loggers and a person are shown."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import functrain as ft
from functrain import checkpoint
from functrain.train import TrainState, fit, record, watching
from functrain.train.watching import peak as peaks
from functrain.train.watching import rows
from functrain.train.watching.meter import Meter
from functrain.train.watching.rows import OF_THE_MACHINE, keep


def step(state: Any, batch: Any) -> Any:
    loss = state.params * batch
    return state._replace(step=state.step + 1, params=state.params * 0.9), {"loss": loss, "weight": torch.tensor(8.0)}


def start(t: int = 0) -> TrainState:
    return TrainState(torch.tensor(t), torch.tensor(1.0), (), torch.zeros(2, dtype=torch.int32))


def measure(t: int, state: Any, metrics: Any) -> Any:
    return {"validation_loss": float(state.params) + 1} if t % 4 == 0 else None


measure.measures = True  # type: ignore[attr-defined]
BATCHES = [torch.tensor(float(t)) for t in range(20)]


def numbers(file: Path) -> list[dict[str, float]]:
    """The record without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows(file)]


def test_in_a_loop_of_ones_own_each_step_has_one_line_with_the_learning_rate_that_made_it(tmp_path: Path) -> None:
    hook = record(tmp_path, every=2, learning_rate=lambda count: count / 10, steps_per_epoch=4)
    for t in range(1, 6):
        more = {"validation_loss": 9.0} if t == 4 else {}
        hook(t, None, {"loss": torch.tensor(float(t)), "half": torch.tensor(t / 2, dtype=torch.bfloat16)} | more)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4], "the last waits for its multiple"
    hook.close()
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in found] == [1, 2, 3, 4, 5] and [row["half"] for row in found] == [0.5, 1, 1.5, 2, 2.5]
    assert [row["learning_rate"] for row in found] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [row["epoch"] for row in found] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert [row.get("validation_loss") for row in found] == [None, None, None, 9.0, None]
    assert all(row["process_memory_bytes"] > 1e7 for row in found)


def test_nothing_is_read_between_the_multiples(tmp_path: Path) -> None:
    class Unread:
        def __float__(self) -> float:
            raise AssertionError("read")

    hook = record(tmp_path, every=4)
    hook(1, None, {"loss": 1.0})
    hook(2, None, {"loss": Unread()})
    hook._meter._waiting.clear()
    hook.close()


def test_a_run_that_was_killed_has_the_lines_of_one_that_was_not(tmp_path: Path) -> None:
    def run(folder: Path, kill: int | None = None) -> None:
        def killed(t: int, state: Any, metrics: Any) -> None:
            if t == kill:
                os._exit(9)

        hooks: list[Any] = [
            checkpoint.every(3, folder), measure, killed,
            record(folder, every=5, loggers=[watching.csv(folder / "a.csv")]),
        ]  # fmt: skip
        fit(step, checkpoint.resume(folder, start()), BATCHES, steps=14, every=hooks)

    from checkpoint_crashes import forked

    run(tmp_path / "whole")
    for kill in (2, 7, 7, 11):
        assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda kill=kill: run(tmp_path / "run", kill)), 0)[1]) == 9
        newest = checkpoint.latest(tmp_path / "run")
        done = 0 if newest is None else int(checkpoint.load(newest).step)
        file = tmp_path / "run" / "metrics.jsonl"
        assert [row["step"] for row in rows(file)][:done] == list(range(1, done + 1)), "the lines before the checkpoint"
    run(tmp_path / "run")
    found = numbers(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 15))
    assert found == numbers(tmp_path / "whole" / "metrics.jsonl")
    table = list(csv.DictReader((tmp_path / "run" / "a.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in found]
    assert [row["validation_loss"] for row in table][:5] == ["", "", "", repr(found[3]["validation_loss"]), ""]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(rows(file), rows(file)[1:], strict=False))


class Events:
    def __init__(self, folder: Path) -> None:
        self._found = EventAccumulator(str(folder))
        self._found.Reload()

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self._found.Scalars(tag)]

    def times(self, tag: str) -> list[float]:
        return [event.wall_time for event in self._found.Scalars(tag)]

    @property
    def texts(self) -> list[str]:
        return self._found.Tags()["tensors"]


@pytest.mark.parametrize("resumed", [True, False])
def test_tensorboard_has_training_and_validation_on_one_chart_and_each_step_once(resumed: bool, tmp_path: Path) -> None:
    def new() -> Any:
        logger = watching.tensorboard(tmp_path / "tensorboard")
        return record(tmp_path, every=2, loggers=[logger], hyperparameters={"optimizer": {"b1": 0.9}, "name": "tiny"})

    hook = new()
    for done, stop, loss in [(0, 6, 1.0), (3, 6, 2.0)]:
        if done and resumed:
            hook.close()
            hook = new()
        hook.begin(done, stop, None)
        for t in range(done + 1, stop + 1):
            hook(t, None, {"loss": torch.tensor(loss)} | ({"validation_loss": loss + 0.5} if t % 2 == 0 else {}))
    hook.text(6, "sample", "a\nb")
    hook.close()
    events, validation = Events(tmp_path / "tensorboard"), Events(tmp_path / "tensorboard" / "validation")
    assert events.scalars("loss") == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert validation.scalars("loss") == [(2, 1.5), (4, 2.5), (6, 2.5)]
    found = rows(tmp_path / "metrics.jsonl")
    assert events.times("loss") == pytest.approx([row["time"] for row in found], abs=1e-6)
    assert {"sample/text_summary", "hyperparameters/text_summary"} <= set(events.texts)
    assert [(row["step"], row["loss"]) for row in found] == [(t, 1 if t < 4 else 2) for t in range(1, 7)]


def test_events_of_a_run_that_goes_back_lie_in_a_file_of_a_later_second(tmp_path: Path) -> None:
    # TensorBoard reads the files of a folder by name, and the count behind the second goes from 9 to 10
    logger = watching.tensorboard(tmp_path)
    for step in (0, 3, 1):
        logger.begin(step)
    logger.close()
    seconds = [file.name.split(".")[3] for file in tmp_path.glob("events.out.tfevents.*")]
    assert len(seconds) == len(set(seconds)) == 3


def test_rates_leave_out_the_first_step_evaluations_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(
        "record", every=2, learning_rate=None, steps_per_epoch=None, samples=4, tokens="weight", flops=6e9,
        peak_flops=1e12,
    )  # fmt: skip
    meter.begin(0, 0.0)
    for t, seconds in enumerate([60.0, 0.5, 0.25, 0.25], 1):
        now[0] += seconds
        if t == 3:
            now[0] += 7.0
            meter.aside(7.0)
        if meter.add(t, None, {"weight": torch.tensor(10.0 * t)}):
            found = meter.read()
            if t == 1:
                assert found[0]["first_step_seconds"] == 60.0 and found[0]["samples_per_second"] == 4 / 60
            elif t == 4:
                assert [row["step"] for row in found] == [3, 4] and "first_step_seconds" not in found[0]
                assert {row["samples_per_second"] for row in found} == {8 / 0.5}
                assert {row["tokens_per_second"] for row in found} == {70 / 0.5}
                assert found[0]["model_flops_utilization"] == pytest.approx(2 * 6e9 / 0.5 / 1e12)
    for wrong, words in (({"every": 0}, "every of at least 1"), ({"flops": 1.0}, "came one of them")):
        with pytest.raises(ValueError, match=words):
            record("run", **wrong)


def test_a_logger_of_ones_own_is_told_what_it_needs(tmp_path: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.said: list[Any] = []

        def begin(self, step: int) -> None:
            self.said.append(("begin", step))

        def log(self, rows: Any) -> None:
            self.said.append([row["step"] for row in rows])

        def hyperparameters(self, values: Any) -> None:
            self.said.append(values)

        def close(self) -> None:
            self.said.append("close")

    told = Told()
    hook = record(tmp_path, every=3, loggers=[told], hyperparameters={"a": {"b": 1}})
    fit(step, start(), BATCHES, steps=7, every=[hook])
    assert told.said == [("begin", 0), {"a.b": 1}, [1], [2, 3], [4, 5, 6], [7], "close"]


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record: loss: expected a \(\) tensor, came \(2,\), as the lanes"):
        record(tmp_path, every=1)(1, None, {"loss": torch.zeros(2)})
    with pytest.raises(ValueError, match="expected a metric 'tokens' that counts, came loss"):
        record(tmp_path, every=1, tokens="tokens")(1, None, {"loss": 1.0})
    with pytest.raises(ValueError, match="whose name is UTF-8"):
        watching.tensorboard(tmp_path / os.fsdecode(b"run\xff"))


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in rows(path)] == [1]
    keep(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    "damaged",
    [b"}{", b"\0" * 9, b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": 2, "loss": null}', b"", b'{"step": "x"}'],
)
def test_a_damaged_line_costs_itself_and_is_told(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, third = b'{"step": 1, "loss": "nan"}\n', b'{"step": 3, "loss": 2.0}\n'
    path.write_bytes(first + damaged + b"\n" + third + b'{"step": 4, "loss": 2.0}\n')
    assert [row["step"] for row in rows(path)] == [1, 3, 4]
    assert caplog.messages == [f"{path}: line 2 is damaged and left out"]
    keep(path, 3)
    assert path.read_bytes() == first + third


def test_what_is_not_finite_is_text_that_every_reader_of_json_takes(tmp_path: Path) -> None:
    hook = record(tmp_path, every=1)
    for t, loss in enumerate([math.nan, 1.0, -math.inf], 1):
        hook(t, None, {"loss": torch.tensor(loss)})
    hook.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == ["nan", 1.0, "-inf"]
    assert [math.isfinite(row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [False, True, False]


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ft.train.progress(every=4, learning_rate=lambda count: 0.1, samples=2)
    fit(step, start(), BATCHES, steps=9, every=[bar, measure])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 1/9", "step 4/9", "step 8/9", "step 9/9"]
    assert "loss 0.0000" in shown[0] and "lr 1.0e-01" in shown[0] and "samples/s" in shown[0] and "ETA" in shown[0]
    assert "validation 1.6561" in shown[1] and "validation" not in shown[3]
    with pytest.raises(ValueError, match="expected progress.begin"):
        ft.train.progress()(1, start(1), {})


def test_in_a_terminal_without_rich_progress_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert type(watching.display.display()).__name__ == "Terminal"
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert type(watching.display.display()).__name__ == "Lines"


def test_an_evaluation_and_other_metrics_are_shown() -> None:
    row = {"step": 3, "loss": 1.0, "accuracy": 0.5, "validation_loss": 2.0, "validation_top_5": 0.25, "seconds": 1.0}
    assert watching.display.training(row, None) == "loss 1.0000  accuracy 0.5"
    assert watching.display.training(row, ()) == "loss 1.0000"
    assert watching.display.validation(row) == "validation 2.0000 (top 5 0.25)"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_package_that_is_missing_is_named_with_the_command_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed; pip install functrain\["):
        getattr(watching, name)(*([tmp_path] if name == "tensorboard" else []))


def run_that_goes_back(hook: Any) -> None:
    for done, stop in ((0, 5), (3, 6)):
        hook.begin(done, stop, None)
        for t in range(done + 1, stop + 1):
            more = {"validation_loss": 2.0} if t % 2 == 0 else {}
            hook(t, None, {"loss": torch.tensor(1.0 / t), "odd": torch.tensor(math.nan)} | more)
    hook.text(6, "sample", "hello\nworld")


@pytest.mark.filterwarnings("default")  # theirs
def test_weights_and_biases_gets_rows_settings_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    hook = record(tmp_path, every=2, loggers=[watching.wandb(run)], hyperparameters={"a": {"b": 1}})
    run_that_goes_back(hook)
    hook.close()
    assert run.config["a.b"] == 1 and run.summary["step"] == 6 and run.summary["validation_loss"] == 2.0
    assert run.summary["loss"] == pytest.approx(1 / 6) and "sample" in run.summary.keys()
    run.finish()


@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_gets_rows_settings_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    logger = watching.mlflow(run_name="test")
    hook = record(tmp_path, every=2, loggers=[logger], hyperparameters={"a": {"b": 1}})
    run_that_goes_back(hook)
    hook.close()
    client = mlflow.MlflowClient()
    points = client.get_metric_history(logger.run_id, "loss")
    assert sorted((point.step, round(1 / point.value)) for point in points) == [
        (1, 1), (2, 2), (3, 3), (4, 4), (4, 4), (5, 5), (5, 5), (6, 6),
    ]  # fmt: skip
    last = rows(tmp_path / "metrics.jsonl")[-1]
    assert max(point.timestamp for point in points) == int(last["time"] * 1000)
    found = client.get_run(logger.run_id)
    assert found.data.params == {"a.b": "1"} and found.info.status == "FINISHED" and found.info.run_name == "test"
    assert "odd" not in found.data.metrics
    assert [file.path for file in client.list_artifacts(logger.run_id, "sample")] == ["sample/step-00000006.txt"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_what_a_gpu_can_do_is_known_by_the_words_of_its_name(name: str, peak: float | None) -> None:
    assert peaks.of_name(name) == peak


def test_of_a_cpu_and_of_float32_no_peak_is_known() -> None:
    assert peaks.peak_flops("cpu") is None and peaks.peak_flops("cuda", torch.float32) is None
