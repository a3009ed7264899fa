"""Models in and out of the folders of Hugging Face transformers: config.json beside safetensors.

A model adds a `Layout`, which is data: its names, which matrices lie transposed, and what its config's fields are
called. It names no file, and these functions know no model. A model whose tensors lie in another order here than there,
as the heads of a rotary model may, needs a function beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.checkpoint import MismatchError, MissingError, UnsupportedError, hub, strict_json
from functrain.checkpoint.stream import is_there
from functrain.models.config_fields import read_config as read_config
from functrain.models.config_fields import write_config
from functrain.models.layout import IN_TRANSFORMERS, OF_ANOTHER
from functrain.models.layout import Field as Field
from functrain.models.layout import Group as Group
from functrain.models.layout import Layout as Layout
from functrain.models.layout import Refused as Refused
from functrain.models.names import Names, check_counts, from_state_dict, to_state_dict
from functrain.progress import Progress
from functrain.tree import Params

Folder = str | os.PathLike[str]
_MAX_FILE_BYTES = 5 << 30  # as transformers divides by default


def read(
    folder: Folder, layout: Layout | Sequence[Layout], progress: Progress | None = None, *, head: str | None = None
) -> tuple[Params, Any]:
    """Return parameters, in the dtype of the files, and config of a model in a folder of transformers.

    Of several layouts the one of the folder's `model_type` is taken. A model with heads has the one of the folder's
    `architectures`, or `head`; tensors of other heads are passed over.
    Raises: MissingError, UnsupportedError for a config that the model cannot compute or a head that is not there,
    MismatchError for names and shapes that are not the config's, HeaderError, IntegrityError; ValueError for a head
    that the model does not have.
    """
    path = Path(folder) / "config.json"
    if not is_there(path):
        came = "none" if path.parent.is_dir() else "no such folder"
        raise MissingError(path, expected="a config.json", came=came, way_out="name the folder of a model")
    table = hub.load_json(path)
    layout = _layout(layout, table, str(path))
    config = read_config(table, layout, str(path), head)
    names, tied_to = layout.names_of(config), layout.tied_of(config)
    ignored = _matcher(layout.prefix, layout.ignored)
    state = hub.load_folder(folder, wanted=lambda name: not ignored(name), progress=progress)
    if config.layers > len(state):
        # before a tree of so many layers is made: a wrong number must not take all memory
        expected, came = f"at most the {len(state)} layers that so many tensors can be", f"{config.layers}"
        raise UnsupportedError(path, path="layers", expected=expected, came=came, way_out="mend config.json")
    like = layout.init(config, torch.zeros(2, dtype=torch.int32, device="meta"))
    check_counts(like, names, len(state), str(folder))
    state = {_newer(name, layout): tensor for name, tensor in state.items()}
    of_heads = _matcher("", layout.heads)
    if not any(name.startswith(layout.prefix) for name in state):
        alone = {name: name in tied_to or of_heads(name) for name in state}
        state = {name if alone[name] else layout.prefix + name: tensor for name, tensor in state.items()}
    wanted = to_state_dict(like, names).keys() | tied_to.keys()
    state = {name: tensor for name, tensor in state.items() if name in wanted or not of_heads(name)}
    tied = {name: state.pop(name) for name in tied_to if name in state}
    _check_head(like, names, layout, state, of_heads, str(folder), config)
    try:
        params = from_state_dict(state, like=like, names=names, where=str(folder))
    except MismatchError as error:
        _check_architecture(layout, table, str(path), error)
        raise
    for name, tensor in tied.items():
        if not _same_bits(tensor, tree.at(params, tied_to[name])):
            expected = f"the same values as {names.of(tied_to[name])!r}, to which it is tied"
            way_out = "load it with a model whose head is its own"
            raise UnsupportedError(folder, path=name, expected=expected, came="others", way_out=way_out)
    return params, config


def write(
    folder: Folder,
    params: Params,
    config: Any,
    layout: Layout,
    more: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Save parameters and config as a folder that transformers loads, whole or not at all; return its path.

    `more` are fields of config.json that say nothing about the computation, `files` what else stands in the folder, by
    name. Equals both again under `read`.
    Raises: UnsupportedError for a config that transformers cannot express; MismatchError; ExistsError; StorageError.
    """
    fields = write_config(config, layout, f"{folder}/config.json")
    names = layout.names_of(config)
    like = layout.init(config, torch.zeros(2, dtype=torch.int32, device="meta"))
    state = to_state_dict(params, names)
    from_state_dict(state, like=like, names=names, where=f"{folder}: params")
    table = {**fields, "dtype": _dtype(params, folder), **more}
    texts = {**(files or {}), "config.json": strict_json.dumps(table, indent=2) + b"\n"}
    return hub.save_folder(folder, state, texts, max_file_bytes=_MAX_FILE_BYTES, progress=progress)


