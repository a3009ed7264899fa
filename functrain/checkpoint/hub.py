"""Folders of safetensors as model hubs lay them out: `model.safetensors`, or an index and the shards that it names.

Nothing here has a checksum, because such folders carry none; what a header or an index says is checked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from functrain.checkpoint import staging, strict_json
from functrain.checkpoint.collect import check_tensor
from functrain.checkpoint.errors import CheckpointError, ExistsError, IntegrityError, MissingError, UnsupportedError
from functrain.checkpoint.stream import Sink, Source, is_there
from functrain.checkpoint.tensors import divide, scan, write_file
from functrain.progress import Progress, counter

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 100_000_000
_PART = re.compile(r"(?P<name>.*)-(?P<part>\d{1,9})-of-(?P<parts>\d{1,9})\.safetensors")
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")  # no separator, so no file outside the folder
_NAME_BYTES = 255  # what file systems allow; a longer name is an error that even asking for the file raises
_WAY_OUT = "fetch or save the folder again"
_log = logging.getLogger(__name__)

Folder = str | os.PathLike[str]


def load_folder(
    folder: Folder, *, wanted: Callable[[str], bool] | None = None, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Load the tensors of a folder by name, those that are `wanted`; they own their memory.

    Links are followed, because hub caches are made of them, but a shard's name never leads out of the folder.
    `progress` counts bytes of the files.
    Raises: MissingError, IntegrityError for an index that does not fit its shards, HeaderError, StorageError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     tensors = {"wte.weight": torch.ones(2), "h.0.attn.bias": torch.zeros(2)}
    ...     path = ft.checkpoint.save_folder(f"{folder}/mine", tensors, {}, max_file_bytes=5 << 30)
    ...     ft.checkpoint.load_folder(path, wanted=lambda name: not name.endswith("attn.bias"))
    {'wte.weight': tensor([1., 1.])}
    """
    found: dict[str, Tensor] = {}
    total = 0 if progress is None else sum(file.stat().st_size for file in files(folder))
    add = counter(total, progress)

    def take(name: str, tensor: Tensor) -> None:
        found[name] = tensor
        add(tensor.nbytes)

    scan_folder(folder, take, wanted=wanted)
    add(total - sum(tensor.nbytes for tensor in found.values()))  # headers, and what was not wanted
    return found


def scan_folder(
    folder: Folder, take: Callable[[str, Tensor], None], *, wanted: Callable[[str], bool] | None = None
) -> None:
    """Read a folder as `load_folder` does, and give `take(name, tensor)` each tensor as soon as it is read."""
    path = Path(folder)
    single, index = path / SINGLE, path / INDEX
    if is_there(single):
        _warn_of_others(path, {SINGLE})
        scan(single, take, wanted=wanted, links=True)
        return
    if not is_there(index):
        raise _nothing_to_read(path)
    where = _shards(path)
    _warn_of_others(path, set(where.values()))
    for file in sorted(set(where.values())):
        held = {entry.name for entry in scan(path / file, take, wanted=wanted, links=True)}
        for name in held:
            if where.get(name) != file:
                said = f"in {where[name]}" if name in where else "nowhere"
                raise _broken(path / file, f"what the index says: this tensor is {said}", "it here", name)
        for name, named in where.items():
            if named == file and name not in held:
                raise _broken(path / file, "this tensor, as the index says", "none", name)


def files(folder: Folder) -> list[Path]:
    """List the safetensors files of a model's folder, as its index says; each is there.

    Raises: MissingError, IntegrityError for an index that is broken.
    """
    path = Path(folder)
    if is_there(path / SINGLE):
        return [path / SINGLE]
    if not is_there(path / INDEX):
        raise _nothing_to_read(path)
    return [path / file for file in sorted(set(_shards(path).values()))]


