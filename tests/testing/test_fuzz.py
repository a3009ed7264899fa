"""Wrong files end well, and the search for bad ends, `benchmarks/fuzz.py --files 100000`, can see them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def fuzz(*words: str, broken: str = "") -> tuple[int, dict[str, int], str]:
    """Run it, with functrain broken by a line of Python; return the exit code, what it counted, and its stories."""
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(FUZZ.parent)!r}); sys.argv = {[str(FUZZ), *words]!r}\n"
        f"{broken}\nrunpy.run_path({str(FUZZ)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout), done.stderr


def test_every_wrong_file_gives_exact_tensors_or_an_error_of_ours() -> None:
    code, found, stories = fuzz("--files", "2000")
    print(f"tried: {found['tried']}, crashes: {found['crashes']}, silent: {found['silent']}")
    assert (code, found["crashes"], found["silent"]) == (0, 0, 0), stories[-4000:]
    assert found["tried"] == 2000 and 50 < found["loaded"] < 1000


BROKEN = {
    "no check of gaps": "from functrain.checkpoint import header; header._check = lambda t, s, n, w: header.Header("
    "[header._entry(k, v, s, w) for k, v in t.items() if k != '__metadata__'], {}, s)",
    "no grammar": "from functrain.checkpoint import grammar; grammar.check = lambda *a: a[0]",
    "a lenient manifest": "from functrain.checkpoint import stream; stream.Source.finish = lambda self: None",
    "no largest size": "from functrain.models import config_fields; config_fields._MOST = 2**70",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_search_finds_what_is_broken(name: str) -> None:
    code, found, _ = fuzz("--files", "1500", "--until-found", broken=BROKEN[name])
    assert code == 1 and found["crashes"] + found["silent"] > 0


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs the package atheris")
def test_bytes_that_coverage_chooses_end_well() -> None:
    places = os.pathsep.join([str(FUZZ.parent.parent), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(FUZZ), "--guided", "--files", "2000"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": places})
    assert done.returncode == 0 and "Done 2000 runs" in done.stderr, done.stderr[-4000:]
