"""Where two trees differ, and by how much."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.tree import Tree


class Difference(NamedTuple):
    path: str  # of the leaf
    text: str  # what is there and what was expected


def different_bits(actual: Tree, expected: Tree) -> list[Difference]:
    """Return the leaves whose shape, dtype, device or bits differ; NaN equals NaN of the same bits.

    Raises: ValueError naming the paths when the structures differ.
    """
    return _compare(actual, expected, None)


def far_apart(actual: Tree, expected: Tree, *, rtol: float, atol: float) -> list[Difference]:
    """Return the leaves whose shape, dtype or device differ, or an element by more than `atol + rtol * |expected|`;
    NaN is close to NaN. Leaves that are no floating-point or complex numbers must be equal.

    Raises: ValueError naming the paths when the structures differ.
    """
    return _compare(actual, expected, (rtol, atol))


def kind(leaf: Any) -> str:
    """Describe what of a leaf is no value: `float32 (2, 3)`."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    device = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{device}"


def _compare(actual: Tree, expected: Tree, tolerance: tuple[float, float] | None) -> list[Difference]:
    tree.check_same_structure(expected, actual, what="the expected tree and the one that came")
    found = []
    for (path, want), came in zip(tree.items(expected), tree.leaves(actual), strict=True):
        text = _difference(came, want, tolerance)
        if text is not None:
            found.append(Difference(path, text))
    return found


def _difference(came: Any, want: Any, tolerance: tuple[float, float] | None) -> str | None:
    if kind(came) != kind(want):
        return f"expected {kind(want)}, came {kind(came)}"
    if not isinstance(want, Tensor):
        return None if came == want or came is want else f"expected {want!r}, came {came!r}"
    came, want = came.detach(), want.detach()
    if tolerance is None or not (want.is_floating_point() or want.is_complex()):
        wrong = (_bits(came) != _bits(want)).any(-1).reshape(want.shape)
    else:
        rtol, atol = tolerance
        wrong = ~torch.isclose(_wide(came), _wide(want), rtol=rtol, atol=atol, equal_nan=True)
    count = int(wrong.sum())
    return f"{count} of {want.numel()} elements, {_worst(came, want, wrong)}" if count else None


def _worst(came: Tensor, want: Tensor, wrong: Tensor) -> str:
    """Describe the wrong element that is furthest off, one that is not finite before others."""
    off = torch.where(wrong, torch.abs(_wide(came) - _wide(want)).nan_to_num(nan=torch.inf), -1.0)
    at = int(torch.argmax(off))
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
    where = f"at {index}: " if want.dim() else ""
    by = float(off.flatten()[at])
    how = f" (off by {by:.3g})" if 0 < by < float("inf") else ""
    return f"the furthest off {where}expected {want.flatten()[at].item()!r}, came {came.flatten()[at].item()!r}{how}"


def _wide(leaf: Tensor) -> Tensor:
    return leaf.to(torch.complex128 if leaf.is_complex() else torch.float64)


def _bits(leaf: Tensor) -> Tensor:
    """Return the bytes of each element, (elements, bytes)."""
    # resolved: a conjugate or negative view has other bytes in memory than it stands for
    flat = leaf.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), -1) if flat.numel() else flat.new_empty(0, 1)
