"""Training as a function: from the first state to the last, for gradients through all steps.

T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functrain import transforms, tree
from functrain.train.loop import Metrics, Step
from functrain.train.state import TrainState
from functrain.tree import Batch


def unroll(
    step: Step, state: TrainState, batches: Sequence[Batch], *, recompute: bool = False, truncate: int | None = None
) -> tuple[TrainState, Metrics]:
    """Take a step for each batch, and return the last state and the metrics of all steps, each (T, ...).

    Equals the loop. Inside of `ft.grad` it is differentiated in whatever of the state and the batches depends on the
    argument: first params, hyper-parameters that `ft.optim.inject_hyperparams` keeps in the state, weights of examples
    or the parameters of a learned loss in the batches. An Adam wants an `eps_root` above zero there. A step that a
    guard or a loss scale skips as not finite makes these gradients NaN, though not the state.

    With `recompute`, the steps are cut into about sqrt(T) windows that keep only the state they begin with, and are
    run again for the backward pass: the memory grows with sqrt(T), the time by one more forward pass. `step` must not
    use a differentiated tensor that is not in the state or the batch.

    With `truncate`, what the steps change in the state is cut from the gradient before step `truncate`, 2 * `truncate`,
    and so on; what they pass on, such as a hyper-parameter, is not. The result has the same numbers.

    Raises: ValueError without a batch, and for truncate < 1; TypeError for batches without an end, and for a recompute
    that is neither True nor False.

    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, ft.optim.sgd(0.25))
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, ft.optim.sgd(0.25), key=ft.random.key(0))
    >>> def trained(w):  # the param after three steps from w, each of which halves the distance to 1
    ...     return ft.train.unroll(step, state._replace(params={"w": w}), [torch.tensor(1.0)] * 3)[0].params["w"]
    >>> trained(torch.tensor(0.0)), ft.grad(trained)(torch.tensor(0.0))
    (tensor(0.8750), tensor(0.1250))
    """
    if isinstance(batches, dict) or not (hasattr(batches, "__len__") or hasattr(batches, "__iter__")):
        raise TypeError(  # what has __getitem__ alone, as ft.data.windows, has no end
            f"unroll: expected a list of batches, one for each step, came {type(batches).__name__}; write "
            "[batches[t] for t in range(steps)]"
        )
    batches = list(batches)
    if not isinstance(recompute, bool):
        raise TypeError(f"unroll: expected recompute=True or False, came {recompute!r}; windows are of sqrt(T) steps")
    if not batches:
        raise ValueError("unroll: expected at least one batch, came none")
    if truncate is not None and (type(truncate) is not int or truncate < 1):
        raise ValueError(f"unroll: expected truncate of at least 1 step, came {truncate!r}; leave it out for no cut")

    def window(state: TrainState, batches: list[Batch], first: int) -> tuple[TrainState, list[Metrics]]:
        rows = []
        for t, batch in enumerate(batches, first):
            if truncate is not None and t > 0 and t % truncate == 0:
                state = _cut(state, passed_on)
            before = tree.leaves(state)
            state, metrics = step(state, batch)
            if truncate is not None:
                passed_on.intersection_update(i for i, leaf in enumerate(tree.leaves(state)) if leaf is before[i])
            rows.append(metrics)
        return state, rows

    passed_on = set(range(len(tree.leaves(state))))
    size = math.ceil(math.sqrt(len(batches))) if recompute else len(batches)
    run = transforms.recompute(window) if recompute else window
    rows: list[Metrics] = []
    for first in range(0, len(batches), size):
        state, found = run(state, batches[first : first + size], first)
        rows += found
    return state, tree.map(lambda *leaves: torch.stack(leaves), *rows)


def _cut(state: TrainState, passed_on: set[int]) -> TrainState:
    leaves, structure = tree.flatten(state)
    cut = [leaf if i in passed_on or not isinstance(leaf, Tensor) else leaf.detach() for i, leaf in enumerate(leaves)]
    return tree.unflatten(structure, cut)
