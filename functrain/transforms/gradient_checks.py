"""What a gradient cannot be taken of, told by argument and path."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import tree


def check_positions(positions: Sequence[int], args: tuple[Any, ...]) -> None:
    count = len(args)
    if any(not -count <= i < count for i in positions):
        raise ValueError(f"value_and_grad: argnums {tuple(positions)}: came {count} arguments by position")
    if len({i % count for i in positions}) < len(positions):
        raise ValueError(f"value_and_grad: argnums {tuple(positions)}: an argument is named twice; name each once")


def check_leaves(chosen: Any, leaves: list[Any]) -> None:
    if all(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves):
        return
    for path, leaf in tree.items(chosen):
        check_no_module(f"value_and_grad: {path.partition('/')[2] or 'the argument'}", leaf)
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            came = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}"
            raise TypeError(
                f"value_and_grad: {path.partition('/')[2] or 'the argument'}: expected a floating-point tensor, came "
                f"{came}; pass it in another argument, or take it out with tree.partition"
            )


def check_no_module(what: str, leaf: Any) -> None:
    """Raise a TypeError for a module, or what one is made of, in the place of its params."""
    if isinstance(leaf, torch.nn.Module):
        raise TypeError(
            f"{what}: expected a tree of tensors, came the module {type(leaf).__name__}; take "
            "ft.from_module(module).params, and call its `apply`"
        )
    if isinstance(leaf, Iterator):
        raise TypeError(
            f"{what}: expected a tree of tensors, came a {type(leaf).__name__}, which can be read once and has no "
            "paths; of a module take ft.from_module(module).params"
        )
    if callable(leaf):
        raise TypeError(
            f"{what}: expected a tree of tensors, came the function {getattr(leaf, '__name__', leaf)!r}; of what "
            "ft.from_module returns, pass its field `params`"
        )


def versions(inputs: list[Tensor]) -> list[int]:
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "value_and_grad: inside of torch.inference_mode there are no gradients; use torch.no_grad there"
        )
    return [x._version for x in inputs]


@contextmanager
def explained() -> Iterator[None]:
    """Say of torch's errors about graphs that are walked twice, and leaves that are written to, what to do."""
    try:
        yield
    except RuntimeError as error:
        if "through the graph a second time" in str(error) or "inside a functorch transform" in str(error):
            raise _differentiates() from error
        if "requires grad" in str(error) and "in-place" in str(error):
            where = _own_line(error)
            raise ValueError(
                f"value_and_grad: {where}fn writes into an argument that it is differentiated by; compute a new one, "
                "as in x = x + 1 for x += 1"
            ) from error
        raise


def _differentiates() -> TypeError:
    return TypeError(
        "value_and_grad: fn differentiates for itself, as .backward() does, what is differentiated once more around "
        "it; leave out .backward(), and take gradients inside by ft.grad"
    )


def _own_line(error: BaseException) -> str:
    package = str(Path(__file__).parents[1])
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(package)]
    return f"{lines[-1].filename}:{lines[-1].lineno}: " if lines else ""


def check_unwritten(inputs: list[Tensor], versions: list[int], structure: Any) -> None:
    if any(x.grad is not None for x in inputs):
        raise _differentiates()
    if [x._version for x in inputs] != versions:
        i = next(i for i, (x, version) in enumerate(zip(inputs, versions, strict=True)) if x._version != version)
        raise ValueError(
            f"value_and_grad: {_path(structure, i)}: fn has written into this argument, which is the caller's tensor; "
            "compute a new one, as in x = x + 1 for x += 1 (torch's embedding with max_norm= writes too)"
        )


def check_dense(grads: Sequence[Any], structure: Any) -> None:
    for i, grad in enumerate(grads):
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"value_and_grad: {_path(structure, i)}: expected a dense gradient, came one of {grad.layout}; leave "
                "out sparse=True"
            )


def unreached() -> ValueError:
    return ValueError(
        "value_and_grad: the value does not depend on any leaf of the differentiated argument, so every gradient would "
        "be zero; was it computed under torch.no_grad, detached, or passed through argmax or an integer dtype?"
    )


def check_reaches(value: Tensor, inputs: list[Tensor], structure: Any) -> None:
    """Walk the graph behind `value`: some leaf of ours must be there, and nobody else's."""
    ours, found = {id(leaf) for leaf in inputs}, False
    if id(value) in ours:
        return
    if value.grad_fn is None:
        raise unreached()
    seen, queue = {value.grad_fn}, [value.grad_fn]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is None:
                queue.append(node)
            elif id(variable) in ours:
                found = True
            else:
                raise ValueError(
                    f"value_and_grad: fn uses a tensor of shape {tuple(variable.shape)} that requires grad and is not "
                    "an argument, so its gradient would be lost; pass it as an argument, or detach it where it is made"
                )
    if not found:
        raise unreached()


def _path(structure: Any, i: int) -> str:
    """Return the path of leaf i of the differentiated arguments, within its argument."""
    path = list(tree.items(tree.unflatten(structure, range(structure.num_leaves))))[i][0]
    return path.partition("/")[2] or "the argument"
