"""Gradients of single examples, and what they say about the noise of a batch's gradient.

B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor

from functrain import random, tree
from functrain.compiler import engine
from functrain.losses import Loss
from functrain.transforms.gradient import value_and_grad, vmap
from functrain.tree import Tree

P = ParamSpec("P")
Params = TypeVar("Params")
Value = TypeVar("Value", bound=Tensor | Loss)
Aux = TypeVar("Aux")


@overload
def per_example_value_and_grad(
    fn: Callable[Concatenate[Params, P], Value], *, has_aux: Literal[False] = False, chunk_size: int | None = None
) -> Callable[Concatenate[Params, P], tuple[Value, Params]]: ...
@overload
def per_example_value_and_grad(
    fn: Callable[Concatenate[Params, P], tuple[Value, Aux]], *, has_aux: Literal[True], chunk_size: int | None = None
) -> Callable[Concatenate[Params, P], tuple[tuple[Value, Aux], Params]]: ...
def per_example_value_and_grad(
    fn: Callable[..., Any], *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """Make a function `(params, batch, key)` that returns fn's result and gradients for each example of the batch.

    Equals `value_and_grad(fn)(params, {leaf[i : i + 1]}, fold_in(key, i))` for each i, stacked: an example is a batch
    of one, so that the loss is the one that trains. Without a key `fn` is called as `fn(params, batch)`; a key that is
    None stays None.
    At most `chunk_size` examples are in flight, which bounds the activations; the numbers do not depend on it.

    Shapes: every batch leaf is (B, ...); every leaf of the result and of the gradients is (B, ...).
    Raises: ValueError naming a leaf whose first dimension is not B, for an empty batch, and for chunk_size < 1;
    TypeError for keywords, and naming a leaf of the result that is no tensor.

    >>> def loss_fn(params, batch):
    ...     return torch.mean((params["w"] - batch["x"]) ** 2)
    >>> params, batch = {"w": torch.tensor(1.0)}, {"x": torch.arange(3.0)}
    >>> ft.transforms.per_example_value_and_grad(loss_fn)(params, batch)
    (tensor([1., 0., 1.]), {'w': tensor([ 2.,  0., -2.])})
    """
    return _by_example(fn, has_aux, chunk_size)


@overload
def per_example_grad(
    fn: Callable[Concatenate[Params, P], Tensor | Loss],
    *,
    has_aux: Literal[False] = False,
    chunk_size: int | None = None,
) -> Callable[Concatenate[Params, P], Params]: ...
@overload
def per_example_grad(
    fn: Callable[Concatenate[Params, P], tuple[Tensor | Loss, Aux]],
    *,
    has_aux: Literal[True],
    chunk_size: int | None = None,
) -> Callable[Concatenate[Params, P], tuple[Params, Aux]]: ...
def per_example_grad(
    fn: Callable[..., Any], *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """Make a function `(params, batch, key)` that returns the gradient of fn for each example of the batch.

    With `has_aux`, `(gradients, aux)`. See `per_example_value_and_grad`.

    >>> def loss_fn(params, batch):
    ...     return torch.mean((params["w"] - batch["x"]) ** 2)
    >>> ft.per_example_grad(loss_fn)({"w": torch.tensor(1.0)}, {"x": torch.arange(3.0)})
    {'w': tensor([ 2.,  0., -2.])}
    """
    both = _by_example(fn, has_aux, chunk_size)

    @wraps(fn)
    def grad_of_examples(params: Any, batch: Any, *key: Any, **kwargs: Any) -> Any:
        result, grads = both(params, batch, *key, **kwargs)
        return (grads, result[1]) if has_aux else grads

    return grad_of_examples


def _by_example(fn: Callable[..., Any], has_aux: bool, chunk_size: int | None) -> Callable[..., Any]:
    of_examples = beside_examples(fn, has_aux, chunk_size)

    @wraps(fn)
    def alone(params: Any, batch: Any, *key: Any, **kwargs: Any) -> Any:
        _check_call(key, kwargs)
        return of_examples(params, (), batch, *key)

    return alone


def beside_examples(fn: Callable[..., Any], has_aux: bool, chunk_size: int | None) -> Callable[..., Any]:
    """Make `(params, beside, batch, key)` of `fn(params, *beside, batch, key)`: what `per_example_value_and_grad` does,
    where `beside` is neither differentiated nor sliced, such as frozen params."""
    run = _InPieces(_mapped(fn, has_aux))
    _check_chunk("per_example_grad", chunk_size)

    def of_examples(params: Any, beside: tuple[Any, ...], batch: Any, *key: Any) -> Any:
        return _joined(
            [run(params, beside, part, index, *key) for part, index in chunks("per_example_grad", batch, chunk_size)]
        )

    return of_examples


class GradientMoments(NamedTuple):
    """Sums over the examples of a batch, as `gradient_moments` returns them."""

    result: Any  # what fn returned, with has_aux a pair, summed over the examples
    grads: Tree  # like params: sum of the examples' gradients
    squared_norm: Tensor  # (): sum of the squared norms of the examples' gradients
    examples: int


def gradient_moments(
    fn: Callable[P, Any], *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[P, GradientMoments]:
    """Make a function `(params, batch, key)` that adds the gradients of single examples, and their squared norms.

    Equals sums of `per_example_value_and_grad`, of which only `chunk_size` gradients exist at a time.

    >>> def loss_fn(params, batch):
    ...     return torch.mean((params["w"] - batch["x"]) ** 2)
    >>> params, batch = {"w": torch.tensor(1.0)}, {"x": torch.arange(3.0)}
    >>> moments = ft.transforms.gradient_moments(loss_fn, chunk_size=2)(params, batch)
    >>> moments.grads, moments.squared_norm, moments.examples
    ({'w': tensor(0.)}, tensor(8.), 3)
    """
    of_examples = moments_beside(fn, has_aux, chunk_size)

    def moments(params: Any, batch: Any, *key: Any) -> GradientMoments:
        return of_examples(params, (), batch, *key)

    return wraps(fn)(cast(Callable[..., GradientMoments], moments))


def moments_beside(fn: Callable[..., Any], has_aux: bool, chunk_size: int | None) -> Callable[..., GradientMoments]:
    """Make `(params, beside, batch, key)` of `fn(params, *beside, batch, key)`: what `gradient_moments` does, where
    `beside` is neither differentiated nor sliced, such as frozen params."""
    mapped = _mapped(fn, has_aux)

    def sums(params: Any, beside: tuple[Any, ...], part: Any, index: Tensor, *key: Any) -> tuple[Any, Tree, Tensor]:
        result, grads = mapped(params, beside, part, index, *key)
        total = tree.map(lambda leaf: torch.sum(leaf, 0), (result, grads))
        return total[0], total[1], tree.norm(grads) ** 2

    run = _InPieces(sums)
    _check_chunk("per_example_grad", chunk_size)

    def moments(params: Any, beside: tuple[Any, ...], batch: Any, *key: Any) -> GradientMoments:
        total: Any = None
        count = 0
        for part, index in chunks("per_example_grad", batch, chunk_size):
            found = run(params, beside, part, index, *key)
            total = found if total is None else tree.add(total, found)
            count += len(index)
        result, grads, squared_norm = total
        return GradientMoments(result, grads, squared_norm, count)

    return moments


class GradientNoise(NamedTuple):
    """How noisy a batch's gradient is, as `gradient_noise` estimates it."""

    variance: Tensor  # (): trace of the covariance of one example's gradient
    squared_norm: Tensor  # (): squared norm of the true gradient; an estimate without bias, so it may be negative
    scale: Tensor  # (): examples in a batch whose noise is as large as the gradient; inf where there is no gradient


