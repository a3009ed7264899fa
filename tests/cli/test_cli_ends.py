"""How a run ends: shown, interruptible, told where it is not finite, and whatever becomes of its output."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from functrain import checkpoint, cli
from functrain.cli import plotting
from functrain.recipes import pretrain, record
from functrain.train.watching import display

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from functrain_command import main; sys.exit(main())"
SMOKE = ["train", "smoke", "--no-compile", "--log-every", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    return file


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def test_help_and_a_wrong_option_need_no_torch() -> None:
    said = "; ".join(
        ["import sys, functrain_command as f", "assert f.main(['--help']) == 0 and f.main(['--version']) == 0"]
        + [
            "assert f.main(['trian']) == 2 and f.main([]) == 2",
            "assert 'functrain' not in sys.modules and f.main(['train', '--help']) == 0",
            "assert f.main(['train', 'tinny']) == 2 and f.main(['presets', 'tiny']) == 0",
            "assert [f.main([command, '--help']) for command in f.COMMANDS] == [0] * len(f.COMMANDS)",
            "assert [f.main([command, 'run', '--wrong']) for command in f.COMMANDS] == [2] * len(f.COMMANDS)",
            "print('torch' in sys.modules, 'matplotlib' in sys.modules)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("False False\n"), done.stderr
    # what may be left out says so itself
    assert not any(silly in done.stdout for silly in ("(default: )", "(default: '')", "(default: None)", "{None}"))
    assert "usage: functrain COMMAND" in done.stdout and "no command 'trian'" in done.stderr


def test_a_model_that_ends_as_nan_is_one_sentence_and_a_curve(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*SMOKE, "--run", str(run), "--data.corpus", str(text), "--optimizer.learning-rate", "1e30"]
    assert cli.main([*words, "--stop-after-nonfinite", "99"]) == 1
    found = capsys.readouterr()
    assert found.err.startswith("functrain: the model is not finite at the end: validation loss nan")
    assert found.err.count("\n") == 1 and f"learning curve: {run / 'loss.png'}" in found.out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert said["validation_loss"] == "nan" and math.isfinite(said["trigram_bits_per_byte"])
    assert cli.main(["generate", str(run)]) == 1
    assert "NaN" in capsys.readouterr().err
    assert cli.main([*words, "--stop-after-nonfinite", "3", "--run", str(tmp_path / "stopped")]) == 1
    assert (tmp_path / "stopped" / "loss.png").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("swept", [[], ["--sweep", "b1=0.8,0.9"]])
def test_the_evaluation_at_the_end_is_shown_and_a_signal_ends_it(
    signum: int, swept: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    validation, seen = pretrain.validation, list[int]()

    def interrupted(*args: Any, **named: Any) -> dict[str, float]:
        def before(batch: int) -> None:
            seen.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signum)
            named["before"](batch)

        return validation(*args, **{**named, "before": before} if "before" in named else named)

    words = [*SMOKE, "--steps", "2", "--run", str(tmp_path), "--data.corpus", str(text), *swept]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "validation", interrupted)
        assert cli.main(words) == 128 + signum
    found = capsys.readouterr()
    assert seen == [0, 1] and f"evaluation of {8 if swept else 4} batches" in found.out
    assert f"{signal.Signals(signum).name} stopped training after step 2; the same command goes on" in found.err
    assert int(checkpoint.load(checkpoint.latest(tmp_path / ("sweep" if swept else "")), at="step").reshape(-1)[0]) == 2
    assert cli.main(words) == 0
    assert (tmp_path / "summary.json").exists()


def test_an_evaluation_tells_its_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    lines = display.Lines()
    lines.begin(0, 10)
    for done in range(31):
        lines.evaluating(done, 30)
        now[0] += 1.0
    assert capsys.readouterr().out.splitlines() == [
        "evaluation of 30 batches", "evaluation 10/30  ETA 0:20", "evaluation 20/30  ETA 0:10",
        "evaluation 30/30  ETA 0:00",
    ]  # fmt: skip


def test_a_run_whose_reader_leaves_trains_on(text: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM, *SMOKE, "--run", "run", "--data.corpus", str(text)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii")
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == b""
    assert len(record.rows(tmp_path / "run" / "metrics.jsonl")) == 8 and (tmp_path / "run" / "sample.txt").exists()


def test_a_run_without_any_stream_trains(text: Path, tmp_path: Path) -> None:
    script = f"{sys.executable} -c '{PROGRAM}' {' '.join(SMOKE)} --steps 2 --run run --data.corpus {text} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment(), timeout=300).returncode == 0
    assert (tmp_path / "run" / "config.toml").read_text().startswith("steps = 2\n"), "no file became standard output"
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_terminal_that_closes_saves_the_step(text: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *SMOKE, "--steps", "100000", "--run", "run", "--data.corpus", str(text)],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(COLUMNS="40", TERM="xterm"),
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"tokens/s" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=300) == 128 + signal.SIGHUP
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None and int(checkpoint.load(newest, at="step")) >= 1


def test_an_output_that_fails_is_dropped_and_one_that_is_no_utf_8_shows_all() -> None:
    program = (
        "import sys; from functrain.cli import streams\n"
        "streams.settle(); print('a\\u2501\\udcff', flush=True)\n"
        "sys.stdout = open('/dev/full', 'w')\n"
        "with streams.enduring():\n    print('x' * 99999, flush=True)\n"
        "sys.stderr.write('on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(PYTHONIOENCODING="ascii")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\\u2501\\udcff\n", b"on")


def rows_of(run: Path, values: list[float], name: str = "bits_per_byte") -> Path:
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"step": i + 1, name: record.readable(value)}) + "\n" for i, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every picture that is saved."""
    found, save = [], plotting.matplotlib.figure.Figure.savefig

    def saving(figure: Any, out: Any) -> None:
        found.append(figure.axes[0])
        save(figure, out)

    monkeypatch.setattr(plotting.matplotlib.figure.Figure, "savefig", saving)
    return found


