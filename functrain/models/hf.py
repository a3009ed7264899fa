"""Models in and out of the folders of Hugging Face transformers: config.json beside safetensors.

A model adds a `Layout`, which is data: its names, which matrices lie transposed, and what its config's fields are
called. It names no file, and these functions know no model. A model whose tensors lie in another order here than there,
as the heads of a rotary model may, needs a function beside it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.checkpoint import MissingError, UnsupportedError, hub, strict_json
from functrain.checkpoint.stream import is_there
from functrain.models.names import Names, from_state_dict, to_state_dict
from functrain.progress import Progress
from functrain.tree import Params

Folder = str | os.PathLike[str]
_MAX_FILE_BYTES = 5 << 30  # as transformers divides by default
_MOST = 1 << 28  # of a size: a matrix of two of them, four of a model's widths long, still has less than 2**63 bytes
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How transformers keeps a model: everything that its folders need, as data."""

    model_type: str
    architecture: str  # the class with a head, whose names are those of `names`
    prefix: str  # what a folder of the class without a head leaves out of the names
    names: Names
    tied: Mapping[str, str]  # a name that may stand there too -> our path that it repeats
    ignored: Sequence[str]  # patterns of names that are no parameters
    fields: Mapping[str, Field]  # our config's field -> theirs
    config: Callable[..., Any]  # from our fields, as keywords, to our config, which counts its blocks as `layers`
    init: Callable[[Any, Tensor], Params]
    fixed: Callable[[Any], Mapping[str, Sequence[Any]]]  # our config -> their field -> what we compute, default first
    silent: Sequence[str] = ()  # fields of theirs that change no number that we compute
    ours: Sequence[str] = ()  # fields of ours that change no number either, or no inference


@dataclass(frozen=True)
class Field:
    """A field of config.json, or several that must agree, and its value where it is left out."""

    names: str | Sequence[str]
    default: Any

    @property
    def all(self) -> list[str]:
        return [self.names] if isinstance(self.names, str) else list(self.names)


def read(folder: Folder, layout: Layout, progress: Progress | None = None) -> tuple[Params, Any]:
    """Return parameters, in the dtype of the files, and config of a model in a folder of transformers.

    Raises: MissingError, UnsupportedError for a config that the model cannot compute, MismatchError for names and
    shapes that are not the config's, HeaderError, IntegrityError.
    """
    path = Path(folder) / "config.json"
    if not is_there(path):
        came = "none" if path.parent.is_dir() else "no such folder"
        raise MissingError(path, expected="a config.json", came=came, way_out="name the folder of a model")
    config = read_config(hub.load_json(path), layout, str(path))
    ignored = re.compile("|".join(_regex(layout.prefix, name) for name in layout.ignored) or r"(?!)")
    state = hub.load_folder(folder, wanted=lambda name: not ignored.fullmatch(name), progress=progress)
    if config.layers > len(state):
        # before a tree of so many layers is made: a wrong number must not take all memory
        expected, came = f"at most the {len(state)} layers that so many tensors can be", f"{config.layers}"
        raise UnsupportedError(path, path="layers", expected=expected, came=came, way_out="mend config.json")
    like = layout.init(config, torch.zeros(2, dtype=torch.int32, device="meta"))
    if not any(name.startswith(layout.prefix) for name in state):
        state = {name if name in layout.tied else layout.prefix + name: tensor for name, tensor in state.items()}
    tied = {name: state.pop(name) for name in layout.tied if name in state}
    params = from_state_dict(state, like=like, names=layout.names, where=str(folder))
    for name, tensor in tied.items():
        if not _same_bits(tensor, tree.at(params, layout.tied[name])):
            expected = f"the same values as {layout.names.of(layout.tied[name])!r}, to which it is tied"
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
    where = f"{folder}/config.json"
    fields = {name: getattr(config, ours) for ours, field in layout.fields.items() for name in field.all}
    fixed = {name: values[0] for name, values in layout.fixed(config).items()}
    back = asdict(read_config({"model_type": layout.model_type, **fixed, **fields}, layout, where))
    for name, value in asdict(config).items():
        if back[name] != value and name not in layout.ours:
            expected = f"{name}={back[name]!r}, the only one that {layout.architecture} has"
            way_out = "train a model that has it, or keep it as a functrain checkpoint"
            raise UnsupportedError(where, expected=expected, came=f"{value!r}", way_out=way_out)
    like = layout.init(config, torch.zeros(2, dtype=torch.int32, device="meta"))
    state = to_state_dict(params, layout.names)
    from_state_dict(state, like=like, names=layout.names, where=f"{folder}: params")
    table = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "dtype": _dtype(params, folder),
        **fixed,
        **fields,
        **more,
    }
    texts = {**(files or {}), "config.json": strict_json.dumps(table, indent=2) + b"\n"}
    return hub.save_folder(folder, state, texts, max_file_bytes=_MAX_FILE_BYTES, progress=progress)


def read_config(table: Mapping[str, Any], layout: Layout, where: str) -> Any:
    """Return our config for the fields of a config.json.

    Raises: UnsupportedError naming `where`, the field, what was expected and what came.
    """

    def refuse(name: str, expected: str, came: Any, way_out: str) -> UnsupportedError:
        return UnsupportedError(where, path=name, expected=expected, came=f"{came!r:.200}", way_out=way_out)

    if table.get("model_type") != layout.model_type:
        came = table.get("model_type")
        raise refuse("model_type", repr(layout.model_type), came, "load it with the module of that model")
    if "quantization_config" in table:
        came = table["quantization_config"]
        raise refuse("quantization_config", "plain tensors", came, "fetch the model that is not quantized")
    found = {}
    for ours, field in layout.fields.items():
        values = {name: table.get(name, field.default) for name in field.all}
        for name, value in values.items():
            if not _is_like(value, field.default):
                raise refuse(name, f"a number such as {field.default}", value, "mend config.json")
            if type(value) is int and value > _MOST:
                raise refuse(name, f"at most {_MOST}", value, "mend config.json")
            if value != values[field.all[0]]:
                raise refuse(name, f"{values[field.all[0]]!r} as in {field.all[0]}", value, "give them one value")
        found[ours] = values[field.all[0]]
    try:
        config = layout.config(**found)
    except ValueError as error:
        raise refuse("", "a config that can be", str(error), "mend config.json") from error
    fixed = layout.fixed(config)
    for name, choices in fixed.items():
        value = table.get(name, choices[0])
        if value not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise refuse(name, expected, value, "choose a model without it: this one computes otherwise")
    known = {name for field in layout.fields.values() for name in field.all} | set(fixed) | set(layout.silent) | _SILENT
    unknown = sorted(set(table) - known)
    if unknown:
        _log.warning(
            "%s: fields that functrain does not know are ignored: %s",
            where,
            ", ".join([f"{name:.60}" for name in unknown]),
        )
    return config


# what transformers writes into every config.json, and what steers only training, generation or other heads
_SILENT = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "task_specific_params"),
    *("id2label", "label2id"),
}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # bits: two NaNs are not equal
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def _regex(prefix: str, pattern: str) -> str:
    return f"(?:{re.escape(prefix)})?" + r"[^.]+".join(re.escape(part) for part in pattern.split("*"))


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
