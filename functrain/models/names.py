"""Trees and the flat state dicts of `torch.nn.Module`: another name, another layout, the same numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.checkpoint import MismatchError
from functrain.tree import Tree
from functrain.tree.hints import listed


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a module names and lays out the leaves of a tree.

    `modules` gives the module's name for the beginning of a path; the rest of the path follows, joined by dots. `*`
    stands for one part, such as the number of a layer. A path that begins with none of them has its own name with dots:
    the empty `modules` fits a tree that has a module's own names. `transposed` are the paths, or patterns of paths, of
    the matrices that the module keeps (out, in), as `torch.nn.Linear` does.

    A leaf may be several tensors of the module. `#` in a name counts the first dimension of the leaf: experts (E, D, F)
    of "experts.#.up" are E tensors (D, F). `joined` gives, as `modules` does, the names that lie side by side in the
    last dimension of a leaf, each with its share: `{"attn/qkv": {"q_proj": 4, "k_proj": 1, "v_proj": 1}}`.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    transposed: Sequence[str] = ()
    joined: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def of(self, path: str) -> str:
        """Return the module's name for a path, of a joined one the first.

        >>> Names(modules={"blocks/*/up": "h.*.fc"}).of("blocks/3/up/bias")
        'h.3.fc.bias'
        """
        return next(iter(self.shares(path)))

    def shares(self, path: str) -> dict[str, int]:
        """Return the module's names for a path, and what each has of the last dimension beside the others.

        >>> Names(joined={"*/kv": {"h.*.k": 1, "h.*.v": 1}}).shares("3/kv/bias")
        {'h.3.k.bias': 1, 'h.3.v.bias': 1}
        """
        parts = path.split("/")
        alone = {ours: {theirs: 1} for ours, theirs in self.modules.items()}
        for count in range(len(parts), 0, -1):
            for ours, theirs in {**alone, **self.joined}.items():
                pattern = ours.split("/")
                if len(pattern) == count and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
                    stars = [part for p, part in zip(pattern, parts, strict=False) if p == "*"]
                    filled = {name.replace("*", "{}").format(*stars): share for name, share in theirs.items()}
                    return {".".join([name, *parts[count:]]): share for name, share in filled.items()}
        return {".".join(parts): 1}


def to_state_dict(params: Tree, names: Names | None = None) -> dict[str, Tensor]:
    """Return the leaves of a tree under a module's names, for `module.load_state_dict` or a safetensors file.

    Equals the tree again under `from_state_dict`. Leaves are the same tensors, transposed ones and parts views of them.
    Raises: ValueError for two paths with one name or a dimension that the shares do not divide, TypeError for a leaf
    that is no tensor, PathError for a pattern that fits no path.

    >>> params = {"fc": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}}
    >>> state = ft.models.to_state_dict(params, ft.models.Names(modules={"fc": "linear"}, transposed=["fc/weight"]))
    >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
    {'linear.bias': (2,), 'linear.weight': (2, 3)}
    """
    names = names or Names()
    found: dict[str, Tensor] = {}
    for path, leaf, turned in _leaves(params, names):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"to_state_dict: {path}: expected a tensor, came {leaf!r}; leave it out of the tree")
        for piece in _pieces(names, path, leaf.shape):
            if piece.name in found:
                name = piece.name
                raise ValueError(
                    f"to_state_dict: {path}: expected a name of its own, came {name!r} again; rename a key"
                )
            part = leaf if piece.row is None else leaf[piece.row]
            part = part if piece.width is None else part.narrow(-1, piece.start, piece.width)
            found[piece.name] = part.mT if turned else part
    return found


def from_state_dict(
    state: Mapping[str, Any], *, like: Tree = None, names: Names | None = None, where: str = "from_state_dict"
) -> Tree:
    """Return the tree of a module's state dict: nested dicts by the parts of its names, or the containers of `like`.

    With `like`, whose leaves may be on the meta device, names and shapes must be its own; dtypes and devices are those
    of the state. What torch.compile and DataParallel put into names, `_orig_mod.` and `module.`, is passed over. Leaves
    are the state's own tensors, transposed and joined ones copies; `Parameter`s become plain tensors.
    Raises: MismatchError with all missing, extra and misshapen names at once; TypeError for an entry that is no tensor.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    >>> params = ft.models.from_state_dict(net.state_dict())
    >>> [(path, tuple(leaf.shape)) for path, leaf in ft.tree.items(params)]
    [('0/bias', (2,)), ('0/weight', (2, 3))]
    """
    names = names or Names()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            came = f"{type(value).__name__} {value!r:.40}"
            raise TypeError(f"{where}: {name!r}: expected a tensor, came {came}; leave it out of the state dict")
    if like is None:
        if names != Names():
            raise ValueError(f"{where}: expected like= beside names=, came None; pass a tree such as init makes")
        return _nested(state, where)
    check_counts(like, names, len(state), where)
    rows = [_Row(path, turned, _pieces(names, path, leaf.shape)) for path, leaf, turned in _leaves(like, names)]
    state = _unwrapped(state, {piece.name for row in rows for piece in row.pieces})
    _check(state, rows, where)
    return tree.unflatten(tree.structure(like), [_leaf(state, row, where) for row in rows])


def check_counts(like: Tree, names: Names, count: int, where: str) -> None:
    """Refuse a leaf of more tensors than `count`, before so many names are made: a wrong number must not take all
    memory."""
    for path, leaf in tree.items(like):
        name = names.of(path)
        if "#" in name and leaf.shape[0] > count:
            raise _mismatch(where, [f"  missing ({leaf.shape[0]}): {name!r} from 0 on"], leaf.shape[0])


def _unwrapped(state: Mapping[str, Tensor], wanted: Set[str]) -> Mapping[str, Tensor]:
    """Return the state with the names that it has inside of torch's wrappers, where that makes them those wanted."""
    found = state
    for pattern in (r"\b_orig_mod\.", r"^module\.", r"^module\.|\b_orig_mod\.", r"\b(_orig_mod|module)\."):
        bare = {re.sub(pattern, "", name): value for name, value in state.items()}
        if len(bare) == len(state) and len(bare.keys() & wanted) > len(found.keys() & wanted):
            found = bare
    return found


