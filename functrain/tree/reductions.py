"""All elements of a tree as one number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from functrain.tree.by_kind import once_a_kind
from functrain.tree.flattening import leaves
from functrain.tree.mapping import each
from functrain.tree.nodes import Tree
from functrain.tree.reusing import over


def sum(tree: Tree) -> Tensor:
    """Return the sum of all elements, a () tensor: at least float32, of integers int64; 0.0 for an empty tree.

    >>> ft.tree.sum({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    tensor(6.)
    """
    return joined(each(once_a_kind(_sum), [leaves(tree)], tree), torch.sum, 0.0)


def max(tree: Tree) -> Tensor:
    """Return the largest element, a () tensor; -inf for a tree without elements.

    >>> ft.tree.max({"w": torch.tensor([1.0, 5.0]), "b": torch.tensor(3.0)})
    tensor(5.)
    """
    return joined(_of_filled(torch.amax, tree), torch.amax, -torch.inf)


def min(tree: Tree) -> Tensor:
    """Return the smallest element, a () tensor; inf for a tree without elements.

    >>> ft.tree.min({"w": torch.tensor([1.0, 5.0]), "b": torch.tensor(3.0)})
    tensor(1.)
    """
    return joined(_of_filled(torch.amin, tree), torch.amin, torch.inf)


def norm(tree: Tree, ord: int | float | str | None = None, squared: bool = False) -> Tensor:
    """Return a norm of all elements together, a () tensor, at least float32: Euclidean, or of the order given.

    Orders are None or 2, 1 for the sum of absolute values, and `math.inf` or "inf" for the largest.
    At zero the Euclidean norm's derivative is zero, as that of `torch.linalg.norm`. Squares that overflow or underflow
    do not count as infinite or 0: [1e20, 1] in float32 has the norm 1e20. `squared` returns the square.

    Raises: ValueError for another order.

    >>> grads = {"w": torch.tensor([3.0]), "b": torch.tensor([-4.0])}
    >>> ft.tree.norm(grads), ft.tree.norm(grads, 1), ft.tree.norm(grads, "inf")
    (tensor(5.), tensor(7.), tensor(4.))
    """
    if ord is None or ord == 2:
        found = each(once_a_kind(wide), [leaves(tree)], tree)
        dtype = working_dtype(found)
        squares = once_a_kind(lambda leaf: scaled_squares(leaf, torch.sum, dtype))
        pairs = [squares(leaf) for leaf in found]
        low, high = (joined([pair[i] for pair in pairs], torch.sum, 0.0) for i in (0, 1))
        return of_squares(low, high, squared=squared)
    if ord == 1:
        size = joined(each(once_a_kind(lambda x: torch.sum(torch.abs(wide(x)))), [leaves(tree)], tree), torch.sum, 0.0)
    elif ord in (math.inf, "inf", "infinity"):
        size = joined(_of_filled(lambda x: torch.amax(torch.abs(wide(x))), tree), torch.amax, 0.0)
    else:
        raise ValueError(f"norm: expected the order None, 1, 2 or inf, came {ord!r}")
    return size * size if squared else size


def joined(terms: list[Tensor], join: Callable[[Tensor], Tensor], nothing: float) -> Tensor:
    """Return `join` of () tensors, in the dtype that all of them go into; `nothing` where there are none."""
    return join(torch.stack(terms)) if terms else torch.full((), nothing)  # stack promotes to the widest dtype


def root(square: Tensor) -> Tensor:
    """Return the square root, whose derivative is zero at zero."""
    # the derivative is infinite there, and infinity times the zero that comes back from an unused norm is NaN
    zero = square == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, square)))


def finite(tree: Tree) -> Tensor:
    """Tell whether every number in a tree is finite, as a () bool tensor that the host does not read."""
    # one stack of sums: compiled, a leaf costs no kernel of its own
    count = once_a_kind(lambda leaf: torch.sum(~torch.isfinite(leaf)))
    return _none([count(leaf) for leaf in leaves(tree)])


def stays_finite(old: Tree, new: Tree) -> Tensor:
    """Tell whether every finite number has stayed one, as a () bool tensor that the host does not read.

    What is infinite from the start, as the best loss of a plateau or the bias of a mask, may stay so.
    """
    pairs = zip(leaves(old), leaves(new), strict=True)
    changed = [(a, b) for a, b in pairs if a is not b and (b.is_floating_point() or b.is_complex())]
    count = once_a_kind(lambda a, b: torch.sum(torch.isfinite(a) & ~torch.isfinite(b)))
    return _none([count(a, b) for a, b in changed])


def _none(counts: list[Tensor]) -> Tensor:
    return torch.stack(counts).sum() == 0 if counts else torch.ones((), dtype=torch.bool)


# Numbers are squared twice, times each of two powers of 2, which rounds nothing. The first sum holds norms of 1e-30 to
# 1e5 in float32 (1e-230 to 1e57 in float64), the second those from there to the largest of the dtype.
_SCALES = {torch.float32: (2.0**46, 2.0**-65), torch.float64: (2.0**320, 2.0**-530)}


def length(x: Tensor, reduce: Callable[[Tensor], Tensor] = torch.sum) -> Tensor:
    """Return the square root of `reduce` of the squares |x|**2: of `torch.sum`, `torch.mean`, or along dimensions.

    It is at least float32, real where x is complex; its derivative at zero is zero. No square overflows.
    """
    return of_squares(*scaled_squares(x, reduce))


def scaled_squares(
    x: Tensor, reduce: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return `reduce` of the squares of x times either scale of the (real) dtype; sums of several tensors may be added.

    `of_squares` makes one number of the two.
    """
    x = wide(x)
    parts = [part.to(dtype or part.dtype) for part in ((x.real, x.imag) if x.is_complex() else (x,))]

    def squares(scale: float) -> Tensor:
        scaled = [part * scale for part in parts]
        total = over(scaled[0], torch.mul, scaled[0], scaled[0])
        return reduce(total + scaled[1] * scaled[1] if len(scaled) > 1 else total)

    low, high = _SCALES[parts[0].dtype]
    return squares(low), squares(high)


def of_squares(low: Tensor, high: Tensor, *, squared: bool = False) -> Tensor:
    """Return the norm whose squares, times either scale, are given; or its square."""
    scale, scale_high = _SCALES[low.dtype]
    fits = torch.isfinite(low)
    if squared:
        return torch.where(fits, low / scale / scale, high / scale_high / scale_high)
    # each root sees 1 where the other one counts, so that its derivative is a number
    of_low, of_high = root(torch.where(fits, low, 1.0)), root(torch.where(fits, 1.0, high))
    return torch.where(fits, of_low / scale, of_high / scale_high)


def working_dtype(tree: Tree) -> torch.dtype:
    """Return float64 when a leaf is that wide, else float32: what a number shared by all leaves is computed in.

    >>> working_dtype({"w": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)})
    torch.float32
    """
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(leaf.dtype in double for leaf in leaves(tree)) else torch.float32


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real part, the dtype itself where it is real; torch.compile traces no `to_real`."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def wide(leaf: Tensor) -> Tensor:
    """Return a leaf as a floating-point or complex tensor of at least 32 bits a number.

    A bfloat16 sum of a million squares stops growing at about 256 times a term, and int8 wraps at 12 * 12.
    """
    if not isinstance(leaf, Tensor):
        raise TypeError(f"expected a tensor, came {leaf!r}; take it out with tree.partition")
    if leaf.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return leaf
    return leaf.to(torch.complex64) if leaf.is_complex() else leaf.float()


def _sum(leaf: Tensor) -> Tensor:
    integer = isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex()
    return torch.sum(leaf if integer else wide(leaf))


def _of_filled(fn: Callable[[Tensor], Tensor], tree: Tree) -> list[Tensor]:
    found = each(once_a_kind(lambda leaf: fn(leaf) if leaf.numel() else None), [leaves(tree)], tree)
    return [term for term in found if term is not None]