def test_a_step_of_nan_blanks_itself_and_a_spike_squeezes_nothing(axes: list[Any], tmp_path: Path) -> None:
    values = [8.0 * 0.99**i + 2.0 for i in range(200)]
    values[50], values[120], values[150] = math.nan, 1e6, math.inf
    plotting.draw([rows_of(tmp_path / "run", values)], tmp_path / "loss.png")
    smooth = axes[0].lines[1].get_ydata()
    assert [i for i in range(200) if not math.isfinite(smooth[i])] == [50, 150]
    low, high = axes[0].get_ylim()
    assert 0.0 < low < 4.0 and 10.0 < high < 11.0
    assert axes[0].lines[1].get_label() == "train (2 steps above 10)" and axes[0].get_title() == "run"


@pytest.mark.parametrize("values", [[math.nan] * 3, [1.0], [9.0, 1e9], [10.0 - i for i in range(9)]])
def test_a_short_run_is_drawn(values: list[float], axes: list[Any], tmp_path: Path) -> None:
    plotting.draw([rows_of(tmp_path / "run", values)], tmp_path / "loss.png")
    assert axes[0].get_ylim()[1] < 20.0


@pytest.mark.parametrize("summary", ["", "{", "[]", "{}", '{"trigram_bits_per_byte": "nan"}', "\xff"])
def test_a_damaged_summary_costs_its_line(summary: str, axes: list[Any], tmp_path: Path) -> None:
    run = rows_of(tmp_path / "run", [3.0, 2.0])
    (run / "summary.json").write_text(summary, encoding="latin-1")
    assert cli.main(["plot", str(run)]) == 0
    assert not [line for line in axes[0].lines if str(line.get_label()).startswith("trigram")]


@pytest.mark.parametrize("name", ["a$b_{", "_hidden", os.fsdecode(b"run\xff"), "plain"])
def test_a_run_of_any_name_is_drawn_under_it(name: str, axes: list[Any], tmp_path: Path) -> None:
    run = rows_of(tmp_path / name, [3.0, 2.0])
    assert cli.main(["plot", str(run), str(run), "--out", str(run / "two.png")]) == 0
    shown = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert len(shown) == 4 and shown[0].startswith("train, ") and (run / "two.png").exists()


