"""A tree in a few lines: what each part of it weighs, which is what Keras's `summary` prints of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functrain.tree.flattening import items, leaves
from functrain.tree.nodes import Tree
from functrain.tree.selection import Where, mask

_WIDTH = 80  # characters of a line
_HEADER = ("path", "parameters", "size", "dtype", "trainable")
_PARAMS = "params"


def summary(tree: Tree, *, depth: int = 2, trainable: Where | None = None) -> str:
    """Return a table of the parts of a tree, with the sums of their elements and bytes, their dtypes and how much of
    them is trainable, and a line of totals.

    A part is what has the same first `depth` names of its path. Neighbours that are numbered and alike, as the blocks
    of a transformer, share a line such as `blocks/0..11`, whose numbers are those of all of them together. A tied
    tensor counts where it stands first, so the lines add up to the total, which equals `tree.size` and `tree.bytes`.

    A tree with a branch `params` beside others, as a `TrainState`, begins with it and has a line of its total. There
    `params/**` is trainable, in other trees everything is, unless `trainable` says otherwise: a pattern of `select`,
    several, or a predicate. No tensor but a floating-point or complex one is. Sizes are in units of 1000 bytes, and no
    line has more than 80 characters as long as the numbers leave room for a path.

    Raises: TypeError and ValueError for a `depth` that is no int of at least 1; PathError for a pattern that fits no
    path.

    >>> params = {"blocks": [{"w": torch.ones(64, 64)} for _ in range(12)], "embedding": torch.ones(256, 64)}
    >>> print(ft.tree.summary(params, trainable="blocks/**"))
    path          parameters     size  dtype    trainable
    blocks/0..11      49,152   197 kB  float32  yes
    embedding         16,384  65.5 kB  float32  no
    total             65,536   262 kB  float32  75 %
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"summary: expected depth to be an int, came {type(depth).__name__} {depth!r}")
    if depth < 1:
        raise ValueError(f"summary: expected a depth of at least 1, came {depth}; tree.format shows every leaf")
    found = _weighed(tree, trainable)
    first = [leaf for leaf in found if leaf.names[:1] == (_PARAMS,)]
    others = [leaf for leaf in found if leaf.names[:1] != (_PARAMS,)]
    rows = [_row(path, part) for path, part in _parts("", first, depth) + _parts("", others, depth)]
    if first and others:
        rows.append(_row("total of params", first))
    rows.append(_row("total", found))
    return _table(rows)


class _Leaf(NamedTuple):
    names: tuple[str, ...]  # of the path
    kind: tuple[Any, ...]  # what is alike in leaves that are alike
    elements: int
    bytes: int
    trainable: bool


def _weighed(tree: Tree, trainable: Where | None) -> list[_Leaf]:
    pairs = items(tree)
    names = [tuple(path.split("/")) if path else () for path, _ in pairs]
    tops = {path[0] for path in names if path}
    if trainable is None:
        trainable = f"{_PARAMS}/**" if _PARAMS in tops and len(tops) > 1 and (_PARAMS,) not in names else "**"
    chosen = leaves(mask(trainable, tree)) if pairs else []
    # params first, for what is tied to them to count there
    order = sorted(range(len(pairs)), key=lambda i: names[i][:1] != (_PARAMS,))
    seen, found = set[int](), []
    for i in order:
        leaf = pairs[i][1]
        if not isinstance(leaf, Tensor):
            found.append(_Leaf(names[i], (type(leaf).__name__,), 0, 0, False))
            continue
        fits = chosen[i] and (leaf.is_floating_point() or leaf.is_complex())
        count = 0 if id(leaf) in seen else leaf.numel()
        seen.add(id(leaf))
        dtype = str(leaf.dtype).removeprefix("torch.")
        found.append(_Leaf(names[i], (dtype, tuple(leaf.shape), fits), count, count * leaf.element_size(), fits))
    return found


def _parts(above: str, found: list[_Leaf], depth: int) -> list[tuple[str, list[_Leaf]]]:
    """Cut a tree into its parts; `found` are the leaves below the path `above`, by what their paths go on with."""
    groups: dict[str, list[_Leaf]] = {}
    for leaf in found:
        groups.setdefault(leaf.names[0] if leaf.names else "", []).append(leaf._replace(names=leaf.names[1:]))
    made = []
    for name, part in _folded(groups):
        path = f"{above}/{name}" if above else name
        if depth == 1 or any(not leaf.names for leaf in part):
            made.append((path, part))
        else:
            made += _parts(path, part, depth - 1)
    return made


def _folded(groups: dict[str, list[_Leaf]]) -> list[tuple[str, list[_Leaf]]]:
    """Join neighbours whose names are numbers in a row and whose leaves are alike."""
    made: list[tuple[list[str], list[_Leaf], Any]] = []
    for name, part in groups.items():
        like = [(leaf.names, leaf.kind) for leaf in part]
        names, joined, like_before = made[-1] if made else ([], [], None)
        if like == like_before and name.isdecimal() and names[-1].isdecimal() and int(name) == int(names[-1]) + 1:
            names.append(name)
            joined += part
        else:
            made.append(([name], list(part), like))
    return [(names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}", part) for names, part, _ in made]


def _row(path: str, part: list[_Leaf]) -> tuple[str, str, str, str, str]:
    elements, dtypes = sum(leaf.elements for leaf in part), sorted({leaf.kind[0] for leaf in part})
    said = ", ".join(dtypes[:2]) + (f", +{len(dtypes) - 2}" if len(dtypes) > 2 else "")
    moving = sum(leaf.elements for leaf in part if leaf.trainable)
    if moving in (0, elements):
        share = "yes" if any(leaf.trainable for leaf in part) else "no"
    else:
        share = f"{min(max(round(100 * moving / elements), 1), 99)} %"
    return path, f"{elements:,}", _size(sum(leaf.bytes for leaf in part)), said, share


def _size(count: int) -> str:
    """Write bytes in three digits or more: 12 B, 3.07 kB, 498 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000.0, larger
    return f"{count} B" if unit == "B" else f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _table(rows: list[tuple[str, str, str, str, str]]) -> str:
    _, *columns = zip(_HEADER, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    most = max(_WIDTH - sum(widths) - 2 * len(widths), len("total of params"))
    paths = [_shortened(row[0], most) for row in rows]
    width = max(map(len, [_HEADER[0], *paths]))
    lines = []
    for path, (_, elements, size, dtype, share) in zip([_HEADER[0], *paths], [_HEADER, *rows], strict=True):
        cells = [path.ljust(width), elements.rjust(widths[0]), size.rjust(widths[1]), dtype.ljust(widths[2]), share]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _shortened(path: str, most: int) -> str:
    """Leave out the middle of a long path: how it begins says where, how it ends says what."""
    begin = (most - 3) // 2
    return path if len(path) <= most else f"{path[:begin]}...{path[len(path) - (most - 3 - begin) :]}"
