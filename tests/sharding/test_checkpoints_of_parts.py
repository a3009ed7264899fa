"""Checkpoints of split leaves: each rank its own parts, whole or not there, and the same bits on any other mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import saving
import torch
from ranks import Ranks

import functrain as ft
from functrain.checkpoint import grammar, manifest, strict_json
from functrain.checkpoint.stream import Record


def test_a_checkpoint_moves_over_meshes_and_keeps_every_bit(two: Ranks, four: Ranks, tmp_path: Path) -> None:
    """4 -> 2 -> 1 -> 4, with replicas on the way."""
    paths = [str(tmp_path / name) for name in ("of4", "of2", "of1", "again", "of22")]
    four.run(saving.save, {"fsdp": 4}, paths[0])
    for whole in two.run(saving.move, {"fsdp": 2}, paths[0], paths[1]):
        saving.same_bits(whole, saving.values())
    loaded = ft.checkpoint.load(paths[1], like=saving.values())
    saving.same_bits(loaded, saving.values())
    assert loaded["rows"]["a"] is loaded["rows"]["tied"] and loaded["columns"].stride() == (1, 12)
    saving.same_bits(ft.checkpoint.load(paths[1]), saving.values())
    ft.checkpoint.save(paths[2], loaded, metadata={"x": 1})
    for whole in four.run(saving.move, {"fsdp": 4}, paths[2], paths[3]):
        saving.same_bits(whole, saving.values())
    for whole in four.run(saving.move, {"data": 2, "fsdp": 2}, paths[0], paths[4]):
        saving.same_bits(whole, saving.values())
    # what a mesh saved is what it saves again, and of replicas one is on the disk
    for first, last in ((paths[0], paths[3]), (paths[1], paths[4])):
        records = [{n: r for n, r in manifest.read(Path(p)).items() if manifest.is_tensors(n)} for p in (first, last)]
        sizes = [sorted(record.sha256 for record in files.values()) for files in records]
        assert sizes[0] == sizes[1]
    assert sorted(os.listdir(paths[0])) == [
        "manifest.json", *(f"tensors-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "tree.json",
    ]  # fmt: skip
    node = ft.checkpoint.contents(paths[0]).leaves["columns"]
    assert node["split"] == [1, 4] and node["shape"] == [12, 8]
    assert ft.checkpoint.contents(paths[0]).metadata == {"x": 1}


def test_files_of_a_rank_are_divided_too(two: Ranks, tmp_path: Path) -> None:
    two.run(saving.save, {"fsdp": 2}, str(tmp_path / "x"), 400)
    names = [name for name in os.listdir(tmp_path / "x") if manifest.is_tensors(name)]
    assert len(names) > 4 and "tensors-00001-of-00002.1.safetensors" in names
    saving.same_bits(ft.checkpoint.load(tmp_path / "x"), saving.values())


def test_saving_what_is_there_changes_nothing(two: Ranks, tmp_path: Path) -> None:
    for _ in range(2):
        two.run(saving.save, {"fsdp": 2}, str(tmp_path / "x"))
    with pytest.raises(AssertionError, match="ExistsError: .*expected no folder, or one with this tree"):
        two.run(saving.save, {"data": 2, "fsdp": 1}, str(tmp_path / "x"))


def test_a_rank_reads_its_own_bytes(four: Ranks, tmp_path: Path) -> None:
    w, v = torch.arange(64.0 * 1024).reshape(64, 1024), torch.arange(8.0 * 4096).reshape(8, 4096)
    ft.checkpoint.save(tmp_path / "x", {"w": w, "v": v})
    # of what is split by its columns, rows are read whole: both are, but for the rows of other ranks
    most = w.nbytes + v.nbytes + 10_000
    assert all(count <= most for count in four.run(saving.bytes_read, {"fsdp": 4}, str(tmp_path / "x")))
    four.run(saving.bytes_of_rows, str(tmp_path / "rows"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_goes_on_with_as_many_ranks_and_with_fewer(two: Ranks, asynchronous: bool, tmp_path: Path) -> None:
    whole = two.run(saving.trained, {"fsdp": 2}, str(tmp_path / "whole"), 6, 2, asynchronous)[0][0]
    for state, begun in two.run(saving.trained, {"fsdp": 2}, str(tmp_path / "run"), 3, 2, asynchronous):
        assert begun == 0 and int(state.step) == 3
    names = [path.name for path in ft.checkpoint.list(tmp_path / "run")]
    assert names[-1] == "step-00000003" and ft.checkpoint.best(tmp_path / "run").name == "step-00000003"
    for state, begun in two.run(saving.trained, {"fsdp": 2}, str(tmp_path / "run"), 6, 2, asynchronous):
        assert begun == 3
        saving.same_bits(state, whole)
    # one process goes on from what two have saved
    found, begun = saving.trained({"fsdp": 1}, str(tmp_path / "whole"), 6)
    assert begun == 6
    saving.same_bits(found, whole)


@pytest.mark.parametrize("how", ["leaf", "disk"])
def test_what_one_rank_cannot_save_is_an_error_in_all(two: Ranks, how: str, tmp_path: Path) -> None:
    first, last = two.run(saving.failing, {"fsdp": 2}, str(tmp_path / "x"), how)
    assert first.startswith("StorageError: ") and "rank 1: " in first and "expected every rank to do its part" in first
    assert (
        last.startswith("UnsupportedError: " if how == "leaf" else "StorageError: ")
        and last in first.replace("rank 1: ", "")
        or last.partition(": ")[2] in first
    )
    assert os.listdir(tmp_path) == []


def resign(folder: Path) -> None:
    """Let the manifest say what the files hold now."""
    records = {}
    for name in manifest.read(folder):
        if (folder / name).exists():
            import hashlib

            text = (folder / name).read_bytes()
            records[name] = Record(len(text), hashlib.sha256(text).hexdigest())
    (folder / manifest.NAME).write_bytes(manifest.write(records))


def test_parts_that_are_not_as_they_were_saved_are_refused(two: Ranks, tmp_path: Path) -> None:
    two.run(saving.save, {"fsdp": 2}, str(tmp_path / "x"))

    def spoilt(name: str, work: Any) -> Path:
        copy = tmp_path / name
        subprocess.run(["cp", "-r", str(tmp_path / "x"), str(copy)], check=True)
        work(copy)
        return copy

    second = "tensors-00002-of-00002.safetensors"
    missing = spoilt("missing", lambda copy: (copy / second).unlink())
    with pytest.raises(ft.checkpoint.IntegrityError, match=f"{second}: expected a file, came none"):
        ft.checkpoint.load(missing)

    def drop(copy: Path) -> None:
        (copy / second).unlink()
        resign(copy)

    with pytest.raises(ft.checkpoint.IntegrityError, match=r"the tensor 'rows/a/1\.0/' as .*came none"):
        ft.checkpoint.load(spoilt("dropped", drop))

    def twice(copy: Path) -> None:
        (copy / second).write_bytes((copy / "tensors-00001-of-00002.safetensors").read_bytes())
        resign(copy)

    with pytest.raises(ft.checkpoint.IntegrityError, match="in one file, came a second one of this name"):
        ft.checkpoint.load(spoilt("twice", twice))

    def other(copy: Path) -> None:
        text = bytearray((copy / second).read_bytes())
        text[-1] ^= 1
        (copy / second).write_bytes(bytes(text))

    with pytest.raises(ft.checkpoint.IntegrityError, match=f"{second}: expected sha256"):
        ft.checkpoint.load(spoilt("broken", other))

    def more(copy: Path) -> None:
        text = json.loads((copy / "tree.json").read_text())
        text["tree"] = json.loads(json.dumps(text["tree"]).replace('"split": [2, 1]', '"split": [4, 1]'))
        (copy / "tree.json").write_bytes(strict_json.dumps(text) + b"\n")
        resign(copy)

    with pytest.raises(ft.checkpoint.IntegrityError, match=r"rows/a/0\.0/' as .*\(2, 12\)"):
        ft.checkpoint.load(spoilt("more", more))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "broken").rename(tmp_path / "run" / "checkpoints" / "step-00000001")
    spoilt("broken", other)
    first, last = two.run(saving.refused, {"fsdp": 2}, str(tmp_path))
    for said in (first, last):
        assert "'columns': expected a whole tensor, came a part of one" in said[0] and "pass plan=" in said[0]
        assert "'a/b': expected what a plan splits, came expected pieces of one shape, came the placements" in said[1]
        assert "expected a checkpoint that verifies, came 1 that do not" in said[3]
    # the second rank's file is the second rank's to check
    assert last[2].startswith("IntegrityError: ") and f"{second}: expected sha256" in last[2]
    assert first[2].startswith("StorageError: ") and "rank 1: IntegrityError" in first[2]


@pytest.mark.parametrize(
    "split", [[], [3, 1], [1], [0, 1], [-1, -1], [1, 1], [True, 2], [2.0, 1], "2", [2**40, 1], None, [2, 1, 1]]
)
def test_a_split_that_is_none_is_refused(split: Any) -> None:
    node = {"kind": "tensor", "tensor": "w", "dtype": "float32", "shape": [2**40 if split == [2**40, 1] else 4, 2]}
    grammar.check({**node, "split": [2, 1]}, "x")
    with pytest.raises(ft.checkpoint.IntegrityError, match="expected a well-formed tree node"):
        grammar.check({**node, "split": split}, "x")


def test_a_description_of_more_parts_than_bytes_is_refused_at_once(tmp_path: Path) -> None:
    folder = ft.checkpoint.save(tmp_path / "x", {"w": torch.zeros(2**20)})
    text = json.loads((folder / "tree.json").read_text())
    text["tree"]["items"][0][1]["split"] = [2**20]
    (folder / "tree.json").write_bytes(strict_json.dumps(text) + b"\n")
    resign(folder)
    with pytest.raises(ft.checkpoint.IntegrityError, match=r"expected tensors that \d+ bytes may hold, came 1048576"):
        ft.checkpoint.load(folder)


def test_killed_at_every_call_a_save_of_ranks_is_whole_or_not_there(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [here, here.parent / "checkpoint", *sys.path]))
    done = subprocess.run(
        [sys.executable, str(here / "crashing_ranks.py"), str(tmp_path)], env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] > 12 and found["whole"] > 0 and found["absent"] > 0
