"""`functrain evaluate`, `presets` and `profile`."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import functrain as ft
from functrain import cli
from functrain.models import gpt2
from functrain.recipes import architectures, profiling, toml
from functrain.recipes.config import PRESETS, Config

TEXT = "the cat sat on the mat and the dog sat on the cat\n" * 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_text(TEXT)
    words = ["train", "smoke", "--run", str(folder / "run"), "--data.corpus", str(folder / "text.txt"), "--no-compile"]
    assert cli.main(words) == 0
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err if code == 2 else found.out


def numbers(text: str) -> dict[str, float]:
    rows = [line.rsplit("  ", 1) for line in text.splitlines() if line.startswith(("loss", "perplexity", "bits"))]
    return {name.strip(): float(value.split()[0]) for name, value in rows}


def test_a_run_has_on_its_own_validation_text_the_loss_of_its_summary(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "evaluate", run)
    found, summary = numbers(text), json.loads((run / "summary.json").read_text())
    assert "199 tokens predicted, of 1.00 bytes each" in text and "step-00000008 on the validation side of" in text
    assert found["loss"] == round(summary["validation_loss"], 4)
    assert found["bits per byte"] == round(summary["validation_bits_per_byte"], 4)
    assert found["perplexity"] == pytest.approx(math.exp(summary["validation_loss"]), rel=1e-5)


def test_a_text_its_json_lines_its_tokens_and_an_exported_model_give_one_loss(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run.parent / "text.txt"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT, "source": "x"}) + "\n\n")
    ft.data.write_tokens(tmp_path / "text.bin", [TEXT], ft.data.Bytes(), corpus="text")
    found = said(capsys, "evaluate", run, "--data", text)
    assert found.splitlines()[0] == f"{run / 'checkpoints' / 'step-00000008'} on {text}"
    for words in (
        ["--data", tmp_path / "text.jsonl"],
        ["--data", tmp_path / "text.bin"],
        ["--data", text, "--batch", 7],
    ):
        assert numbers(said(capsys, "evaluate", run, *words)) == numbers(found)
    said(capsys, "export", run, "--to", tmp_path / "model")
    beside = ["--tokenizer", run / "tokenizer.json"]
    theirs = numbers(said(capsys, "evaluate", tmp_path / "model", "--data", text, *beside))
    assert theirs["loss"] == pytest.approx(numbers(found)["loss"], abs=2e-4)  # printed to 1e-4, rounded differently
    assert "has no text of its own; name one with --data" in said(
        capsys, "evaluate", tmp_path / "model", *beside, code=2
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": 3}', 'line 2: expected an object whose "text" is a text, came the keys text'),
        ('{"content": "a"}', "came the keys content"),
        ("[1]", "came list"),
        ('{"text": "a', "line 2: expected JSON in UTF-8, and it breaks off"),
        ('{"text": "a\\u0000"}', "came a zero byte in it"),
    ],
)
def test_a_line_that_is_no_text_is_named(
    line: str, says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "the cat"}\n' + line + "\n")
    errors = said(capsys, "evaluate", run, "--data", tmp_path / "x.jsonl", code=2)
    assert says in errors and errors.count("\n") == 1


def test_what_cannot_be_evaluated_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ft.data.write_tokens(tmp_path / "x.bin", ["abc"], ft.data.Characters("abc"), corpus="x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.txt").write_text("a")
    for data, says in (
        ("x.bin", "expected tokens of the model's own tokenizer"),
        ("empty.jsonl", "expected lines of JSON with texts, came none"),
        ("no.jsonl", "no such file"),
        ("one.txt", "needs 2 tokens, came 1"),
    ):
        assert says in said(capsys, "evaluate", run, "--data", tmp_path / data, code=2)
    assert "--batch: expected at least 1" in said(capsys, "evaluate", run, "--batch", 0, code=2)


def test_ctrl_c_shows_what_was_evaluated(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, calls = gpt2.hidden, list[int]()

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(*args, **named)

    words = ["evaluate", run, "--data", run.parent / "text.txt"]
    whole = said(capsys, *words)
    monkeypatch.setattr(gpt2, "hidden", interrupted)
    part = said(capsys, *words, code=130)
    assert "on the first 2 of 8 batches of" in part and "512 tokens predicted" in part
    assert numbers(part)["loss"] != numbers(whole)["loss"]


def test_a_model_of_nan_exits_with_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = gpt2.hidden
    monkeypatch.setattr(gpt2, "hidden", lambda *args, **named: hidden(*args, **named) * math.nan)
    assert "loss           nan" in said(capsys, "evaluate", run, code=1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_listed_with_its_size_and_printed_as_a_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = PRESETS[name]
    assert toml.loads(said(capsys, "presets", name), Config(), "here") == config
    about = said(capsys, "presets").split("\n\n")[list(PRESETS).index(name)].splitlines()
    architecture = architectures.of(config.model)
    model = architecture.model(config.model, config.data.vocabulary)
    size = ft.tree.size(architecture.module.init(model, torch.zeros(2, dtype=torch.int32, device="meta")))
    assert config.model.parameters(config.data.vocabulary) == size
    kind, _, said_size, unit = about[1].split()[1:5]
    assert kind == architecture.name
    assert float(said_size) == pytest.approx(size / {"thousand": 1e3, "million": 1e6, "billion": 1e9}[unit], rel=0.005)
    assert about[0] == name and "needs" in about[4] and max(map(len, about)) <= 80


def test_a_preset_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no preset 'tinny'; did you mean tiny?" in said(capsys, "presets", "tinny", code=2)


def test_profile_shows_operations_and_writes_a_trace(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    words = ["--no-compile", "--active", 2, "--warmup", 0]
    text = said(capsys, "profile", run, *words, "--rows", 3, "--trace", tmp_path / "trace.json.gz")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    lines = text[: text.index("each of one step")].splitlines()
    assert [line for line in lines if line.startswith(("waiting for input", "only Python runs", "peak memory"))]
    rows = lines[[line.split()[:1] for line in lines].index(["operation"]) + 1 :]
    assert len(rows) == 3 and max(map(len, rows)) <= 80
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    steps = [e for e in trace["traceEvents"] if e.get("name") == profiling.STEP and e.get("ph") == "X"]
    assert len(steps) == 2 and f"trace: {tmp_path / 'trace.json.gz'}" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "functrain profile RUN|PRESET"),
        (["tinny"], "did you mean tiny?"),
        (["smoke", "--active", "0"], "--active: expected at least 1"),
        (["smoke", "--trace", "x.txt"], "ends in .json or .json.gz"),
        (["smoke", "--model.layer", "3"], "did you mean --model.layers?"),
    ],
)
def test_what_cannot_be_profiled_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in said(capsys, "profile", *words, code=2)
    assert list(tmp_path.iterdir()) == []


def test_the_time_in_which_nothing_runs_is_what_no_kernel_covers() -> None:
    def event(name: str, start: float, end: float, kind: str = "CUDA") -> Any:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=kind), time_range=SimpleNamespace(start=start, end=end)
        )

    events = [
        event(profiling.STEP, 0.0, 40.0, "CPU"),
        event(profiling.STEP, 5.0, 90.0),  # as a GPU's time line repeats it
        event("before", -20.0, -10.0),
        event("b", 60.0, 100.0), event("a", 10.0, 30.0), event("inside a", 15.0, 20.0), event("overlaps", 25.0, 40.0),
        event("launch", 0.0, 60.0, "CPU"),
    ]  # fmt: skip
    idle, gaps, longest = profiling._idle(events, torch.device("cuda"))
    assert (idle, gaps, longest) == (pytest.approx(0.3), 2, pytest.approx(20e-6))
