"""Memory of what was computed on the way, used again in eager.

Every result of megabytes gets fresh memory from the system, page by page: of Adam's eleven on a leaf, four are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**15  # elements: below, memory comes from a list of what was freed, and to ask would cost more


def over(fresh: Tensor, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Return `op(*args)`, on the memory of `fresh` where nobody could tell.

    `fresh` is a result of the caller's own that is read by `op` and by nobody after; the new result has its shape and
    dtype. Nothing is written over what is differentiated, mapped over or traced.
    """
    if torch.compiler.is_compiling() or fresh.numel() < _LARGE or torch.autograd.forward_ad._current_level >= 0:
        return op(*args, **kwargs)
    if not all(_plain(x) for x in (fresh, *args) if isinstance(x, Tensor)):
        return op(*args, **kwargs)
    return op(*args, **kwargs, out=fresh)


def _plain(x: Tensor) -> bool:
    return type(x) is Tensor and not x.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(x)
