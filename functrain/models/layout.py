"""How transformers keeps a model, as data: the names of its tensors and the fields of its config.json.

A model adds a `Layout` and no code that reads or writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from functrain.models.names import Names
from functrain.tree import Params


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How transformers keeps a model: everything that its folders need.

    A model with heads has a `head` in its config, and a class of transformers for each of them. What depends on more
    than the head, such as a head that is tied or not, is a function of our config.
    """

    model_type: str
    architecture: str | Mapping[str, str]  # the class whose names are those of `names`, or one for each head of ours
    prefix: str  # what a folder of the class without a head leaves out of the names
    names: Names | Callable[[Any], Names]
    tied: Mapping[str, str] | Callable[[Any], Mapping[str, str]]  # a name that may stand there too -> our path
    ignored: Sequence[str]  # patterns of names that are no parameters
    fields: Mapping[str, Field]  # our config's field -> theirs
    config: Callable[..., Any]  # from our fields, as keywords, to our config, which counts its blocks as `layers`
    init: Callable[[Any, Tensor], Params]
    fixed: Callable[[Any], Mapping[str, Sequence[Any]]]  # our config -> their field -> what we compute, default first
    groups: Sequence[Group] = ()  # what no single field says, read after `fields`
    older: Mapping[str, str] = field(default_factory=dict)  # how a name ended in older files -> how it ends now
    heads: Sequence[str] = ()  # patterns of the names of all heads: those that a config's head lacks are passed over
    silent: Sequence[str] = ()  # fields of theirs that change no number that we compute
    ours: Sequence[str] = ()  # fields of ours that change no number either, or no inference

    def names_of(self, config: Any) -> Names:
        return self.names if isinstance(self.names, Names) else self.names(config)

    def tied_of(self, config: Any) -> Mapping[str, str]:
        return self.tied(config) if callable(self.tied) else self.tied

    def architecture_of(self, config: Any) -> str:
        return self.architecture if isinstance(self.architecture, str) else self.architecture[config.head]


@dataclass(frozen=True)
class Field:
    """A field of config.json, or several that must agree, and its value where it is left out.

    `kind` is the type of its values, `type(default)` unless given, such as `int` for a default of None, `list[str]`, or
    `int | list[int]`. A list is a tuple in our config. A null is refused unless `null` says what it means, given our
    fields that were read before: `null=lambda ours: ours["width"] // ours["heads"]` for a width of heads.
    """

    names: str | Sequence[str]
    default: Any
    kind: Any = field(default=None, kw_only=True)
    null: Callable[[Mapping[str, Any]], Any] | None = field(default=None, kw_only=True)
    choices: Sequence[Any] = field(default=(), kw_only=True)  # the values that we compute; of a list, its members
    older: Sequence[str] = field(default=(), kw_only=True)  # what else the first of `names` is called in files

    @property
    def all(self) -> list[str]:
        return [self.names] if isinstance(self.names, str) else list(self.names)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Fields of config.json that together say fields of ours, where a `Field` would not do.

    `read` takes config.json and our fields so far to more of ours, and raises `Refused`; `write` takes our config to
    theirs.
    """

    names: Sequence[str]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Any], Mapping[str, Any]]


IN_TRANSFORMERS = "load it in transformers and take ft.from_module of that"
WITHOUT_IT = f"choose a model without it, or {IN_TRANSFORMERS}"
OF_ANOTHER = f"load it with the model of ft.models that has it, or {IN_TRANSFORMERS}"


class Refused(ValueError):
    """A field of config.json that says what the model does not compute."""

    def __init__(self, name: str, *, expected: str, came: Any, way_out: str = "mend config.json") -> None:
        super().__init__(f"{name}: expected {expected}, came {came!r:.200}; {way_out}")
        self.name, self.expected, self.came, self.way_out = name, expected, came, way_out