def _leaves(tree_: Tree, names: Names) -> list[tuple[str, Any, bool]]:
    pairs = tree.items(tree_)
    turned = tree.leaves(tree.mask(names.transposed, tree_)) if pairs else []
    return [(path, leaf, turn) for (path, leaf), turn in zip(pairs, turned, strict=True)]


class _Piece(NamedTuple):
    """A tensor of the module, and where it lies in a leaf."""

    name: str
    shape: torch.Size  # as in the leaf, before it is transposed
    row: int | None  # of the leaf's first dimension
    start: int
    width: int | None  # of the leaf's last dimension, all of it where None


class _Row(NamedTuple):
    path: str
    turned: bool
    pieces: list[_Piece]  # row by row


def _pieces(names: Names, path: str, shape: torch.Size) -> list[_Piece]:
    shares = names.shares(path)
    stacked, total = "#" in next(iter(shares)), sum(shares.values())
    last = shape[-1] if len(shape) > stacked else 1
    if len(shape) < stacked + (len(shares) > 1) or last % total:
        expected = f"a last dimension that divides into {total} parts, for {', '.join(shares)}"
        raise ValueError(f"{path}: expected {expected}, came {tuple(shape)}; mend the names or the tree")
    found = []
    for row in range(shape[0]) if stacked else [None]:
        start = 0
        for name, share in shares.items():
            width = None if len(shares) == 1 else last // total * share
            own = shape[1:] if stacked else shape
            own = own if width is None else torch.Size([*own[:-1], width])
            found.append(_Piece(name.replace("#", str(row)), own, row, start, width))
            start += width or 0
    return found


def _leaf(state: Mapping[str, Tensor], row: _Row, where: str) -> Tensor:
    tensors = [state[piece.name] for piece in row.pieces]
    if len(tensors) == 1 and row.pieces[0].row is None:
        return _plain(tensors[0], row.turned)
    for piece, tensor in zip(row.pieces, tensors, strict=True):
        if tensor.dtype != tensors[0].dtype:  # torch.cat would take them all to the wider one in silence
            first, way_out = row.pieces[0].name, "cast the tensors to one dtype first"
            expected, came = f"{tensors[0].dtype} as of {first!r}, with which it is one leaf", f"{tensor.dtype}"
            raise MismatchError(where, path=piece.name, expected=expected, came=came, way_out=way_out)
    rows: dict[int | None, list[Tensor]] = {}
    for piece, tensor in zip(row.pieces, tensors, strict=True):
        rows.setdefault(piece.row, []).append(tensor.detach().mT if row.turned else tensor.detach())
    joined = [parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in rows.values()]
    return torch.stack(joined) if row.pieces[0].row is not None else joined[0]


def _plain(value: Tensor, turned: bool) -> Tensor:
    # contiguous: the order of dimensions in memory decides which kernel runs, and with it the last bits
    return value.detach().mT.contiguous() if turned else value.detach()


def _check(state: Mapping[str, Tensor], rows: list[_Row], where: str) -> None:
    wanted = {}
    for path, turned, pieces in rows:
        for name, shape, *_ in pieces:
            wanted[name] = path, torch.Size([*shape[:-2], shape[-1], shape[-2]]) if turned else shape
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name!r} ({path} here): expected {tuple(shape)}, came {tuple(state[name].shape)}"
        for name, (path, shape) in wanted.items()
        if name in state and state[name].shape != shape
    ]
    details = [
        f"  missing ({len(missing)}): {listed(missing, extra)}" if missing else "",
        f"  extra ({len(extra)}): {listed(extra, missing)}" if extra else "",
        *[f"  shape of {row}" for row in shapes[:8]],
        f"  and {len(shapes) - 8} more shapes" if len(shapes) > 8 else "",
    ]
    count = len(missing) + len(extra) + len(shapes)
    if count:
        raise _mismatch(where, details, count)


def _mismatch(where: str, details: list[str], count: int) -> MismatchError:
    return MismatchError(
        where,
        expected="the names and shapes of the model",
        came=f"{count} difference{'s' * (count > 1)}",
        way_out="use the config that belongs to these tensors, or leave out what is extra",
        details="\n".join(line for line in details if line),
    )


def _nested(state: Mapping[str, Tensor], where: str) -> Tree:
    top: dict[str, Any] = {}
    for name, value in state.items():
        *above, last = name.split(".")
        place: Any = top
        for part in above:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise ValueError(f"{where}: {name!r}: expected no tensor above another's name, came one; pass like=")
        if "" in name.split(".") or "/" in name:
            raise ValueError(f"{where}: expected names of parts joined by dots, came {name!r}; rename it")
        place[last] = _plain(value, False)
    return top