def save_folder(
    folder: Folder,
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
    *,
    max_file_bytes: int,
    progress: Progress | None = None,
) -> Path:
    """Save tensors by name and texts by file name as a folder, which appears whole or not at all; return its path.

    Equals the tensors again under `load_folder`, and under any reader of safetensors. More than `max_file_bytes` of
    tensors become shards and an index; a single tensor may be larger. `progress` counts bytes of tensors.
    Raises: ExistsError; UnsupportedError naming a tensor; StorageError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     tensors, texts = {"fc.weight": torch.ones(2)}, {"config.json": b"{}"}
    ...     path = ft.checkpoint.save_folder(f"{folder}/mine", tensors, texts, max_file_bytes=5 << 30)
    ...     sorted(file.name for file in path.iterdir())
    ['config.json', 'model.safetensors']
    """
    target = Path(folder).absolute()
    _check_free(target)
    for name, tensor in tensors.items():
        _check(folder, name, tensor)
    for file in texts:
        if os.path.basename(file) != file or not file or file.endswith(".safetensors") or file == INDEX:
            expected = "the name of a file beside the tensors"
            raise UnsupportedError(folder, expected=expected, came=f"{file!r}", way_out="choose another name")
    need_bytes = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(len, texts.values()))
    with staging.staged(target, need_bytes) as stage:
        groups, wrote = divide(tensors, max_file_bytes), counter(sum(t.nbytes for t in tensors.values()), progress)
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        for file, part in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True):
            write_file(stage / file, part, wrote)
        if len(groups) > 1:
            where = {name: file for file, part in zip(names, groups, strict=True) for name in part}
            total = sum(tensor.nbytes for tensor in tensors.values())
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            _write_text(stage / INDEX, strict_json.dumps(table, indent=2) + b"\n")
        for file, text in texts.items():
            _write_text(stage / file, text)
    return Path(folder)


def load_json(path: Folder) -> dict[str, Any]:
    """Load a JSON object from a file of at most 100 MB.

    Raises: IntegrityError for other text, a key that stands twice, NaN; StorageError.
    """
    path = Path(path)
    with Source(path, links=True, record=None) as source:
        if source.size_bytes > _MAX_JSON_BYTES:
            raise _broken(path, f"at most {_MAX_JSON_BYTES} bytes of JSON", f"{source.size_bytes}", None)
        text = source.take(source.size_bytes)
    return strict_json.loads(text, lambda expected, came, key: _broken(path, expected, came, key))


def _shards(path: Path) -> dict[str, str]:
    """Read a folder's index: the file of each tensor, all of which are there."""
    where = _read_index(path / INDEX)
    absent = sorted({file for file in where.values() if not is_there(path / file)})
    if absent:
        raise _broken(path / INDEX, "the shards that it names", f"no {', '.join(absent)}", None)
    return where


def _read_index(path: Path) -> dict[str, str]:
    where = load_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise _broken(path, "a weight_map from tensors to files", f"{where!r:.40}", "weight_map")
    for name, file in where.items():
        if not _is_shard(file):
            raise _broken(path, "the name of a safetensors file in this folder", f"{file!a:.80}", name)
    _check_all_parts(path, set(where.values()))
    return where


def _is_shard(file: object) -> bool:
    plain = isinstance(file, str) and _SHARD.fullmatch(file) is not None and strict_json.is_text(file)
    return plain and len(str(file).encode()) <= _NAME_BYTES


def _check_all_parts(path: Path, files: set[str]) -> None:
    """Refuse an index that lost all tensors of a shard: it would be passed over, and a part taken for the whole."""
    named: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_PART.fullmatch, files)):
        named.setdefault((match["name"], int(match["parts"])), set()).add(int(match["part"]))
    for (name, parts), there in named.items():
        # shards are numbered from 1, or from 0
        if len(there) < parts:
            raise _broken(path, f"all {parts} shards of {name}", f"{len(there)} of them", "weight_map")


def _nothing_to_read(path: Path) -> MissingError:
    expected = f"a folder with {SINGLE} or {INDEX}"
    if not path.is_dir():
        return MissingError(path, expected=expected, came="no such folder", way_out="name a model's folder")
    names = sorted(child.name for child in path.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        came = f"{', '.join(pickles[:3])}, which may be a pickle and run code"
        return MissingError(path, expected=expected, came=came, way_out="fetch the model's safetensors, or convert it")
    came = f"only {', '.join(names[:8])}" if names else "an empty folder"
    return MissingError(path, expected=expected, came=came, way_out=_WAY_OUT)


def _warn_of_others(path: Path, read: Iterable[str]) -> None:
    for other in sorted({child.name for child in path.glob("*.safetensors")} - set(read)):
        _log.warning("%s: not named by the model, ignored", path / other)


def _check_free(target: Path) -> None:
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        came = "one that holds something" if target.is_dir() else "a file"
        raise ExistsError(target, expected="no such folder yet", came=came, way_out="choose another name")


def _check(folder: Folder, name: str, tensor: Tensor) -> None:
    if name == "__metadata__":  # the header keeps its own strings there, and no reader would find the tensor
        raise UnsupportedError(folder, path=name, expected="another name", came="this one", way_out="rename it")
    check_tensor(name, tensor, str(folder))


def _write_text(path: Path, text: bytes) -> None:
    sink = Sink(path)
    try:
        sink.write(memoryview(text))
        sink.finish()
    finally:
        sink.close()


def _broken(path: Path, expected: str, came: str, key: str | None) -> CheckpointError:
    return IntegrityError(path, path=key, expected=expected, came=came, way_out=_WAY_OUT)
