"""The examples run, and find what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_script

import functrain as ft

ROOT = Path(__file__).parents[2]


def run(name: str, *words: str, folder: Path | None = None) -> list[str]:
    done = run_script(ROOT / "examples" / name, *words, folder=folder, seconds=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_sweep_finds_a_rate_that_learns() -> None:
    *lanes, best = run("sweep_learning_rates.py")
    losses = [float(line.split()[-1]) for line in lanes]
    assert len(losses) == 16
    at = losses.index(min(losses))
    assert best.startswith(f"the best lane is {at}: ")
    # the mean square of sin is 1/2: the slowest rate is still there, the best is at a tenth
    assert losses[at] < 0.05 and min(losses[:4]) > 0.3


def test_one_step_from_meta_trained_parameters_fits_a_sine() -> None:
    fresh, before, after = [float(line.split()[-1]) for line in run("maml_sinusoids.py", "--steps", "600")]
    assert after < 0.4 * before < 0.4 * fresh  # 0.76, 3.83 and 8.58


def test_harmful_examples_are_those_with_wrong_labels() -> None:
    found = int(run("influence_of_labels.py")[-1].split(", ")[1].split()[0])
    assert found >= 24, "30 were found; 4 would be chance"


def test_privacy_costs_accuracy() -> None:
    strict, loose, open_ = [float(line.split()[-1]) for line in run("private_training.py")]
    assert 0.9 < strict < loose < open_


def test_intervals_of_a_laplace_approximation_hold_what_they_say() -> None:
    lines = [line.replace(",", "").split() for line in run("laplace.py")[3:]]
    found = {line[0]: (float(line[-3]), float(line[-1])) for line in lines}  # parts inside of 90 % intervals
    assert found["noise"][1] < 0.4  # 0.16: between the data the network errs, and does not know
    for name in ("all", "last"):
        near, between = found[name]
        # of 80 points, a tenth outside: 3.4 % of deviation, times 2
        assert abs(near - 0.9) < 0.07 and between > 0.9  # 0.91 and 0.90; 1.00 and 0.98


def test_a_learned_loss_is_not_misled_by_wrong_targets() -> None:
    squared, learned = [float(line.split()[-1]) for line in run("learned_loss.py", "--steps", "100")]
    assert learned < 0.2 * squared


def lines_of(name: str) -> int:
    body = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""', 2)[2]
    return sum(bool(line.strip()) for line in body.splitlines())


def accuracy_of(line: str) -> float:
    return float(line.split("'accuracy': ")[1].rstrip("}"))


def test_an_mlp_on_digits_is_a_page_and_learns(tmp_path: Path) -> None:
    shown = run("digits_mlp.py", folder=tmp_path)
    assert accuracy_of(shown[-1]) >= 0.975  # 0.981
    last = max(int(line.split()[1].split("/")[0]) for line in shown if line.startswith("step ") and "/2000" in line)
    assert last < 2000  # stopped early; what is shown at the end is the best before
    assert int(shown[-1].split()[1].rstrip(":")) < last
    assert lines_of("digits_mlp.py") <= 25


def test_a_cnn_of_torch_on_digits_is_a_page_and_learns(tmp_path: Path) -> None:
    assert accuracy_of(run("digits_cnn.py", folder=tmp_path)[-1]) >= 0.985  # 0.992
    assert lines_of("digits_cnn.py") <= 25


def test_a_vit_on_digits_is_a_page_and_learns(tmp_path: Path) -> None:
    assert accuracy_of(run("vit_digits.py", folder=tmp_path)[-1]) > 0.97  # 0.983
    assert lines_of("vit_digits.py") <= 27


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    for i in range(24):
        lines = [f"line {j} of file {i} says that {i * j} is a number" for j in range(12)]
        (where / f"f{i + 1}.txt").write_text("\n".join(lines) + "\n")
    return where


@pytest.mark.parametrize("name", ["pretrain_bert.py", "pretrain_llama.py"])
def test_a_pre_training_is_a_page_learns_and_goes_on(name: str, texts: Path, tmp_path: Path) -> None:
    words = ["--steps", "20", "--width", "16", "--vocabulary", "300", "--corpus", str(texts), "--run", str(tmp_path)]
    words.append("--no-compile")
    shown = run(name, *words)
    rows = list(ft.train.watching.rows(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    last = float(shown[-1].split("'loss': ")[1].split(",")[0].rstrip("}"))
    assert last == rows[-1]["validation_loss"] < rows[0]["loss"]
    # all is done already: it is read, evaluated, and the same
    assert run(name, *words)[-1] == shown[-1]
    assert lines_of(name) <= 60
