"""`functrain generate`: what it reads, what it shows, and when."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import functrain as ft
from functrain import cli
from functrain.cli import bars
from functrain.recipes import texts
from functrain.recipes.config import Data

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat and the dog sat on the cat\n" * 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bytes and one of byte pairs, and what they are exported to."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text(TEXT)
    for name, vocabulary in (("bytes", 256), ("pairs", 270)):
        words = ["train", "smoke", "--run", str(folder / name), "--data.corpus", str(folder / "text.txt")]
        assert cli.main([*words, "--no-compile", "--data.vocabulary", str(vocabulary)]) == 0
        assert cli.main(["export", str(folder / name), "--to", str(folder / f"{name}-model")]) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    assert cli.main(["generate", *map(str, words)]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err and found.err.count("\n") == (code != 0)
    return found.err if code else found.out


@pytest.mark.parametrize("name", ["bytes", "pairs"])
def test_an_exported_folder_and_a_checkpoint_go_on_as_their_run_does(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "the cat", "--tokens", 12, "--temperature", 0]
    text = said(capsys, runs / name, *words)
    assert text.startswith("the cat")
    assert said(capsys, runs / name / "checkpoints" / "step-00000008", *words) == text
    beside = [] if name == "pairs" else ["--tokenizer", runs / name / "tokenizer.json"]
    # "math" and "fused" attention round differently; the likeliest token is the same
    assert said(capsys, runs / f"{name}-model", *words, *beside) == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bytes-model"], "and there is none; name the run's with --tokenizer RUN/tokenizer.json"),
        (["bytes-model", "--tokenizer", "pairs/tokenizer.json"], "of at most the model's 256 tokens, came one of 270"),
        (["bytes-model", "--tokenizer", "text.txt"], "text.txt: expected the JSON of a tokenizer"),
        (["nowhere"], "nowhere: expected the folder of a run or of a model"),
        (["."], ".: expected the folder of a run"),
        (["pairs", "--num-samples", "0"], "--num-samples: expected at least 1, came 0"),
        (["pairs", "--num-samples", "2", "--temperature", "0"], "would be the same text"),
        (["pairs", "--temperature", "0", "--top-k", "3"], "temperature 0 draws nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    words: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert says in said(capsys, *words, code=2)


def test_several_samples_differ_and_the_first_is_that_of_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", 9, "--prompt", "the"]
    one = said(capsys, runs / "pairs", *words)
    first, second, third = said(capsys, runs / "pairs", *words, "--num-samples", 3).split("--- ")[1:]
    assert first == f"1 of 3 ---\n{one}\n" and second.startswith("2 of 3 ---\nthe") and third.startswith("3 of 3")
    assert len({part[10:].strip() for part in (first, second, third)}) == 3


def test_a_prompt_is_read_from_a_pipe(runs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "functrain.cli", "generate", str(runs / "pairs"), "--tokens", "3"],
        input="das Kätzchen\n".encode(), capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode().startswith("das Kätzchen") and not done.stdout.startswith("das Kätzchen\n".encode())


def test_a_dash_reads_standard_input_too(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog\r\n")))
    text = said(capsys, runs / "pairs", "--prompt", "-", "--tokens", 3)
    assert text == said(capsys, runs / "pairs", "--prompt", "the dog", "--tokens", 3)


def test_bytes_on_standard_input_that_are_no_text_are_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "standard input: expected a prompt in UTF-8" in said(capsys, runs / "pairs", "--prompt", "-", code=2)


def test_a_token_is_shown_before_the_next_is_computed(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, stream = [], ft.generation.stream

    def watched(*args: Any, **named: Any) -> Any:
        for token in stream(*args, **named):
            shown.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(ft.generation, "stream", watched)
    assert cli.main(["generate", str(runs / "pairs"), "--prompt", "the", "--tokens", "9", "--temperature", "0"]) == 0
    # the first is waited for; each of the others finds the one before it shown
    assert len(shown) == 9 and shown[0] == "" and shown[1].startswith("the") and all(shown[2:])


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.bar("loading", "bytes") as shown:
        for done in range(31):
            now[0] = float(done)
            shown(done * 10**6, 30 * 10**6)
    assert capsys.readouterr() == ("", "loading: 10 of 30 MB\nloading: 20 of 30 MB\nloading: 30 of 30 MB\n")

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with bars.bar("quick", "tokens") as shown:
        shown(0, 2)
        shown(2, 2)
    assert screen.getvalue() == ""
    with bars.bar("slow", "tokens") as shown:
        shown(0, None)
        now[0] += 1.0
        shown(1, None)
        shown(1000, 2000)
    assert "slow" in screen.getvalue()


def test_a_run_tells_how_far_the_reading_of_its_text_is(runs: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}

    @contextmanager
    def bar(label: str, unit: str) -> Iterator[Any]:
        assert unit == "characters"
        yield lambda done, total: seen.setdefault(label, []).append((done, total))

    data = Data(corpus=str(runs / "text.txt"), vocabulary=270)
    sides = texts.read(data)
    tokenizer = texts.tokenizer_of(sides, data, tmp_path, resumed=False, bar=bar)
    texts.encode(sides, tokenizer, tmp_path, bar=bar)
    whole = {"learning the tokenizer": 1800, "encoding the training text": 1800, "encoding the validation text": 200}
    assert {label: told[-1] for label, told in seen.items()} == {label: (n, n) for label, n in whole.items()}
