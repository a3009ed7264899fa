"""Leaves that stay split in a loss, along a tensor axis, and the layers that compute with their parts.

A linear layer whose columns are split makes its own columns of the result; one whose rows are split takes them, and
what the ranks make is added. With a stream, tokens are split between them: each rank has its own tokens of what the
layers add to, all tokens are gathered where columns begin, and scattered where rows end.

B batch, T tokens, I inputs, O outputs, D width, V vocabulary, N rows, R ranks along the axis.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain import tree
from functrain.sharding import collectives
from functrain.sharding.mesh import current, tensor_axis
from functrain.sharding.placement import Dims, Where, split_axes

_here = threading.local()


@tree.dataclass(static=("dims", "where"))
class Split:
    """A leaf of which this rank has a part, and computes with it."""

    part: Tensor
    dims: Dims
    where: Where

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {self.why()}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = _first((args, kwargs or {}))
        # no TypeError, in whose place an operator of Python's would raise its own
        raise RuntimeError(f"{getattr(function, '__name__', function)}: {found.why()}")

    def why(self) -> str:
        return (
            f"sharding: {self.where.path} stays split along {', '.join(split_axes(self.dims))}, which is known to "
            "ft.nn.linear, ft.nn.embedding and ft.losses.next_token_from_hidden alone; split it by another axis, by "
            "which it is gathered"
        )

    @property
    def dim(self) -> int:
        """The dimension that is split."""
        (found,) = (d for d, axes in enumerate(self.dims) if axes)
        return found

    @property
    def axis(self) -> str:
        (found,) = split_axes(self.dims)
        return found


def _first(node: Any) -> Split:
    if isinstance(node, Split):
        return node
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    found = [split for value in values if (split := _first(value)) is not None]
    return found[0] if found else None  # type: ignore[return-value]


def linear(x: Tensor, weight: Split, bias: Tensor | Split | None) -> Tensor:
    """Return x @ weight + bias, of which a rank has its columns, or which is added over ranks.

    Shapes: weight (I, O) split along O: (B, T, I) -> (B, T, O / R); along I: (B, T, I / R) -> (B, T, O).
    """
    if weight.dim == 1:
        y = entered(x, weight.axis) @ weight.part
        if bias is None:
            return y
        if not isinstance(bias, Split) or bias.axis != weight.axis:
            raise ValueError(
                f"sharding: {weight.where.path}: expected a bias that {weight.axis} splits as the columns of its "
                "weight, came a whole one; split it alike"
            )
        return y + bias.part
    if isinstance(bias, Split):
        raise ValueError(
            f"sharding: {bias.where.path}: expected a whole bias of a weight whose rows are split, since what ranks "
            f"make is added, came one that {bias.axis} splits; leave it out of the rules"
        )
    if x.shape[-1] != weight.part.shape[0]:
        raise ValueError(
            f"sharding: {weight.where.path}: expected the {weight.part.shape[0]} columns that this rank has of its "
            f"input, came {x.shape[-1]}; split the columns of the layer before it by {weight.axis} too"
        )
    y = left(x @ weight.part, weight.axis)
    return y if bias is None else y + bias


def embedding(tokens: Tensor, weight: Split) -> Tensor:
    """Return the rows of weight (V, D) that the tokens (...) name, (..., D), whichever rank has them."""
    if weight.dim == 1:
        return collectives.gather(F.embedding(tokens, weight.part), weight.axis, tokens.dim())
    place, inside = _own(tokens, weight)
    rows = torch.where(inside[..., None], F.embedding(place, weight.part), 0.0)
    return collectives.sum(rows, weight.axis)


def cross_entropies(hidden: Tensor, weight: Split, targets: Tensor) -> Tensor:
    """Return -log softmax(hidden @ weight.T) at the targets, (N,), of logits that are split between the ranks.

    Shapes: hidden (N, D), weight (V, D) split along V, targets (N,).
    """
    if weight.dim != 0:
        raise ValueError(
            f"sharding: {weight.where.path}: expected rows of the vocabulary to be split, came columns; write "
            f"P({weight.axis!r}, None)"
        )
    logits = hidden @ weight.part.mT  # (N, V / R)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    place, inside = _own(targets, weight)
    picked = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), 0.0)
    parts = collectives.gather(torch.logsumexp(logits, 1)[None], weight.axis)  # (R, N)
    return torch.logsumexp(parts, 0) - collectives.sum(picked, weight.axis)


def _own(tokens: Tensor, weight: Split) -> tuple[Tensor, Tensor]:
    """Return where in this rank's rows a token is, and whether it is there."""
    count = len(weight.part)
    place = tokens - collectives.index(weight.axis, tokens) * count
    inside = (place >= 0) & (place < count)
    return torch.where(inside, place, 0), inside


