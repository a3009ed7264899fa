"""`functrain train` of a llama and a bert: whole runs, resumed, exported, generated from; and what is another's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import functrain as ft
from functrain import checkpoint, cli, tree
from functrain.recipes import architectures, folder, next_tokens, opened, pretrain, record, toml
from functrain.recipes.config import PRESETS, Config
from functrain.recipes.model_config import Bert, Llama

CPU = torch.device("cpu")
# what a run can be asked for beside its preset, a case of each architecture
OPTIONS = {
    "llama": ["--data.vocabulary", "300", "--model.packed", "--accumulate", "2", "--recompute", "1"],
    "experts": [
        "--model.experts",
        "4",
        "--model.experts-per-token",
        "2",
        "--model.balance",
        "0.01",
        "--peak-flops",
        "1e12",
    ],
    "bert": ["--accumulate", "2", "--recompute", "1", "--model.whole-words", "--model.dropout", "0.1"],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"line {j} of file {i} says that {i * j} is a number" for j in range(12)]
        (where / f"f{i + 1}.txt").write_text("\n".join(lines) + "\n")
    return where


def words(name: str, run: Path, texts: Path, *more: str) -> list[str]:
    preset = "bert-smoke" if name == "bert" else "llama-smoke"
    given = ["train", preset, "--no-compile", "--run", str(run), "--data.corpus", str(texts)]
    return [*given, "--data.validation", "0.3", *OPTIONS[name], *more]


@pytest.fixture(scope="module", params=OPTIONS)
def whole(request: pytest.FixtureRequest, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert cli.main(words(request.param, run, texts)) == 0
    return request.param, run


def test_the_record_says_how_much_of_the_peak_is_used(whole: tuple[str, Path]) -> None:
    name, run = whole
    rows, config = record.rows(run / "metrics.jsonl"), folder.read_config(run)
    if name != "experts":  # nobody says what a CPU can do
        assert not any("model_flops_utilization" in row for row in rows)
        return
    model = pretrain.model_of(config, 256)
    for row in rows:
        used = row["tokens_per_second"] * ft.models.training_flops_of(model) / 1e12
        assert row["model_flops_utilization"] == pytest.approx(used)


def said(capsys: pytest.CaptureFixture[str], *given: Any, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in given]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err if code else found.out


def test_a_run_records_what_its_loss_is_made_of(whole: tuple[str, Path]) -> None:
    name, run = whole
    rows, summary = record.rows(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    evaluated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [4, 8]
    if name == "bert":
        for row in rows:
            assert row["loss"] == pytest.approx(row["masked_lm_loss"] + row["next_sentence_loss"], rel=1e-6)
            assert row["weight"] == 4.0 and 0.0 <= row["next_sentence_accuracy"] <= 1.0
        assert {"validation_masked_lm_accuracy", "validation_next_sentence_accuracy"} <= set(evaluated[0])
        assert 0.0 < summary["unigram_loss"] < summary["validation_masked_lm_loss"]
        return
    assert evaluated[0]["validation_perplexity"] == pytest.approx(2.718281828 ** evaluated[0]["validation_loss"])
    assert {"validation_bits_per_byte", "trigram_bits_per_byte"} <= set(summary) and (run / "sample.txt").exists()
    if name == "experts":
        for row in rows:
            # of a router that has learnt nothing: the number of a token's experts
            assert row["load_balancing"] == pytest.approx(2.0, abs=0.05)
            assert row["loss"] == pytest.approx(row["next_token_loss"] + 0.01 * row["load_balancing"], rel=1e-5)
            assert row["bits_per_byte"] == pytest.approx(row["next_token_loss"] / 0.6931471805599453, rel=1e-5)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole: tuple[str, Path], texts: Path, tmp_path: Path) -> None:
    name, run = whole
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(checkpoint.list(again)[-1])
    assert int(checkpoint.load(folder.newest(again), at="step")) == 6
    assert cli.main(words(name, again, texts)) == 0
    states = [checkpoint.load(folder.newest(path)) for path in (again, run)]
    assert int(states[0].step) == 8 and all(map(torch.equal, *map(tree.leaves, states)))


def test_a_run_has_on_its_own_validation_text_the_loss_of_its_summary(
    whole: tuple[str, Path], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = whole
    if name == "bert":
        one = said(capsys, "evaluate", run, "--data", texts / "f1.txt", code=2)
        assert "f1.txt: expected two documents of two sentences or more, " in one and "give a folder of texts" in one
    found = said(capsys, "evaluate", run, "--batch", 4)
    line = next(line for line in found.splitlines() if line.startswith("loss"))
    assert float(line.split()[1]) == round(json.loads((run / "summary.json").read_text())["validation_loss"], 4)


def test_an_exported_run_has_the_logits_of_transformers(
    whole: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = whole
    said(capsys, "export", run, "--to", tmp_path / "model")
    cls = transformers.BertForPreTraining if name == "bert" else transformers.AutoModelForCausalLM
    theirs, ours = cls.from_pretrained(tmp_path / "model").eval(), opened.opened(run, CPU)
    tokens = torch.arange(2 * 9).reshape(2, 9) + 30
    with torch.no_grad():
        found, expected = ours.architecture.module.apply(ours.params, tokens, ours.model), theirs(tokens)
    pairs = [(found, expected.logits)] if name != "bert" else [
        (found.tokens, expected.prediction_logits), (found.next_sentence, expected.seq_relationship_logits)
    ]  # fmt: skip
    for mine, other in pairs:
        # float32 rounding of logits of order 1
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    if name != "experts":  # whose tokens are bytes, which the library of tokenizers has not
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
        text = "line 3 of file 2"
        encoded = tokenizer(text, add_special_tokens=False).input_ids
        assert encoded == ours.tokenizer.encode(text).tolist()
        assert tokenizer.mask_token_id == ours.tokenizer.special.mask
        if name == "bert":
            assert tokenizer(text).input_ids == [ours.tokenizer.special.cls, *encoded, ours.tokenizer.special.sep]
        back = opened.opened(tmp_path / "model", CPU)
        assert back.architecture is ours.architecture
        assert dataclasses.replace(back.model, attention="math") == dataclasses.replace(
            architectures.ARCHITECTURES[back.architecture.name].module.from_hf(tmp_path / "model")[1], attention="math"
        )


def test_a_decoder_goes_on_with_a_text_and_a_bert_says_that_it_cannot(
    whole: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = whole
    given = ["generate", run, "--prompt", "line 3", "--tokens", 9, "--temperature", 0]
    if name == "bert":
        assert "a bert continues no text; expected a model of gpt2 and llama" in said(capsys, *given, code=2)
        assert not (run / "sample.txt").exists()
        return
    found = opened.opened(run, CPU)
    ids = found.tokenizer.encode("line 3").tolist()
    for _ in range(9):  # the largest of the last logits each time, within the context
        logits = found.architecture.module.apply(found.params, torch.tensor([ids]), found.model)
        ids.append(int(logits[0, -1].argmax()))
    text = found.tokenizer.decode(ids).partition(ft.data.END)[0]
    assert said(capsys, *given).rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["smoke", "--model.experts", "4"], "--model.experts: a gpt2 has no such option; it is one of --model.arch"),
        (["llama-smoke", "--model.dropout", "0.1"], "a llama has no such option; it is one of --model.arch"),
        (["bert-smoke", "--model.packed"], "--model.packed: a bert has no such option"),
        (["bert-smoke", "--model.no-tied"], "--model.no-tied: a bert has no such option"),
        (["smoke", "--model.architecture", "lama"], "expected one of gpt2, llama, bert, came lama"),
        (["smoke", "--model.architecture"], "expected one of gpt2, llama, bert, came --run"),
        (["smoke", "--model.architecture", "llama", "--model.key-heads", "3"], "divides the 2 heads, came 3"),
        (["llama-smoke", "--model.experts", "4"], "model.experts_per_token: expected 1 to 4"),
        (["llama-smoke", "--model.balance", "0.1"], "model.balance: expected none, for a model without experts"),
        (["llama-smoke", "--model.expert", "4"], "did you mean --model.experts?"),
        (["bert"], "no preset 'bert'; did you mean bert-tiny?"),
        (["bert-smoke", "--data.corpus", "one.txt"], "two documents of two sentences or more on its train side"),
    ],
)  # fmt: skip
def test_what_an_architecture_lacks_is_one_sentence(
    given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("One. Two.\n" * 99)
    errors = said(capsys, "train", *given, "--run", "run", "--no-compile", code=2)
    assert says in errors and errors.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_says_the_architecture_and_has_its_fields_alone() -> None:
    tiny = PRESETS["tiny"]
    found = toml.loads('[model]\narchitecture = "llama"\nexperts = 2\nexperts_per_token = 1\nbalance = 0', tiny, "file")
    # what both have is the preset's
    assert found.model == Llama(context=128, attention="math", experts=2, experts_per_token=1, balance=0.0)
    with pytest.raises(ValueError, match=r"file: model.mask_rate: a llama has no .* of model.architecture bert$"):
        toml.loads("[model]\nmask_rate = 0.1", found, "file")
    with pytest.raises(ValueError, match=r"model.architecture: expected one of 'gpt2', 'llama', 'bert', came 'x'"):
        toml.loads('[model]\narchitecture = "x"', found, "file")
    assert toml.differences(Config(), Config(model=Bert()))[0] == 'model.architecture: "gpt2" -> "bert"'
    assert "model.mask_rate: (none) -> 0.15" in toml.differences(Config(), Config(model=Bert()))


def test_a_run_of_before_there_were_architectures_is_of_gpt2(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["train", "smoke", "--no-compile", "--run", str(tmp_path), "--data.corpus", str(texts)]
    assert cli.main([*given, "--steps", "3"]) == 0
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace('architecture = "gpt2"\n', ""))
    newest = folder.newest(tmp_path)
    about = dict(checkpoint.contents(newest).metadata)
    assert about.pop("architecture") == "gpt2"
    monkeypatch.setattr(checkpoint, "contents", lambda path: SimpleNamespace(metadata=about))
    found = folder.model_in(newest)
    assert found is not None and found[0].name == "gpt2" and folder.read_config(tmp_path).model.architecture == "gpt2"
    assert pretrain.model_at(tmp_path, newest, ft.data.Bytes())[1] == found[1]


def test_another_architecture_in_a_folder_is_another_shape(whole: tuple[str, Path], texts: Path, capsys: Any) -> None:
    _, run = whole
    errors = said(capsys, "train", "smoke", "--run", run, "--no-compile", "--accept-changes", code=2)
    assert "holds a model of another shape" in errors and "model.architecture: " in errors


def test_windows_of_a_packed_run_are_told_of_their_documents() -> None:
    end = 9
    ids = torch.tensor([1, 2, 3, end, 4, 5, end, 6, 7, 8, 1, 2, 3])
    windows = ft.data.evaluation_windows(ids, batch=1, context=4)
    found = [next_tokens._Documents(windows, end)[i] for i in range(3)]
    # an end begins the next document, which it is the first token of in packed rows, too
    assert [batch["tokens"].tolist() for batch in found] == [[[1, 2, 3, end]], [[4, 5, end, 6]], [[7, 8, 1, 2]]]
    assert [batch["documents"].tolist() for batch in found] == [[[0, 0, 0, 1]], [[0, 0, 1, 1]], [[0, 0, 0, 0]]]
    assert [batch["positions"].tolist() for batch in found] == [[[0, 1, 2, 0]], [[0, 1, 0, 1]], [[0, 1, 2, 3]]]
