"""The layer above a recording that turns writes into new values, for a function that writes into shared memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from functrain.compiler import forward_mode
from functrain.compiler.recording import CONSTANTS, Recording, with_tensors


class Functional(FunctionalTensorMode):
    """Writes as new values, and tensors from outside as inputs."""

    def __init__(self, mode: Recording) -> None:
        super().__init__()
        self.mode = mode
        self.twins: dict[int, Tensor] = {}  # of tensors from outside: what stands for them here

    def wrapped(self, fake: Tensor) -> Tensor:
        functional = torch._to_functional_tensor(fake)
        return FunctionalTensor(functional, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in forward_mode.ZEROS:
            with self:
                return forward_mode.dense_zeros(func, args, kwargs)
        if func in CONSTANTS and type(args[0]) is Tensor:
            return self._constant(args[0])
        args, kwargs = with_tensors(args, self._ours), with_tensors(kwargs, self._ours)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _ours(self, x: Tensor) -> Tensor:
        """Return what stands here for a tensor from outside."""
        own: Any = torch._from_functional_tensor(x.elem) if isinstance(x, FunctionalTensor) else x
        if isinstance(own, FakeTensor) and own.fake_mode is self.mode:
            return x
        if id(x) not in self.twins:
            self.twins[id(x)] = self.wrapped(self.mode.lift(x))
        return self.twins[id(x)]

    def _constant(self, value: Tensor) -> Tensor:
        """Return a tensor of numbers that stand in the function's code, which it may write to."""
        with _disable_current_modes(), self.mode:
            made = self.mode.constant(value)
        return self.wrapped(made)
