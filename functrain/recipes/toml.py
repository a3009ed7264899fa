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
    # kinds of a table have other fields
    pairs = {key: (before.get(key, "(none)"), after.get(key, "(none)")) for key in before | after}
    return [f"{key}: {was} -> {now}" for key, (was, now) in pairs.items() if was != now]


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


def of_kind(hint: Any, current: Any, name: str) -> Any:
    """Return `current` as the dataclass of that kind, with the fields that both have.

    A hint that is a union of dataclasses has kinds; the first field of each is a literal, and names its kind.

    Raises: KeyError for a kind that there is not; ValueError for fields that cannot be.
    """
    kind = kinds(hint)[name]
    if type(current) is kind:
        return current
    first, *shared = [
        f.name for f in dataclasses.fields(kind) if f.name in {g.name for g in dataclasses.fields(current)}
    ]
    return kind(**{field: getattr(current, field) for field in shared})


def kinds(hint: Any) -> dict[str, Any]:
    """Return the dataclasses of a union by name, or none where the hint is no such union."""
    found = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
    return {dataclasses.fields(kind)[0].default: kind for kind in found}  # type: ignore[misc]


def owners(hint: Any, field: str) -> list[str]:
    """Return the kinds of a table that have a field."""
    return [name for name, kind in kinds(hint).items() if field in {f.name for f in dataclasses.fields(kind)}]


def _replace(default: Any, table: dict[str, Any], where: str, prefix: str, hint: Any = None) -> Any:
    if of := kinds(hint):
        default, table = _chosen(default, table, where, prefix, of, hint)
    hints = typing.get_type_hints(type(default))
    changed: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            if others := owners(hint, key):
                tag = dataclasses.fields(default)[0].name
                raise ValueError(
                    f"{where}: {name}: a {getattr(default, tag)} has no such field; it is one of "
                    f"{prefix}{tag} {' and '.join(others)}"
                )
            close = difflib.get_close_matches(key, hints, 1)
            meant = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(hints)}"
            raise ValueError(f"{where}: unknown key {name}; {meant}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected a table [{name}], came {value!r}")
            changed[key] = _replace(current, value, where, f"{name}.", hints[key])
        else:
            changed[key] = _typed(hints[key], value, f"{where}: {name}")
    try:
        return dataclasses.replace(default, **changed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _chosen(
    default: Any, table: dict[str, Any], where: str, prefix: str, of: dict[str, Any], hint: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the default of the kind that a table names, and what else is in the table."""
    tag = dataclasses.fields(default)[0].name
    name = table.get(tag, getattr(default, tag))
    if not isinstance(name, str) or name not in of:
        raise ValueError(f"{where}: {prefix}{tag}: expected one of {', '.join(map(repr, of))}, came {name!r}")
    try:
        return of_kind(hint, default, name), {key: value for key, value in table.items() if key != tag}
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
