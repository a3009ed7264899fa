"""Memory that is written again: a donated state's, which holds the new state after `ft.compile(step, donate=True)`, and
a sum's of gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from functrain import tree


class ConsumedError(RuntimeError):
    """A tensor was used after its memory had been given to the next state."""


def give_gradient(leaf: Tensor, total: Tensor) -> Tensor:
    """Return the leaf, with a gradient that is added to `total` in place; others see a zero that has no memory.

    With a function in place of the hook, autograd, which runs the youngest function first, would add at the very end.
    """

    def add_and_forget(grad: Tensor) -> Tensor:
        total.add_(grad)
        return grad.new_zeros(()).expand(grad.shape)

    leaf.register_hook(add_and_forget)
    return leaf


def add(total: Tensor, grad: Tensor) -> None:
    """Add a gradient to a sum, in the sum's memory."""
    total.add_(grad)


def multiply(total: list[Tensor], factor: Tensor) -> None:
    """Multiply a sum in its memory, also between a forward pass that has seen it and the backward pass that adds."""
    for leaf in total:
        # .data, because autograd holds that what a forward pass has seen must not change: here it is to
        leaf.data.mul_(factor.detach().to(leaf.dtype))


class _Refusing:
    """What a donated tensor becomes: every use of it is an error."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ConsumedError(
            "this tensor was donated: its memory holds the state that the compiled step returned; use that state, "
            "copy the old one before the call, or compile with donate=False"
        )

    def __repr__(self, **_: Any) -> str:
        return "<donated tensor>"


class _Consumed(_Refusing, Tensor):  # type: ignore[misc]
    pass


@cache
def consumed_kind(kind: type) -> type:
    """Return what a donated tensor of a class becomes."""
    return type("_Consumed", (_Refusing, kind), {"__slots__": ()})


def pass_on(leaves: list[Tensor]) -> list[Tensor]:
    """Return tensors on the same memory, and make every later use of the given ones an error."""
    # .data, not .detach(): the same tensor on the same memory in half the time, which is 3 % of a small model's step
    new = [leaf.data for leaf in leaves]
    for leaf in leaves:
        leaf.__class__ = _Consumed
    return new


def check_donatable(state: Any, leaves: list[Any]) -> None:
    """Raise for a state whose memory cannot be given away.

    Raises: ConsumedError for one that was; TypeError naming a leaf that is no tensor; ValueError naming two leaves on
    the same memory, of which the second would overwrite the first.
    """
    kinds = {type(leaf) for leaf in leaves}
    if any(issubclass(kind, _Refusing) for kind in kinds):
        _Consumed.__torch_function__(None, ())
    if not all(issubclass(kind, Tensor) for kind in kinds):
        path, leaf = next((path, leaf) for path, leaf in tree.items(state) if not isinstance(leaf, Tensor))
        raise TypeError(
            f"ft.compile(donate=True): {path}: expected a tensor, came {type(leaf).__name__} {leaf!r}; make it "
            "torch.tensor(...), so that its value can change without a new compilation"
        )
    places = [leaf.data_ptr() for leaf in leaves if leaf.numel()]
    if len(set(places)) != len(places):
        seen: dict[int, str] = {}
        for path, leaf in tree.items(state):
            if leaf.numel() and leaf.data_ptr() in seen:
                raise ValueError(
                    f"ft.compile(donate=True): {seen[leaf.data_ptr()]} and {path} share one memory, which cannot hold "
                    "both new values; clone one of them, or keep the shared tensor at one path only"
                )
            seen[leaf.data_ptr()] = path
