"""Trees and the flat state dicts of `torch.nn.Module`: another name, another layout, the same numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

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
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    transposed: Sequence[str] = ()

    def of(self, path: str) -> str:
        """Return the module's name for a path.

        >>> Names(modules={"blocks/*/up": "h.*.fc"}).of("blocks/3/up/bias")
        'h.3.fc.bias'
        """
        parts = path.split("/")
        for count in range(len(parts), 0, -1):
            for ours, theirs in self.modules.items():
                pattern = ours.split("/")
                if len(pattern) == count and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
                    stars = [part for p, part in zip(pattern, parts, strict=False) if p == "*"]
                    return ".".join([theirs.replace("*", "{}").format(*stars), *parts[count:]])
        return ".".join(parts)


def to_state_dict(params: Tree, names: Names | None = None) -> dict[str, Tensor]:
    """Return the leaves of a tree under a module's names, for `module.load_state_dict` or a safetensors file.

    Equals the tree again under `from_state_dict`. Leaves are the same tensors, transposed ones views of them.
    Raises: ValueError for two paths with one name, TypeError for a leaf that is no tensor, PathError for a pattern that
    fits no path.

    >>> params = {"fc": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}}
    >>> state = ft.models.to_state_dict(params, ft.models.Names(modules={"fc": "linear"}, transposed=["fc/weight"]))
    >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
    {'linear.bias': (2,), 'linear.weight': (2, 3)}
    """
    names = names or Names()
    found: dict[str, Tensor] = {}
    for path, leaf, turned in _leaves(params, names):
        name = names.of(path)
        if name in found:
            raise ValueError(f"to_state_dict: {path}: expected a name of its own, came {name!r} again; rename a key")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"to_state_dict: {path}: expected a tensor, came {leaf!r}; leave it out of the tree")
        found[name] = leaf.mT if turned else leaf
    return found


def from_state_dict(
    state: Mapping[str, Any], *, like: Tree = None, names: Names | None = None, where: str = "from_state_dict"
) -> Tree:
    """Return the tree of a module's state dict: nested dicts by the parts of its names, or the containers of `like`.

    With `like`, whose leaves may be on the meta device, names and shapes must be its own; dtypes and devices are those
    of the state. What torch.compile and DataParallel put into names, `_orig_mod.` and `module.`, is passed over. Leaves
    are the state's own tensors, transposed ones copies; `Parameter`s become plain tensors.
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
    rows = [(names.of(path), path, leaf.shape, turned) for path, leaf, turned in _leaves(like, names)]
    state = _unwrapped(state, {name for name, *_ in rows})
    _check(state, rows, where)
    return tree.unflatten(tree.structure(like), [_plain(state[name], turned) for name, _, _, turned in rows])


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


def _plain(value: Tensor, turned: bool) -> Tensor:
    # contiguous: the order of dimensions in memory decides which kernel runs, and with it the last bits
    return value.detach().mT.contiguous() if turned else value.detach()


def _check(state: Mapping[str, Tensor], rows: list[tuple[str, str, torch.Size, bool]], where: str) -> None:
    wanted = {name: torch.Size([*shape[:-2], shape[-1], shape[-2]]) if turn else shape for name, _, shape, turn in rows}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name!r} ({path} here): expected {tuple(wanted[name])}, came {tuple(state[name].shape)}"
        for name, path, _, _ in rows
        if name in state and state[name].shape != wanted[name]
    ]
    details = [
        f"  missing ({len(missing)}): {listed(missing, extra)}" if missing else "",
        f"  extra ({len(extra)}): {listed(extra, missing)}" if extra else "",
        *[f"  shape of {row}" for row in shapes[:8]],
        f"  and {len(shapes) - 8} more shapes" if len(shapes) > 8 else "",
    ]
    count = len(missing) + len(extra) + len(shapes)
    if count:
        raise MismatchError(
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
