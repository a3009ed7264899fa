"""Transformations one after another."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_own_state,
    with_extra_args_support,
)
from functrain.tree import Params


def chain(*args: GradientTransformation) -> GradientTransformationExtraArgs:
    """Apply transformations in order, each to what the one before it returned. The state is the tuple of their states.

    Equals `identity` of nothing. `chain(a, chain(b, c))` and `chain(chain(a, b), c)` make the same updates.

    Raises: ValueError for the state of other transformations.

    >>> optimizer = ft.optim.chain(ft.optim.clip(1.0), ft.optim.add_decayed_weights(0.1), ft.optim.scale(-0.1))
    >>> params = torch.tensor([1.0, -2.0])
    >>> optimizer.update(torch.tensor([0.5, -3.0]), optimizer.init(params), params)[0]
    tensor([-0.0600,  0.1200])
    """
    transforms = [with_extra_args_support(tx) for tx in args]

    def init(params: Params) -> tuple[OptState, ...]:
        return tuple([tx.init(params) for tx in transforms])

    def update(
        updates: Updates, state: tuple[OptState, ...], params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, tuple[OptState, ...]]:
        if len(transforms) != len(state):
            raise ValueError(f"chain of {len(transforms)}: came a state of {len(state)}; make it with its own init")
        states = []
        for i, (tx, old) in enumerate(zip(transforms, state, strict=True)):
            try:
                made, new = tx.update(updates, old, params, **extra_args)
            except (AttributeError, IndexError, KeyError, TypeError):
                check_own_state(f"chain: transformation {i}", old, tx.init(updates))
                raise
            if type(new) is not type(old):
                check_own_state(f"chain: transformation {i}", old, new)
            updates = made
            states.append(new)
        return updates, tuple(states)

    return GradientTransformationExtraArgs(init, update)


def named_chain(*args: tuple[str, GradientTransformation]) -> GradientTransformationExtraArgs:
    """Apply named transformations in order. The state is a dictionary from name to state, in that order.

    Raises: ValueError when two have one name.

    >>> optimizer = ft.optim.named_chain(("clip", ft.optim.clip(1.0)), ("momentum", ft.optim.trace(0.9)))
    >>> _, state = optimizer.update(torch.tensor([0.5, -3.0]), optimizer.init(torch.zeros(2)))
    >>> state["momentum"].trace
    tensor([ 0.5000, -1.0000])
    """
    names = [name for name, _ in args]
    if len(set(names)) != len(names):
        raise ValueError(f"named_chain: names must differ, came {names}; rename the second of each pair")
    transforms = [(name, with_extra_args_support(tx)) for name, tx in args]

    def init(params: Params) -> OrderedDict[str, OptState]:
        return OrderedDict([(name, tx.init(params)) for name, tx in transforms])

    def update(
        updates: Updates, state: OrderedDict[str, OptState], params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OrderedDict[str, OptState]]:
        states: OrderedDict[str, OptState] = OrderedDict()
        for name, tx in transforms:
            updates, states[name] = tx.update(updates, state[name], params, **extra_args)
        return updates, states

    return GradientTransformationExtraArgs(init, update)
