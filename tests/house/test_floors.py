"""Who may import whom: every room imports lower floors only. The house's plan is the table below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "functrain"
ROOF = 8
FLOORS = {
    "tree": 0,
    "random": 1,
    "progress": 0,
    "losses": 2,
    "schedules": 1,
    "sharding": 1,
    "compiler": 2,
    "transforms": 3,
    "curvature": 4,
    "data": 4,
    # knows trees and files, and below the models: an exchange with other libraries reads their names and its files
    "checkpoint": 4,
    "optim": 5,
    "nn": 5,
    "models": 6,
    "train": 7,
    "generation": 7,
    "evaluate": 7,
    "testing": 7,
    "recipes": ROOF,
    "cli": ROOF,
}
# the rooms within optim, from below; "" is what lies in sight: the contract, and how transformations are put together
OPTIM = ["numerics", "", "clipping", "optimizers", "preconditioning", "line_search", "learning_rate_free"]
CONTRACT = "functrain.optim.transformation"  # below all of them
# the command shows and runs recipes; testing is a side tower that looks into every room below the roof
EXTRA = {("cli", "recipes"), ("testing", "train"), ("testing", "generation"), ("testing", "evaluate")}
# the compiler knows functions of tensors: what a loss or a sharded tensor is, those tell it who use it
ONLY = {"compiler": {"tree", "random"}}
OPTREE_ROOM = "tree"
OF_THE_COMMAND = {"tyro", "rich", "tokenizers", "tensorboard", "matplotlib"}


def violations(root: Path) -> list[str]:
    """List what in the package at `root` breaks the plan, one sentence each."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        room = parts[0]
        if room in ("__init__", "__main__"):
            continue
        where = str(file.relative_to(root))
        if room not in FLOORS:
            found.append(f"{where}: room {room!r} has no floor")
            continue
        syntax = ast.parse(file.read_text(), filename=str(file))
        package = ("functrain", *(parts if file.name == "__init__.py" else parts[:-1]))[: len(parts)]
        outside_functions = _imports(syntax, package, into_functions=False)
        for line, module in _imports(syntax, package, into_functions=True):
            words = module.split(".")
            if words[0] == "optree" and room != OPTREE_ROOM:
                found.append(f"{where}:{line}: only {OPTREE_ROOM} imports optree")
            if words[0] in OF_THE_COMMAND and FLOORS[room] < ROOF and (line, module) in outside_functions:
                found.append(f"{where}:{line}: {words[0]} is imported when functrain is; import it inside the function")
            if words[0] != "functrain":
                continue
            other = words[1] if len(words) > 1 else None
            if other is None:
                if FLOORS[room] < ROOF and room != "testing":
                    found.append(f"{where}:{line}: a room below the roof imports the whole house")
            elif other == room:
                continue
            elif other not in FLOORS:
                found.append(f"{where}:{line}: imports {module}, which has no floor")
            elif other == "testing":
                found.append(f"{where}:{line}: testing is imported by none")
            elif room in ONLY and other not in ONLY[room]:
                found.append(f"{where}:{line}: {room} imports {other}, and may only {sorted(ONLY[room])}")
            elif FLOORS[other] >= FLOORS[room] and (room, other) not in EXTRA:
                found.append(f"{where}:{line}: {room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})")
    return found


