"""Packages that are imported where they are first used: a room's first test does not wait for a witness of its last."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Later:
    """Stand for a module, to monkeypatch too."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_mock")):  # what pytest asks every object for
            raise AttributeError(name)
        module = _module(self._name)
        if not hasattr(module, name):
            try:
                _module(f"{self._name}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{self._name}.{name}":
                    raise
                raise AttributeError(f"module {self._name!r} has no attribute {name!r}") from None
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_module(self._name), name, value)

    @property
    def __dict__(self) -> Any:  # where monkeypatch looks for what it puts back
        return vars(_module(self._name))


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
