"""One place of a tree: look there, or put something there."""

from __future__ import annotations

from functrain.tree.hints import instead
from functrain.tree.nodes import Tree, children, rebuild


class PathError(KeyError, ValueError):
    """There is nothing at a path, or a pattern fits no path."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


def at(tree: Tree, path: str) -> Tree:
    """Return the leaf or subtree at `path`; the tree itself at the empty path.

    Raises: PathError, a KeyError, that lists what is there instead.

    >>> ft.tree.at({"blocks": [{"bias": 1}, {"bias": 2}]}, "blocks/1/bias")
    2
    """
    node = tree
    for name in _split(path):
        node = dict(_named(node, name, path))[name]
    return node


def set_at(tree: Tree, path: str, value: Tree) -> Tree:
    """Return the tree with `value` in place of the leaf or subtree at `path`; every other leaf is the same object.

    Raises: PathError, a KeyError, that lists what is there instead.

    >>> ft.tree.set_at({"backbone": {"w": 1}, "head": {"w": 2}}, "head", {"w": 3, "b": 4})
    {'backbone': {'w': 1}, 'head': {'w': 3, 'b': 4}}
    """
    return _set(tree, _split(path), value, path)


def _set(node: Tree, names: list[str], value: Tree, path: str) -> Tree:
    if not names:
        return value
    pairs = _named(node, names[0], path)
    return rebuild(node, [_set(old, names[1:], value, path) if name == names[0] else old for name, old in pairs])


def _split(path: str) -> list[str]:
    if not isinstance(path, str):
        raise TypeError(f"tree: expected a path such as 'blocks/0/w', came {path!r} of type {type(path).__name__}")
    return path.split("/") if path else []


def _named(node: Tree, name: str, path: str) -> list[tuple[str, Tree]]:
    """Return the children of a node, one of which must have this name."""
    pairs = children(node)
    if pairs is None:
        raise PathError(f"{path}: no {name!r} here; a leaf is, end the path before it")
    names = [known for known, _ in pairs]
    if name not in names:
        raise PathError(f"{path}: no {name!r} here; there is {instead(name, names)}")
    return pairs
