"""Layers one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from functrain.transforms import engine


def stack(block: Callable[..., Any], layers: Sequence[Any], x: Any, *args: Any) -> Any:
    """Run `x = block(layer, x, *args)` for each layer, and return the last x.

    In a step compiled by `ft.compile` a block is compiled once and its code reused for every layer of the same
    shapes, so that the time to compile does not grow with the depth.
    """
    # torch 2.13 differentiates a nested region only from outside its graph, which is where piecewise compilation does
    once = torch.compiler.is_compiling() and engine.piecewise and engine.depth == 1
    for layer in layers:
        x = _region(block, layer, x, *args) if once else block(layer, x, *args)
    return x


@torch.compiler.nested_compile_region
def _region(block: Callable[..., Any], layer: Any, x: Any, *args: Any) -> Any:
    return block(layer, x, *args)
