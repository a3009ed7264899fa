"""Which params a step trains and which are frozen: to fine-tune a head, a few layers, or adapters.

What is frozen is no argument of the gradient, so that none is computed or held for it; the optimizer sees the tree of
the trained params alone, None standing in the holes, under the paths that they have in the whole tree. A mask or a
label that an optimizer makes of a path, or by a function of params, therefore works; a mask that is a tree is one of
the trained params.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from functrain import tree
from functrain.optim import GradientTransformation, OptState, Updates, with_extra_args_support
from functrain.optim.masking import full_mask
from functrain.optim.transformation import GradientTransformationExtraArgs
from functrain.tree import Params, Tree
from functrain.tree.hints import listed

Trainable: TypeAlias = tree.Where | Tree  # as `tree.mask` takes it, or a tree of bools like params or a prefix of them
Split: TypeAlias = Callable[[Params], tuple[Params, Params]]  # to the trained params and the frozen ones


def splitting(what: str, trainable: Trainable | None) -> Split:
    """Make the function from params to those that are trained and those that are not; `tree.combine` goes back.

    Raises: from it, ValueError for a pattern that fits no path, and where nothing is trained, naming what there is;
    TypeError for a mask whose leaf is no bool.
    """
    if trainable is None:
        return lambda params: (params, None)

    def split(params: Params) -> tuple[Params, Params]:
        leaves, structure = tree.flatten(params)
        chosen = tree.leaves(_mask(what, trainable, params))
        if True not in chosen:
            raise ValueError(
                f"{what}: trainable: expected to train some of params, came none of {listed(tree.paths(params))}; "
                "choose paths of them, such as 'head/**'"
            )
        pairs = list(zip(chosen, leaves, strict=True))
        trained = tree.unflatten(structure, [leaf if hit else None for hit, leaf in pairs])
        return trained, tree.unflatten(structure, [None if hit else leaf for hit, leaf in pairs])

    return split


def whole(trained: Params, frozen: Params) -> Params:
    """Return the params that `splitting` has split."""
    return trained if frozen is None else tree.combine(trained, frozen)


def _mask(what: str, trainable: Trainable, params: Params) -> Tree:
    given = [] if callable(trainable) or isinstance(trainable, str) else tree.leaves(trainable)
    if given and not all(isinstance(leaf, str) for leaf in given):
        return full_mask(trainable, params)
    try:
        return tree.mask(trainable, params)
    except tree.PathError as error:
        raise tree.PathError(f"{what}: trainable: {error}") from error


def marks(params: Params, trained: Params) -> Tree:
    """Return what a state remembers of `trainable`: like params, () where a leaf is trained, None where it is frozen.

    It has no leaves: to compare two is to compare structures, and reads no number.
    """
    given = set(tree.paths(trained))
    return tree.map_with_path(lambda path, _: () if path in given else None, params)


def check_marks(what: str, state: Any, trained: Params, trainable: Trainable | None) -> None:
    """Raise a ValueError for a state that was made with another `trainable`."""
    ours = None if trainable is None else marks(state.params, trained)
    if tree.structure(ours) == tree.structure(state.trainable):
        return
    there, here = (_described(state.params, given) for given in (state.trainable, ours))
    raise ValueError(
        f"{what}: the state trains {there} and the step {here}; give init_state and train_step the same trainable"
    )


def _described(params: Params, given: Tree) -> str:
    if given is None:
        return "all of params"
    return listed([path for path, _ in tree.items(params) if _at(given, path) == ()])


def _at(given: Tree, path: str) -> Any:
    try:
        return tree.at(given, path)
    except tree.PathError:
        return None


def of_trained(tx: GradientTransformation, split: Split) -> GradientTransformationExtraArgs:
    """Make an optimizer that takes all of params, and shows `tx` those that are trained."""
    tx = with_extra_args_support(tx)

    def init(params: Params) -> OptState:
        return tx.init(split(params)[0])

    def update(
        updates: Updates, state: OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OptState]:
        return tx.update(updates, state, None if params is None else split(params)[0], **extra_args)

    return GradientTransformationExtraArgs(init, update)
