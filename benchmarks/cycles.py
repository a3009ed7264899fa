"""Memory, objects, open files and threads over many saves and loads: flat, or something is kept that should not be.

    python benchmarks/cycles.py [--cycles 1000]

A cycle saves a state of 4 MB through a hook, behind the training and in it by turns, loads it with and without `like=`,
verifies it, and meets a broken file. Printed is what grew between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from functrain import checkpoint


def state(i: int) -> dict[str, Any]:
    layers = [{"w": torch.full((256, 256), float(i + k)), "b": torch.zeros(256)} for k in range(16)]
    return {"layers": layers, "tied": layers[0]["w"], "step": torch.tensor(i), "note": f"cycle {i}"}


def cycle(run: Path, hooks: list[checkpoint.Every], i: int) -> None:
    made = state(i)
    hook = hooks[i % 2]
    hook(i, made)
    hook.wait()
    newest = checkpoint.latest(run)
    assert newest is not None and newest.name == f"step-{i:08d}"
    for loaded in (checkpoint.load(newest), checkpoint.load(newest, like=made), checkpoint.load(newest, only="tied")):
        assert all(int(leaf.flatten()[0]) == i for leaf in [loaded["tied"]])
    file = newest / "tensors.safetensors"
    assert len(checkpoint.load_file(file)) == 33
    broken = run / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-1])
    try:
        checkpoint.load_file(broken)
    except checkpoint.HeaderError:
        return
    raise AssertionError("a file without its last byte was loaded")


def used() -> dict[str, int]:
    """Memory of this process in kB, less what malloc keeps for later; Python objects; open files; threads."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    files, objects = len(os.listdir("/proc/self/fd")), len(gc.get_objects())
    return {"kB": resident, "objects": objects, "files": files, "threads": threading.active_count()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=1000)
    options = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        run = Path(folder)
        hooks = [checkpoint.every(1, run, asynchronous=behind) for behind in (False, True)]
        early = used()
        for i in range(1, options.cycles + 1):
            cycle(run, hooks, i)
            if i == max(options.cycles // 10, 10):
                early = used()
        late = used()
    grown = {name: late[name] - early[name] for name in early}
    print(json.dumps({"cycles": options.cycles, "at a tenth": early, "at the end": late, "grown": grown}))
    # malloc gives back no page on which anything lives, wherever threads happened to put it: 9 MB once; a state is 4 MB
    kept = grown["kB"] > 16_000 or grown["objects"] > options.cycles // 10
    return 1 if kept or grown["files"] or grown["threads"] else 0


if __name__ == "__main__":
    sys.exit(main())
