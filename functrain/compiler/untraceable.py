"""Functions that torch cannot trace or map over, and where."""

from __future__ import annotations

import traceback
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_NO_PLACES = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))
_OPTIMIZERS = str(Path(_NO_PLACES[0]) / "optim")


class Untraceable(RuntimeError):
    """What a function that is traced must not do. Not a TypeError, which an operator of Python's would swallow."""


def drawn(func: torch._ops.OpOverload) -> Untraceable:
    return Untraceable(
        f"expected random numbers from a key, came {func.overloadpacket}, which draws from torch's global generator; "
        "draw by ft.random, as in ft.random.normal(key, shape)"
    )


def closure_written() -> Untraceable:
    return Untraceable(
        "the function writes into a tensor that it did not get as an argument, which would happen once, when it is "
        "traced; pass the tensor as an argument, and return the new value"
    )


def quiet(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether an operation that may draw does not, as attention without dropout."""
    names = [argument.name for argument in func._schema.arguments]
    rate = dict(zip(names, args, strict=False)).get("dropout_p", kwargs.get("dropout_p", 0.0))
    return "attention" in str(func) and rate == 0.0


def escaped(x: Tensor) -> Untraceable:
    return Untraceable(
        f"a tensor of shape {tuple(x.shape)} that was made while a function, or a part of it such as a block of "
        "nn.stack, was traced is used elsewhere; return it, in place of keeping it in a list or an attribute"
    )


def reading(error: BaseException) -> str | None:
    """Explain an error that says that a function does what cannot be traced, such as reading numbers in a tensor."""
    if isinstance(error, Untraceable):
        return ": ".join(filter(None, (_own_place(error), str(error))))
    if "backward through the graph a second time" in str(error):
        return (
            "the function differentiates for itself, as .backward() does, what is differentiated once more around it; "
            "leave out .backward(), and take gradients inside by ft.grad"
        )
    if not isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)):
        return None
    checks = any("distributions" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return (
        f"{_place(error)}: expected Python that is the same for all numbers in a tensor, came an `if`, an .item() or a "
        "shape that depends on them; choose by torch.where, leave numbers in tensors, weigh rows with 0 in place of "
        "leaving them out, or do this outside of ft.compile"
        + ("; torch.distributions reads them to check its arguments: validate_args=False" if checks else "")
    )


def mapped(error: BaseException) -> str | None:
    """Explain an error of `torch.func.vmap` that says that one operation is not the same for all that it maps over."""
    says = str(error)
    if any(text in says for text in _READS):
        return (
            f"{_place(error)}: expected Python that is the same for all examples or lanes, which a map computes at "
            "once, came an `if`, an .item() or a shape that depends on the numbers of one; choose by torch.where, "
            "leave numbers in tensors, weigh rows with 0 in place of leaving them out, or take the examples in a loop"
            + _of_an_optimizer(error)
        )
    if "is not possible because there exists a Tensor" in says:
        return (
            f"{_place(error)}: expected a write into a tensor that each example or lane has, came one into a tensor "
            "that they share; make it from one that they have, as x.new_zeros(3), or write without an underscore"
        )
    if "called random operation while in randomness error mode" in says:
        return (
            f"{_place(error)}: expected random numbers from a key, came a draw from torch's global generator; draw by "
            "ft.random or ft.nn.dropout, from a key for each example or lane, as by ft.random.split"
        )
    if "must override the setup_context" in says:
        return (
            f"{_place(error)}: expected operations that can be mapped over, came an autograd.Function, or an operation "
            "of torch.library, without a rule for it; give it setup_context and generate_vmap_rule = True, or take "
            "another, as for experts of transformers by model.set_experts_implementation('batched_mm')"
        )
    return None


# what torch 2.13 says of .item(), `if`, boolean indices, nonzero, masked_select, .tolist(), equal, allclose, one_hot
_READS = (
    "vmap: It looks like you're",
    "can support dynamic shape",
    "can output dynamic shape",
    "differently shaped Tensor",
    "Cannot access data pointer",
    "Batching rule not implemented for aten::equal",
    "vmap over torch.allclose",
    "explicit positive num_classes",
)


def _of_an_optimizer(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not any(f.filename.startswith(_OPTIMIZERS) for f in frames):
        return ""
    return (
        "; a number by which an optimizer chooses what it does, such as a count of iterations, is no tensor: name it "
        "in static_args of ft.optim.inject_hyperparams"
    )


def users_own(error: BaseException) -> types.TracebackType | None:
    """Return the traceback of an error without the frames of torch and of the compiler."""
    frames, at = [], error.__traceback__
    while at is not None:
        if not at.tb_frame.f_code.co_filename.startswith(_NO_PLACES):
            frames.append(at)
        at = at.tb_next
    found: types.TracebackType | None = None
    for frame in reversed(frames):
        found = types.TracebackType(found, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return found


def _place(error: BaseException) -> str:
    return _own_place(error) or str(error).partition("\n")[0]


def _own_place(error: BaseException) -> str | None:
    """Return the innermost line of the user's, or of an optimizer, behind an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and not f.filename.startswith(_NO_PLACES)]
    own = own or [f for f in frames if f.line and f.filename.startswith(_OPTIMIZERS)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else None
