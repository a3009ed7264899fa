"""A tree taken apart for saving: its description, and each tensor once under the name it has in the files.

Of a leaf that is split over ranks, each rank saves the part that no rank before it has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.checkpoint.description import Node, describe, is_dense, type_name, unsupported
from functrain.checkpoint.header import MAX_DIMS
from functrain.checkpoint.parts import name_of
from functrain.checkpoint.strict_json import is_text
from functrain.checkpoint.tensors import DTYPE_NAMES, NAMES
from functrain.sharding.pieces import cut_of, is_split
from functrain.tree import Tree


class Collected(NamedTuple):
    """A tree taken apart."""

    node: Node  # the description, alike on all ranks
    tensors: dict[str, Tensor]  # whole ones, by name
    parts: dict[str, Tensor]  # those that this rank saves, by name


def collect(tree: Tree, where: str, *, split: bool = False) -> Collected:
    """Return the tree's description and its tensors by name; tied tensors have one name, that of the first path.

    Two leaves are tied when they are the same object or the same elements of the same memory.
    Raises: UnsupportedError naming `where` and the path, also of a leaf that is split over ranks, unless `split`.
    """
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def tensor_node(path: str, tensor: Any) -> Node:
        if is_split(tensor):
            return part_node(path, tensor)
        check_tensor(path, tensor, where)
        name = names.setdefault(_identity(tensor), _file_name(path))
        tensors.setdefault(name, tensor)
        return {"kind": "tensor", "tensor": name, **shape_and_dtype(tensor), **_stride(tensor)}

    def part_node(path: str, leaf: Any) -> Node:
        if not split:
            came, way_out = "a part of one that is split over ranks", "pass plan=, and call it on every rank"
            raise unsupported(where, path, "a whole tensor", came, way_out)
        part = leaf.to_local()
        check_tensor(path, part, where)
        try:
            cut = cut_of(leaf)
        except ValueError as error:
            raise unsupported(where, path, "what a plan splits", str(error), "split it by plan.shard") from error
        # of no elements the leaf itself tells: its part is another object each time
        name = names.setdefault(("split", _identity(part) if part.numel() else id(leaf)), _file_name(path))
        node = {"kind": "tensor", "tensor": name, **shape_and_dtype(leaf), **_stride(leaf)}
        if all(count == 1 for count in cut.counts):
            tensors.setdefault(name, part)
            return node
        for place, here in cut.pieces if cut.first else ():
            parts.setdefault(name_of(name, place), part[here])
        return {**node, "split": list(cut.counts)}

    return Collected(describe(tree, tensor_node, where), tensors, parts)


def _stride(tensor: Tensor) -> Node:
    # the order of dimensions in memory decides which kernel runs, and with it the last bits of a resumed run
    if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
        return {"stride": list(tensor.stride())}
    return {}


def shape_and_dtype(tensor: Tensor) -> Node:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _file_name(path: str) -> str:
    # safetensors keeps its own strings under this name; no path ends in "/", so the escaped name is free
    return "__metadata__/" if path == "__metadata__" else path


def _identity(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)  # without memory, only the object itself tells
    layout = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *layout)


def check_tensor(path: str, tensor: Tensor, where: str) -> None:
    """Return when the tensor has values that a file keeps. Raises: UnsupportedError naming `where` and the path."""
    if not is_text(path):
        raise unsupported(where, path, "keys in Unicode", "a lone surrogate", "rename the key")
    if (
        tensor.layout != torch.strided or tensor.is_nested
    ):  # first: of a donated tensor even this raises its own, clearer error
        came = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise unsupported(where, path, "a dense tensor", came, "save the dense tensors that it is made of")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise unsupported(where, path, "a plain tensor", type_name(type(tensor)), "convert it")
    if tensor.device.type == "meta":
        raise unsupported(where, path, "a tensor with values", "one on the meta device", "initialise it first")
    if tensor.dtype not in NAMES:
        raise unsupported(where, path, f"a dtype of {', '.join(DTYPE_NAMES)}", f"{tensor.dtype}", "cast or view it")
    if tensor.dim() > MAX_DIMS:
        raise unsupported(where, path, f"at most {MAX_DIMS} dimensions", f"{tensor.dim()}", "reshape it")
    try:
        tensor.data_ptr()
    except RuntimeError as error:  # traced, vmapped or differentiated by torch.func: there is no value to save
        raise unsupported(where, path, "a tensor with values", str(error), "save outside the transform") from error
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = tensor.storage_offset() + steps
    if tensor.numel() and (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise unsupported(where, path, "a tensor with values", "one whose memory was freed", "gather it first")
