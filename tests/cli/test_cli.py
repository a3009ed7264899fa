"""The command as a user meets it: what it prints, what it leaves in the run folder, how it stops and goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from functrain import checkpoint, cli, tree
from functrain.recipes import record
from functrain.train.watching.rows import OF_THE_MACHINE

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "functrain.cli"]
STEPS = 120
OPTIONS = [
    "--steps",
    str(STEPS),
    "--checkpoint-every",
    "25",
    "--log-every",
    "5",
    "--evaluate-every",
    "40",
    "--no-compile",
]


def environment(**more):
    # one thread: sums come out the same beside other tests; wide: no line of a live display is cut
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"} | more


class Done(NamedTuple):
    stdout: str
    stderr: str


def command(*words, code=0, **more):
    """Run the command in this process: another one would load torch once more, for 4 s."""
    out, errors, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, environment(**more)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            found = cli.main([str(word) for word in words])
    finally:
        torch.set_num_threads(threads)
    assert found == code, f"exit code {found}\n{out.getvalue()}\n{errors.getvalue()}"
    assert "Traceback" not in errors.getvalue()
    return Done(out.getvalue(), errors.getvalue())


def process(*words, code=0, **more):
    """Run the command as a process."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=600, env=environment(**more)
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return Done(done.stdout, done.stderr)


def train(run, corpus, *more, **settings):
    return command("train", "smoke", "--run", run, "--data.corpus", corpus, *OPTIONS, *more, **settings)


def interrupted(run, corpus, signum, step):
    """Start a run, send it a signal when it has shown that `step` is done, and return its exit code and stderr."""
    words = [*COMMAND, "train", "smoke", "--run", str(run), "--data.corpus", str(corpus), *OPTIONS]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(signum)
            break
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} says that {i} and {i * i} are numbers\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A run that nothing stopped, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train(run, corpus).stdout


def last_state(run):
    checkpoint.verify(checkpoint.latest(run))
    return checkpoint.load_file(checkpoint.latest(run) / "tensors.safetensors")


def numbers(run):
    """The record without what depends on the clock."""
    rows = record.rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def test_a_run_leaves_its_record(whole, corpus):
    run, _ = whole
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["steps"] == STEPS and config["compile"] is False and config["data"]["corpus"] == str(corpus)
    rows = record.rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert [row["step"] for row in rows if "validation_loss" in row] == [40, 80, 120]
    assert {"bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second"} <= set(rows[0])
    assert [path.name for path in checkpoint.list(run)] == ["step-00000100", "step-00000120"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG") and (run / "loss.png").stat().st_size > 10_000
    assert (run / "sample.txt").read_text()


def test_a_run_shows_its_numbers(whole):
    run, shown = whole
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert f"validation loss {summary['validation_loss']:.4f}" in shown
    assert f"{summary['validation_bits_per_byte']:.4f} bits per byte" in shown
    assert f"trigram model's {summary['trigram_bits_per_byte']:.4f}" in shown
    assert "\x1b" not in shown
    line = next(line for line in shown.splitlines() if line.startswith("step 80/120"))
    for part in ("loss ", "lr ", "grad norm ", "tokens/s", "validation ", "ETA "):
        assert part in line
    assert "a sample:" in shown


def test_bits_per_byte_are_nats_over_ln_2(whole):
    summary = json.loads((whole[0] / "summary.json").read_text())
    # the smoke preset's tokens are bytes; 1e-6: the loss was summed in float32 within a batch
    assert summary["validation_bits_per_byte"] == pytest.approx(
        summary["validation_loss"] / 0.6931471805599453, rel=1e-6
    )


def test_the_same_command_again_trains_no_more_and_says_the_same(whole, corpus):
    run, shown = whole
    before = (run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes()
    again = train(run, corpus).stdout
    assert ((run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes()) == before
    assert again.splitlines()[-8:] == shown.splitlines()[-8:]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, corpus, tmp_path, signum, code):
    run = tmp_path / "run"
    found, errors = interrupted(run, corpus, signum, step=30)
    assert found == code
    if signum != signal.SIGKILL:
        assert "stopped training after step" in errors and "Traceback" not in errors and len(errors.splitlines()) == 1
        # the step that was running is saved, not only the last multiple of 25
        stopped_at = int(last_state(run)["step"])
        assert stopped_at >= 30 and f"after step {stopped_at};" in errors
    train(run, corpus)
    assert tree.leaves(tree.map(torch.equal, last_state(run), last_state(whole[0]))).count(False) == 0
    assert numbers(run) == numbers(whole[0])


def test_another_config_is_a_difference_and_an_error_until_it_is_accepted(whole, corpus, tmp_path):
    run = tmp_path / "run"
    train(run, corpus, "--steps", 30)
    refused = train(run, corpus, "--steps", 32, "--optimizer.b1", 0.8, code=2).stderr
    assert "steps: 30 -> 32" in refused and "optimizer.b1: 0.9 -> 0.8" in refused and "--accept-changes" in refused
    assert tomllib.loads((run / "config.toml").read_text())["steps"] == 30
    train(run, corpus, "--steps", 32, "--accept-changes")
    assert len(numbers(run)) == 32
    train(run, corpus, "--steps", 32)


def test_another_text_is_an_error_until_it_is_accepted(tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one two three four five six seven eight nine ten\n" * 50)
    train(run, text, "--steps", 4)
    text.write_text("ten nine eight seven six five four three two one\n" * 50)
    refused = train(run, text, "--steps", 4, code=2).stderr
    assert "the corpus is not the one it was trained on" in refused and "--accept-changes" in refused
    train(run, text, "--steps", 4, "--accept-changes")


def test_a_loss_that_stays_nan_is_seen_and_stops_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    options = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup", 0.1, "--checkpoint-every", 3]
    failed = train(run, corpus, *options, code=1)
    # the row is looked at when the numbers are shown: at step 15
    assert re.fullmatch(r"functrain: step 15: 1\d steps in a row were skipped.*\n", failed.stderr)
    assert "loss nan" in failed.stdout and "skipped (10 in a row)" in failed.stdout and "skipped 1" in failed.stdout
    assert any(row["loss"] != row["loss"] for row in record.rows(run / "metrics.jsonl"))
    newest = checkpoint.latest(run)
    assert newest is None or all(
        leaf.isfinite().all() for leaf in checkpoint.load_file(newest / "tensors.safetensors").values()
    )


def test_a_compiled_run_learns_the_same(corpus, tmp_path):
    short = ["--steps", 10]
    train(tmp_path / "eager", corpus, *short), train(tmp_path / "compiled", corpus, *short, "--compile")
    for eager, compiled in zip(numbers(tmp_path / "eager"), numbers(tmp_path / "compiled"), strict=True):
        # float32 sums in another order: 1e-7 a step, and ten steps of Adam do not blow it up a thousandfold
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_two_writers_are_not_let_into_one_run(corpus, tmp_path):
    run = tmp_path / "run"
    hook = checkpoint.every(1, run)
    refused = process("train", "smoke", "--run", run, "--data.corpus", corpus, *OPTIONS, code=2).stderr
    assert "lock" in refused and str(os.getpid()) in refused
    del hook


def test_without_a_compiler_the_error_says_how_to_go_on(corpus, tmp_path):
    options = ["train", "smoke", "--run", tmp_path / "run", "--data.corpus", corpus]
    missing = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused = process(*options, code=2, **missing).stderr
    assert "no C++ compiler" in refused and "--no-compile" in refused and len(refused.splitlines()) == 1
    command(*options, "--no-compile", **missing)
