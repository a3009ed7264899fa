"""The index beside several safetensors files, as `transformers` and others read it: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from functrain.checkpoint import strict_json
from functrain.checkpoint.errors import IntegrityError
from functrain.checkpoint.stream import Record, Source

_MAX_BYTES = 1_000_000_000


def write(files: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Return the text of the index of these files."""
    where = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return strict_json.dumps(table, indent=2) + b"\n"


def check(path: Path, record: Record, held: Mapping[str, str]) -> None:
    """Return when the index at `path` has the bytes of its record and says what the files hold (tensor -> file).

    Raises: IntegrityError naming a tensor.
    """

    def refuse(expected: str, came: str, key: str | None) -> IntegrityError:
        way_out = "use an older checkpoint or a copy of this one"
        return IntegrityError(path, path=key, expected=expected, came=came, way_out=way_out)

    with Source(path, links=False, record=record) as source:
        if source.size_bytes > _MAX_BYTES:
            raise refuse(f"at most {_MAX_BYTES} bytes", f"{source.size_bytes}", None)
        text = source.take(source.size_bytes)
        source.finish()
    where = strict_json.loads(text, refuse).get("weight_map")
    if not isinstance(where, dict):
        raise refuse("a weight_map from tensors to files", "none", None)
    for name in sorted(held.keys() | where.keys()):
        if where.get(name) != held.get(name):
            raise refuse(f"{held.get(name, 'no file')}, as the files say", f"{where.get(name)!r:.80}", name)
