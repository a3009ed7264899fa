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

from functrain.compiler import engine
from functrain.transforms import captured
from functrain.transforms.tape import Diverged, Recording, Replay, Tape

_functorch = torch._C._functorch
Flat = Callable[..., tuple[Tensor, ...]]  # tensors in, tensors out
Check = Callable[[], AbstractContextManager[Any]]


class Rematerialized(torch.autograd.Function):
    """`apply(call, *tensors)` equals `call.values(tensors)`, with the copies that wait in host memory after them."""

    @staticmethod
    def forward(call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        # below every transform of torch.func: plain tensors
        return (*call.values(tensors), *[_to_host(tensors[i]) for i in call.offloaded])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.tape = ctx.call.tape
        ctx.devices = {i: tensors[i].device for i in ctx.call.offloaded}
        values = output[: len(output) - len(ctx.devices)]
        ctx.save_for_forward(*tensors)
        # a result of this function may be saved as an argument may: torch knows how to differentiate through both
        for i, copy in zip(ctx.devices, output[len(values) :], strict=True):
            tensors[i] = copy
        ctx.save_for_backward(*tensors)
        ctx.differentiable = [value.is_floating_point() or value.is_complex() for value in values]
        ctx.set_materialize_grads(False)  # zero times an infinite slope is NaN: what nobody reads has no gradient
        ctx.mark_non_differentiable(*[x for x in output if not (x.is_floating_point() or x.is_complex())])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        call, tensors = ctx.call, list(ctx.saved_tensors)
        for i, device in ctx.devices.items():
            tensors[i] = tensors[i].to(device, non_blocking=True)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        of_values: Any = cotangents[: len(ctx.differentiable)]
        of_copies = cotangents[len(ctx.differentiable) :]
        read = [d and c is not None for d, c in zip(ctx.differentiable, of_values, strict=True)]
        pull = Pullback(call, wanted, read)
        given = (*tensors, *_where(of_values, read))
        # without either nobody transforms the gradients, and the call would only cost time
        transformed = torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None
        found: Any = [None] * len(wanted)
        if any(read):
            found = Rematerialized.apply(pull, *given) if transformed else pull.values(given)
        grads: list[Any] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(wanted, found, strict=True):
            grads[i + 1] = grad
        for (i, device), cotangent in zip(ctx.devices.items(), of_copies, strict=True):
            if i in wanted and cotangent is not None:
                add = cotangent.to(device)
                grads[i + 1] = add if grads[i + 1] is None else grads[i + 1] + add
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        depth = sum(i.key() == _functorch.TransformType.Jvp for i in _functorch.get_interpreter_stack() or ())
        if depth == 0:
            raise NotImplementedError(
                "recompute: expected the forward mode of torch.func.jvp, came that of torch.autograd.forward_ad, in "
                "which there is no other; take torch.func.jvp or torch.func.jacfwd"
            )
        if depth > 1:
            # torch 2.13 returns zeros for the derivative of the jvp of any autograd.Function
            raise NotImplementedError(
                "recompute: torch has no forward mode of forward mode through it, as in jacfwd(jacfwd(f)); let one of "
                "the two be reverse, as in jacfwd(jacrev(f)) or torch.func.hessian"
            )
        tensors = ctx.saved_tensors
        moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
        # a call inside would find the forward mode of ours around it, besides the one that the caller wants
        function = engine.running(_of_chosen(ctx.call.function, moved, tensors), plain=True)
        inputs = tuple([tensors[i] for i in moved])
        moves: Any = torch.func.jvp(function, inputs, tuple([tangents[i] for i in moved]))[1]
        copies = [torch.zeros_like(tensors[i]) if tangents[i] is None else tangents[i] for i in ctx.devices]
        copies = [t.cpu() if t is not None and t.is_floating_point() else None for t in copies]
        return (*[t if d else None for t, d in zip(moves, ctx.differentiable, strict=True)], *copies)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Any, *tensors: Tensor) -> tuple[Any, Any]:
        mapped = torch.func.vmap(call.function, in_dims[1:], randomness=info.randomness)
        found = Rematerialized.apply(call.of(mapped), *tensors)
        copies = [in_dims[1 + i] for i in call.offloaded]
        return found, (*[0] * (len(found) - len(copies)), *copies)


