"""Layers one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from functrain.compiler import engine
from functrain.sharding import split
from functrain.sharding.using import is_held
from functrain.transforms.gathered import gathered
from functrain.transforms.recompute import recomputed_blocks


def stack(block: Callable[..., Any], layers: Sequence[Any], x: Any, *args: Any) -> Any:
    """Run `x = block(layer, x, *args)` for each layer, and return the last x.

    x is a tensor, or a tree that every block returns alike. In a step compiled by `ft.compile` a block is traced and
    compiled once for all layers of the same structure and shapes, so that the time to compile does not grow with the
    depth: it must not count its calls, or keep anything of them. `ft.recompute_layers` around the loss recomputes the
    layers.

    >>> layers = [{"weight": torch.eye(2), "bias": torch.ones(2)} for _ in range(3)]
    >>> ft.nn.stack(lambda layer, x: torch.relu(ft.nn.linear(x, **layer)), layers, torch.zeros(2))
    tensor([3., 3.])
    """
    if any(is_held(layer) for layer in layers):  # gathered within what is recomputed
        block = gathered(block)
    axis = split.stream_axis()
    if axis is not None:
        with split.streaming(None):
            return split.ended(stack(split.within(block, axis), layers, split.begun(x, axis), *args), axis)
    blocks, count = recomputed_blocks(block, len(layers))
    cutter = engine.here.cutter
    if cutter is not None and cutter.cuts_layers():
        return _cut(cutter, blocks, count, layers, x, args)
    for layer, run in zip(layers, blocks, strict=True):
        x = run(layer, x, *args)
    return x


def _cut(
    cutter: Any, blocks: Sequence[Callable[..., Any]], recomputed: int, layers: Sequence[Any], x: Any, args: Any
) -> Any:
    call = object()  # what a block takes from around it may be something else at the next call of stack
    for i, (layer, run) in enumerate(zip(layers, blocks, strict=True)):
        x = cutter.layer((call, _closed_over(run), i < recomputed), run, layer, x, args)
    return x


def _closed_over(fn: Callable[..., Any]) -> tuple[int, ...]:
    # a variable of the function around a block that has another value for another layer makes another kind of layer
    return tuple([id(cell.cell_contents) for cell in getattr(fn, "__closure__", None) or () if _is_set(cell)])


def _is_set(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return False
    return True
