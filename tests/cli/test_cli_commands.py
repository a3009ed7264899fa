"""The small commands, and every error that a user can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from functrain import checkpoint, cli
from functrain.train.watching import display

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    words = ["train", "smoke", "--run", str(folder / "run"), "--data.corpus", str(folder / "text.txt"), "--no-compile"]
    assert cli.main(words) == 0
    return folder / "run"


def said(capsys, *words, code=0):
    assert cli.main([str(word) for word in words]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err if code else found.out


def test_help_lists_the_commands_and_each_has_its_own(capsys):
    shown = said(capsys, "--help")
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)
        assert f"usage: functrain {name}" in said(capsys, name, "--help")
    assert re.fullmatch(r"functrain \d+\.\d+\.\d+\n", said(capsys, "--version"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["trian"],
            "no command 'trian'; there are train, presets, generate, evaluate, inspect, plot, profile, dry-run, "
            "verify, export",
        ),
        (["train", "tinny"], "no preset 'tinny'; did you mean tiny?"),
        (["train", "zebra"], "no preset 'zebra'; there are tiny, smoke"),
        (["train", "smoke", "--stepz", "3"], "did you mean --steps?"),
        (["train", "smoke", "--model.layer", "3"], "did you mean --model.layers?"),
        (["train", "smoke", "--steps", "many"], "--steps"),
        (["train", "smoke", "--steps"], "--steps"),
        (["train", "smoke", "--precision", "float8"], "'float32', 'bfloat16', 'float16'"),
        (["train", "smoke", "--batch", "0"], "batch: expected at least 1, came 0"),
        (["train", "smoke", "--config"], "expected a TOML file after it"),
        (["train", "smoke", "--config", "no.toml"], "no.toml: no such file"),
        (["train", "smoke", "--config", "other.toml"], "other.toml: unknown key stepz; did you mean steps?"),
        (["train", "smoke", "--run", "new", "--data.corpus", "nowhere"], "'nowhere' is neither a file nor a folder"),
        (["train", "smoke", "--run", "other.toml"], "expected a folder for the run, came a file"),
        (["train", "smoke", "--run", "."], "expected the folder of a run or an empty one"),
        (["generate"], "RUN"),
        (["generate", "nowhere"], "nowhere: expected the folder of a run"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["inspect", "."], "expected a run, a checkpoint or a model's safetensors"),
        (["inspect", "other.toml"], "expected a safetensors file"),
        (["verify", "nowhere"], "nowhere: no such file or folder"),
        (["verify", "."], "expected a run, a checkpoint or a model's safetensors"),
        (["export", "nowhere", "--to", "new"], "nowhere: expected the folder of a run"),
        (["export", "nowhere"], "--to"),
        (["plot"], "functrain plot RUN"),
        (["plot", "nowhere"], "nowhere: expected the folder of a run"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.toml").write_text("stepz = 3\n")
    errors = said(capsys, *words, code=2)
    assert errors.startswith("functrain: ") and says in errors and len(errors.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.toml"], "a refused command leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here, which the refusal needs to lack")
def test_a_device_that_is_not_there_is_named(capsys, tmp_path):
    assert "torch sees none" in said(capsys, "train", "smoke", "--run", tmp_path / "r", "--device", "cuda", code=2)


def test_no_command_is_a_usage_error(capsys):
    assert "usage: functrain" in said(capsys, code=2)


def test_an_option_wins_over_the_file_and_the_file_over_the_preset(capsys, tmp_path, run):
    file, other = tmp_path / "mine.toml", tmp_path / "run"
    file.write_text("steps = 3\nbatch = 2\nlog_every = 1\n[model]\nlayers = 1\n")
    text = run.parent / "text.txt"
    words = ["train", "smoke", "--config", file, "--run", other, "--data.corpus", text, "--no-compile", "--steps", 2]
    said(capsys, *words)
    written = (other / "config.toml").read_text()
    for line in ("steps = 2", "batch = 2", "layers = 1", "width = 16"):
        assert line in written.splitlines()


@pytest.mark.parametrize("missing", ["tyro", "rich", "matplotlib"])
def test_a_missing_package_is_named_with_how_to_get_it(missing, tmp_path):
    program = f"import sys; sys.modules[{missing!r}] = None; from functrain.cli import main; sys.exit(main(['train']))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"functrain: train needs the package {missing!r}; install it with: pip install 'functrain[cli]'\n"
    )


def test_our_own_error_keeps_its_traceback(monkeypatch):
    def broken(words):
        return [][0]

    monkeypatch.setattr("functrain.cli.plot.main", broken)
    with pytest.raises(IndexError):
        cli.main(["plot", "run"])


def test_inspect_shows_the_tree_of_a_run_a_checkpoint_and_a_file(capsys, run):
    short = said(capsys, "inspect", run)
    assert "step-00000008" in short and "step: 8" in short and "threads: " in short
    rows = {line.split()[0]: line.split()[1:] for line in short.splitlines()}
    assert rows["params/wte"] == ["4,096", "16.4", "kB", "float32", "yes"]
    assert rows["params/blocks/0..1"][-1] == "yes" and rows["opt_state/1/0"][-1] == "no"
    assert list(rows).index("params/wte") < list(rows).index("opt_state/1/0")
    assert "(256, 16)" not in short and max(map(len, short[short.index("path ") :].splitlines())) <= 80
    rows = [line.split()[0] for line in said(capsys, "inspect", run, "--depth", 1).splitlines()]
    assert rows[rows.index("path") :][1:3] == ["params", "guard"] and rows[-2:] == ["total", "total"]
    assert "--depth: expected at least 1, came 0" in said(capsys, "inspect", run, "--depth", 0, code=2)

    whole = said(capsys, "inspect", run, "--leaves")
    assert whole.startswith(short)
    row = next(line for line in whole.splitlines() if line.startswith("params/wte") and "(256" in line)
    assert row.split() == ["params/wte", "(256,", "16)", "float32", "16,384", "yes"]
    assert re.search(r"^opt_state/\S+/mu/wte .* no$", whole, re.MULTILINE)
    older = said(capsys, "inspect", run / "checkpoints" / "step-00000006")
    assert "step: 6" in older
    table = said(capsys, "inspect", run / "checkpoints" / "step-00000008" / "tensors.safetensors", "--leaves")
    assert [line.split()[:3] for line in table.splitlines() if "wte" in line][-1] == ["params/wte", "(256,", "16)"]


def test_inspect_shows_anybodys_safetensors(capsys, tmp_path):
    file = tmp_path / "other.safetensors"
    names = ["h.0.w", "layers/2/w", "layers/10/w", "mixed/0", "mixed/b"]
    save_file({name: torch.zeros(2, 3, dtype=torch.bfloat16) for name in names}, file)
    table = said(capsys, "inspect", file, "--leaves").split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in table[1:-1]] == names
    save_file({"a": torch.zeros(1), "a/b": torch.zeros(1)}, file)
    assert "'a/b' lies below" in said(capsys, "inspect", file, code=2)


def test_inspect_shows_a_models_folder_in_one_file_or_many(capsys, tmp_path):
    tensors = {f"h.{i}.attn.weight": torch.zeros(4, 4) for i in range(3)} | {"wte.weight": torch.zeros(8, 4)}
    for folder, most in (("one", 1 << 20), ("many", 100)):
        checkpoint.save_folder(tmp_path / folder, tensors, {}, max_file_bytes=most)
        rows = said(capsys, "inspect", tmp_path / folder).splitlines()[2:]
        assert [row.split()[:2] for row in rows] == [["h/0..2", "48"], ["wte/weight", "32"], ["total", "80"]]
    (tmp_path / "many" / "model-00002-of-00004.safetensors").unlink()
    assert "no model-00002-of-00004.safetensors" in said(capsys, "inspect", tmp_path / "many", code=2)


def test_plot_draws_one_run_into_it_and_several_where_it_is_told(capsys, run, tmp_path):
    (run / "loss.png").unlink()
    assert said(capsys, "plot", run).strip() == str(run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "deep" / "both.png"
    said(capsys, "plot", run, run, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_generate_goes_on_from_the_prompt_the_same_way_each_time(capsys, run):
    first = said(capsys, "generate", run, "--prompt", "the cat", "--tokens", 20, "--seed", 1)
    assert first.startswith("the cat") and len(first) > len("the cat") + 5
    assert said(capsys, "generate", run, "--prompt", "the cat", "--tokens", 20, "--seed", 1) == first
    assert said(capsys, "generate", run, "--prompt", "the cat", "--tokens", 20, "--seed", 2) != first
    likeliest = [said(capsys, "generate", run, "--tokens", 9, "--temperature", 0, "--seed", seed) for seed in (1, 2)]
    assert likeliest[0] == likeliest[1]
    # more than the context of 16
    assert len(said(capsys, "generate", run, "--prompt", "the cat sat on the mat and", "--tokens", 40)) > 40


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--tokens", "-1"], "tokens"), (["--temperature", "-1"], "temperature"), (["--top-p", "2"], "top_p")],
)
def test_generate_refuses_what_cannot_be(capsys, run, words, says):
    assert says in said(capsys, "generate", run, *words, code=2)


def test_a_reader_that_goes_away_is_no_error(run):
    words = [sys.executable, "-m", "functrain.cli", "inspect", str(run)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=300)
    process.stderr.close()
    assert errors == b""


def test_in_a_terminal_the_progress_is_live(run, tmp_path):
    ours, theirs = pty.openpty()
    words = [
        "train",
        "smoke",
        "--run",
        str(tmp_path / "run"),
        "--data.corpus",
        str(run.parent / "text.txt"),
        "--no-compile",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "functrain.cli", *words],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=300) == 0
    text = shown.decode()
    assert "━" in text and "8/8" in text and "tokens/s" in text and "grad norm" in text and "\x1b[" in text
    assert "trigram model" in text and "Traceback" not in text


def test_time_left_is_that_of_the_steps_after_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    pace = display.Pace(done=0, steps=100)
    now[0] = 60.0  # compiling
    pace.add(1)
    assert pace.eta() == "-"
    now[0] = 70.0
    pace.add(11)
    assert pace.eta() == "1:29"
    now[0] = 60.0 + 3600.0
    pace.add(51)
    assert pace.eta() == "58:48"