def gradient_noise(small: Tensor, big: Tensor, small_size: int, big_size: int | Tensor) -> GradientNoise:
    """Estimate the gradient's variance and noise scale from squared norms of gradients of batches of two sizes.

    `small` is the mean squared norm of gradients over `small_size` examples (1: single examples), `big` that of the
    mean gradient over `big_size`; both estimates are without bias. The scale is a ratio: average variance and squared
    norm over steps before dividing them, one step's ratio is noisy.

    A () tensor `big_size` is not read; at `small_size` or below nothing can be told, and the estimates are NaN.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), equation 2.9 and appendix A.1.
    Raises: ValueError unless 1 <= small_size < big_size.

    >>> ft.transforms.gradient_noise(torch.tensor(5.0), torch.tensor(1.5), small_size=1, big_size=8)
    GradientNoise(variance=tensor(4.), squared_norm=tensor(1.), scale=tensor(4.))
    """
    if isinstance(big_size, Tensor):
        big_size = torch.where(big_size > small_size, big_size.to(big.dtype), torch.nan)
    elif not 1 <= small_size < big_size:
        raise ValueError(f"gradient_noise: expected 1 <= small_size < big_size, came {small_size} and {big_size}")
    variance = (small - big) / (1 / small_size - 1 / big_size)
    squared_norm = (big_size * big - small_size * small) / (big_size - small_size)
    scale = torch.where(squared_norm <= 0, torch.inf, variance / squared_norm)
    return GradientNoise(variance, squared_norm, scale)


