"""Different transformations for different parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import functrain.tree as tree
from functrain.optim.masking import MaskedState, ParamsPlaceholder, made_for, masked
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_kind,
    set_to_zero,
    with_extra_args_support,
)
from functrain.tree import Params, Tree

Labels: TypeAlias = (
    Tree | Callable[[Params], Tree]
)  # strings or ints like params or a prefix, or what makes such a tree


class PartitionState(NamedTuple):
    inner_states: dict[Any, OptState]  # a MaskedState for each label


MultiTransformState = PartitionState


def partition(
    transforms: Mapping[Any, GradientTransformation], param_labels: Labels, *, mask_compatible_extra_args: bool = False
) -> GradientTransformationExtraArgs:
    """Apply to each parameter the transformation whose key is its label.

    Equals each transformation run by itself on the params with its label.

    Raises: ValueError naming the params whose label is no key.

    >>> params, labels = {"w": torch.ones(1), "b": torch.ones(1)}, {"w": "fast", "b": "slow"}
    >>> optimizer = ft.optim.partition({"fast": ft.optim.sgd(1.0), "slow": ft.optim.sgd(0.1)}, labels)
    >>> optimizer.update(params, optimizer.init(params), params)[0]
    {'w': tensor([-1.]), 'b': tensor([-0.1000])}
    """
    groups = {label: with_extra_args_support(tx) for label, tx in transforms.items()}

    def inner(label: Any, labels: Tree) -> GradientTransformationExtraArgs:
        mask = tree.map(lambda leaf: leaf == label, labels)
        return masked(groups[label], mask, mask_compatible_extra_args=mask_compatible_extra_args)

    def init(params: Params) -> PartitionState:
        if isinstance(params, ParamsPlaceholder):  # labels are those of the real params
            return PartitionState({label: MaskedState(tx.init(params)) for label, tx in groups.items()})
        labels = made_for(param_labels, params)
        lost = [f"{path}: {label!r}" for path, label in tree.items(labels) if label not in groups]
        if lost:
            raise ValueError(f"partition: no transformation for {', '.join(lost[:8])}; there is {sorted(groups)}")
        return PartitionState({label: inner(label, labels).init(params) for label in groups})

    def update(
        updates: Updates, state: PartitionState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, PartitionState]:
        check_kind("partition", state, PartitionState)
        labels = made_for(param_labels, updates)
        states = {}
        for label in groups:
            tx = inner(label, labels)
            updates, states[label] = tx.update(updates, state.inner_states[label], params, **extra_args)
        return updates, PartitionState(states)

    return GradientTransformationExtraArgs(init, update)


multi_transform = partition


def selective_transform(optimizer: GradientTransformation, *, freeze_mask: Tree) -> GradientTransformationExtraArgs:
    """Apply `optimizer` where the mask is False, and keep the parameters where it is True.

    >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
    >>> optimizer = ft.optim.selective_transform(ft.optim.sgd(0.1), freeze_mask={"body": True, "head": False})
    >>> optimizer.update(params, optimizer.init(params), params)[0]
    {'body': tensor([0.]), 'head': tensor([-0.1000])}
    """
    labels = tree.map(lambda frozen: "freeze" if frozen else "train", freeze_mask)
    return partition({"train": optimizer, "freeze": set_to_zero()}, labels)
