"""A command that is refused has written nothing; what is asked of a run is read where it cannot be another's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from functrain import checkpoint, cli, tree
from functrain.cli import options
from functrain.cli import train as train_command
from functrain.recipes import folder, texts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    inside = tmp_path_factory.mktemp("cli")
    (inside / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    assert train(inside / "run", inside / "text.txt") == 0
    return inside / "run"


def train(run: Path, text: Path, *words: str) -> int:
    given = ["train", "smoke", "--run", str(run), "--data.corpus", str(text), "--no-compile", "--steps", "4"]
    return cli.main([*given, "--checkpoint-every", "2", *words])


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def files(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"  # says which process had it last
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "2", "--model.heads", "4"], "expected steps of at least the 4 that it has done, came 2"),
        (["--model.width", "32"], "holds a model of another shape"),
        (["--data.vocabulary", "300"], "data.vocabulary: 256 -> 300"),
        (["--data.corpus", "short.txt"], "short.txt: expected a text to train on of 17 tokens"),
        (["--data.corpus", "absent.txt", "--seed", "3"], "'absent.txt' is neither a file nor a folder"),
    ],
)
def test_changes_that_are_accepted_and_then_refused_change_nothing(
    words: list[str],
    says: str,
    copy: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(copy.parent)
    (copy.parent / "short.txt").write_text("0123456789")
    before = files(copy)
    assert train(copy, run.parent / "text.txt", "--accept-changes", *words) == 2
    assert says in capsys.readouterr().err
    assert files(copy) == before


def test_a_new_run_that_is_refused_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run.parent / "text.txt"
    for words in (["--model.context", "5000"], ["--data.validation", "0.0004"], ["--model.context", "700"]):
        assert train(tmp_path / "new", text, "--data.vocabulary", "270", *words) == 2
        assert train(tmp_path / "new", text, "--sweep", "b1=0.8,0.9", "--data.vocabulary", "270", *words) == 2
    assert capsys.readouterr().err.count("give more text") == 6
    assert not (tmp_path / "new").exists()


def test_without_a_compiler_nothing_is_begun(
    copy: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from functrain.compiler.inductor import cxx

    monkeypatch.setattr(cxx, "is_there", lambda: False)
    before = files(copy)
    for words in (["--accept-changes", "--seed", "5"], ["--sweep", "b1=0.8,0.9"]):
        assert train(copy, run.parent / "text.txt", *words, "--compile") == 2
        assert "--no-compile" in capsys.readouterr().err
    assert files(copy) == before


def test_a_run_that_another_process_began_meanwhile_is_not_begun_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    length = texts.check_lengths

    def meanwhile(*args: object) -> str | None:
        shutil.copytree(run, tmp_path / "new")
        return length(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(texts, "check_lengths", meanwhile)
    assert train(tmp_path / "new", run.parent / "text.txt", "--seed", "7") == 2
    assert "another process has saved here meanwhile" in capsys.readouterr().err
    assert files(tmp_path / "new") == files(run)


def test_the_shape_of_a_model_is_read_in_its_checkpoint(
    copy: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["--prompt", "the", "--tokens", "30", "--temperature", "0"]
    assert cli.main(["generate", str(run), *words]) == 0
    text = capsys.readouterr().out
    config = folder.read_config(copy)
    found = folder.model_in(folder.newest(copy))
    assert found is not None and found[0].name == "gpt2"
    model = found[1]
    assert (model.heads, model.width, model.vocab) == (2, config.model.width, 256)
    file = (copy / "config.toml").read_text()
    for i, spoilt in enumerate([file.replace("heads = 2", "heads = 4"), file.replace("layers = 2", "layers = 7"), "x"]):
        (copy / "config.toml").write_text(spoilt)
        assert cli.main(["generate", str(copy), *words]) == 0
        assert capsys.readouterr().out == text
        assert cli.main(["export", str(copy), "--to", str(copy / f"model-{i}")]) == 0
        assert '"n_head": 2' in (copy / f"model-{i}" / "config.json").read_text()
        capsys.readouterr()


def test_another_cadence_goes_on_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    text, other = run.parent / "text.txt", tmp_path / "run"
    cadence = ["--log-every", "1", "--evaluate-every", "1", "--evaluate-batches", "1", "--checkpoint-every", "1"]
    assert train(tmp_path / "whole", text, "--steps", "6") == 0
    assert train(other, text, "--steps", "6", *cadence) == 0
    shutil.rmtree(checkpoint.list(other)[-1])
    assert train(other, text, "--steps", "6") == 0
    states = [checkpoint.load(folder.newest(path)) for path in (other, tmp_path / "whole")]
    assert all(map(torch.equal, *map(tree.leaves, states)))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--learning_rate", "--optimizer.learning-rate"),
        ("--final-learning-rat", "--optimizer.final-learning-rate"),
        ("--optimiser.learning-rate", "--optimizer.learning-rate"),
        ("--lr", "--optimizer.learning-rate"),
        ("--decay", "--optimizer.weight-decay"),
        ("--modle.layers", "--model.layers"),
        ("--layer", "--model.layers"),
        ("--heads", "--model.heads"),
        ("--vocab", "--data.vocabulary"),
        ("--stepz", "--steps"),
        ("--no-compil", "--no-compile"),
        ("--confg", "--config"),
        ("--zebra", None),
    ],
)
def test_an_option_is_known_by_its_last_word_first(word: str, meant: str | None) -> None:
    assert options.suggestion(word, [*options._names(train_command.Options), "--config"]) == meant
