"""tree.json: the tree's description, the caller's metadata, the run, and what bitwise resume depends on."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functrain.checkpoint import grammar, strict_json
from functrain.checkpoint.description import MAX_INT_BITS, MAX_LEVELS, Node, unsupported
from functrain.checkpoint.errors import IntegrityError
from functrain.checkpoint.stream import Record, Source

_MAX_BYTES = 1_000_000_000  # of tree.json: millions of leaves


class Document(NamedTuple):
    tree: Node  # docs/checkpoint-format.md lists the kinds of nodes
    metadata: dict[str, Any]
    environment: dict[str, Any]
    run: str | None  # the run that saved it, as RUN/checkpoints/run.json names it


def environment() -> dict[str, Any]:
    """Return what the last bits of a result depend on: a run resumes bit for bit where this is equal.

    >>> ft.checkpoint.environment()["torch"] == torch.__version__
    True
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if _cuda_runs() else []
    return {
        "functrain": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "devices": devices,
    }


def _cuda_runs() -> bool:
    # asking for names starts CUDA, and takes memory on the device from a run that is on the CPU
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _version() -> str:
    try:
        return importlib.metadata.version("functrain")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(node: Node, metadata: Mapping[str, Any], where: str, run: str | None = None) -> bytes:
    """Return the text of tree.json.

    Raises: UnsupportedError naming the key of metadata that would not come back from JSON as it is, or for a text that
    is too long to be read again.
    """
    check_metadata(metadata, where)
    table = {"tree": node, "metadata": dict(metadata), "environment": environment(), "run": run}
    text = strict_json.dumps(table) + b"\n"
    if len(text) > _MAX_BYTES:
        expected, came = f"a description of at most {_MAX_BYTES} bytes", f"{len(text)}"
        raise unsupported(where, "", expected, came, "save long texts and many scalars as tensors")
    return text


def read(path: Path, record: Record) -> Document:
    """Return the document when its bytes are those of the record.

    Raises: IntegrityError.
    """

    def refuse(expected: str, came: str, key: str | None) -> IntegrityError:
        way_out = "use an older checkpoint or a copy of this one"
        return IntegrityError(path, path=key, expected=expected, came=came, way_out=way_out)

    with Source(path, links=False, record=record) as source:
        if source.size_bytes > _MAX_BYTES:
            raise refuse(f"at most {_MAX_BYTES} bytes", f"{source.size_bytes}", None)
        text = source.take(source.size_bytes)
        source.finish()
    table = strict_json.loads(text, refuse)
    if set(table) != {"tree", "metadata", "environment", "run"}:
        raise refuse("tree, metadata, environment and run", f"{sorted(table)[:8]}", None)
    if not isinstance(table["metadata"], dict) or not isinstance(table["environment"], dict):
        raise refuse("metadata and environment as objects", "something else", None)
    if table["run"] is not None and not is_run(table["run"]):
        raise refuse("a run of 32 hexadecimal digits or null", "something else", "run")
    grammar.check(table["tree"], str(path))
    return Document(**table)


def check_metadata(metadata: Mapping[str, Any], where: str) -> None:
    """Return when JSON keeps the metadata. Raises: UnsupportedError naming a key."""
    _check_plain(metadata, "metadata", where)


def is_run(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def _check_plain(value: Any, path: str, where: str, level: int = 0) -> None:
    if level > MAX_LEVELS:
        raise unsupported(
            where, path[:40], f"at most {MAX_LEVELS} levels", "more, or a list inside itself", "flatten it"
        )
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str) or not strict_json.is_text(key):
                raise unsupported(where, path, "keys that are str", f"{key!r}", "write the key as text")
            _check_plain(child, f"{path}/{key}", where, level + 1)
    elif type(value) in (list, tuple):  # JSON keeps a tuple as a list
        for i, child in enumerate(value):
            _check_plain(child, f"{path}/{i}", where, level + 1)
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise unsupported(where, path, "what JSON keeps", f"{type(value).__name__}", "make it a str, list or dict")
    elif type(value) is int and value.bit_length() > MAX_INT_BITS:
        raise unsupported(where, path, f"an int of {MAX_INT_BITS} bits", "a longer one", "write it as a str")
    elif type(value) is float and not math.isfinite(value):
        raise unsupported(where, path, "a finite number", f"{value}", "write it as a str")
    elif type(value) is str and not strict_json.is_text(value):
        raise unsupported(where, path, "text in Unicode", f"{value!a:.60}", "drop the lone surrogate")
