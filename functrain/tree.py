"""Trees of tensors: nested dict, list, tuple, NamedTuple and registered dataclasses, every leaf with a stable path.

A path joins keys, indices and field names with "/": `blocks/0/attn/qkv`. Dictionaries are traversed by sorted key and
None is an empty node, as in JAX. Every function here is pure and traces under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

Tree: TypeAlias = Any
Params: TypeAlias = Any
Batch: TypeAlias = Any
T = TypeVar("T")

_NAMESPACE = "functrain"


# ---- dataclasses as nodes ---------------------------------------------------------------------------------------


def register_dataclass(cls: type[T], *, static: Sequence[str] = ()) -> type[T]:
    """Make a dataclass a tree node: its fields are children, those named in `static` are part of the structure.

    Raises: TypeError when `cls` is no dataclass; ValueError for a static name that is no field.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"register_dataclass: expected a dataclass, came {cls!r}; decorate it with @dataclasses.dataclass")
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(static) - set(names))
    if unknown:
        raise ValueError(f"register_dataclass: {cls.__name__} has no field {unknown}; its fields are {names}")
    dynamic = tuple(name for name in names if name not in static)
    fixed = tuple(static)

    def to_children(node: Any) -> tuple[tuple[Any, ...], Any, tuple[str, ...]]:
        return tuple(getattr(node, n) for n in dynamic), tuple(getattr(node, n) for n in fixed), dynamic

    def from_children(metadata: Any, children: Any) -> Any:
        return cls(**dict(zip(dynamic, children, strict=True)), **dict(zip(fixed, metadata, strict=True)))

    optree.register_pytree_node(cls, to_children, from_children, namespace=_NAMESPACE)
    _DATACLASS_FIELDS[cls] = dynamic
    return cls


def dataclass(cls: type[T] | None = None, *, static: Sequence[str] = ()) -> Any:
    """Decorate a class as a frozen dataclass that is a tree node; see `register_dataclass`."""

    def decorate(inner: type[T]) -> type[T]:
        return register_dataclass(dataclasses.dataclass(frozen=True)(inner), static=static)

    return decorate if cls is None else decorate(cls)


_DATACLASS_FIELDS: dict[type, tuple[str, ...]] = {}


# ---- structure --------------------------------------------------------------------------------------------------


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves, in path order, and the structure that `unflatten` takes."""
    if torch.compiler.is_compiling():
        return leaves(tree), _Traced(tree)
    return optree.tree_flatten(tree, namespace=_NAMESPACE)


def unflatten(structure: Any, leaves: Iterable[Any]) -> Tree:
    """Return the tree of this structure with these leaves; the inverse of `flatten`."""
    if isinstance(structure, _Traced):
        return _rebuild(structure.tree, iter(leaves))
    return optree.tree_unflatten(structure, leaves)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in path order."""
    if torch.compiler.is_compiling():
        return [leaf for _, leaf in items(tree)]
    return optree.tree_leaves(tree, namespace=_NAMESPACE)


def structure(tree: Tree) -> Any:
    """Return the structure of a tree; two structures compare with ==."""
    return _Traced(tree) if torch.compiler.is_compiling() else optree.tree_structure(tree, namespace=_NAMESPACE)


