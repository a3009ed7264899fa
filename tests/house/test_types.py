"""What users write is checked by mypy --strict and by pyright: right programs pass, each mistake is found on its line.

The programs lie in `typed`: `good.py`, and `mistakes.py`, whose wrong lines end with `# wrong`; README's page is one
beside them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import ROOT, programs

TYPED = Path(__file__).parent / "typed"
GOOD, MISTAKES, PAGE = "good.py", "mistakes.py", "README.py"
# a page is for reading: its loss is not annotated
PAGE_RULES = ["# mypy: allow-untyped-defs", "# pyright: standard"]
Found = dict[str, set[int]]  # the lines of each file with an error


def _wrong(file: str) -> set[int]:
    """Return the numbers of the lines that are marked as wrong."""
    lines = (TYPED / file).read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


def _mypy(files: list[Path], folder: Path) -> tuple[Found, str]:
    # the cache that `make types` fills: without it torch alone takes half a minute
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, files)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    return _lines(re.findall(r"^([^:\n]+):(\d+): error:", done.stdout, re.MULTILINE)), done.stdout


def _pyright(files: list[Path], folder: Path) -> tuple[Found, str]:
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed: pip install functrain[test]")
    config = {"typeCheckingMode": "strict", "include": [str(file) for file in files], "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "-p", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    return _lines([(e["file"], e["range"]["start"]["line"] + 1) for e in errors]), done.stdout


def _lines(errors: list[tuple[str, str | int]]) -> Found:
    found: Found = {}
    for file, line in errors:
        found.setdefault(Path(file).name, set()).add(int(line))
    return found


@pytest.mark.parametrize("check", [_mypy, _pyright], ids=["mypy", "pyright"])
def test_right_programs_pass_and_each_mistake_is_found_on_its_line(check, tmp_path):
    lines = programs(ROOT / "README.md").splitlines()
    assert not any(lines[: len(PAGE_RULES)])
    page = tmp_path / PAGE
    page.write_text("\n".join([*PAGE_RULES, *lines[len(PAGE_RULES) :]]) + "\n")
    found, said = check([TYPED / GOOD, TYPED / MISTAKES, page], tmp_path)
    wrong = _wrong(MISTAKES)
    assert len(wrong) > 25 and not _wrong(GOOD)
    assert found == {MISTAKES: wrong}, said