class Call:
    """A function of tensors, which of them are differentiated where it is called, and a context to run it in.

    `tape` takes what is kept beside the arguments; those at `offloaded` wait in host memory for the backward pass.
    """

    def __init__(
        self,
        function: Flat,
        differentiated: Sequence[bool],
        check: Check,
        tape: Tape | None = None,
        offloaded: Sequence[int] = (),
    ) -> None:
        self.function, self.differentiated, self.check = function, differentiated, check
        self.tape, self.offloaded = tape, offloaded

    def of(self, mapped: Flat) -> Call:
        return Call(mapped, self.differentiated, self.check, self.tape, self.offloaded)

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # as the backward pass will run it: torch.matmul, for one, multiplies in another order for a tensor that
        # requires grad, and the last bits would differ
        recording = Recording(self.tape, tensors) if self.tape else None
        # under a map, torch says of who is differentiated outside of it only here
        self.differentiated = [d or x.requires_grad for x, d in zip(tensors, self.differentiated, strict=True)]
        with torch.enable_grad():
            seen = [engine.start_of_gradient(x, d) for x, d in zip(tensors, self.differentiated, strict=True)]
            with _own_hooks(), captured.writing_nothing("recompute", tensors):
                undrawn = captured.drawing_nothing("recompute", tensors, lambda: self.function(*seen))
                with self.check(), undrawn, recording or nullcontext():
                    values = self.function(*seen)
                captured.check_graph("recompute", values, seen)
                if recording:
                    recording.close(values)
        return tuple([value.detach() for value in values])


class Pullback:
    """The function `(*inputs, *cotangents)` that returns the gradients of the `wanted` inputs of a call.

    Cotangents are those of the results that are `differentiable`.
    """

    offloaded = ()

    def __init__(self, call: Any, wanted: Sequence[int], differentiable: Sequence[bool]) -> None:
        self.call, self.tape, self.wanted, self.differentiable = call, call.tape, wanted, differentiable
        self.inputs = len(call.differentiated)
        self.differentiated = [*call.differentiated, *[True] * sum(differentiable)]

    def of(self, mapped: Flat) -> Call:
        return Call(mapped, self.differentiated, nullcontext)  # what it runs has been checked in the forward pass

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, cotangents = tensors[: self.inputs], tensors[self.inputs :]
        of_chosen = _of_chosen(self.call.function, self.wanted, inputs)
        chosen = [inputs[i] for i in self.wanted]

        def replayed(*values: Tensor) -> tuple[Tensor, ...]:
            with Replay(self.tape, shorten=False) if self.tape else nullcontext():
                return _where(of_chosen(*values), self.differentiable)

        pull: Any = torch.func.vjp(replayed, *chosen)[1]
        return pull(cotangents)

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # autograd frees each activation as soon as it is used, which torch.func does not
        cotangents = tensors[self.inputs :]
        differentiated = [d or i in self.wanted for i, d in enumerate(self.call.differentiated)]
        with torch.enable_grad(), engine.differentiating():
            inputs = [
                engine.start_of_gradient(x, d) for x, d in zip(tensors[: self.inputs], differentiated, strict=True)
            ]
            values = self._again(inputs, shorten=differentiated == list(self.call.differentiated))
        chosen = [inputs[i] for i in self.wanted]
        pairs = [
            (v, c) for v, c in zip(_where(values, self.differentiable), cotangents, strict=True) if v.requires_grad
        ]
        if not pairs:
            return tuple([torch.zeros_like(x) for x in chosen])
        values, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(values, chosen, cotangents, allow_unused=True, materialize_grads=True)

    def _again(self, inputs: Sequence[Tensor], shorten: bool) -> tuple[Tensor, ...]:
        if self.tape:
            try:
                with Replay(self.tape, shorten=shorten):
                    return self.call.function(*inputs)
            except Diverged:
                pass
        return self.call.function(*inputs)


def _own_hooks() -> AbstractContextManager[Any]:
    """Hide what is saved inside from hooks outside: a recomputed function around us counts the tensors that its own
    backward pass will read, and the graph of a forward pass here is thrown away."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _of_chosen(function: Flat, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Flat:
    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return function(*full)

    return of_chosen


def _where(values: Sequence[Tensor], chosen: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple([value for value, keep in zip(values, chosen, strict=True) if keep])


def in_host_memory(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _to_host(x: Tensor) -> Tensor:
    # page-locked, so that both ways are asynchronous, in the order of the device's stream
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)