class _InPieces:
    """A function that is traced apart where `ft.compile` cuts a step, once for all chunks."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        if engine.cuts_losses() and not engine.nested():
            with engine.repeating():
                return engine.here.cutter.call(self, self.fn, args)
        return self.fn(*args)


def _mapped(fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    both = value_and_grad(fn, argnums=0, has_aux=has_aux)

    def mapped(params: Any, beside: tuple[Any, ...], part: Any, index: Tensor, *key: Any) -> Any:
        rows, structure = tree.flatten(part)
        found: list[Any] = []

        # flat lists of tensors in and out, because torch.func walks trees by torch's own registry, not by ours
        def of_one(rows: list[Tensor], index: Tensor) -> list[Any]:
            example = tree.unflatten(structure, [row.unsqueeze(0) for row in rows])
            keys = [None if k is None else random.fold_in(k, index) for k in key]
            results = both(params, *beside, example, *keys)
            leaves, treedef = tree.flatten(results)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise _no_tensor(results[0])
            found.append(treedef)
            return leaves

        leaves = vmap(of_one)(rows, index)
        return tree.unflatten(found[0], leaves)

    return mapped


def _check_call(key: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs or len(key) > 1:
        came = f"the keyword {next(iter(kwargs))!r}" if kwargs else f"{2 + len(key)} arguments"
        raise TypeError(
            f"per_example_grad: expected (params, batch) or (params, batch, key) by position, came {came}; bind what "
            "else the function takes, as functools.partial(fn, scale=2.0) does"
        )


def _no_tensor(result: Any) -> TypeError:
    path, leaf = next((path, leaf) for path, leaf in tree.items(result) if not isinstance(leaf, Tensor))
    return TypeError(
        f"per_example_grad: {path}: expected a tensor in fn's result, of which each example has one, came "
        f"{type(leaf).__name__} {leaf!r}; make it one by torch.tensor, or leave it out"
    )


def chunks(what: str, batch: Any, chunk_size: int | None) -> Iterator[tuple[Any, Tensor]]:
    """Yield slices of the batch, of `chunk_size` rows or all, with the indices of their rows.

    Raises: ValueError naming a leaf whose first dimension is not B, for an empty batch, and for chunk_size < 1.
    """
    _check_chunk(what, chunk_size)
    rows = tree.items(batch)
    count = -1
    for path, leaf in rows:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != (leaf.shape[0] if count < 0 else count):
            came = tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
            size = "B" if count < 0 else count
            raise ValueError(
                f"{what}: {path or 'the batch'}: expected a tensor of ({size}, ...), came {came}; give every "
                "leaf of the batch one row for each example"
            )
        count = leaf.shape[0]
    if count < 1:
        raise ValueError(f"{what}: expected at least one example, came an empty batch; pass at least one row")
    index = torch.arange(count, device=rows[0][1].device)
    size = chunk_size or count
    for start in range(0, count, size):
        part = slice(start, start + size)
        yield (batch if size >= count else tree.map(lambda leaf, part=part: leaf[part], batch)), index[part]


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tree.map(lambda *leaves: torch.cat(leaves), *parts)


def _check_chunk(what: str, chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{what}: expected chunk_size >= 1 or None, came {chunk_size!r}")
