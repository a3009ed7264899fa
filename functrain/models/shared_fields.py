"""Fields of config.json of several families that say more than one field can: labels, rotary positions, absent ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functrain.models.layout import IN_TRANSFORMERS, WITHOUT_IT, Group, Refused
from functrain.nn import Rotary


def class_labels() -> Group:
    """Return `num_labels`, and the `labels` of classes where they have names, of `id2label` and `label2id`.

    The names LABEL_0, LABEL_1 ..., which transformers gives to those that have none, are None here.
    """

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        named = table.get("id2label")
        count = table.get("num_labels", 2 if named is None else None)
        if count is not None and type(count) is not int:
            raise Refused("num_labels", expected="a number such as 2", came=count)
        if named is None:
            return {"num_labels": count, "labels": None}
        numbers = [str(number) for number in range(len(named))] if isinstance(named, dict) else []
        if not numbers or set(named) != set(numbers) or not all(isinstance(one, str) for one in named.values()):
            raise Refused("id2label", expected="a name for each class from '0' on", came=named)
        if count not in (None, len(named)):
            way_out = "give them one value"
            raise Refused("num_labels", expected=f"{len(named)}, the names in id2label", came=count, way_out=way_out)
        labels = tuple(named[number] for number in numbers)
        return {"num_labels": len(labels), "labels": None if labels == _nameless(len(labels)) else labels}

    def write(config: Any) -> dict[str, Any]:
        labels = config.labels or _nameless(config.num_labels)
        named = {str(number): label for number, label in enumerate(labels)}
        return {"id2label": named, "label2id": {label: int(number) for number, label in named.items()}}

    return Group(names=("id2label", "label2id", "num_labels"), read=read, write=write)


def rotary(*, theta: float, read: Callable[[dict[str, Any]], Any], write: Callable[[Any], Mapping[str, Any]]) -> Group:
    """Return the field `rope` of rotary positions, of `rope_parameters` or the older `rope_scaling` and `rope_theta`.

    `theta` is the one of a config.json that says none. `read` takes what `rope_parameters` checks and returns to ours,
    `write` ours to a `rope_parameters`.
    """

    def from_table(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        newer, older = table.get("rope_parameters") or {}, table.get("rope_scaling") or {}
        if newer and older and newer != older:
            way_out = "give them one value"
            raise Refused("rope_scaling", expected=f"{newer!r} as in rope_parameters", came=older, way_out=way_out)
        name = "rope_parameters" if newer else "rope_scaling"
        if table.get("partial_rotary_factor") not in (None, 1.0):
            raise Refused(
                "partial_rotary_factor", expected="1.0", came=table["partial_rotary_factor"], way_out=WITHOUT_IT
            )
        found = rope_parameters(newer or older, name, table.get("rope_theta", theta), table)
        if table.get("rope_theta") not in (None, found["rope_theta"]):
            expected = f"{found['rope_theta']} as in {name}"
            raise Refused("rope_theta", expected=expected, came=table["rope_theta"], way_out="give them one value")
        return {"rope": read(found)}

    return Group(
        names=("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
        read=from_table,
        write=lambda config: {"rope_parameters": dict(write(config.rope))},
    )


# of a type of rotary positions: its numbers, those that must stand there first
_NUMBERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
            *("mscale_all_dim", "truncate"),
        ),
    ),
}


def rope_parameters(values: Mapping[str, Any], name: str, theta: float, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the numbers of this type that one `rope_parameters` says, checked.

    What it leaves out or has as null is left out, but for theta, and for the original context of "llama3" and "yarn",
    which then is `max_position_embeddings` of the table. `name` is where the values stand.
    Raises: Refused for a type or number that is not computed, or is no number.
    """
    if not isinstance(values, Mapping):
        raise Refused(name, expected="the parameters by name", came=values)
    given = {key: value for key, value in values.items() if value is not None}
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    kind = kinds[0]
    if kinds[-1] != kind:
        way_out = "give them one value"
        raise Refused(f"{name}/type", expected=f"{kind!r} as in rope_type", came=kinds[-1], way_out=way_out)
    if kind not in _NUMBERS:
        expected = " or ".join(map(repr, _NUMBERS))
        raise Refused(f"{name}/rope_type", expected=expected, came=kind, way_out=WITHOUT_IT)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        came = values["partial_rotary_factor"]
        raise Refused(f"{name}/partial_rotary_factor", expected="1.0", came=came, way_out=WITHOUT_IT)
    needed, others = _NUMBERS[kind]
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": given.pop("rope_theta", theta)}
    for key in needed:
        if key not in given:
            raise Refused(f"{name}/{key}", expected=f"a number, as {kind!r} needs one", came=None)
    for key, value in given.items():
        if key not in (*needed, *others):
            raise Refused(f"{name}/{key}", expected=f"no such parameter of {kind!r}", came=value, way_out=WITHOUT_IT)
        found[key] = value
    if "original_max_position_embeddings" in others and "original_max_position_embeddings" not in found:
        found["original_max_position_embeddings"] = table.get("max_position_embeddings")
    for key, value in found.items():
        wanted = (bool,) if key == "truncate" else (str,) if key == "rope_type" else (int, float)
        if type(value) not in wanted or (key != "truncate" and key != "rope_type" and not value > 0):
            expected = "true or false" if key == "truncate" else "a number above 0"
            raise Refused(f"{name}/{key}", expected=expected, came=value)
    return found


# our field of a Rotary -> theirs in rope_parameters
_ROPE = {
    "kind": "rope_type", "base": "rope_theta", "factor": "factor", "original": "original_max_position_embeddings",
    "low": "low_freq_factor", "high": "high_freq_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
    "attention_factor": "attention_factor", "mscale": "mscale", "mscale_all": "mscale_all_dim", "truncate": "truncate",
}  # fmt: skip


def rotary_of(found: Mapping[str, Any], context: int) -> Rotary:
    """Return the Rotary of what `rope_parameters` returned; of the "dynamic" one the context is that trained on.

    Raises: Refused for one that cannot be.
    """
    if found["rope_type"] == "dynamic":
        found = {**found, "original_max_position_embeddings": context}
    try:
        return Rotary(**{name: found[theirs] for name, theirs in _ROPE.items() if theirs in found})
    except ValueError as error:
        raise Refused("rope_parameters", expected="a Rotary that can be", came=str(error)) from error


def of_rotary(rope: Rotary) -> dict[str, Any]:
    """Return the `rope_parameters` of a Rotary."""
    kept = {theirs: getattr(rope, name) for name, theirs in _ROPE.items() if getattr(rope, name) is not None}
    if rope.kind == "dynamic":
        del kept["original_max_position_embeddings"]  # there it is max_position_embeddings
    return kept


def absent(*names: str) -> Group:
    """Refuse fields of neighbours of a family that compute something else."""

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        for name in names:
            if table.get(name):
                raise Refused(name, expected="nothing", came=table[name], way_out=IN_TRANSFORMERS)
        return {}

    return Group(names=names, read=read, write=lambda config: {})


def _nameless(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))