def _imports(syntax: ast.Module, package: tuple[str, ...], *, into_functions: bool) -> list[tuple[int, str]]:
    found = []
    todo: list[ast.AST] = [syntax]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from functrain import tree` names the room in its names
            found += [(node.lineno, f"{module}.{n.name}" if module == "functrain" else module) for n in node.names]
        elif not into_functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        todo.extend(ast.iter_child_nodes(node))
    return sorted(set(found))


def test_every_room_imports_lower_floors_only():
    assert violations(ROOT) == []


def _module(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files_imported(root: Path) -> dict[str, set[str]]:
    """Return which modules each module of the package imports, lazily too: of a room's own names, the file of each."""
    files = {_module(file, root): file for file in sorted(root.rglob("*.py"))}
    found = {}
    for name, file in files.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(root.name):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= (inner & set(files)) or {node.module}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        found[name] = wanted & set(files) - {name}
    return found


def cycles(imported: dict[str, set[str]]) -> list[str]:
    """Return modules that import one another, each cycle as one line."""
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(imported.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in imported:
        visit(name, [])
    return found


def test_no_two_files_import_each_other():
    # the whole house imports its rooms; that some of them look into it from a function is no cycle of files
    imported = {name: others - {"functrain"} for name, others in _files_imported(ROOT).items()}
    assert cycles(imported) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


def test_the_rooms_of_optim_import_those_below():
    found = []
    for name, others in _files_imported(ROOT).items():
        if not name.startswith("functrain.optim.") or name.removeprefix("functrain.optim.") in OPTIM:
            continue
        room = OPTIM.index(_optim_room(name))
        for other in others - {CONTRACT}:
            if other.startswith("functrain.optim.") and OPTIM.index(_optim_room(other)) > room:
                found.append(f"{name} imports {other}")
    assert found == []


def _optim_room(name: str) -> str:
    room, dot, _ = name.removeprefix("functrain.optim.").partition(".")
    return room if dot or room in OPTIM else ""


def test_the_page_shows_the_plan() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {room: int(floor) for floor, room in re.findall(r"^\| (\d) \| `(\w+)` \|", page, re.MULTILINE)}
    there = {room: floor for room, floor in FLOORS.items() if list(ROOT.glob(f"{room}.py")) or (ROOT / room).is_dir()}
    assert rows == there
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", page))
    beside = {file.name for file in ROOT.parent.glob("*.py")}
    assert [name for name in named - beside if not list(ROOT.rglob(name))] == []


def test_torchs_compiler_is_called_from_one_folder():
    private = [name.relative_to(ROOT) for name in ROOT.rglob("*.py") if "torch._inductor" in name.read_text()]
    assert {str(name.parent) for name in private} == {"compiler/inductor"}


def test_files_and_folders_are_of_a_size_that_a_reader_holds():
    long = [str(file) for file in ROOT.rglob("*.py") if len(file.read_text().splitlines()) > 300]
    folders = {file.parent for file in ROOT.rglob("*.py")}
    full = [str(folder) for folder in folders if len(list(folder.glob("*.py"))) > 30]
    assert long == [] and full == []


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("optim/adam.py", "from functrain.train import state", "optim (floor 5) imports train (floor 7)"),
        ("optim/adam.py", "from functrain import nn", "optim (floor 5) imports nn (floor 5)"),
        ("optim/adam.py", "from ..nn import stack", "optim (floor 5) imports nn (floor 5)"),
        ("optim/__init__.py", "from .. import models", "optim (floor 5) imports models (floor 6)"),
        ("random.py", "import functrain.losses", "random (floor 1) imports losses (floor 2)"),
        ("losses.py", "def f():\n    from functrain import nn", "losses (floor 2) imports nn (floor 5)"),
        ("losses.py", "from functrain.compiler import engine", "losses (floor 2) imports compiler (floor 2)"),
        ("compiler/linking.py", "from functrain.losses import Loss", "compiler imports losses, and may only"),
        ("compiler/linking.py", "from functrain import transforms", "compiler imports transforms, and may only"),
        ("data/corpus.py", "import functrain as ft", "imports the whole house"),
        ("recipes/pretrain.py", "from functrain.cli import main", "recipes (floor 8) imports cli (floor 8)"),
        ("train/loop.py", "from functrain import testing", "testing is imported by none"),
        ("train/loop.py", "import optree", "only tree imports optree"),
        ("train/loop.py", "from functrain import cellar", "has no floor"),
        ("cellar/wine.py", "", "room 'cellar' has no floor"),
        ("data/bpe.py", "import tokenizers", "import it inside the function"),
        ("data/bpe.py", "try:\n    import tokenizers\nexcept ImportError:\n    pass", "import it inside the function"),
    ],
)
def test_a_broken_plan_is_found(tmp_path, file, text, says):
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/loop.py", "from functrain import data, tree\nfrom functrain.data.windows import prefetch"),
        ("compiler/cutting.py", "from functrain import random, tree\nfrom functrain.compiler import engine"),
        ("train/loop.py", "from . import state\nfrom .state import TrainState\nfrom ..tree import map"),
        ("tree/nodes.py", "import optree"),
        ("cli/train.py", "import functrain as ft\nimport rich\nfrom functrain.recipes import pretrain"),
        ("data/bpe.py", "def train():\n    import tokenizers"),
        ("testing/laws.py", "import functrain\nfrom functrain import train"),
        ("__init__.py", "from functrain import cli"),
    ],
)
def test_a_kept_plan_passes(tmp_path, file, text):
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
    assert violations(tmp_path) == []
