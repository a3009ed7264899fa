"""Functions that torch's Dynamo cannot trace."""

from __future__ import annotations

from torch._dynamo.exc import TorchDynamoException


def untraceable(error: BaseException) -> bool:
    """Tell whether an error says that Dynamo cannot trace a function."""
    # the second is an assertion of torch 2.13 about what a torch.func transform inside of the function made
    return isinstance(error, TorchDynamoException) or "Expected FakeTensor, got" in str(error)
