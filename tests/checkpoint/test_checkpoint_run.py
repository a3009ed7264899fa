"""The checkpoints of a run: saved every n steps, the newest whole one found, older ones removed, one writer."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_trees import assert_same, small

from functrain import checkpoint
from functrain.checkpoint import run, staging, writing


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list(run)]


def train(hook: checkpoint.Every, first: int, last: int) -> None:
    for t in range(first, last + 1):
        hook(t, small(t), {})


def test_every_nth_step_is_saved_and_the_newest_two_stay(tmp_path: Path) -> None:
    assert checkpoint.list(tmp_path) == [] and checkpoint.latest(tmp_path) is None
    train(checkpoint.every(3, tmp_path, metadata={"config": {"width": 8}}), 1, 11)
    assert steps(tmp_path) == [6, 9]
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / "checkpoints" / "step-00000009"
    assert_same(small(9), checkpoint.load(newest, like=small(0) | {"note": ""}))
    assert checkpoint.contents(newest).metadata == {"config": {"width": 8}, "step": 9}


def test_save_forces_a_step_and_keep_last_says_how_many_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = checkpoint.every(100, tmp_path, keep_last=1)
    assert hook.save(7, small(7)) == tmp_path / "checkpoints" / "step-00000007"
    hook.save(8, small(8))
    with monkeypatch.context() as patched:
        patched.setattr(writing, "draft", None)  # the end of a loop on an n-th step costs nothing
        assert hook.save(8, small(8)) == tmp_path / "checkpoints" / "step-00000008"
    assert steps(tmp_path) == [8]
    train(checkpoint.every(1, tmp_path, keep_last=None), 9, 13)
    assert steps(tmp_path) == [8, 9, 10, 11, 12, 13]
    assert steps(Path(os.path.relpath(tmp_path))) == steps(tmp_path)


def test_more_than_eight_digits_still_sort_as_numbers(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path)
    for t in (99_999_999, 100_000_000, 100_000_001):
        hook.save(t, small(1))
    assert steps(tmp_path) == [100_000_000, 100_000_001]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "5"])
def test_every_refuses_what_is_no_number_of_steps(n: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        checkpoint.every(n, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="None keeps all"):
        checkpoint.every(1, tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="steps done, came -1"):
        checkpoint.every(1, tmp_path).save(-1, small(1))


def damage(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return path.parent


def test_a_broken_newest_is_passed_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(checkpoint.every(1, tmp_path, keep_last=3), 1, 3)
    broken = damage(tmp_path, 3)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "passed over" in record.getMessage() and str(broken) in record.getMessage()


def test_passing_over_is_seen_on_stderr_without_any_setting(tmp_path: Path) -> None:
    train(checkpoint.every(1, tmp_path), 1, 2)
    damage(tmp_path, 2)
    code = f"from functrain import checkpoint; print(checkpoint.latest({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("step-00000001") and "passed over a checkpoint" in done.stderr


def test_a_run_with_only_broken_checkpoints_does_not_start_over(tmp_path: Path) -> None:
    train(checkpoint.every(1, tmp_path), 1, 2)
    for step in (1, 2):
        damage(tmp_path, step)
    with pytest.raises(checkpoint.IntegrityError, match="came 2 that do not") as caught:
        checkpoint.latest(tmp_path)
    assert "step-00000001" in str(caught.value) and "step-00000002" in str(caught.value)


def test_a_broken_newest_does_not_count_as_kept(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=2)
    train(hook, 1, 3)
    damage(tmp_path, 3)
    hook(4, small(4))
    assert steps(tmp_path) == [2, 3, 4]  # 2 and 4 are whole
    hook(5, small(5))
    assert steps(tmp_path) == [4, 5]


def test_a_resumed_run_writes_a_broken_step_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(checkpoint.every(1, tmp_path, keep_last=None), 1, 3)
    broken = damage(tmp_path, 3)
    train(checkpoint.every(1, tmp_path, keep_last=None), 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert_same(small(3), checkpoint.load(broken))
    [aside] = (tmp_path / "checkpoints").glob("broken-step-00000003-*")
    assert "set aside" in caplog.text and str(aside) in caplog.text


def test_a_resumed_run_meets_its_own_steps(tmp_path: Path) -> None:
    train(checkpoint.every(1, tmp_path, keep_last=None), 1, 3)
    made = {path: path.stat().st_ino for path in checkpoint.list(tmp_path)}
    train(checkpoint.every(1, tmp_path, keep_last=None, metadata={"other": 1}), 2, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert made.items() <= {path: path.stat().st_ino for path in checkpoint.list(tmp_path)}.items()


def test_a_run_that_went_back_replaces_its_step_and_sets_later_ones_aside(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=None)
    train(hook, 1, 4)
    hook.save(2, small(9))
    assert steps(tmp_path) == [1, 2]
    assert_same(small(9), checkpoint.load(checkpoint.latest(tmp_path) or ""))
    aside = sorted((tmp_path / "checkpoints").glob("abandoned-step-*"))
    assert [path.name[:23] for path in aside] == ["abandoned-step-00000003", "abandoned-step-00000004"]
    assert_same(small(4), checkpoint.load(aside[1]))
    hook.save(5, small(5))
    hook.save(3, small(8))  # there was none any more
    assert steps(tmp_path) == [1, 2, 3]


def test_another_runs_checkpoint_is_never_replaced_removed_or_set_aside(tmp_path: Path) -> None:
    other, here = tmp_path / "other", tmp_path / "run"
    train(checkpoint.every(1, other, keep_last=None), 1, 5)
    (here / "checkpoints").mkdir(parents=True)
    for t in (1, 2, 5):
        shutil.copytree(other / "checkpoints" / f"step-{t:08d}", here / "checkpoints" / f"step-{t:08d}")
    hook = checkpoint.every(1, here, keep_last=1)
    with pytest.raises(checkpoint.ExistsError, match="another run"):
        hook.save(2, small(9))
    hook.save(2, small(2))  # the same bits are no other history
    hook.save(3, small(3))
    hook.save(4, small(4))
    assert steps(here) == [1, 2, 4, 5]
    assert_same(small(5), checkpoint.load(here / "checkpoints" / "step-00000005"))
    assert_same(small(1), checkpoint.load(here / "checkpoints" / "step-00000001"))
    names = {checkpoint.contents(path).run for path in checkpoint.list(here)}
    assert len(names) == 2 and None not in names


LOSS = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: float("-inf"), 6: 1.0, 7: 9.0, 8: 8.0, 9: 7.0}


def test_every_nth_and_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    best = checkpoint.Best("loss", 2)
    hook = checkpoint.every(1, tmp_path, keep_last=1, keep_every=4, keep_best=best)
    for t, loss in LOSS.items():
        hook(t, small(t), {"loss": torch.tensor(loss), "other": torch.tensor(t)})
    assert steps(tmp_path) == [2, 4, 6, 8, 9]
    assert checkpoint.contents(tmp_path / "checkpoints" / "step-00000002").metadata["metrics"] == {"loss": 1.0}
    damage(tmp_path, 6)
    hook(10, small(10))  # without metrics it is never best
    assert steps(tmp_path) == [2, 4, 8, 10]
    highest = checkpoint.every(1, tmp_path / "b", keep_last=1, keep_best=checkpoint.Best("loss", mode="max"))
    for t, loss in LOSS.items():
        highest(t, small(t), {"loss": torch.tensor(loss)})
    assert steps(tmp_path / "b") == [7, 9]
    for wrong in ("loss", checkpoint.Best("loss", 0), checkpoint.Best("loss", mode="low")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected keep_best of Best"):
            checkpoint.every(1, tmp_path, keep_best=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep_best: loss: expected one number, came a tensor \(2,\), as the lanes"):
        checkpoint.Best("loss").of({"loss": torch.zeros(2)})
    with pytest.raises(ValueError, match="expected keep_every of at least 1, came 0"):
        checkpoint.every(1, tmp_path, keep_every=0)


def test_a_kept_checkpoint_is_read_once_and_again_when_it_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    fault = run.fault
    monkeypatch.setattr(run, "fault", lambda path: (read.append(path.name), fault(path))[1])
    hook = checkpoint.every(1, tmp_path, keep_last=2)
    train(hook, 1, 4)
    assert read == ["step-00000003", "step-00000002", "step-00000004"]
    read.clear()
    flip = tmp_path / "checkpoints" / "step-00000004" / "tensors.safetensors"
    text = bytearray(flip.read_bytes())
    text[-1] ^= 1
    flip.write_bytes(text)
    hook.save(5, small(5))
    assert steps(tmp_path) == [3, 4, 5] and read == ["step-00000005", "step-00000004"]


def test_a_run_whose_name_was_changed_is_told(tmp_path: Path) -> None:
    checkpoint.every(1, tmp_path)
    gc.collect()
    for text in ("{}", '{"run": "x"}', "x" * 2000, '{"run": 1}'):
        (tmp_path / "checkpoints" / "run.json").write_text(text)
        with pytest.raises(checkpoint.IntegrityError, match=r"run\.json.*remove it"):
            checkpoint.every(1, tmp_path)


def test_leftovers_of_dead_writers_go_and_other_things_stay(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path)
    folder = tmp_path / "checkpoints"
    dead = [".step-00000001.staging-elsewhere-1-0123abcd", f".step-00000009.staging-vm-{os.getpid()}-01234567"]
    kept = [".step-00000001.staging", "notes", ".mine"]
    for name in dead + kept:
        (folder / name).mkdir()
        (folder / name / "tensors.safetensors").write_bytes(b"half")
    hook.save(1, small(1))
    assert {path.name for path in folder.iterdir()} == {".lock", "run.json", "step-00000001", *kept}


def test_a_save_without_a_run_removes_only_leftovers_of_dead_processes_here(tmp_path: Path) -> None:
    host = staging.socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = f".c.staging-{host}-{dead.pid}-01234567"
    kept = {f".c.staging-{host}-{os.getppid()}-01234567", ".c.staging-elsewhere-1-01234567", f".d{stale[2:]}"}
    for name in (stale, *kept):
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path / "c", small(1))
    assert {path.name for path in tmp_path.iterdir()} == {"c", *kept}


OTHER = """
import sys
from functrain import checkpoint
try:
    hook = checkpoint.every(1, sys.argv[1])
