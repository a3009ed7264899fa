"""The fields of a config.json of transformers to a config of ours, and back: computed, harmless, or refused by name."""

from __future__ import annotations

import logging
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from functrain.checkpoint import UnsupportedError
from functrain.models.layout import IN_TRANSFORMERS, OF_ANOTHER, WITHOUT_IT, Field, Layout, Refused

_MOST = 1 << 28  # of a size: a matrix of two of them, four of a model's widths long, still has less than 2**63 bytes
_log = logging.getLogger(__name__)


def read_config(table: Mapping[str, Any], layout: Layout, where: str, head: str | None = None) -> Any:
    """Return our config for the fields of a config.json, with the head of its `architectures` or with this one.

    Raises: UnsupportedError naming `where`, the field, what was expected and what came; ValueError for a head that the
    model does not have.
    """
    try:
        return _read(table, layout, where, head)
    except Refused as error:
        came = f"{error.came!r:.200}"
        raise UnsupportedError(
            where, path=error.name, expected=error.expected, came=came, way_out=error.way_out
        ) from error


def write_config(config: Any, layout: Layout, where: str) -> dict[str, Any]:
    """Return the fields of config.json that say a config of ours.

    Equals the config again under `read_config`, but for what `layout.ours` names.
    Raises: UnsupportedError for a config that transformers cannot express.
    """
    fields = {name: _json(getattr(config, ours)) for ours, field in layout.fields.items() for name in field.all}
    groups = {name: value for group in layout.groups for name, value in group.write(config).items()}
    fixed = {name: choices[0] for name, choices in layout.fixed(config).items()}
    architecture = layout.architecture_of(config)
    table = {"architectures": [architecture], "model_type": layout.model_type, **fixed, **fields, **groups}
    head = None if isinstance(layout.architecture, str) else config.head
    back = asdict(read_config(table, layout, where, head))
    for name, value in asdict(config).items():
        if back[name] != value and name not in layout.ours:
            expected = f"{name}={back[name]!r}, the only one that {architecture} has"
            way_out = "train a model that has it, or keep it as a functrain checkpoint"
            raise UnsupportedError(where, expected=expected, came=f"{value!r}", way_out=way_out)
    return table


def _read(table: Mapping[str, Any], layout: Layout, where: str, head: str | None) -> Any:
    if table.get("model_type") != layout.model_type:
        came = table.get("model_type")
        raise Refused("model_type", expected=repr(layout.model_type), came=came, way_out=OF_ANOTHER)
    if "quantization_config" in table:
        came, way_out = table["quantization_config"], "fetch the model that is not quantized"
        raise Refused("quantization_config", expected="plain tensors", came=came, way_out=way_out)
    found: dict[str, Any] = {}
    if not isinstance(layout.architecture, str):
        found["head"] = _head(table, layout.architecture, head)
    for ours, field in layout.fields.items():
        found[ours] = _value(table, field, found)
    for group in layout.groups:
        found.update(group.read(table, found))
    try:
        config = layout.config(**found)
    except ValueError as error:
        raise Refused("", expected="a config that can be", came=str(error)) from error
    fixed = {**_FIXED, **layout.fixed(config)}
    for name, choices in fixed.items():
        value = table.get(name, choices[0])
        if value not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise Refused(name, expected=expected, came=value, way_out=WITHOUT_IT)
    known = {name for field in layout.fields.values() for name in [*field.all, *field.older]} | set(fixed)
    known |= {name for group in layout.groups for name in group.names} | set(layout.silent) | _SILENT
    unknown = sorted(set(table) - known)
    if unknown:
        names = ", ".join([f"{name:.60}" for name in unknown])
        _log.warning("%s: fields that functrain does not know are ignored: %s", where, names)
    return config


# what transformers writes into every config.json, and what steers only training, generation, outputs or other heads
_SILENT = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "task_specific_params"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions"),
    *("chunk_size_feed_forward", "tie_last_hidden_states"),
}

# what any config.json may ask for and no model here computes
_FIXED: Mapping[str, Sequence[Any]] = {
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
}


def _head(table: Mapping[str, Any], architectures: Mapping[str, str], head: str | None) -> str:
    if head is not None:
        if head not in architectures:
            raise ValueError(f"expected a head of {', '.join(map(repr, architectures))}, came {head!r}; choose one")
        return head
    came = table.get("architectures")
    for name, architecture in architectures.items():
        if came == [architecture]:
            return name
    expected = " or ".join(repr([name]) for name in dict.fromkeys(architectures.values()))
    heads = ", ".join(map(repr, architectures))
    way_out = f"say which part to load, by head= of {heads}, or {IN_TRANSFORMERS}"
    raise Refused("architectures", expected=expected, came=came, way_out=way_out)


def _value(table: Mapping[str, Any], field: Field, found: Mapping[str, Any]) -> Any:
    """Return the one value of a field's names, checked, a list as a tuple."""
    first, *others = field.all
    kind = type(field.default) if field.kind is None else field.kind
    there = [name for name in [first, *field.older] if name in table]
    named = {name: table.get(name, field.default) for name in [*(there or [first]), *others]}
    values = list(named.items())
    for name, value in values:
        if value is None and field.null is not None:
            continue
        members = value if isinstance(value, list) else [value]
        if not _is_like(value, kind):
            raise Refused(name, expected=_described(kind, field.default), came=value)
        for member in members:
            if type(member) is int and member > _MOST:
                raise Refused(name, expected=f"at most {_MOST}", came=member)
            if field.choices and member not in field.choices:
                expected = " or ".join(map(repr, field.choices))
                raise Refused(name, expected=expected, came=member, way_out=WITHOUT_IT)
        if value != values[0][1]:
            expected = f"{values[0][1]!r} as in {values[0][0]}"
            raise Refused(name, expected=expected, came=value, way_out="give them one value")
    value = values[0][1]
    if value is None and field.null is not None:
        return field.null(found)
    return tuple(value) if isinstance(value, list) else value


def _is_like(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_like(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        [member] = typing.get_args(kind)
        return isinstance(value, list) and all(_is_like(one, member) for one in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _described(kind: Any, default: Any) -> str:
    such_as = "" if default is None else f" such as {default}"
    if kind in (int, float):
        return f"a number{such_as}"
    if isinstance(kind, type) and not typing.get_args(kind):
        return {str: "a string", bool: "true or false"}.get(kind, f"a {kind.__name__}") + (
            such_as if kind is str else ""
        )
    return f"{kind}{such_as}"


def _json(value: Any) -> Any:
    return [_json(one) for one in value] if isinstance(value, tuple) else value