class _Traced:
    """A structure while `torch.compile` traces: optree 0.20 keeps dictionary keys in a class that Dynamo cannot
    build, so inside a graph a tree stands for its own structure and is walked in Python, at no cost at run time."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Traced) and _same_nodes(self.tree, other.tree)


def _same_nodes(a: Tree, b: Tree) -> bool:
    below_a, below_b = children(a), children(b)
    if below_a is None or below_b is None:
        return below_a is None and below_b is None
    if type(a) is not type(b) or len(below_a) != len(below_b):
        return False
    return all(x == y and _same_nodes(u, v) for (x, u), (y, v) in zip(below_a, below_b, strict=True))


def _rebuild(node: Tree, values: Iterator[Any]) -> Tree:
    below = children(node)
    if below is None:
        return next(values)
    names = [name for name, _ in below]
    return _with_children(node, names, [_rebuild(child, values) for _, child in below])


def _with_children(node: Tree, names: list[str], made: list[Any]) -> Tree:
    if node is None:
        return None
    if isinstance(node, dict):
        new = dict(zip(names, made, strict=True))
        rows = {key: new[str(key)] for key in node}
        if isinstance(node, OrderedDict):
            return OrderedDict(rows)
        return defaultdict(node.default_factory, rows) if isinstance(node, defaultdict) else rows
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*made)
    if isinstance(node, (list, tuple)):
        return type(node)(made)
    return dataclasses.replace(node, **dict(zip(names, made, strict=True)))


def children(node: Tree) -> list[tuple[str, Any]] | None:
    """Return a node's (name, child) pairs in traversal order, or None for a leaf.

    Raises: ValueError for a dictionary key that cannot stand in a path.
    """
    if node is None:
        return []
    if isinstance(node, dict):
        keys = list(node) if isinstance(node, OrderedDict) else sorted(node, key=_sort_key)
        return [(_key_name(key, node), node[key]) for key in keys]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(name, getattr(node, name)) for name in node._fields]
    if isinstance(node, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(node)]
    fields = _DATACLASS_FIELDS.get(type(node))
    return None if fields is None else [(name, getattr(node, name)) for name in fields]


def _sort_key(key: Any) -> Any:
    return key if not isinstance(key, bool) else str(key)


def _key_name(key: Any, node: Mapping[Any, Any]) -> str:
    if not isinstance(key, (str, int)) or isinstance(key, bool):
        raise ValueError(f"tree: dictionary keys must be str or int, came {key!r} of {type(key).__name__}; rename it")
    name = str(key)
    if name == "" or "/" in name:
        raise ValueError(f"tree: the key {key!r} would make a path ambiguous; use a key without '/' that is not empty")
    if isinstance(key, int) and name in node:
        raise ValueError(f"tree: keys {key!r} and {name!r} of one dictionary have the same path {name!r}; rename one")
    return name


def items(tree: Tree) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs in path order; the path of a tree that is one leaf is the empty string.

    Raises: ValueError for keys whose path would be ambiguous.
    """
    found: list[tuple[str, Any]] = []
    _walk(tree, "", found)
    return found


def _walk(node: Tree, path: str, found: list[tuple[str, Any]]) -> None:
    below = children(node)
    if below is None:
        found.append((path, node))
    else:
        for name, child in below:
            _walk(child, f"{path}/{name}" if path else name, found)


def paths(tree: Tree) -> list[str]:
    """Return the leaves' paths, in the order of `leaves`."""
    return [path for path, _ in items(tree)]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of `fn(leaf, *leaves of rest at the same path)`.

    Raises: ValueError naming the paths that differ when the trees have different structures.
    """
    first, treedef = flatten(tree)
    columns = [first, *(_leaves_like(tree, treedef, other) for other in rest)]
    return unflatten(treedef, [fn(*row) for row in zip(*columns, strict=True)])


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of `fn(path, leaf, *leaves of rest at the same path)`."""
    treedef = structure(tree)
    columns = [items(tree), *(_leaves_like(tree, treedef, other) for other in rest)]
    return unflatten(treedef, [fn(*pair, *others) for pair, *others in zip(*columns, strict=True)])


def _leaves_like(tree: Tree, treedef: Any, other: Tree) -> list[Any]:
    found, other_def = flatten(other)
    if other_def != treedef:
        check_same_structure(tree, other)
    return found


def check_same_structure(expected: Tree, got: Tree, *, what: str = "trees") -> None:
    """Raise a ValueError that names the paths in which two trees differ; return when their structures are equal."""
    if structure(expected) == structure(got):
        return
    want, have = paths(expected), paths(got)
    missing = [p for p in want if p not in set(have)]
    extra = [p for p in have if p not in set(want)]
    lines = [f"{what}: the structures differ"]
    for title, names, pool in (("missing", missing, extra), ("unexpected", extra, missing)):
        if names:
            lines.append(f"  {title}: " + ", ".join(_hinted(name, pool) for name in names[:8]) + _more(names))
    if not missing and not extra:
        lines.append(f"  same paths, other containers: expected {structure(expected)}, came {structure(got)}")
    raise ValueError("\n".join(lines))


