"""The examples in docstrings run, with `torch` and `ft` at hand, and show what they say.

Of the rooms in EXEMPLARY every public function has one.
"""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import functrain as ft

ROOT = Path(ft.__file__).parent
EXEMPLARY = [
    ft.transforms, ft.transforms.loss_scale, ft.curvature, ft.curvature.laplace, ft.losses, ft.schedules, ft.tree,
    ft.random, ft.nn, ft.nn.init, ft.optim, ft.optim.aggregating, ft.optim.assignment, ft.optim.microbatching,
    ft.optim.perturbations, ft.optim.projections, ft.optim.second_order, ft.train, ft.train.watching,
    ft.train.privacy, ft.data, ft.checkpoint, ft.generation, ft.models, ft.models.bert, ft.models.gpt2, ft.models.vit,
    ft.models.modernbert,
]  # fmt: skip


def modules(root: Path) -> list[str]:
    """Return the names of the modules with an example in them."""
    files = [file for file in sorted(root.rglob("*.py")) if ">>> " in file.read_text()]
    return [".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__") for file in files]


def failures(module: ModuleType) -> tuple[int, str]:
    """Run a module's examples; return how many there are, and what is said about those that fail."""
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch, "ft": ft}):
        runner.run(test, out=said.append)
    return runner.summarize(verbose=False).attempted, "".join(said)


@pytest.mark.parametrize("name", modules(ROOT))
def test_examples_show_what_comes(name: str) -> None:
    attempted, said = failures(import_module(name))
    assert attempted and not said, said


def test_every_public_function_has_an_example() -> None:
    found = []
    for room in EXEMPLARY:
        for name in room.__all__:
            value = getattr(room, name)
            if inspect.isfunction(value) and value.__module__.startswith("functrain") and ">>> " not in value.__doc__:
                found.append(f"{room.__name__}.{name}")
    assert found == []


def test_a_wrong_example_is_found() -> None:
    module = ModuleType("wrong")
    module.__doc__ = ">>> torch.ones(2).sum()\ntensor(3.)\n>>> ft.tree.leaves([1])\n[1]\n"
    attempted, said = failures(module)
    assert attempted == 2 and "tensor(3.)" in said and "leaves" not in said
