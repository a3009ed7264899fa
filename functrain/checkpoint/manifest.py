"""The manifest: which files make a checkpoint, their sizes and sha256, and a sha256 of the list itself.

A folder without a manifest that reads is no checkpoint. Its text has one spelling, so any flipped bit shows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from functrain.checkpoint import strict_json
from functrain.checkpoint.errors import IntegrityError, MissingError, VersionError
from functrain.checkpoint.stream import Record, Source, is_there

NAME = "manifest.json"
TREE = "tree.json"
INDEX = "tensors.safetensors.index.json"
FORMAT = "functrain checkpoint"
VERSION = 1
_MAX_BYTES = 100_000_000
# no separator, so no file outside the folder
_TENSORS = re.compile(r"tensors(-\d{5,}-of-\d{5,}(\.\d+)?)?\.safetensors")


def write(files: Mapping[str, Record]) -> bytes:
    """Return the manifest's text; its last line is the sha256 of what stands before."""
    rows = {name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in sorted(files.items())}
    table = {"format": FORMAT, "version": VERSION, "files": rows}
    own = hashlib.sha256(strict_json.dumps(table, indent=2)).hexdigest()
    return strict_json.dumps({**table, "sha256": own}, indent=2) + b"\n"


def read(folder: Path) -> dict[str, Record]:
    """Return the files of a checkpoint by name, the tree's description among them.

    Raises: MissingError, VersionError, IntegrityError.
    """
    path = folder / NAME
    if not is_there(path):
        came = "no such folder" if not folder.is_dir() else f"a folder without {NAME}"
        way_out = "name a folder that functrain.checkpoint.save made"
        raise MissingError(folder, expected="a checkpoint folder", came=came, way_out=way_out)
    with Source(path, links=False, record=None) as source:
        if source.size_bytes > _MAX_BYTES:
            raise _broken(path, f"at most {_MAX_BYTES} bytes", f"{source.size_bytes}")
        text = source.take(source.size_bytes)
    table = strict_json.loads(text, lambda expected, came, key: _broken(path, expected, came, key))
    if table.get("format") == FORMAT and type(table.get("version")) is int and table["version"] > VERSION:
        way_out = "upgrade functrain, or check the file if this functrain wrote it"
        raise VersionError(path, expected=f"format version {VERSION}", came=f"{table['version']}", way_out=way_out)
    files = _files(table.get("files"), path)
    if write(files) != text:
        raise _broken(path, "a manifest with its own sha256, as it was written", "changed text")
    return files


def _files(rows: object, path: Path) -> dict[str, Record]:
    if not isinstance(rows, dict) or TREE not in rows:
        raise _broken(path, f"a table of files with {TREE}", "none")
    for name, row in rows.items():
        if not (name in (TREE, INDEX) or is_tensors(name)):
            raise _broken(path, f"file names {TREE} and tensors*.safetensors", ascii(name))
        if not isinstance(row, dict) or set(row) != {"bytes", "sha256"}:
            raise _broken(path, "bytes and sha256 of each file", "something else", name)
        if type(row["bytes"]) is not int or row["bytes"] < 0 or not _is_sha256(row["sha256"]):
            raise _broken(path, "a size and a checksum", "something else", name)
    return {name: Record(row["bytes"], row["sha256"]) for name, row in rows.items()}


def name_of(number: int, count: int, more: int = 0) -> str:
    """Return the name of one of several files of tensors, which count from 1; `more` is 1 for a rank's second one."""
    return f"tensors-{number + 1:05d}-of-{count:05d}{f'.{more}' if more else ''}.safetensors"


def is_tensors(name: str) -> bool:
    return _TENSORS.fullmatch(name) is not None


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _broken(path: Path, expected: str, came: str, key: str | None = None) -> IntegrityError:
    way_out = "use an older checkpoint or a copy of this one"
    return IntegrityError(path, path=key, expected=expected, came=came, way_out=way_out)
