"""A run folder that is copied, moved, linked or read while it is written, and a disk that fails between two renames."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_trees import assert_same, small
from test_checkpoint_run import other, steps, train

from functrain import checkpoint
from functrain.checkpoint import run


def test_a_lock_that_was_lost_is_taken_again_or_told(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path / "run")
    hook.save(1, small(1))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # closes a file that is locked, and with it the lock
    hook.save(2, small(2))
    said, _ = other(tmp_path / "run").communicate()
    assert "a lock by host" in said
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    holder = other(tmp_path / "run")
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(checkpoint.LockedError, match=f"process {holder.pid}"):
        hook.save(3, small(3))
    assert steps(tmp_path / "run") == [1, 2]
    holder.kill()
    holder.communicate()
    hook.save(3, small(3))


def test_a_copy_elsewhere_is_whole_and_a_run_that_was_moved_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = checkpoint.every(1, tmp_path / "run")
    saved = hook.save(1, small(1))
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert_same(small(1), checkpoint.load(tmp_path / "elsewhere"))
    os.rename(tmp_path / "run", tmp_path / "moved")
    hook.save(2, small(2))
    assert "moved or removed while it was in use" in caplog.text
    assert steps(tmp_path / "moved") == [1] and steps(tmp_path / "run") == [2]
    assert "a lock by host" in other(tmp_path / "run").communicate()[0]
    names = {checkpoint.contents(path).run for r in ("run", "moved") for path in checkpoint.list(tmp_path / r)}
    assert len(names) == 1
    train(checkpoint.every(1, tmp_path / "moved"), 2, 4)
    assert steps(tmp_path / "moved") == [3, 4]


def test_of_a_linked_checkpoint_only_the_link_is_removed(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path / "run", keep_last=1)
    saved = hook.save(1, small(1))
    os.rename(saved, tmp_path / "other-disk")
    saved.symlink_to(tmp_path / "other-disk")
    assert checkpoint.latest(tmp_path / "run") == saved
    hook.save(2, small(2))
    assert steps(tmp_path / "run") == [2]
    assert_same(small(1), checkpoint.load(tmp_path / "other-disk"))
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if "staging" in path.name]


def test_two_paths_to_one_run_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    one, two = (checkpoint.every(1, tmp_path / name) for name in ("run", "link"))
    one.save(1, small(1))
    two.save(2, small(2))
    assert steps(tmp_path / "run") == steps(tmp_path / "link") == [1, 2]


def test_a_reader_beside_the_writer_finds_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=1)
    hook.save(1, small(1))
    fault, calls = run.fault, []

    def while_it_reads(path: Path, *crew: Any) -> Any:
        if not calls:
            calls.append(path)
            monkeypatch.setattr(run, "fault", fault)
            hook.save(2, small(2))  # and step 1 is gone
        return fault(path, *crew)

    monkeypatch.setattr(run, "fault", while_it_reads)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002" and len(calls) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EXDEV], ids=["EIO", "EXDEV"])
@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_disk_that_fails_in_an_overwrite_is_told_and_loses_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = getattr(os, call), 0
    for fatal in range(20):
        hook = checkpoint.every(1, tmp_path / str(fatal), keep_last=None)
        train(hook, 1, 2)
        left = fatal

        def failing(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, os.strerror(code))
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing)
            try:
                hook.save(1, small(9))
            except checkpoint.StorageError as error:
                assert error.__cause__ is not None and str(tmp_path / str(fatal)) in str(error)
                tried += 1
            else:
                assert left >= 0, "an error of the disk was passed over"
                break
        newest = checkpoint.load(checkpoint.latest(tmp_path / str(fatal)) or "")
        assert int(newest["step"]) in (2, 9)
        hook.save(1, small(9))
        assert_same(small(9), checkpoint.load(checkpoint.latest(tmp_path / str(fatal)) or ""))
    assert tried >= 4


def test_what_is_saved_already_is_brought_to_the_disk_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process that was killed between the rename and the fsync of the folder left a name that a power cut takes back
    train(checkpoint.every(1, tmp_path / "run"), 1, 1)
    checkpoint.save(tmp_path / "c", small(1))
    fsync, synced = os.fsync, set[int]()
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd))[1])
    again = checkpoint.every(1, tmp_path / "run")
    folders = [tmp_path / "run" / "checkpoints", tmp_path / "run", tmp_path]
    assert synced == {folder.stat().st_ino for folder in folders}
    for save, folder in ((lambda: again.save(1, small(1)), folders[0]), (lambda: resave(tmp_path), tmp_path)):
        synced.clear()
        save()
        assert synced == {folder.stat().st_ino}


def resave(folder: Path) -> None:
    checkpoint.save(folder / "c", small(1))


def test_the_number_of_a_step_may_be_a_tensor(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=None)
    for step in (torch.tensor(1), np.int64(2)):
        hook.save(step, small(1))  # type: ignore[arg-type]
    hook(torch.tensor(3), small(1))  # type: ignore[arg-type]
    assert steps(tmp_path) == [1, 2, 3]
    assert checkpoint.contents(checkpoint.list(tmp_path)[2]).metadata == {"step": 3}


def test_what_a_hook_cannot_do_is_told_before_the_first_step(tmp_path: Path) -> None:
    for metadata in ({"step": 1}, {"metrics": {}}):
        with pytest.raises(ValueError, match="which the hook writes; rename it"):
            checkpoint.every(1, tmp_path, metadata=metadata)
    with pytest.raises(ValueError, match="max_file_bytes: expected at least 1 byte, came 0"):
        checkpoint.every(1, tmp_path, max_file_bytes=0)
    assert list(tmp_path.iterdir()) == []