@contextmanager
def streaming(axis: str | None) -> Iterator[None]:
    """Let `stack` split tokens along the axis."""
    before = getattr(_here, "axis", None)
    _here.axis = axis
    try:
        yield
    finally:
        _here.axis = before


def stream_axis() -> str | None:
    """Return the axis along which `stack` splits tokens."""
    axis: str | None = getattr(_here, "axis", None)
    return axis


def begun(x: Any, axis: str) -> Any:
    """Return this rank's tokens of x (B, T, D), the first leaf of a tree.

    Raises: ValueError for tokens that do not divide.
    """
    first, *rest = tree.leaves(x)
    count = current().size(axis)
    if first.dim() != 3 or first.shape[1] % count:
        raise ValueError(
            f"sharding: stream: expected x (B, T, D) of nn.stack with tokens that divide by {count}, the ranks along "
            f"{axis}, came {tuple(first.shape)}; choose another length, or no stream"
        )
    return tree.unflatten(tree.structure(x), [own(first, axis, 1), *rest])


def ended(x: Any, axis: str) -> Any:
    """Return x with all tokens."""
    first, *rest = tree.leaves(x)
    return tree.unflatten(tree.structure(x), [collectives.gather(first, axis, 1), *rest])


def within(block: Callable[..., Any], axis: str) -> Callable[..., Any]:
    """Return the block of a stack whose x has this rank's tokens."""

    def run(layer: Any, x: Any, *args: Any) -> Any:
        before = getattr(_here, "tokens", None)
        first = tree.leaves(x)[0]
        _here.tokens = axis, first.shape[1]
        try:
            return block(layer, x, *args)
        finally:
            _here.tokens = before

    return run


def own(x: Tensor, axis: str, dim: int) -> Tensor:
    """Return this rank's part of what all ranks have. No program contains which."""
    if current().size(axis) == 1:
        return x
    parts = x.unflatten(dim, (current().size(axis), -1))
    return parts.index_select(dim, collectives.index(axis, x)[None]).squeeze(dim)


def entered(x: Tensor, axis: str) -> Tensor:
    """Return all tokens of x (B, T, D), where a stream has this rank's."""
    return collectives.gather(x, axis, 1) if is_own(x) else x


def left(y: Tensor, axis: str) -> Tensor:
    """Add y over ranks; of a stream each gets its tokens."""
    tokens = getattr(_here, "tokens", None)
    return collectives.sum(y, axis) if tokens is None else collectives.scatter(y, axis, 1)


def is_own(x: Tensor) -> bool:
    """Tell whether x (B, T, D) has this rank's tokens alone."""
    tokens = getattr(_here, "tokens", None)
    return tokens is not None and x.dim() == 3 and x.shape[1] == tokens[1]


def check_all(tokens: int) -> None:
    """Raise a RuntimeError where attention sees the tokens of this rank alone."""
    here = getattr(_here, "tokens", None)
    if here is not None and here[1] == tokens:
        raise RuntimeError(
            f"sharding: stream: expected attention to see all tokens, came the {tokens} of this rank; split its "
            f"queries, keys and values by rules with {here[0]!r}, as ft.models.gpt2.sharding does, or leave out stream"
        )


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], of: tuple[int, int] | None = None) -> Tensor:
    """Draw for a tensor, of whose whole this rank may have a part: its tokens of a stream, or of a dimension `of` a
    size, (dimension, size).

    The numbers are those of the whole, of which each rank takes its own.
    """
    tokens = getattr(_here, "tokens", None)
    if of is not None and shape[of[0]] != of[1]:
        axis, dim = _axis_of(shape[of[0]], of[1]), of[0]
    elif tokens is not None and len(shape) == 3 and shape[1] == tokens[1]:
        axis, dim = tokens[0], 1
    else:
        return draw(tuple(shape))
    whole = list(shape)
    whole[dim] *= current().size(axis)
    return own(draw(tuple(whole)), axis, dim)


def _axis_of(here: int, whole: int) -> str:
    axis = tensor_axis()
    if axis is None or here * current().size(axis) != whole:
        raise ValueError(f"dropout: expected {whole} there, or the part that a rank of a tensor axis has, came {here}")
    return axis