def _hinted(name: str, pool: list[str]) -> str:
    near = difflib.get_close_matches(name, pool, n=1, cutoff=0.75)
    return f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 8} more" if len(names) > 8 else ""


# ---- surgery ----------------------------------------------------------------------------------------------------


def at(tree: Tree, path: str) -> Tree:
    """Return the leaf or subtree at `path`.

    Raises: KeyError that lists what is there instead.
    """
    node = tree
    for name in _split(path):
        node = _child(node, name, path)
    return node


def set_at(tree: Tree, path: str, value: Tree) -> Tree:
    """Return a copy of the tree with the leaf or subtree at `path` replaced; nothing else is copied.

    Raises: KeyError that lists what is there instead.
    """
    return _set(tree, _split(path), value, path)


def _split(path: str) -> list[str]:
    return path.split("/") if path else []


def _child(node: Tree, name: str, path: str) -> Tree:
    below = dict(children(node) or [])
    if name not in below:
        raise KeyError(f"{path}: no {name!r} here; there is {_hint_names(name, list(below))}")
    return below[name]


def _hint_names(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"{near[0]!r}" if near else (", ".join(repr(n) for n in names[:8]) + _more(names)) or "a leaf"


def _set(node: Tree, names: list[str], value: Tree, path: str) -> Tree:
    if not names:
        return value
    name, rest = names[0], names[1:]
    child = _set(_child(node, name, path), rest, value, path)
    if isinstance(node, dict):
        copy = node.copy()  # keeps an OrderedDict or a defaultdict what it is
        copy[next(key for key in node if str(key) == name)] = child
        return copy
    if isinstance(node, tuple) and hasattr(node, "_replace"):
        return node._replace(**{name: child})
    if isinstance(node, (list, tuple)):
        return type(node)(child if i == int(name) else old for i, old in enumerate(node))
    return dataclasses.replace(node, **{name: child})


Where: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool]


def select(tree: Tree, *patterns: str) -> dict[str, Any]:
    """Return the leaves whose path fits any pattern, by path. `*` stops at "/", `**` does not, `?` is one character.

    Raises: KeyError for a pattern that fits no path.
    """
    pairs = items(tree)
    for pattern in patterns:
        if not any(_regex(pattern).fullmatch(path) for path, _ in pairs):
            raise KeyError(f"{pattern}: fits no path; there is {_hint_names(pattern, [path for path, _ in pairs])}")
    return {path: leaf for path, leaf in pairs if any(_regex(pattern).fullmatch(path) for pattern in patterns)}


def mask(where: Where, tree: Tree) -> Tree:
    """Return the tree of booleans that says which leaves fit a pattern, any of several patterns, or a predicate of
    (path, leaf)."""
    if callable(where):
        return map_with_path(lambda path, leaf: bool(where(path, leaf)), tree)
    chosen = select(tree, *([where] if isinstance(where, str) else where))
    return map_with_path(lambda path, leaf: path in chosen, tree)


def partition(where: Where, tree: Tree) -> tuple[Tree, Tree]:
    """Split a tree in two of the same containers: leaves that fit, and the others; None stands in the holes.

    Equals the tree again under `combine`.
    """
    chosen = mask(where, tree)
    return map(lambda keep, leaf: leaf if keep else None, chosen, tree), map(
        lambda keep, leaf: None if keep else leaf, chosen, tree
    )


def combine(first: Tree, second: Tree) -> Tree:
    """Fill the None holes of `first` with what `second` has there; the inverse of `partition`.

    Raises: ValueError when both have a leaf at one place, or the containers differ.
    """
    if first is None:
        return second
    if second is None:
        return first
    below, other = children(first), children(second)
    if below is None or other is None or [name for name, _ in below] != [name for name, _ in other]:
        raise ValueError(
            f"combine: both trees have something at one path, {first!r} and {second!r}; partition makes trees that fit"
        )
    pairs = [combine(a, b) for (_, a), (_, b) in zip(below, other, strict=True)]
    return _with_children(first, [name for name, _ in below], pairs)


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


