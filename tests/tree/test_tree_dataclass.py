"""Dataclasses as nodes: fields are children, static fields are structure."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tree_cases import Layer

from functrain import tree

ONE = torch.ones(())


def test_a_dataclass_is_built_again_without_its_constructor():
    @tree.dataclass(static=("name",))
    class Checked:
        w: Any
        twice: Any = dataclasses.field(init=False)
        name: str = "n"

        def __post_init__(self) -> None:
            assert isinstance(self.w, torch.Tensor)
            object.__setattr__(self, "twice", 2 * self.w)

    node = Checked(ONE, name="m")
    assert tree.paths(node) == ["w", "twice"]
    holes = tree.map(lambda x: None, node)
    assert type(holes) is Checked and (holes.w, holes.twice, holes.name) == (None, None, "m")
    changed = tree.set_at(node, "w", 5)
    assert changed.w == 5 and changed.twice is node.twice and changed.name == "m"
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.w = 1


def test_static_fields_belong_to_the_structure():
    assert tree.structure(Layer(1, 2, 0.1)) == tree.structure(Layer(3, 4, 0.1))
    assert tree.structure(Layer(1, 2, 0.1)) != tree.structure(Layer(1, 2, 0.2))


def test_a_mutable_dataclass_with_slots_can_be_registered():
    @dataclasses.dataclass(slots=True)
    class Slots:
        x: Any

    tree.register_dataclass(Slots)
    assert tree.map(lambda x: x + 1, Slots(1)) == Slots(2)


def test_what_cannot_be_registered_is_refused():
    class Plain:
        x: int

    @dataclasses.dataclass
    class Data:
        x: int

    with pytest.raises(TypeError, match="expected a dataclass, came .*Plain.*; use @tree.dataclass"):
        tree.register_dataclass(Plain)
    with pytest.raises(TypeError, match="expected a dataclass"):
        tree.register_dataclass(Data(1))
    with pytest.raises(TypeError, match=r"expected static names, came 'x'; write \('x',\)"):
        tree.register_dataclass(Data, static="x")
    with pytest.raises(ValueError, match=r"Data has no field \['y'\]; its fields are \['x'\]"):
        tree.register_dataclass(Data, static=("x", "y"))
    assert tree.register_dataclass(Data) is Data
    with pytest.raises(ValueError, match="Data is a tree node already; register it once"):
        tree.register_dataclass(Data)
