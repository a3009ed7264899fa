"""Recompute in eager, where no torch.func transform is around: what autograd saves is a number, and the tensor behind
it comes from a second run, which stops as soon as it has made all of them.

As torch.utils.checkpoint, but quicker. A call inside of another needs no care: its inputs are what a node of the graph
has saved, so that the call around it keeps a number in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from functrain import tree
from functrain.transforms import captured


def run(fn: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """Return `fn(*tensors)`, a tree; the graph behind it keeps the tensors alone."""
    if not any(x.requires_grad for x in tensors):
        result = fn(*tensors)
        captured.check_graph("recompute", _tensors(result))
        return result
    inputs = _views(tensors)
    saved = _Saved(fn, _Kept.apply(*tensors).grad_fn)
    unwritten = captured.writing_nothing("recompute", tensors)
    with captured.drawing_nothing("recompute", tensors, lambda: fn(*inputs)), unwritten:
        with saved_tensors_hooks(saved.number, saved.tensor):
            result = fn(*inputs)
    captured.check_graph("recompute", _tensors(result), begins=[x.grad_fn for x in inputs if x.requires_grad])
    return result


def _views(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.view_as(x) if x.requires_grad else x for x in tensors]  # a node for each, where our graph begins


class _Kept(torch.autograd.Function):
    """A node of no use in the graph but to keep tensors, as a call around us may wish to keep them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


class _Saved:
    """The tensors that autograd has saved in one run of a function, made when the first of them is asked for."""

    def __init__(self, fn: Callable[..., Any], inputs: Any) -> None:
        self.fn, self.inputs = fn, inputs
        self.kinds: list[Any] = []
        self.made: dict[int, Tensor] = {}

    def number(self, x: Tensor) -> int:
        self.kinds.append((x.dtype, x.shape))
        return len(self.kinds) - 1

    def tensor(self, number: int) -> Tensor:
        if number not in self.made:
            self._run_again()
        return self.made.pop(number)

    def _run_again(self) -> None:
        made: dict[int, Tensor] = {}
        versions: list[int] = []

        def keep(x: Tensor) -> Tensor:
            number = len(made)
            if number == len(self.kinds) or (x.dtype, x.shape) != self.kinds[number]:
                raise _differs(self.kinds[number:], x)
            made[number] = x = x.detach()  # autograd knows what it belonged to
            versions.append(x._version)
            if len(made) == len(self.kinds):
                raise _Complete
            return x

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
            try:
                self.fn(*_views(self.inputs.saved_tensors))
            except _Complete:
                pass
        if len(made) < len(self.kinds):
            raise _differs(self.kinds[len(made) :], None)
        for x, version in zip(made.values(), versions, strict=True):
            if x._version != version:  # which autograd checks for what no hook has seen
                raise _written(x)
        self.made = made


class _Complete(BaseException):
    """All that was saved in the first run is there. Not for the user's `except Exception` to catch."""


def _differs(expected: list[Any], x: Tensor | None) -> RuntimeError:
    kinds = [f"{dtype} {tuple(shape)}" for dtype, shape in expected[:1]]
    came = "nothing more" if x is None else f"{x.dtype} {tuple(x.shape)}"
    return RuntimeError(
        f"recompute: expected fn to save {kinds[0] if kinds else 'nothing more'} the second time as well, came {came}; "
        "let it depend on its arguments alone, not on a counter, a cache or the mode that it runs in"
    )


def _written(x: Tensor) -> RuntimeError:
    return RuntimeError(
        f"recompute: fn writes into a tensor of shape {tuple(x.shape)} that its backward pass reads, and the gradient "
        "would be another one; compute a new tensor, as in x = x * 2 for x.mul_(2)"
    )


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(result) if isinstance(leaf, Tensor)]
