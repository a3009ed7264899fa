"""Packages that are imported where they are first used: a room's first test does not wait for a witness of its last."""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """Stand for a module."""

    def __init__(self, name: str) -> None:
        vars(self)["_name"] = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_mock")):  # what pytest asks every object for
            raise AttributeError(name)
        module = importlib.import_module(self._name)
        if not hasattr(module, name):
            importlib.import_module(f"{self._name}.{name}")
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(self._name), name, value)