# ---- algebra ----------------------------------------------------------------------------------------------------


def add(a: Tree, b: Tree) -> Tree:
    """Return a + b."""
    return map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """Return a - b."""
    return map(torch.sub, a, b)


def mul(a: Tree, b: Tree) -> Tree:
    """Return a * b, leaf by leaf."""
    return map(torch.mul, a, b)


def scale(scalar: float | Tensor, tree: Tree) -> Tree:
    """Return scalar * tree."""
    return map(lambda leaf: leaf * scalar, tree)


def add_scale(a: Tree, scalar: float | Tensor, b: Tree) -> Tree:
    """Return a + scalar * b."""
    return map(lambda x, y: x + scalar * y, a, b)


def vdot(a: Tree, b: Tree) -> Tensor:
    """Return the sum over all elements of conj(a) * b, a () tensor, at least float32."""
    return _total([torch.sum(_wide(x).conj() * _wide(y)) for x, y in zip(leaves(a), _same(a, b), strict=True)])


def norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm of all elements together, a () tensor, at least float32."""
    return torch.sqrt(_total([_squares(_wide(leaf)) for leaf in leaves(tree)]))


def _squares(leaf: Tensor) -> Tensor:
    return torch.sum(leaf.real**2 + leaf.imag**2) if leaf.is_complex() else torch.sum(leaf * leaf)


def _same(a: Tree, b: Tree) -> list[Any]:
    return _leaves_like(a, structure(a), b)


def _wide(leaf: Tensor) -> Tensor:
    # float32: a bfloat16 sum of a million squares stops growing at about 256 times a term
    return leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf


def _total(terms: list[Tensor]) -> Tensor:
    if not terms:
        return torch.zeros(())
    return torch.stack(terms).sum() if len({t.dtype for t in terms}) == 1 else torch.stack([t.double() for t in terms]).sum()


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Return a where the tensor `condition` is true and b elsewhere; traced, never read by the host."""
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Return the tree with its floating-point leaves in `dtype`; others stay as they are."""
    return map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Return the tree with its tensors on `device`."""
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of zeros with the same shapes, in `dtype` if given."""
    return map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def ones_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of ones with the same shapes, in `dtype` if given."""
    return map(lambda x: torch.ones_like(x, dtype=dtype), tree)


def full_like(tree: Tree, value: float, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree filled with `value`, in `dtype` if given."""
    return map(lambda x: torch.full_like(x, value, dtype=dtype), tree)


def allclose(a: Tree, b: Tree, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Tell whether all leaves are close, NaN equal to NaN; reads the result to the host."""
    pairs = zip(leaves(a), _same(a, b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True) for x, y in pairs)


# ---- to look at -------------------------------------------------------------------------------------------------


def size(tree: Tree) -> int:
    """Return the number of elements in all tensors."""
    return sum(leaf.numel() for leaf in leaves(tree) if isinstance(leaf, Tensor))


def bytes(tree: Tree) -> int:
    """Return the number of bytes in all tensors, a tied tensor counted once."""
    unique = {id(leaf): leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)}
    return sum(leaf.numel() * leaf.element_size() for leaf in unique.values())


def format(tree: Tree, *, trainable: Where = "**") -> str:
    """Return a table of path, shape, dtype, bytes and whether `trainable` names the leaf, with a line of totals."""
    chosen = leaves(mask(trainable, tree)) if leaves(tree) else []
    rows = [("path", "shape", "dtype", "bytes", "trainable")]
    for (path, leaf), fits in zip(items(tree), chosen, strict=True):
        if isinstance(leaf, Tensor):
            dtype, count = str(leaf.dtype).removeprefix("torch."), f"{leaf.numel() * leaf.element_size():,}"
            rows.append((path, str(tuple(leaf.shape)), dtype, count, "yes" if fits else "no"))
        else:
            rows.append((path, repr(leaf), type(leaf).__name__, "", ""))
    rows.append(("total", f"{size(tree):,} elements", "", f"{bytes(tree):,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.rjust(w) if i == 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
