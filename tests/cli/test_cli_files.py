"""`functrain verify` finds what is broken, and `functrain export` gives transformers the same model and tokens."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from later import Later
from safetensors.torch import save_file

from functrain import checkpoint, cli, data
from functrain.models import gpt2
from functrain.recipes import pretrain
from functrain.recipes.folder import read_config

transformers = Later("transformers")

TEXT = "the cat sat on the mat and the dog sat on the cat — naïve\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps with a vocabulary of byte pairs."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT * 40)
    words = ["train", "smoke", "--run", str(folder / "run"), "--data.corpus", str(folder / "text.txt"), "--no-compile"]
    assert cli.main([*words, "--data.vocabulary", "270", "--checkpoint-every", "1", "--steps", "2"]) == 0
    return folder / "run"


def said(capsys, *words, code=0):
    assert cli.main([str(word) for word in words]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found


def test_a_run_a_checkpoint_a_folder_and_a_file_verify(capsys, run, tmp_path):
    steps = checkpoint.list(run)
    lines = said(capsys, "verify", run).out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(step) for step in steps]
    assert all(": whole, " in line for line in lines)
    (line,) = said(capsys, "verify", steps[0]).out.splitlines()
    assert line == lines[0]
    file = steps[0] / "tensors.safetensors"
    count, size = len(checkpoint.load_file(file)), sum(t.nbytes for t in checkpoint.load_file(file).values())
    assert f"well formed, {count} tensors, {size:,} bytes; no checksum" in said(capsys, "verify", file).out
    said(capsys, "export", run, "--to", tmp_path / "model")
    assert "well formed" in said(capsys, "verify", tmp_path / "model").out


def test_everything_that_is_broken_is_told_and_the_code_is_1(capsys, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    first, second = checkpoint.list(tmp_path / "run")
    flipped = bytearray((first / "tensors.safetensors").read_bytes())
    flipped[-1] ^= 1
    (first / "tensors.safetensors").write_bytes(flipped)
    found = said(capsys, "verify", tmp_path / "run", code=1)
    assert found.out.startswith(f"{second}: whole") and len(found.out.splitlines()) == 1
    assert found.err.startswith(f"functrain: {first}/tensors.safetensors: expected sha256 ")
    os.unlink(second / "manifest.json")
    found = said(capsys, "verify", tmp_path / "run", code=1)
    assert found.out == "" and len(found.err.splitlines()) == 2
    assert "without manifest.json" in said(capsys, "verify", second, code=1).err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps({"w": [1.0]}), "a pickle (torch.save, .bin), which functrain never opens"),
        (b"PK\x03\x04" + bytes(40), "a zip archive (torch.save, .pt, .npz)"),
        (b"<!DOCTYPE html>", "a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"", "an empty file"),
    ],
)
def test_a_file_of_another_kind_is_named(capsys, tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    for what in (tmp_path / "model.safetensors", tmp_path):
        assert says in said(capsys, "verify", what, code=1).err


def test_a_shard_that_its_index_does_not_fit_is_told(capsys, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "'b': expected this tensor, as the index says" in said(capsys, "verify", tmp_path, code=1).err


def test_an_exported_run_is_the_same_model_with_the_same_tokens(capsys, run, tmp_path):
    assert said(capsys, "export", run, "--to", tmp_path / "model").out == (
        f"{run}/checkpoints/step-00000002 -> {tmp_path / 'model'}\n"
    )
    tokenizer = data.load_tokenizer(run / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT).input_ids) == TEXT and theirs.eos_token_id == tokenizer.end
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    tokens = torch.tensor([tokenizer.encode(TEXT).tolist()[:16]])
    params = checkpoint.load(run / "checkpoints" / "step-00000002", at="params")
    ours = gpt2.apply(params, tokens, pretrain.model_of(read_config(run), tokenizer.vocab_size))
    with torch.no_grad():
        # float32 rounding of logits of order 1
        torch.testing.assert_close(model(tokens).logits, ours, rtol=1e-5, atol=1e-5)
    assert model.config.eos_token_id == tokenizer.end


def test_an_older_step_is_exported_when_asked(capsys, run, tmp_path):
    said(capsys, "export", run, "--to", tmp_path / "first", "--step", "1")
    params, _ = gpt2.from_hf(tmp_path / "first")
    assert torch.equal(params["wte"], checkpoint.load(run / "checkpoints" / "step-00000001", at="params/wte"))
    error = said(capsys, "export", run, "--to", tmp_path / "third", "--step", "3", code=2).err
    assert "no checkpoint of step 3; it has those of 1, 2" in error and not (tmp_path / "third").exists()


def test_nothing_is_exported_over_something(capsys, run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    error = said(capsys, "export", run, "--to", tmp_path, code=2).err
    assert "choose another name" in error and (tmp_path / "mine").read_text() == "mine"


def test_a_tokenizer_that_transformers_lacks_is_said(capsys, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    data.Bytes().save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "run" / "config.toml").write_text((run / "config.toml").read_text().replace("270", "256"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    said(capsys, "export", tmp_path / "run", "--to", tmp_path / "model", code=2)
    params = gpt2.init(
        pretrain.model_of(read_config(tmp_path / "run"), data.Bytes().vocab_size), torch.zeros(2, dtype=torch.int32)
    )
    checkpoint.every(1, tmp_path / "run").save(1, {"params": params})
    assert "without a tokenizer" in said(capsys, "export", tmp_path / "run", "--to", tmp_path / "model").out
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
