"""Scripts as `python script.py` runs them, but for what takes longest: torch is imported once for all of them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch._inductor", "torch._dynamo", "functrain.models.gpt2", "functrain.recipes.pretrain"]


def context() -> Any:
    """Return how processes are started here: as forks of one that has imported the library and has no threads."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def run_script(script: Path, *words: str, folder: Path | None = None, seconds: float = 600.0) -> Any:
    """Run a script in a process of one thread; return what `subprocess.run(..., text=True)` does.

    It has a `__main__`, arguments, a working directory, outputs and an end of its own.
    """
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place) / name for name in ("out", "err")]
        process = context().Process(target=_main, args=(str(script), list(words), str(folder or Path.cwd()), said))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script)], seconds, *[file.read_bytes() for file in said])
        return subprocess.CompletedProcess(
            [str(script), *words], process.exitcode, *[file.read_text(encoding="utf-8") for file in said]
        )


def _main(script: str, words: list[str], folder: str, said: list[Path]) -> None:
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    sys.argv, sys.path[0] = [script, *words], str(Path(script).parent)
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
