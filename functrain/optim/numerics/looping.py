"""A loop that ends when it has converged, and work that is done when it is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.compiler import engine

Carry = TypeVar("Carry")


def while_loop(go_on: Callable[[Carry], Tensor], body: Callable[[Carry], Carry], carry: Carry, limit: int) -> Carry:
    """Run `body` on `carry` while the () bool tensor `go_on(carry)` is true, at most `limit` times.

    Equals `jax.lax.while_loop`. Eagerly, each turn reads `go_on` to the host. Vmapped or compiled, where nothing can be
    read, all `limit` turns are made, and a carry that is done stays as it is.
    """
    for _ in range(limit):
        going = go_on(carry)
        if _is_over(going):
            break
        new = body(carry)
        carry = new if _is_known(going) else tree.where(going, new, carry)
    return carry


def when(due: Tensor, fn: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Return `fn(carry)` where the () bool tensor `due` is true, else `carry`.

    Equals `jax.lax.cond(due, fn, identity, carry)`. Eagerly, `due` is read to the host and saves the work. Vmapped or
    compiled, the work is always done.
    """
    if _is_known(due):
        return fn(carry) if bool(due) else carry
    return tree.where(due, fn(carry), carry)


def _is_over(going: Tensor) -> bool:
    return _is_known(going) and not bool(going)


def _is_known(going: Tensor) -> bool:
    """Tell whether the host can read a () tensor: nobody traces it, and it is no lane of a vmap."""
    if engine.here.tracing or torch.compiler.is_dynamo_compiling():
        return False
    try:
        bool(going)
    except RuntimeError:  # vmap's refusal: torch has no public question for it
        return False
    return True