def _layout(layouts: Layout | Sequence[Layout], table: Mapping[str, Any], where: str) -> Layout:
    if isinstance(layouts, Layout):
        return layouts
    came = table.get("model_type")
    for layout in layouts:
        if layout.model_type == came:
            return layout
    expected = " or ".join(repr(one.model_type) for one in layouts)
    raise UnsupportedError(where, path="model_type", expected=expected, came=f"{came!r:.200}", way_out=OF_ANOTHER)


def _check_architecture(layout: Layout, table: Mapping[str, Any], where: str, error: MismatchError) -> None:
    """Say of tensors that do not fit that the folder is of another class, such as one of this model with a head."""
    came = table.get("architectures")
    if isinstance(layout.architecture, str) and came not in (None, [layout.architecture]):
        expected = f"{[layout.architecture]!r}, or its tensors"
        raise UnsupportedError(
            where, path="architectures", expected=expected, came=f"{came!r:.200}", way_out=IN_TRANSFORMERS
        ) from error


def _newer(name: str, layout: Layout) -> str:
    for old, new in layout.older.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_head(
    like: Params,
    names: Names,
    layout: Layout,
    state: Mapping[str, Tensor],
    of_heads: Callable[[str], bool],
    folder: str,
    config: Any,
) -> None:
    """Say of a part of the tree of which the folder has no tensor, that it is a head that the folder lacks."""
    parts: dict[str, list[str]] = {}
    for path in tree.paths(like):
        parts.setdefault(path.split("/")[0], []).append(names.of(path))
    lacking = {
        part: held[0]
        for part, held in parts.items()
        if all(of_heads(name) and name.replace("#", "0") not in state for name in held)
    }
    if lacking:
        raise UnsupportedError(
            folder,
            path=next(iter(lacking.values())),
            expected=f"{', '.join(lacking)} of head {config.head!r}, as {layout.architecture_of(config)} has it",
            came="no tensor of it",
            way_out="load it with head='none', and begin what is missing anew: "
            f"params = {{**init(config, key), **params}} with the config of head {config.head!r}",
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # bits: two NaNs are not equal
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _matcher(prefix: str, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a name, with or without the prefix, fits a pattern; `*` is one part of it, `**` any number."""

    def regex(pattern: str) -> str:
        whole = [r"[^.]+".join(map(re.escape, some.split("*"))) for some in pattern.split("**")]
        return f"(?:{re.escape(prefix)})?" + ".+".join(whole)

    fits = re.compile("|".join(map(regex, patterns)) or r"(?!)")
    return lambda name: fits.fullmatch(name) is not None


def _dtype(params: Params, folder: Folder) -> str:
    first, *others = tree.items(params)
    if not first[1].is_floating_point():
        way_out = "cast the parameters to the dtype of the model"
        raise UnsupportedError(
            folder, path=first[0], expected="a floating dtype", came=f"{first[1].dtype}", way_out=way_out
        )
    for path, leaf in others:
        if leaf.dtype != first[1].dtype:
            # transformers loads a model in one dtype, and would round the others in silence
            expected, way_out = f"{first[1].dtype} as of {first[0]}", "cast the parameters to one dtype first"
            raise UnsupportedError(folder, path=path, expected=expected, came=f"{leaf.dtype}", way_out=way_out)
    return str(first[1].dtype).removeprefix("torch.")