@pytest.mark.parametrize(
    ("out", "written"),
    [("x.png", "x.png"), ("x", "x.png"), ("x.", "x.png"), ("a.b/x", "a.b/x.png"), ("x.SVG", "x.SVG")],
)
def test_the_name_that_is_printed_is_the_one_written(
    out: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", str(rows_of(tmp_path / "run", [3.0, 2.0])), "--out", out]) == 0
    assert capsys.readouterr().out == f"{written}\n" and Path(written).is_file()


@pytest.mark.parametrize(("out", "says"), [("x.xyz", "expected a picture of kind avif"), (".", "came a folder")])
def test_a_picture_that_cannot_be_is_one_line(
    out: str, says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", str(rows_of(tmp_path / "run", [3.0, 2.0])), "--out", out]) == 2
    found = capsys.readouterr().err
    assert says in found and found.count("\n") == 1


def test_a_run_and_a_text_whose_names_are_no_utf_8(text: Path, tmp_path: Path, capsys: Any) -> None:
    odd = tmp_path / os.fsdecode(b"t\xff.txt")
    odd.write_bytes(text.read_bytes())
    run = tmp_path / os.fsdecode(b"r\xff")
    for steps in ("2", "2"):
        assert cli.main([*SMOKE, "--steps", steps, "--run", str(run), "--data.corpus", str(odd)]) == 0
    assert cli.main(["generate", str(run), "--tokens", "3"]) == 0
    assert cli.main(["generate", str(run), "--prompt", os.fsdecode(b"\xff")]) == 2
    assert "--prompt: expected UTF-8" in capsys.readouterr().err


def recorded(run: Path, **metrics: list[float]) -> Path:
    """A run as `ft.train.record` keeps it, of a training of one's own."""
    run.mkdir()
    rows = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    lines = [json.dumps({"step": i + 1, **row}) + "\n" for i, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def test_the_learning_rate_and_the_gradient_norm_have_panels_where_they_were_recorded(
    axes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = recorded(tmp_path / "a", loss=[3.0, 2.0], learning_rate=[0.1, 0.2], validation_loss=[3.5, 2.5])
    b = recorded(tmp_path / "b", loss=[4.0, 3.0], grad_norm=[1.0, 9.0], bits_per_byte=[1.0, 2.0])
    assert cli.main(["plot", str(a), str(b), "--out", str(tmp_path / "ab.png")]) == 0
    labels = [panel.get_ylabel() for panel in axes[0].figure.axes]
    assert labels == ["loss", "learning rate", "gradient norm"], "bits per byte are not of both"
    curves, rate, norm = [[list(line.get_ydata()) for line in panel.lines] for panel in axes[0].figure.axes]
    assert [2.5 in line for line in curves].count(True) == 1 and [0.1, 0.2] in rate and [1.0, 9.0] in norm
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == [
        "train, a", "validation, a", "train, b", "validation, b",
    ]  # fmt: skip
    assert cli.main(["plot", str(b)]) == 0
    assert [panel.get_ylabel() for panel in axes[1].figure.axes] == ["bits per byte", "gradient norm"]


def test_panels_are_any_metrics_that_were_recorded(
    axes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded(tmp_path / "run", reward=[3.0, 2.0], validation_accuracy=[0.1, 0.2])
    assert cli.main(["plot", str(run), "--panels", "accuracy, reward"]) == 0
    assert [panel.get_ylabel() for panel in axes[0].figure.axes] == ["accuracy", "reward"]
    capsys.readouterr()
    for words, says in (
        ([], "no run has recorded a loss; name what to draw with --panels, of reward, validation_accuracy"),
        (["--panels", "speed"], "--panels: no run has recorded 'speed'; there are reward, validation_accuracy"),
    ):
        assert cli.main(["plot", str(run), *words]) == 2
        assert says in capsys.readouterr().err
