"""Read and write the header of a safetensors file, strictly.

A safetensors file is a length (8 bytes, little endian), that many bytes of JSON, then the tensors' bytes without gaps.
This parser stands in front of every load: it allocates nothing before the length is known to fit into the file, and
what it lets through has exactly one meaning.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from json.encoder import encode_basestring
from typing import Any, NamedTuple, NoReturn

from functrain.checkpoint import strict_json
from functrain.checkpoint.errors import HeaderError, UnsupportedError

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8},
    **{"F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1},
    **{"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8},
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, so that whoever reads one reads the other
MAX_DIMS = 64  # torch's and numpy's limit for operations on a tensor
_METADATA = "__metadata__"


class Entry(NamedTuple):
    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class Header(NamedTuple):
    entries: list[Entry]  # in the order of their bytes, without gaps to the end of the file
    metadata: dict[str, str]
    size_bytes: int  # where the first tensor begins


def write(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return the header for tensors (name, dtype, shape) that follow in this order.

    Equals what `read` reads; padded with spaces so that the tensors begin at a multiple of 8.
    Raises: UnsupportedError for a header that is too long to be read again.
    """
    table: dict[str, Any] = {_METADATA: metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = strict_json.dumps(table)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        expected, came = f"names of at most {MAX_HEADER_BYTES} bytes in one file", f"a header of {len(text)}"
        raise UnsupportedError("safetensors", expected=expected, came=came, way_out="give them shorter names")
    return len(text).to_bytes(8, "little") + text


def row_bytes(name: str, dims: int) -> int:
    """Return how many bytes a tensor of this name takes in a header at most."""
    return len(encode_basestring(name).encode()) + 100 + 20 * dims


def read(take: Callable[[int], bytes], size_bytes: int, where: str) -> Header:
    """Read and check the header of a file of `size_bytes`, of which `take(n)` returns the next n bytes.

    Raises: HeaderError naming `where`, the tensor, and what the bytes look like when they are no safetensors.
    """
    start = take(min(size_bytes, 8))
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
        _refuse_start(start + take(min(size_bytes - len(start), 64)), length, size_bytes, where)
    text = take(length)
    if not text.startswith(b"{"):
        _refuse_start(start + text[:64], length, size_bytes, where)
    # a tensor has 3 brackets in some 60 bytes; `[[],[],...` would become 25 times its size of Python's lists
    brackets = text.count(b"[") + text.count(b"{") if length > 1_000_000 else 0
    if brackets > length // 8:
        raise _broken(where, "a table of tensors", f"{brackets} brackets in {length} bytes of header")

    def refuse(expected: str, came: str, key: str | None) -> HeaderError:
        return _broken(where, expected, came, key)

    table = strict_json.loads(text.rstrip(b" "), refuse)
    return _check(table, 8 + length, size_bytes, where)


_LOOKS = (
    (b"PK\x03\x04", "a zip archive (torch.save, .pt, .npz)"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer: the real file was not downloaded"),
    (b"<", "a web page or XML"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a .npy file"),
    (b"{", "JSON text"),
)


def _refuse_start(start: bytes, length: int, size_bytes: int, where: str) -> NoReturn:
    look = next((name for magic, name in _LOOKS if start.lstrip().startswith(magic)), None)
    if not start:
        came = "an empty file"
    elif start[0] == 0x80 and start[1:2] and start[1] <= 5 and any(start[2:8]):
        # a protocol's number, and then opcodes: in a header's length, zeros would follow
        came = "a pickle (torch.save, .bin), which functrain never opens because it runs code"
    elif look is not None:
        came = look
    elif len(start) > 3 and _is_text(start):
        came = f"text: {start[:40].decode()!r}"
    elif len(start) < 8:
        came = f"{size_bytes} bytes in all"
    elif length > min(MAX_HEADER_BYTES, size_bytes - 8):
        came = f"a header length of {length} in a file of {size_bytes} bytes (at most {MAX_HEADER_BYTES} is allowed)"
    else:
        came = f"{start[8:24]!r} where the header's '{{' should be"
    raise _broken(where, "a safetensors file", came)


def _is_text(start: bytes) -> bool:
    return start.isascii() and all(char.isprintable() or char.isspace() for char in start.decode())


def _check(table: dict[str, Any], data_start: int, size_bytes: int, where: str) -> Header:
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(_is_string, (*metadata, *metadata.values()))):
        raise _broken(where, "metadata from strings to strings", reprlib.repr(metadata), _METADATA)
    entries = sorted((_entry(name, row, data_start, where) for name, row in table.items()), key=lambda e: e[3:])
    at = data_start
    for entry in entries:
        if entry.begin != at:
            came = f"{'an overlap' if entry.begin < at else 'a gap'}: bytes from {entry.begin}"
            raise _broken(where, f"bytes from {at}, where the tensor before it ends", came, entry.name)
        at = entry.end
    if at != size_bytes:
        raise _broken(where, f"{at} bytes, as its header says", f"a file of {size_bytes} bytes")
    return Header(entries, metadata, data_start)


def _entry(name: str, row: Any, data_start: int, where: str) -> Entry:
    if not strict_json.is_text(name):
        raise _broken(where, "a name in Unicode", "a lone surrogate", name)
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise _broken(where, "dtype, shape and data_offsets", reprlib.repr(row), name)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(where, f"a dtype of {', '.join(ITEM_BYTES)}", reprlib.repr(dtype), name)
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise _broken(where, f"at most {MAX_DIMS} sizes below 2**63 as shape", reprlib.repr(shape), name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(where, "two rising data_offsets", reprlib.repr(offsets), name)
    # sizes beside a 0 count too: torch multiplies them into strides, and overflows
    if math.prod(max(size, 1) for size in shape) * ITEM_BYTES[dtype] >= 2**63:
        raise _broken(where, "a shape of less than 2**63 bytes", reprlib.repr(shape), name)
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise _broken(where, f"{math.prod(shape) * ITEM_BYTES[dtype]} bytes for {dtype} {shape}", f"{offsets}", name)
    return Entry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and strict_json.is_text(value)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _broken(where: str, expected: str, came: str, path: str | None = None) -> HeaderError:
    return HeaderError(where, path=path, expected=expected, came=came, way_out="fetch or save the file again")
