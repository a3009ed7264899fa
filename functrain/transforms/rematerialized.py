"""The function of autograd behind `recompute` in eager: it saves its inputs, and runs again when it is differentiated.

torch.func builds the graph of every backward pass, so that what the backward pass recomputes would be kept as well.
Therefore the backward pass is a `Rematerialized` call too, which keeps its inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from functrain.transforms import captured

_functorch = torch._C._functorch
Flat = Callable[..., tuple[Tensor, ...]]  # tensors in, tensors out
Check = Callable[[], AbstractContextManager[Any]]


class Rematerialized(torch.autograd.Function):
    """`apply(call, *tensors)` equals `call.function(*tensors)`."""

    @staticmethod
    def forward(call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        # below every transform of torch.func: plain tensors
        return call.values(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.differentiable = [value.is_floating_point() or value.is_complex() for value in output]
        ctx.mark_non_differentiable(*_where(output, [not d for d in ctx.differentiable]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        pull = Pullback(ctx.call.function, wanted, len(ctx.saved_tensors), ctx.differentiable)
        tensors = (*ctx.saved_tensors, *_where(cotangents, ctx.differentiable))
        # without either nobody transforms the gradients, and the call would only cost time
        transformed = torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None
        found = Rematerialized.apply(pull, *tensors) if transformed else pull.values(tensors)
        grads: list[Any] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(wanted, found, strict=True):
            grads[i + 1] = grad
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if sum(i.key() == _functorch.TransformType.Jvp for i in _functorch.get_interpreter_stack() or ()) > 1:
            # torch 2.13 returns zeros for the derivative of the jvp of any autograd.Function
            raise NotImplementedError(
                "recompute: torch has no forward mode of forward mode through it, as in jacfwd(jacfwd(f)); let one of "
                "the two be reverse, as in jacfwd(jacrev(f)) or torch.func.hessian"
            )
        tensors = ctx.saved_tensors
        moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
        function = _of_chosen(ctx.call.function, moved, tensors)
        inputs = tuple([tensors[i] for i in moved])
        moves: Any = torch.func.jvp(function, inputs, tuple([tangents[i] for i in moved]))[1]
        return tuple([t if d else None for t, d in zip(moves, ctx.differentiable, strict=True)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Any, *tensors: Tensor) -> tuple[Any, Any]:
        mapped = torch.func.vmap(call.function, in_dims[1:], randomness=info.randomness)
        found = Rematerialized.apply(Call(mapped, (False,) * len(tensors), call.check), *tensors)
        return found, (0,) * len(found)


class Call:
    """A function of tensors, which of them are differentiated where it is called, and a context to run it in."""

    def __init__(self, function: Flat, differentiated: Sequence[bool], check: Check) -> None:
        self.function, self.differentiated, self.check = function, differentiated, check

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # as the backward pass will run it: torch.matmul, for one, multiplies in another order for a tensor that
        # requires grad, and the last bits would differ
        with torch.enable_grad(), self.check():
            seen = [x.detach().requires_grad_(d) for x, d in zip(tensors, self.differentiated, strict=True)]
            values = self.function(*seen)
        captured.check_graph("recompute", values, seen)
        return tuple([value.detach() for value in values])


class Pullback:
    """The function `(*inputs, *cotangents)` that returns the gradients of the `wanted` inputs.

    Cotangents are those of the results that are `differentiable`.
    """

    check = nullcontext  # what it runs has been checked in the forward pass

    def __init__(self, of: Flat, wanted: Sequence[int], inputs: int, differentiable: Sequence[bool]) -> None:
        self.of, self.wanted, self.inputs, self.differentiable = of, wanted, inputs, differentiable

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, cotangents = tensors[: self.inputs], tensors[self.inputs :]
        of_chosen = _of_chosen(self.of, self.wanted, inputs)
        chosen = [inputs[i] for i in self.wanted]
        pull: Any = torch.func.vjp(lambda *values: _where(of_chosen(*values), self.differentiable), *chosen)[1]
        return pull(cotangents)

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # autograd frees each activation as soon as it is used, which torch.func does not
        cotangents = tensors[self.inputs :]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(i in self.wanted) for i, x in enumerate(tensors[: self.inputs])]
            values = _where(self.of(*inputs), self.differentiable)
        chosen = [inputs[i] for i in self.wanted]
        pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
        if not pairs:
            return tuple([torch.zeros_like(x) for x in chosen])
        values, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(values, chosen, cotangents, allow_unused=True, materialize_grads=True)


def _of_chosen(function: Flat, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Flat:
    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return function(*full)

    return of_chosen


def _where(values: Sequence[Tensor], chosen: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple([value for value, keep in zip(values, chosen, strict=True) if keep])
