"""Functions that torch cannot trace, and where."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_NO_PLACES = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))


def way_out(error: BaseException) -> str | None:
    """Say what to do about an error if it says that Dynamo cannot trace a loss that is compiled in pieces."""
    says = str(error)
    if "Freevar has no source" in says:  # an assertion of torch 2.13, as the last one here
        return (
            "a block of nn.stack takes a tensor that the loss computes from around it: pass it, as in "
            "nn.stack(block, layers, x, mask)"
        )
    if "Input-to-input aliasing" in says:
        return "two tensors that a block of nn.stack takes share one memory: clone one of them"
    # the second is about what a torch.func transform inside of the function made
    if isinstance(error, TorchDynamoException) or "Expected FakeTensor, got" in says:
        return "to compile the step as one graph, wrap it: ft.compile(lambda state, batch: step(state, batch))"
    return None


def reading(error: BaseException) -> str | None:
    """Explain an error that says that a function reads the numbers in a tensor, which are not known in a trace."""
    if not isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and not f.filename.startswith(_NO_PLACES)]
    place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else str(error).partition("\n")[0]
    checks = any("distributions" in f.filename for f in frames)
    return (
        f"{place}: expected Python that is the same for all numbers in a tensor, came an `if`, an .item() or a shape "
        "that depends on them; choose by torch.where, leave numbers in tensors, weigh rows with 0 in place of leaving "
        "them out, or do this outside of ft.compile"
        + ("; torch.distributions reads them to check its arguments: validate_args=False" if checks else "")
    )
