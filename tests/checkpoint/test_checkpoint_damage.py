"""Damage is always seen: no byte may be missing, changed or exchanged, in any file of a checkpoint."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_trees import assert_same, small

from functrain import checkpoint

FILES = ("manifest.json", "tree.json", "tensors.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "c", small(1), metadata={"step": 1})


def seen(folder: Path, read: Callable[[Path], object] = checkpoint.load) -> bool:
    try:
        read(folder)
    except checkpoint.CheckpointError as error:
        assert str(folder) in str(error) and error.expected and error.came and error.way_out
        return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_is_seen(name: str, folder: Path) -> None:
    text = (folder / name).read_bytes()
    for at in range(len(text)):
        os.truncate(folder / name, at)
        assert seen(folder), at
        (folder / name).write_bytes(text)
    checkpoint.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_seen(name: str, folder: Path) -> None:
    text = (folder / name).read_bytes()
    for bit in random.Random(0).sample(range(len(text) * 8), 800 if name == "manifest.json" else 300):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        assert seen(folder, checkpoint.verify), bit
    (folder / name).write_bytes(text)
    checkpoint.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_exchanged_or_linked_file_is_seen(name: str, folder: Path, tmp_path: Path) -> None:
    other = checkpoint.save(tmp_path / "d", small(2), metadata={"step": 2})
    kept = (folder / name).rename(tmp_path / "kept")
    assert seen(folder)
    shutil.copy(other / name, folder / name)
    assert seen(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(kept)
    assert seen(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert seen(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    assert seen(folder)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, came in {"no": "no such folder", "file": "no such folder", "empty": "a folder without manifest"}.items():
        with pytest.raises(checkpoint.MissingError, match=came):
            checkpoint.load(tmp_path / name)


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(checkpoint.VersionError, match="expected format version 1, came 2; upgrade functrain"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../c/tensors.safetensors", "/etc/passwd", "a/b", "tree.json/", "..", "\\ud800"])
def test_a_manifest_that_names_other_files_is_refused(name: str, folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"tensors.safetensors"', f'"{name}"'))
    with pytest.raises(checkpoint.IntegrityError, match=r"file names tree.json and tensors\*.safetensors"):
        checkpoint.load(folder)


def test_a_file_that_no_manifest_names_is_ignored_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.txt").write_text("mine")
    shutil.copy(folder / "tensors.safetensors", folder / "tensors-00001-of-00001.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_same(small(1), checkpoint.load(folder))
    told = str(folder / "tensors-00001-of-00001.safetensors")
    assert [record.getMessage() for record in caplog.records] == [f"{told}: not in the manifest, ignored"]


def test_a_file_that_shrinks_while_it_is_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readv, size = os.readv, (folder / "tensors.safetensors").stat().st_size

    def shrinking(fd: int, rooms: list[memoryview]) -> int:
        if os.fstat(fd).st_size == size:
            os.truncate(folder / "tensors.safetensors", 100)
        return readv(fd, rooms)

    monkeypatch.setattr(os, "readv", shrinking)
    with pytest.raises(checkpoint.IntegrityError, match="it shrank while it was read"):
        checkpoint.load(folder)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("errno", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["full", "broken", "read-only"])
def test_a_failing_disk_is_told_and_leaves_nothing(
    call: str, errno: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.save(tmp_path / "a", small(1))
    real = getattr(os, call)

    def failing(path: object, *args: object, **kwargs: object) -> object:
        if call == "open" and not args[0] & os.O_CREAT:  # type: ignore[operator]
            return real(path, *args, **kwargs)
        raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(checkpoint.StorageError) as caught:
            checkpoint.save(tmp_path / "b", small(2))
    assert isinstance(caught.value.__cause__, OSError) and str(tmp_path / "b") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same(small(1), checkpoint.load(before))
    assert_same(small(2), checkpoint.load(checkpoint.save(tmp_path / "b", small(2))))


def test_a_disk_that_cannot_be_read_is_told_and_an_older_checkpoint_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = checkpoint.every(1, tmp_path)
    for t in (1, 2):
        hook.save(t, small(t))
    bad = (tmp_path / "checkpoints" / "step-00000002" / "tensors.safetensors").stat().st_ino
    readv = os.readv

    def failing(fd: int, rooms: list[memoryview]) -> int:
        if os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return readv(fd, rooms)

    monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(checkpoint.StorageError, match="Input/output error"):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000002")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000001"


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(checkpoint.StorageError, match="a folder that can be written"):
        checkpoint.save(tmp_path / "file" / "c", small(1))


def test_a_target_that_comes_into_being_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def late(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        checkpoint.save(new, small(1))
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(checkpoint.ExistsError, match="one that exists"):
        checkpoint.save(tmp_path / "c", small(2))
    assert_same(small(1), checkpoint.load(tmp_path / "c"))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        checkpoint.StorageError, match="room on the disk, came need 4.[0-9]+ kB, free 1.00 kB; make room"
    ):
        checkpoint.save(tmp_path / "new" / "c", {"w": torch.ones(1000)})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "c", small(1))
    assert list(tmp_path.iterdir()) == []


def test_saving_and_loading_leave_no_open_file(tmp_path: Path) -> None:
    def cycle(i: int) -> None:
        folder = checkpoint.save(tmp_path / "c", small(i))
        checkpoint.load(folder)
        os.truncate(folder / "tree.json", 3)
        assert seen(folder)
        shutil.rmtree(folder)

    cycle(0)
    gc.collect()  # the locks of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    for i in range(30):
        cycle(i)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_open_files_and_threads_stay_flat_over_many_cycles() -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "cycles.py"
    environment = os.environ | {"PYTHONPATH": str(program.parent.parent)}
    done = subprocess.run([sys.executable, program, "--cycles", "60"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
