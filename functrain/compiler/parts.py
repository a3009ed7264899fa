"""What a cut function is made of: parts that are traced apart, and the opaque operations that stand for them.

A layer is one operation each way, `forward` and `backward`, and a gradient one `call`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from functrain import tree
from functrain.compiler import engine
from functrain.compiler.tracing import Traced

_library = torch.library.Library("functrain", "FRAGMENT")
for _name in ("forward", "backward", "call"):
    _library.define(f"{_name}(int part, Tensor[] tensors) -> Tensor[]")
FORWARD, BACKWARD, CALL = (getattr(torch.ops.functrain, name).default for name in ("forward", "backward", "call"))
_library.define("zeros(int number, Tensor[] tensors, bool[] as_float32) -> Tensor[]")
ZEROS = torch.ops.functrain.zeros.default
numbers = itertools.count()


class Part:
    """A function of tensors that was traced apart."""

    def __init__(self) -> None:
        self.number = next(numbers)
        self.structure: Any = None  # of what the function returned
        self.values: list[Any] = []  # its leaves: None where they are tensors
        self.lifted: list[Tensor] = []  # what the function uses from around it, further inputs
        self.lasting: list[int] = []  # inputs that are there until the end of the function around it


class Layer(Part):
    """One kind of layers: a forward and a backward program."""

    results: int  # of the forward program; what it keeps for the backward one comes after them
    forward: fx.GraphModule
    backward: fx.GraphModule | None = None
    mode: Any
    differentiable: list[int]  # results that have cotangents
    strides: list[tuple[int, ...]]  # of the cotangents
    kept: list[tuple[bool, int]]  # what the backward program gets: (True, i) an input, (False, j) a result of forward's
    given: list[int]  # inputs whose gradients the backward program returns


class Loss(Part):
    """A function and its gradient, or another function that is compiled by itself."""

    traced: Traced
    results: int  # how many of the tensors it returns are known before the gradient
    written: dict[int, int]  # results that lie in the memory of an input: their place, and the input's
    aliases: dict[int, int]  # results that are, or are views of, an input
    lean: bool


def differentiated(tensors: Sequence[Tensor], x: Any) -> list[int]:
    """Return the places of the tensors by which a layer that gets x is differentiated.

    Numbers in x that layers add to, such as a load of experts, are among them from the first layer on, as they are from
    the second on: layers are one kind then, and not two. Of a larger one, as of the first layer's activations, a
    gradient that nobody wants would cost a product.
    """
    found = [i for i, t in enumerate(tensors) if t.requires_grad]
    sums = {id(t) for t in tree.leaves(x) if isinstance(t, Tensor) and t.dim() <= 1 and t.is_floating_point()}
    return [i for i, t in enumerate(tensors) if i in found or id(t) in sums] if found else []


class LayerCall(torch.autograd.Function):
    """One call of a layer: `forward` and, as its derivative, `backward`."""

    @staticmethod
    def forward(ctx: Any, part: Layer, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = FORWARD(part.number, list(tensors))
        ctx.part, ctx.count = part, len(tensors)
        ctx.save_for_backward(*[tensors[i] if of_input else found[i] for of_input, i in part.kept])
        results = found[: part.results]
        ctx.mark_non_differentiable(*[r for i, r in enumerate(results) if i not in part.differentiable])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        part = ctx.part
        given = [
            _laid_out(cotangents[i], strides) for i, strides in zip(part.differentiable, part.strides, strict=True)
        ]
        grads: list[Tensor | None] = [None] * ctx.count
        for i, grad in zip(part.given, BACKWARD(part.number, [*ctx.saved_tensors, *given]), strict=True):
            grads[i] = grad
        return None, *grads


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return x with these strides, of which none is of a gap or overlap."""
    if x.stride() == strides:
        return x
    order = sorted(range(x.dim()), key=lambda dim: strides[dim], reverse=True)
    back = sorted(range(x.dim()), key=lambda dim: order[dim])
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _fake(which: str) -> Callable[..., list[Tensor]]:
    def run(number: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        part: Any = engine.here.cutter.parts[number]
        graph = part.traced.graph if which == "call" else getattr(part, which).graph
        made = [node.meta["val"] for node in graph.output_node().args[0]]
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in made]

    return run


for _name in ("forward", "backward", "call"):
    torch.library.register_fake(f"functrain::{_name}", _fake(_name), lib=_library)


def zeros_like(tensors: Sequence[Tensor], as_float32: Sequence[bool]) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=torch.float32 if f else None) for x, f in zip(tensors, as_float32, strict=True)]


torch.library.register_fake("functrain::zeros", lambda _, *args: zeros_like(*args), lib=_library)
