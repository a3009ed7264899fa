"""What is public in a room is in its `__all__`, has a docstring, and is what `dir` and `help` show."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import functrain as ft

ROOT = Path(__file__).parents[2] / "functrain"
PACKAGES = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
WITHIN = sorted(
    ".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.rglob("__init__.py") if file.parent != ROOT
)
# rooms whose functions are reached from others: nothing of them is called by a name behind ft
INSIDE = {"cli", "compiler", "recipes"}
ROOMS = [name for name in PACKAGES if name not in INSIDE]


@pytest.mark.parametrize("name", WITHIN)
def test_each_name_in_all_is_there_once(name: str) -> None:
    room = import_module(f"functrain.{name}")
    assert room.__doc__ and list(room.__all__) == list(dict.fromkeys(room.__all__))
    for public in room.__all__:
        assert getattr(room, public) is not None, public


@pytest.mark.parametrize("name", ROOMS)
def test_each_public_function_and_class_has_a_docstring_that_is_a_sentence(name: str) -> None:
    room = import_module(f"functrain.{name}")
    for public in room.__all__:
        found = getattr(room, public)
        # an optimizer's state says by comments what its fields are, and by its name whose it is
        is_state = name == "optim" and public.endswith("State")
        if inspect.isroutine(found) or isinstance(found, ModuleType) or isinstance(found, type) and not is_state:
            first = (inspect.getdoc(found) or "").split("\n\n")[0]
            assert first and not first.startswith(f"{public}("), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", ROOMS)
def test_what_stands_in_a_room_without_an_underscore_is_in_all(name: str) -> None:
    room = import_module(f"functrain.{name}")
    ours = {
        key for key, value in vars(room).items()
        if not key.startswith("_") and not isinstance(value, ModuleType) and _is_ours(value)
    }  # fmt: skip
    assert ours - set(room.__all__) == set()


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "functrain")).startswith("functrain")


@pytest.mark.parametrize("name", ["", *ROOMS])
def test_dir_shows_what_is_public_and_no_file(name: str) -> None:
    room = import_module(f"functrain.{name}") if name else ft
    shown = [public for public in dir(room) if not public.startswith("__")]
    assert shown == sorted(room.__all__)


# files and folders that a room shows as rooms of their own, such as ft.optim.projections
SUBROOMS = [
    f"{room}.{public}"
    for room in ROOMS
    for public in import_module(f"functrain.{room}").__all__
    if isinstance(getattr(import_module(f"functrain.{room}"), public), ModuleType)
]


@pytest.mark.parametrize("name", SUBROOMS)
def test_a_room_within_a_room_shows_what_is_public_and_nothing_that_it_imports(name: str) -> None:
    room = import_module(f"functrain.{name}")
    assert [public for public in dir(room) if not public.startswith("__")] == sorted(room.__all__) != []
    ours = {key for key, value in vars(room).items() if getattr(value, "__module__", None) == room.__name__}
    assert {key for key in ours - set(room.__all__) if not key.startswith("_")} <= _REACHED, "public, or with a _"
    if name != "testing.laws":  # whose names are those of ft.testing
        with pytest.raises(AttributeError, match=f"'functrain.{name}' has no attribute .*did you mean ft.{name}"):
            getattr(room, sorted(room.__all__)[-1] + "s")


# what other files of the house take from there
_REACHED = {"unscale", "wide", "wide_dtype", "Law", "Batch"}


def test_help_of_a_room_shows_its_functions() -> None:
    shown = pydoc.plain(pydoc.render_doc(ft.generation))
    assert "generate(" in shown and "decode_stream(" in shown and "check_prompt(" not in shown
    shown = pydoc.plain(pydoc.render_doc(ft.checkpoint))
    assert "\n    save(" in shown and "\n    load(" in shown


def test_a_star_takes_what_is_public() -> None:
    said = "from functrain.optim import *; from functrain.checkpoint import *; print(adamw, save, 'masking' in dir())"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.endswith(" False\n") and "function adamw" in done.stdout, done.stderr


def test_the_house_is_loaded_when_it_is_named() -> None:
    said = (
        "import sys, functrain as ft; assert 'torch' not in sys.modules and 'optim' in dir(ft)\n"
        "ft.schedules; assert 'functrain.optim' not in sys.modules\n"
        "import functrain.optim, functrain; functrain.train.fit is ft.fit or sys.exit(1)\n"
        "from functrain import Loss, tree, train_step\n"
        "print({name for name in ft.__all__ if getattr(ft, name) is None})"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout == "set()\n", done.stderr


def test_a_room_that_is_imported_by_itself_knows_what_may_be_meant() -> None:
    said = "import functrain.random as r\ntry:\n    r.randn\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.endswith("has no attribute 'randn'; did you mean ft.random.normal?\n"), done.stderr


def test_the_names_of_the_house_are_those_that_a_type_checker_sees() -> None:
    assert set(ft.__all__) == {*ft.ROOMS, *ft._ROOM_OF}
    written = (ROOT / "__init__.py").read_text()
    seen = written[written.index("if TYPE_CHECKING:") : written.index("__version__")]
    assert [name for name in ft.__all__ if not re.search(rf"\b{name}\b", seen)] == []
