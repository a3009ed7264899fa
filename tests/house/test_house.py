"""The house: what is installed is what was tested, and the library stands without the command's packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import functrain

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_direct_requirement_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {_name(r) for rs in [PROJECT["project"]["dependencies"], *extras] for r in rs}
    assert wanted <= {_name(pin) for pin in PINS}


def test_the_pins_name_no_build_of_one_machine():
    assert PINS["torch"] and not [pin for pin, version in PINS.items() if "+" in version]


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "functrain.__version__"
    assert f"## {functrain.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_where_the_project_says():
    module, name = PROJECT["project"]["scripts"]["functrain"].split(":")
    assert callable(getattr(import_module(module), name))


def test_importing_the_library_imports_nothing_of_the_command():
    others = {"tyro", "rich", "tokenizers", "tensorboard", "matplotlib", "jax", "transformers"}
    program = f"import sys, functrain; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_ci_runs_what_a_developer_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "set -euo pipefail" in script
    assert [line for line in script.splitlines() if line.startswith("make ")] == [
        "make lint",
        "make types",
        "make test",
    ]


def test_the_package_does_not_import_the_compiler() -> None:
    command = "import sys, functrain; print([m for m in ('torch._inductor', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "two seconds of every command that compiles nothing"
