"""Compiled programs in a folder, to be there when a run starts again.

torch's compiler keeps each program under a hash of its graph, of the shapes, dtypes and strides of its inputs, and of
its own version and options. Here they are kept below a hash of the rest: what the processor says it can do, the
number of threads, the versions of Python and torch, and the files of our own compiler. A manifest has the hash of each
file, so that a program is the one that was written. It is machine code: take such a folder from nobody whom you would
not let run code.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from functrain.compiler.inductor import jobs

T = TypeVar("T")
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_MANIFEST = "manifest.json"
_process = threading.Lock()  # the variable is the whole process's


def kept_in(folder: Path | None, build: Callable[[], T]) -> T:
    """Return `build()`, whose programs come from a folder where they are there, and are left in it where they are not.

    Processes that share the folder compile one after another, so that the first does it for all. A folder that cannot
    be written, and one whose files are not those that its manifest names, are told by a warning; then everything is
    compiled anew.
    """
    if folder is None:
        return build()
    place = folder / environment()
    try:
        with _process, _locked(place):
            _take_out_broken(place)
            with _variable(place):
                made = build()
                jobs.finish_checks()  # what they wrote is a part of the folder
            _seal(place)
            return made
    except OSError as error:
        if error.errno not in _DISK:
            raise
        warnings.warn(
            f"ft.compile: cache: {error.filename or folder}: {error.strerror}; compiled without it, choose a folder "
            "that can be written",
            stacklevel=2,
        )
    return build()


_DISK = {errno.EACCES, errno.ENOENT, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def environment() -> str:
    """Return a hash of what a program depends on beside its graph."""
    facts = (_processor(), torch.get_num_threads(), platform.python_version(), platform.machine())
    versions = (torch.__version__, torch.version.git_version, _own_code())
    return hashlib.sha256(repr((facts, versions)).encode()).hexdigest()[:16]


def _processor() -> Any:
    """Return all instructions that the processor says it has: torch's own answer takes a compiler and two seconds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor(), torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def _own_code() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join([file.read_bytes() for file in files])).hexdigest()


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when a process dies
        yield


@contextmanager
def _variable(place: Path) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(place.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def _files(place: Path) -> dict[str, str]:
    found = sorted(file for file in place.rglob("*") if file.is_file() and _counts(file))
    return {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def _counts(file: Path) -> bool:
    # Python's own copies of what is beside them, and locks, come and go
    return file.name != _MANIFEST and file.suffix not in (".lock", ".pyc")


def _take_out_broken(place: Path) -> None:
    try:
        listed = json.loads((place / _MANIFEST).read_text())
    except FileNotFoundError:
        listed = {}  # new, or a process was killed while it compiled
    except ValueError:
        listed = None
    found = _files(place)
    if found == listed:
        return
    if listed != {}:
        wrong = next((name for name in [*found, *(listed or {})] if found.get(name) != (listed or {}).get(name)), "")
        warnings.warn(
            f"ft.compile: cache: {place / wrong}: not the file that was written there; compiled anew", stacklevel=3
        )
    shutil.rmtree(place)
    place.mkdir()


def _seal(place: Path) -> None:
    text = json.dumps(_files(place), indent=0)
    manifest = place / _MANIFEST
    if manifest.exists() and manifest.read_text() == text:
        return
    new = manifest.with_suffix(".new.lock")
    new.write_text(text)
    os.replace(new, manifest)
