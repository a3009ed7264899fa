"""The header beside a file of numbers: a dataclass as JSON, written last, so that without it there is no such file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from functrain.data.atomic import replacing

Header = TypeVar("Header")


def header_path(path: Path) -> Path:
    """Return the place of a file's header."""
    return path.with_suffix(".json")


def write_header(path: Path, header: Any) -> None:
    """Write the header of the file `path`, a dataclass of ints and strings with a field `version`, beside it."""
    with replacing(header_path(path)) as file:
        file.write(json.dumps(asdict(header), indent=1).encode())


def read_header(path: Path, kind: type[Header], what: str) -> Header:
    """Read the header of the file `path`, which messages call `what`.

    Raises: ValueError naming the header, and what does not fit in it.
    """
    file = header_path(path)
    if not file.is_file():
        raise ValueError(f"{file}: the header of a {what} is missing; write the tokens again")
    try:
        content: Any = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected the JSON header of a {what}, came something else ({error})") from None
    if isinstance(content, dict) and content.get("version", 1) != 1:
        raise ValueError(f"{file}: {what} version {content['version']} is newer than 1; upgrade functrain")
    expected = kind.__annotations__
    if not isinstance(content, dict) or {name: type(value).__name__ for name, value in content.items()} != expected:
        raise ValueError(f"{file}: expected the fields {expected}, came {content!r}; write the tokens again")
    return kind(**content)
