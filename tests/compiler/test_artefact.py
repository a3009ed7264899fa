"""Programs kept in a folder: taken from there, under the key of all they depend on, and never a wrong one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from later import Later
from torch import Tensor

import functrain as ft

artefact = Later("functrain.compiler.artefact")  # which loads torch's compiler, for 2 s

X = torch.arange(4.0)


def found() -> tuple[int, int]:
    """How many programs torch has taken from its cache, and how many it has made."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


@pytest.fixture
def fn() -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sin(x) * 2


@pytest.fixture
def kept(tmp_path: Path, fn: Callable[[Tensor], Tensor]) -> Path:
    """A folder with the program of `fn`."""
    assert torch.allclose(ft.compile(fn, cache=tmp_path)(X), fn(X))
    return tmp_path


def files(folder: Path, pattern: str) -> list[Path]:
    return [file for file in folder.rglob(pattern) if file.is_file()]


def test_a_program_that_is_there_is_not_made_again(kept: Path, fn: Callable[[Tensor], Tensor]) -> None:
    hits, made = found()
    assert torch.allclose(ft.compile(fn, cache=str(kept))(X), fn(X))
    assert found() == (hits + 1, made)
    # another shape, and another function, are other programs
    ft.compile(fn, cache=kept)(torch.arange(5.0))
    ft.compile(lambda x: fn(x) + 1, cache=kept)(X)
    assert found() == (hits + 1, made + 2)


def test_a_program_that_the_process_has_already_is_kept_too(kept: Path, fn: Callable[[Tensor], Tensor]) -> None:
    another = kept / "another"
    ft.compile(fn, cache=another)(X)
    names = [{file.name for file in files(folder, "*.main.so")} for folder in (kept / artefact.environment(), another)]
    assert names[0] == names[1] != set()


def test_the_key_knows_threads_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here, threads = artefact.environment(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert artefact.environment() != here
    finally:
        torch.set_num_threads(threads)
    assert artefact.environment() == here
    monkeypatch.setattr(artefact, "_processor", lambda: "another")
    assert artefact.environment() != here


@pytest.mark.parametrize("damage", ["changed", "gone", "foreign", "manifest"])
def test_a_broken_folder_is_told_and_compiled_anew(kept: Path, fn: Callable[[Tensor], Tensor], damage: str) -> None:
    library = files(kept, "*.so")[0]
    if damage == "changed":
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 1
        other = library.with_suffix(".other")
        other.write_bytes(content)
        os.replace(other, library)  # this process has the old one in its memory
    elif damage == "gone":
        library.unlink()
    elif damage == "foreign":
        (library.parent / "other.so").write_bytes(b"not ours")
    else:
        files(kept, "manifest.json")[0].write_text("{")
    hits, made = found()
    with pytest.warns(UserWarning, match="not the file that was written there; compiled anew"):
        result = ft.compile(fn, cache=kept)(X)
    assert torch.allclose(result, fn(X)) and found() == (hits, made + 1)
    ft.compile(fn, cache=kept)(X)  # whole again: no warning, which would be an error here
    assert found() == (hits + 1, made + 1)


def test_what_a_killed_process_left_is_compiled_anew_without_a_word(kept: Path, fn: Callable[[Tensor], Tensor]) -> None:
    files(kept, "manifest.json")[0].unlink()
    _, made = found()
    ft.compile(fn, cache=kept)(X)
    assert found()[1] == made + 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, fn: Callable[[Tensor], Tensor]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="compiled without it, choose a folder that can be written"):
        assert torch.allclose(ft.compile(fn, cache=tmp_path / "file")(X), fn(X))


def test_a_process_waits_for_another_that_compiles(tmp_path: Path) -> None:
    place = tmp_path / artefact.environment()
    done = threading.Event()
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process holds it
        thread = threading.Thread(target=lambda: artefact.kept_in(tmp_path, done.set))
        thread.start()
        assert not done.wait(0.5)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert done.wait(60)
        thread.join()


def test_the_key_is_all_that_the_processor_can_do() -> None:
    flags = str(artefact._processor())
    assert ("avx2" in flags.lower()) == torch.cpu._is_avx2_supported()
    assert len(flags) > 10


def test_another_process_compiles_nothing(tmp_path: Path) -> None:
    """Also with torch's own folder empty: what tells the processor's instructions is kept with the programs."""
    program = (
        "import sys, torch, functrain as ft\n"
        "print(ft.compile(lambda x: torch.sin(x) * 3, cache=sys.argv[1])(torch.ones(64)).sum().item())"
    )
    compiler, said = tmp_path / "g++", tmp_path / "said"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {said}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)

    def run(name: str) -> tuple[str, int]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "CXX": str(compiler)}
        command = [sys.executable, "-W", "error::UserWarning", "-c", program, str(tmp_path / "programs")]
        said.write_text("")
        result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return result, said.read_text().count("-shared")

    first, libraries = run("first")
    assert libraries >= 1  # the kernel, and what a processor is asked with that can do more than torch was built for
    assert run("second") == (first, 0)
