"""Folders of a hub, hostile and broken ones included: exact tensors, or an error that names the file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from functrain import checkpoint
from functrain.checkpoint import hub

TENSORS = {"a": torch.arange(4.0), "b": torch.arange(6.0), "c": torch.arange(8.0)}
NAMES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def sharded(folder: Path, where: dict[str, Any] | None = None) -> Path:
    checkpoint.save_folder(folder, TENSORS, {}, max_file_bytes=1)
    if where is not None:
        (folder / hub.INDEX).write_text(json.dumps({"weight_map": dict(zip("abc", NAMES, strict=True)) | where}))
    return folder


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    found = checkpoint.load_folder(sharded(tmp_path / "m"), wanted=lambda name: name != "b")
    assert set(found) == {"a", "c"} and torch.equal(found["c"], TENSORS["c"])


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    checkpoint.save_folder(tmp_path / "blobs", TENSORS, {}, max_file_bytes=1 << 30)
    (tmp_path / "snapshot").mkdir()
    os.symlink("../blobs/model.safetensors", tmp_path / "snapshot" / "model.safetensors")
    assert set(checkpoint.load_folder(tmp_path / "snapshot")) == set(TENSORS)


ESCAPES = ["/etc/x.safetensors", "../x.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin", 3, ".."]
ESCAPES += ["a" * 244 + ".safetensors", "\ud800.safetensors"]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(checkpoint.IntegrityError, match="'b': expected the name of a safetensors file in this folder"):
        checkpoint.load_folder(sharded(tmp_path / "m", {"b": name}))


def test_all_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for name in NAMES[1:]:
        (folder / name).unlink()
    with pytest.raises(checkpoint.IntegrityError, match=f"came no {NAMES[1]}, {NAMES[2]}; fetch"):
        checkpoint.load_folder(folder)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "'b': expected this tensor, as the index says, came none"),
        ({"b": torch.zeros(1), "a": torch.zeros(1)}, f"'a': expected what the index says: .* is in {NAMES[0]}"),
        ({"b": torch.zeros(1), "d": torch.zeros(1)}, "'d': expected what the index says: this tensor is nowhere"),
    ],
    ids=["absent", "in two", "unknown"],
)
def test_a_shard_and_its_index_must_agree(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    folder = sharded(tmp_path / "m")
    save_file(tensors, folder / NAMES[1])
    with pytest.raises(checkpoint.IntegrityError, match=says) as caught:
        checkpoint.load_folder(folder)
    assert str(folder / NAMES[1]) in str(caught.value)


def test_a_shard_that_nobody_names_is_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"z": torch.zeros(1)}, folder / "old.safetensors")
    assert set(checkpoint.load_folder(folder)) == set(TENSORS)
    [record] = caplog.records
    assert record.levelno == logging.WARNING and str(folder / "old.safetensors") in record.getMessage()


def test_an_index_that_lost_all_of_a_shard_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    table = json.loads((folder / hub.INDEX).read_text())
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if file != NAMES[1]}
    (folder / hub.INDEX).write_text(json.dumps(table))
    with pytest.raises(checkpoint.IntegrityError, match=f"expected all {len(NAMES)} shards of model, came 2 of them"):
        checkpoint.load_folder(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "every JSON key once"),
        ('{"weight_map": {"a": "x.safetensors", "\\u0061": "x.safetensors"}}', "every JSON key once"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ("[" * 100_000, "nested too deeply"),
        ("\x80", "expected a JSON object"),
        ("", "expected a JSON object"),
    ],
)
def test_an_index_that_is_none_says_what_came(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / hub.INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(checkpoint.IntegrityError, match=says) as caught:
        checkpoint.load_folder(tmp_path)
    assert hub.INDEX in str(caught.value)


def test_an_index_of_any_length_is_not_read_into_memory(tmp_path: Path) -> None:
    with open(tmp_path / hub.INDEX, "wb") as file:
        file.truncate(10**12)  # a hole: no block on the disk
    with pytest.raises(checkpoint.IntegrityError, match="at most 100000000 bytes of JSON, came 1000000000000"):
        checkpoint.load_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"pytorch_model.bin": b"\x80\x02"}, "came pytorch_model.bin, which may be a pickle and run code"),
        ({"config.json": b"{}", "x.gguf": b"GGUF"}, "came only config.json, x.gguf"),
        ({}, "came an empty folder"),
        ({"model.safetensors": b"PK\x03\x04" + bytes(60)}, "came a zip archive"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "a Git LFS pointer"),
    ],
)
def test_a_folder_without_safetensors_is_named_for_what_it_is(
    tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.load_folder(tmp_path)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.MissingError, match="no such folder"):
        checkpoint.load_folder(tmp_path / "nowhere")


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(checkpoint.ExistsError, match="choose another name"):
            checkpoint.save_folder(target, TENSORS, {}, max_file_bytes=1)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_tensor_that_safetensors_lacks_writes_nothing(tmp_path: Path) -> None:
    for tensor in (torch.zeros(1, dtype=torch.complex128), torch.zeros(1, device="meta")):
        with pytest.raises(checkpoint.UnsupportedError, match="'w': expected a (dtype of bool|tensor with values)"):
            checkpoint.save_folder(tmp_path / "m", {"w": tensor}, {}, max_file_bytes=1)
    assert list(tmp_path.iterdir()) == []