except checkpoint.LockedError as error:
    print(error)
else:
    print("locked")
    sys.stdin.read()
"""


def other(run: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", OTHER, str(run)], stdin=pipe, stdout=pipe, text=True)


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path)
    assert checkpoint.every(2, tmp_path)  # the same process may
    gc.collect()
    said, _ = other(tmp_path).communicate()
    assert f"a lock by host {staging.socket.gethostname()}, process {os.getpid()}" in said
    assert "choose another run folder" in said
    del hook
    gc.collect()
    holder = other(tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(checkpoint.LockedError, match=f"process {holder.pid}"):
        checkpoint.every(1, tmp_path)
    checkpoint.latest(tmp_path)  # reading needs no lock
    holder.kill()
    holder.communicate()
    assert checkpoint.every(1, tmp_path)


def test_a_run_folder_that_cannot_be_made_fails_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(checkpoint.StorageError, match="choose a run folder"):
        checkpoint.every(1, tmp_path / "file")
    if os.getuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(checkpoint.StorageError):
            checkpoint.every(1, tmp_path / "closed")
    (tmp_path / "run" / "checkpoints" / ".lock").mkdir(parents=True)
    with pytest.raises(checkpoint.StorageError, match="lock file"):
        checkpoint.every(1, tmp_path / "run")


def test_what_is_known_of_removed_checkpoints_is_forgotten(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=2)
    for t in range(8):
        hook(t, small(t))
    assert len(hook._known._facts) <= 3
