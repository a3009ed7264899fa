"""Frozen dataclasses as TOML and back: what a run was asked for, in a file that a person edits and git compares."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")


def dumps(config: Any) -> str:
    """Write a dataclass of bools, ints, floats, strings and dataclasses of them; `loads` of it gives it back."""
    flat = [f for f in dataclasses.fields(config) if not dataclasses.is_dataclass(getattr(config, f.name))]
    lines = [f"{f.name} = {_value(getattr(config, f.name))}" for f in flat]
    for field in dataclasses.fields(config):
        if field not in flat:
            lines += ["", f"[{field.name}]", dumps(getattr(config, field.name)).rstrip()]
    return "\n".join(lines) + "\n"


def loads(text: str, default: Config, where: str) -> Config:
    """Return `default` with the fields that `text` names replaced.

    A byte order mark before the text, as editors leave it, is passed over.

    Raises: ValueError naming `where`, the key, what was expected and what came, for text that is no TOML, an unknown
    key, a value of another type or one that cannot be.
    """
    try:
        table = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: expected TOML, and it breaks off: {error}") from None
    return _replace(default, table, where, "")


def differences(old: Any, new: Any) -> list[str]:
    """List the fields in which two configs of one class differ, as lines `model.layers: 4 -> 6`."""
    before, after = dict(_rows(old, "")), dict(_rows(new, ""))
    return [f"{key}: {before[key]} -> {after[key]}" for key in after if before[key] != after[key]]


def _rows(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # a JSON string is a TOML basic string but for DEL, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (bool, int, float)):
        return repr(value).lower()
    raise TypeError(f"toml: expected a bool, int, float or string, came {value!r}")


def _replace(default: Any, table: dict[str, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(type(default))
    changed: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            meant = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(hints)}"
            raise ValueError(f"{where}: unknown key {name}; {meant}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected a table [{name}], came {value!r}")
            changed[key] = _replace(current, value, where, f"{name}.")
        else:
            changed[key] = _typed(hints[key], value, f"{where}: {name}")
    try:
        return dataclasses.replace(default, **changed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if value in typing.get_args(kind) if typing.get_origin(kind) is Literal else type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
    raise ValueError(f"{where}: expected {' or '.join(map(_said, kinds))}, came {value!r}")


def _said(kind: Any) -> str:
    if typing.get_origin(kind) is not Literal:
        return str(kind.__name__)
    values = list(map(repr, typing.get_args(kind)))
    return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
