"""Named fields anywhere in a tree: the count of an optimizer's state, wherever its transformation stands.

A name is a field of a NamedTuple or dataclass, a key of a dictionary, or the type's name of a NamedTuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from functrain.tree.hints import listed
from functrain.tree.nodes import Tree, children, rebuild
from functrain.tree.surgery import PathError

Filter: TypeAlias = Callable[[str, Any], bool]  # (path, value) to whether it counts


def get_all_with_path(tree: Tree, key: Any, filtering: Filter | None = None) -> list[tuple[str, Any]]:
    """Return (path, value) of everything named `key`, inside other such values too, in path order.

    `filtering` keeps those of which it is true. To tell two states with a field of one name apart, take the state by
    its type first: `get_all_with_path(state, "ScaleByAdamState")`.

    >>> optimizer = ft.optim.adam(ft.schedules.linear_schedule(1.0, 0.0, 100))
    >>> ft.tree.get_all_with_path(optimizer.init({"w": torch.ones(2)}), "count")
    [('0/count', tensor(0)), ('1/count', tensor(0))]
    """
    found: list[tuple[str, Any]] = []
    _search(tree, key, "", found)
    return [(path, value) for path, value in found if filtering is None or filtering(path, value)]


def get(tree: Tree, key: Any, default: Any = None, filtering: Filter | None = None) -> Any:
    """Return the one value named `key`, or `default` where there is none.

    Raises: PathError, a KeyError, that names the paths where several have the name.

    >>> state = ft.optim.adam(1e-3).init({"w": torch.ones(2)})
    >>> ft.tree.get(state, "mu")
    {'w': tensor([0., 0.])}
    """
    found = get_all_with_path(tree, key, filtering)
    if len(found) > 1:
        raise PathError(
            f"get: expected one value named {key!r}, came {len(found)}, at {listed([path for path, _ in found])}; "
            f"choose with filtering=lambda path, value: path == {found[0][0]!r}"
        )
    return found[0][1] if found else default


def set(tree: Tree, filtering: Filter | None = None, /, **kwargs: Any) -> Tree:
    """Return the tree with `value` in place of everything that is named `name`, for each name=value.

    `filtering` keeps the old value where it is false. Inside a value that was replaced nothing is looked for.

    Raises: PathError, a KeyError, for a name that nothing has.

    >>> state = ft.optim.adam(1e-3).init({"w": torch.ones(2)})
    >>> ft.tree.get(ft.tree.set(state, count=torch.tensor(100)), "count")
    tensor(100)
    """
    for key in kwargs:
        if not get_all_with_path(tree, key, filtering):
            unless = " that the filter lets pass" if filtering else ""
            raise PathError(f"set: nothing named {key!r}{unless}; the tree has {listed(sorted(_names(tree)))}")
    return _replaced(tree, kwargs, filtering, "")


def _search(node: Tree, key: Any, path: str, found: list[tuple[str, Any]]) -> None:
    if _type_name(node) == key:
        found.append((path, node))
    named = _has(node, key)
    for name, child in children(node) or ():
        below = f"{path}/{name}" if path else name
        if named and name == str(key):
            found.append((below, child))
        _search(child, key, below, found)


def _replaced(node: Tree, values: dict[str, Any], filtering: Filter | None, path: str) -> Tree:
    def chosen(path: str, value: Any) -> bool:
        return filtering is None or filtering(path, value)

    kind = _type_name(node)
    if kind in values and chosen(path, node):
        return values[kind]
    pairs = children(node)
    if pairs is None:
        return node
    made = []
    for name, child in pairs:
        below = f"{path}/{name}" if path else name
        hit = name in values and _has(node, name) and chosen(below, child)
        made.append(values[name] if hit else _replaced(child, values, filtering, below))
    return rebuild(node, made)


def _has(node: Tree, key: Any) -> bool:
    """Tell whether a node's children have names, and one of them this one."""
    if isinstance(node, dict):
        return key in node
    if isinstance(node, (list, tuple)) and _type_name(node) is None:
        return False
    return any(name == key for name, _ in children(node) or ())


def _names(node: Tree) -> dict[str, None]:
    pairs = children(node) or []
    names = {name: None for name, _ in pairs if _has(node, name)}
    for _, child in pairs:
        names |= _names(child)
    return names


def _type_name(node: Tree) -> str | None:
    return type(node).__name__ if isinstance(node, tuple) and hasattr(type(node), "_fields") else None
