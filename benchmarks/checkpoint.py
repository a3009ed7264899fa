"""Time and memory of a save and a load, side by side with safetensors and torch.save.

    python benchmarks/checkpoint.py [--gigabytes 1] [--rounds 5] [--folder DIR]

All saves bring their bytes to the disk (fsync); ours also hashes every byte. The variants take turns, round by round;
printed are medians and the ratio to `safetensors.torch.save_file` with fsync, or `load_file`. Peak memory is that of a
process of its own, above the state that it holds; a load's is above the tensors that it gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from functrain import checkpoint

FILE_BYTES = 256 << 20  # of a shard, where memory is measured


def state(gigabytes: float) -> dict[str, torch.Tensor]:
    """Tensors of 32 MB, with different bytes in every page."""
    count = max(1, round(gigabytes * 1e9 / (1 << 25)))
    row = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    return {f"w{i}": row + float(i) for i in range(count)}


def fsynced(path: Path) -> None:
    for name in (path, path.parent):
        fd = os.open(name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def times(tensors: dict[str, torch.Tensor], folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    saves: dict[str, list[float]] = {}
    loads: dict[str, list[float]] = {}
    whole, theirs, pickled = folder / "ours", folder / "theirs.safetensors", folder / "theirs.pt"

    def save_theirs() -> None:
        safetensors.torch.save_file(tensors, theirs)
        fsynced(theirs)

    def save_pickled() -> None:
        torch.save(tensors, pickled)
        fsynced(pickled)

    for _ in range(rounds):
        saves.setdefault("functrain", []).append(timed(lambda: checkpoint.save(whole, tensors)))
        saves.setdefault("safetensors + fsync", []).append(timed(save_theirs))
        saves.setdefault("torch.save + fsync", []).append(timed(save_pickled))
        loads.setdefault("functrain, verified", []).append(timed(lambda: checkpoint.load(whole)))
        loads.setdefault("functrain, verify=False", []).append(timed(lambda: checkpoint.load(whole, verify=False)))
        # load_file maps the file: its bytes are read when they are used, so they are used
        loads.setdefault("safetensors", []).append(timed(lambda: copied(safetensors.torch.load_file(theirs))))
        loads.setdefault("safetensors, pread", []).append(timed(lambda: pread(theirs)))
        loads.setdefault("torch.load", []).append(timed(lambda: torch.load(pickled, weights_only=True)))
        clear(folder)
        saves.setdefault("functrain, asynchronous: the step waits", []).append(waited(tensors, folder / "run"))
        clear(folder)
    return {"save": saves, "load": loads}


def waited(tensors: dict[str, torch.Tensor], run: Path) -> float:
    hook = checkpoint.every(1, run, asynchronous=True)
    hook(1, tensors)  # the first takes its memory from the system, once a run
    hook.wait()
    seconds = timed(lambda: hook(2, tensors))
    hook.wait()
    return seconds


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def pread(path: Path) -> Any:
    return safetensors.torch.load_file(path, backend="pread")


def table(found: dict[str, dict[str, list[float]]], size_bytes: int) -> list[str]:
    rows = []
    for what, base in (("save", "safetensors + fsync"), ("load", "safetensors, pread")):
        against = statistics.median(found[what][base])
        for name, seconds in found[what].items():
            # paired: both of a round met the same disk
            ratio = statistics.median(a / b for a, b in zip(seconds, found[what][base], strict=True))
            middle = statistics.median(seconds)
            rate = size_bytes / middle / 1e9
            rows.append(
                f"{what}  {name:42}{middle:8.3f} s {rate:7.2f} GB/s   {ratio:5.2f} (of medians {middle / against:.2f})"
            )
    return rows


def peak(what: str, gigabytes: float, folder: Path) -> None:
    """Save or load once, and print how much memory that took at most: in a process of its own."""
    if what == "load":
        before, extra = resident(), 0
        kept = checkpoint.load(folder / "c")
        extra = sum(tensor.nbytes for tensor in kept.values())
    else:
        tensors = state(gigabytes)
        before, extra = resident(), 0
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        checkpoint.save(folder / "c", tensors, max_file_bytes=FILE_BYTES)
    print((highest() - before - extra) // 1000)


def resident() -> int:
    return _status("VmRSS")


def highest() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--peak", choices=["save", "load"])
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, options.gigabytes, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tensors = state(options.gigabytes)
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        found = times(tensors, folder, options.rounds)
        for row in table(found, size_bytes):
            print(row)
        blocked = statistics.median(
            a / b
            for a, b in zip(
                found["save"]["functrain, asynchronous: the step waits"], found["save"]["functrain"], strict=True
            )
        )
        print(f"an asynchronous save blocks the step for {blocked:.1%} of a save")
        for what in ("save", "load"):
            words = [sys.executable, __file__, "--peak", what, "--gigabytes", str(options.gigabytes), "--folder", name]
            kilobytes = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            print(f"{what}: {kilobytes / 1000:.0f} MB above the state of {size_bytes / 1e6:.0f} MB in shards of 268 MB")
        print(json.dumps(found))


if __name__ == "__main__":
    main()
