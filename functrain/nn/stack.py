"""Layers one after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from functrain import tree
from functrain.transforms import engine
from functrain.transforms.recompute import recomputed_blocks


def stack(block: Callable[..., Any], layers: Sequence[Any], x: Any, *args: Any) -> Any:
    """Run `x = block(layer, x, *args)` for each layer, and return the last x.

    x is a tensor, or a tree that every block returns alike; a tensor that the loss computes goes to the block by
    `args`, and is not taken from around it. In a step compiled by `ft.compile` a block is compiled once and its code
    used again for every layer of the same structure and shapes, so that the time to compile does not grow with the
    depth, unless a leaf of x is no tensor. `ft.recompute_layers` around the loss recomputes the layers.
    """
    blocks, count = recomputed_blocks(block, len(layers))
    # torch 2.13 differentiates a region only from outside its graph, which is how piecewise compilation does it
    # and torch.utils.checkpoint traces what is in it without side effects, such as the list of regions
    here = engine.here
    alone = torch.compiler.is_compiling() and here.piecewise and here.depth == 1 and not here.recomputing
    if alone and all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(x)):
        return _regions(blocks, count, layers, x, *args)
    for layer, run in zip(layers, blocks, strict=True):
        x = run(layer, x, *args)
    return x


def _regions(blocks: Sequence[Callable[..., Any]], first: int, layers: Sequence[Any], x: Any, *args: Any) -> Any:
    # few Python operations, because Dynamo takes each of them for a second's thousandth: a deep model has many layers
    kinds: dict[Any, int] = {}
    for i, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
        inputs = (layer, x, args)
        pairs = tree.items(inputs)
        kind = (i < first, *[(path, _kind(leaf)) for path, leaf in pairs])
        if kind not in kinds:
            kinds[kind] = len(engine.here.blocks)
            engine.here.blocks.append((block, inputs))
        found = _region(kinds[kind], *[leaf for _, leaf in pairs])
        x = found if isinstance(x, torch.Tensor) else tree.unflatten(tree.structure(x), found)
    return x


def _run(number: int, *leaves: Any) -> Any:
    # a region takes tensors alone, and a function that Dynamo did not make: the block comes by its number
    block, inputs = engine.here.blocks[number]
    # Dynamo takes an attribute such as .mT of a region's argument for one more argument, and then refuses the two
    own = [torch.ops.aten.alias.default(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    layer, x, args = tree.unflatten(tree.structure(inputs), own)
    new = block(layer, x, *args)
    # a region returns tensors, and none that shares its memory with another one or with an argument
    if isinstance(x, torch.Tensor):
        return new.clone() if new is x else new
    if tree.structure(new) != tree.structure(x):
        expected, came = [[path for path, _ in tree.items(value)] for value in (x, new)]
        raise TypeError(
            f"nn.stack: expected a block that returns a tree like x, {expected}, came {came}; begin with an x that has "
            "all that the block returns"
        )
    return tuple([leaf.clone() for leaf in tree.leaves(new)])


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
    return leaf


# The number of a kind of block is all that decides whether a region's code is used again. In a torch without
# these options Dynamo looks at each layer again, which takes longer and comes to the same code.
_OPTIONS: dict[str, Any] = {"max_reuse_entries": 1024, "reuse_hash_fn": lambda number, *_: number}
_KNOWN = inspect.signature(torch.compiler.nested_compile_region).parameters
_region = torch.compiler.nested_compile_region(_run, **{k: v for k, v in _OPTIONS.items() if k in _KNOWN})
