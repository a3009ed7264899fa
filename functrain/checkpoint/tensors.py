"""Tensors to a safetensors file and back: every bit kept, one copy in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain.checkpoint import header
from functrain.checkpoint.errors import StorageError
from functrain.checkpoint.stream import CHUNK_BYTES, Record, Sink, Source

DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16},
    **{"U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}  # as torch and the tree description say


def write_file(
    path: Path | None, tensors: Mapping[str, Tensor], wrote: Callable[[int], object] = lambda size_bytes: None
) -> Record:
    """Write CPU or device tensors as one safetensors file and fsync it; only count and hash when `path` is None.

    `wrote` is called with the bytes of each tensor.

    Peak memory: one copy of the largest tensor that is on a device or not contiguous, none otherwise.
    """
    # long items first, as the safetensors library does: each tensor then starts at a multiple of its item size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    rows = [(name, NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order]
    sink = Sink(path)
    try:
        sink.write(memoryview(header.write(rows, {"format": "pt"})))
        for name in order:
            sink.write(_bytes(tensors[name]))
            wrote(tensors[name].nbytes)
        return sink.finish()
    finally:
        sink.close()


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memory(plain)


def memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, to read or to fill."""
    # a contiguous tensor of one element may have any stride, of which `view` complains
    row = tensor.as_strided((tensor.numel(),), (1,))
    view: Any = row.view(torch.uint8).numpy()  # numpy's stubs do not say that an array is a buffer
    return memoryview(view)


def divide(tensors: Mapping[str, Tensor], max_file_bytes: int) -> list[dict[str, Tensor]]:
    """Divide tensors, in their order, into files of at most so many bytes, whose headers can be read again.

    A tensor that is longer alone is a file of its own.
    """
    found: list[dict[str, Tensor]] = [{}]
    filled = head = 0
    for name, tensor in tensors.items():
        row = header.row_bytes(name, tensor.dim())
        if found[-1] and (filled + tensor.nbytes > max_file_bytes or head + row > header.MAX_HEADER_BYTES - 1000):
            found.append({})
            filled = head = 0
        found[-1][name] = tensor
        filled += tensor.nbytes
        head += row
    return found


def read_file(
    path: Path, *, wanted: Callable[[str], bool] | None = None, record: Record | None = None, links: bool = False
) -> tuple[list[header.Entry], dict[str, Tensor]]:
    """Read a safetensors file: what it holds, and tensors by name that own their memory; see `scan`."""
    found: dict[str, Tensor] = {}
    return scan(path, found.__setitem__, wanted=wanted, record=record, links=links), found


Wanted = bool | tuple[slice, ...]  # of a tensor: all of it, nothing, or these elements


def scan(
    path: Path,
    take: Callable[[str, Tensor], None],
    *,
    wanted: Callable[[str], Wanted] | None = None,
    record: Record | None = None,
    links: bool = False,
    hashed: bool = True,
    passed: Callable[[int], object] | None = None,
    check: Callable[[header.Entry], object] = lambda entry: None,
) -> list[header.Entry]:
    """Read a safetensors file, give `take(name, tensor)` each tensor as soon as it is read, and return what it holds.

    Tensors that are not `wanted` are skipped, and of those of which some elements are, these are taken alone; `passed`
    is told the bytes of each, skipped or not, and `check` is called with each before any is read. With `record`, all
    the file's bytes must be those that were saved, or, not `hashed`, its size alone. A symbolic link is followed only
    with `links`.
    Raises: HeaderError, IntegrityError, StorageError.
    """
    with Source(path, links=links, record=record, hashed=hashed) as source:
        entries = header.read(source.take, source.size_bytes, str(path)).entries
        for entry in entries:
            check(entry)
        for entry in entries:
            asked = wanted is None or wanted(entry.name)
            if asked is True:
                tensor = _room(path, entry)
                source.fill(memory(tensor))
                take(entry.name, tensor)
            elif asked is False:
                source.skip(entry.end - entry.begin)
            else:
                take(entry.name, _some(source, path, entry, asked))
            if passed is not None:
                passed(entry.end - entry.begin)
        source.finish()
    return entries


def _some(source: Source, path: Path, entry: header.Entry, asked: tuple[slice, ...]) -> Tensor:
    """Read some elements: of the first dimension those asked for alone, and what lies between them in the others."""
    rows, row_shape = asked[0], entry.shape[1:]
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    found = _room(path, entry, (rows.stop - rows.start, *(part.stop - part.start for part in asked[1:])))
    source.skip(rows.start * row_bytes)
    if found.shape[1:] == row_shape:
        source.fill(memory(found))
    else:
        each = max(1, CHUNK_BYTES // max(row_bytes, 1))
        for at in range(0, len(found), each):
            some = torch.empty((min(each, len(found) - at), *row_shape), dtype=found.dtype)
            source.fill(memory(some))
            found[at : at + each] = some[(slice(None), *asked[1:])]
    source.skip((entry.shape[0] - rows.stop) * row_bytes)
    return found


def _room(path: Path, entry: header.Entry, shape: tuple[int, ...] | None = None) -> Tensor:
    try:
        return torch.empty(entry.shape if shape is None else shape, dtype=DTYPES[entry.dtype])
    except RuntimeError as error:  # the file has these bytes: a hole in a file takes no room on the disk
        expected, came = f"memory for {entry.end - entry.begin} bytes", str(error).partition("\n")[0]
        way_out = "load a part, or on a machine with more memory"
        raise StorageError(path, path=entry.name, expected=expected, came=came, way_out=way_out) from error
