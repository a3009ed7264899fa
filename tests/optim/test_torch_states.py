"""Training goes on in torch.optim where ours stopped, and here where torch.optim stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain.optim as optim
from functrain import schedules, tree

NAMES = ["blocks/0/w", "blocks/0/b", "head"]
SHAPES = [(3, 2), (2,), ()]
STEPS = 4

ADAM: dict[str, Any] = dict(betas=(0.8, 0.9), eps=1e-3)
PAIRS = {
    "AdamW": (
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2, **ADAM),
        optim.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.2),
    ),
    "Adam": (lambda p: torch.optim.Adam(p, 0.1, **ADAM), optim.adam(0.1, 0.8, 0.9, 1e-3)),
    "Adamax": (lambda p: torch.optim.Adamax(p, 0.1, **ADAM), optim.adamax(0.1, 0.8, 0.9, 1e-3)),
    # eps=0: torch adds it to another number
    "RAdam": (lambda p: torch.optim.RAdam(p, 0.1, (0.8, 0.7), 0.0), optim.radam(0.1, 0.8, 0.7, 0.0)),
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), optim.sgd(0.1, 0.9, nesterov=True)),
    "SGD without momentum": (lambda p: torch.optim.SGD(p, 0.1), optim.sgd(0.1)),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 0.1, 0.9, 1e-3), optim.rmsprop(0.1, 0.9, 1e-3, eps_in_sqrt=False)),
    "RMSprop with all": (
        lambda p: torch.optim.RMSprop(p, 0.1, 0.9, 0.1, momentum=0.8, centered=True),
        optim.rmsprop(0.1, 0.9, 0.1, eps_in_sqrt=False, momentum=0.8, centered=True),
    ),
    "Adagrad": (
        lambda p: torch.optim.Adagrad(p, 0.1, eps=0.0, initial_accumulator_value=0.3),
        optim.adagrad(0.1, 0.3, 0.0),
    ),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, 0.5, 0.8, 1e-3), optim.adadelta(0.5, 0.8, 1e-3)),
    "Rprop": (lambda p: torch.optim.Rprop(p, 0.1), optim.rprop(0.1)),
}  # fmt: skip


def grads_of(step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]


def of_tree(values: list[torch.Tensor]) -> Any:
    w, b, head = values
    return {"blocks": [{"w": w, "b": b}], "head": head}


def in_torch(make: Any, params: list[torch.Tensor], steps: range, state: Any = None) -> tuple[Any, Any]:
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = make(list(zip([n.replace("/", ".") for n in NAMES], leaves, strict=True)))
    if state is not None:
        optimizer.load_state_dict(state(optimizer))
    for step in steps:
        for leaf, g in zip(leaves, grads_of(step), strict=True):
            leaf.grad = g.clone()
        optimizer.step()
    return [leaf.detach() for leaf in leaves], optimizer


def here(optimizer: Any, params: Any, steps: range, state: Any = None) -> tuple[Any, Any]:
    state = optimizer.init(params) if state is None else state
    for step in steps:
        updates, state = optimizer.update(of_tree(grads_of(step)), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def assert_close(mine: Any, theirs: list[torch.Tensor]) -> None:
    for a, b in zip(tree.leaves(mine), tree.leaves(of_tree(theirs)), strict=True):
        # float64: eight steps of a few roundings of 1e-16
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on_on_the_other_side(name):
    make, optimizer = PAIRS[name]
    start = grads_of(99)
    before, after, whole = range(STEPS), range(STEPS, 2 * STEPS), range(2 * STEPS)
    theirs, _ = in_torch(make, start, whole)
    # torch first, then here
    half, stopped = in_torch(make, start, before)
    state = optim.from_torch_state(optimizer.init(of_tree(half)), stopped.state_dict(), step=STEPS)
    mine, _ = here(optimizer, of_tree(half), after, state)
    assert_close(mine, theirs)
    # here first, then torch
    half, state = here(optimizer, of_tree(start), before)
    values = [half["blocks"][0]["w"], half["blocks"][0]["b"], half["head"]]
    other, loaded = in_torch(make, values, after, lambda o: optim.to_torch_state(state, o, step=STEPS))
    assert_close(of_tree(other), theirs)
    # there and back
    back = optim.to_torch_state(
        optim.from_torch_state(optimizer.init(mine), loaded.state_dict()), loaded, step=2 * STEPS
    )
    for index, values in loaded.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(back["state"][index][key], value, rtol=1e-14, atol=0), (key, index)


def test_groups_are_partitions_and_schedules_count():
    def make(named):
        (_, w), (_, b), (_, head) = named
        return torch.optim.AdamW([{"params": [b], "weight_decay": 0.0}, {"params": [head, w]}], 0.1, weight_decay=0.3)

    order = [NAMES[1], NAMES[2], NAMES[0]]
    labels = of_tree(["decayed", "plain", "decayed"])
    constant = schedules.constant_schedule(0.1)
    optimizer = optim.chain(
        optim.clip_by_global_norm(1e6),
        optim.partition(
            {"decayed": optim.adamw(constant, weight_decay=0.3), "plain": optim.adamw(0.1, weight_decay=0.0)}, labels
        ),
    )
    start = grads_of(99)
    theirs, _ = in_torch(make, start, range(2 * STEPS))
    half, stopped = in_torch(make, start, range(STEPS))
    state = optim.from_torch_state(optimizer.init(of_tree(half)), stopped.state_dict(), order)
    assert {int(count) for _, count in tree.get_all_with_path(state, "count")} == {STEPS}
    mine, state = here(optimizer, of_tree(half), range(STEPS, 2 * STEPS), state)
    assert_close(mine, theirs)
    filled = optim.to_torch_state(state, stopped, order)
    assert filled["param_groups"] == stopped.state_dict()["param_groups"] and sorted(filled["state"]) == [0, 1, 2]
    assert torch.equal(filled["state"][1]["exp_avg"], tree.get_all_with_path(state, "mu")[0][1]["head"])


def adam_state(**options: Any) -> tuple[Any, Any, Any]:
    leaves = [torch.nn.Parameter(p) for p in grads_of(0)]
    optimizer = torch.optim.Adam(list(zip(NAMES, leaves, strict=True)), **options)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    return optimizer, optimizer.state_dict(), optim.adam(0.1).init(of_tree(grads_of(0)))


def test_what_does_not_fit_is_named():
    optimizer, theirs, ours = adam_state()
    with pytest.raises(ValueError, match="no parameter 'blocks/0/b'; it has 'blocks/0/w'"):
        optim.from_torch_state(ours, theirs, ["blocks/0/w", "blocks/0/c", "head"])
    with pytest.raises(ValueError, match="expected 3 different names.* came 2, 2 of them different"):
        optim.from_torch_state(ours, theirs, NAMES[:2])
    with pytest.raises(ValueError, match=r"blocks/0/b: exp_avg: expected \(2,\), came \(3, 2\)"):
        optim.from_torch_state(ours, theirs, [NAMES[1], NAMES[0], NAMES[2]])
    with pytest.raises(ValueError, match="blocks/0/b: expected momentum_buffer for TraceState.trace, came 'exp_avg'"):
        optim.from_torch_state(optim.sgd(0.1, 0.9).init(of_tree(grads_of(0))), theirs)
    with pytest.raises(ValueError, match="blocks/0/w: nothing here takes torch's 'exp_avg', 'exp_avg_sq'"):
        optim.from_torch_state(optim.sgd(0.1).init(of_tree(grads_of(0))), theirs)
    with pytest.raises(TypeError, match="exp_avg: expected torch.float32, came torch.float64; cast"):
        optim.from_torch_state(tree.cast(ours, torch.float32), theirs)
    with pytest.raises(ValueError, match="came a tensor outside of them"):
        optim.from_torch_state(optim.ema(0.9).init(of_tree(grads_of(0))), theirs)
    with pytest.raises(ValueError, match="came nothing, torch has not stepped it"):
        optim.from_torch_state(ours, {"state": {}, "param_groups": theirs["param_groups"]})
    with pytest.raises(ValueError, match="nothing here takes torch's 'max_exp_avg_sq'"):
        optim.from_torch_state(ours, adam_state(amsgrad=True)[1])
    with pytest.raises(ValueError, match=r"one number of steps, came \[1, 5\]"):
        theirs["state"][0]["step"] = torch.tensor(5.0)
        optim.from_torch_state(ours, theirs)
    unnamed = torch.optim.SGD([torch.nn.Parameter(p) for p in grads_of(0)], 0.1)
    with pytest.raises(ValueError, match="expected names of the parameters, came none; pass names="):
        optim.from_torch_state(ours, unnamed.state_dict())
    counted = optim.sgd(schedules.constant_schedule(0.1)).init(of_tree(grads_of(0)))
    with pytest.raises(ValueError, match="torch's state has no step, and ours counts them; pass step="):
        optim.from_torch_state(counted, unnamed.state_dict(), NAMES)


def test_what_torch_cannot_take_is_named():
    optimizer, _, ours = adam_state()
    with pytest.raises(ValueError, match="expected one of Adam, .*came NAdam"):
        optim.to_torch_state(ours, torch.optim.NAdam(optimizer.param_groups[0]["params"]), NAMES)
    with pytest.raises(ValueError, match="blocks/0/w: SGD with these hyper-parameters keeps no exp_avg"):
        optim.to_torch_state(ours, torch.optim.SGD(optimizer.param_groups[0]["params"]), NAMES)
    with pytest.raises(ValueError, match="blocks/0/w: Adam keeps exp_avg, which our state has not"):
        optim.to_torch_state(optim.sgd(0.1).init(of_tree(grads_of(0))), optimizer, step=3)
    with pytest.raises(ValueError, match="torch's optimizer has no parameter 'blocks/0/b'"):
        optim.to_torch_state(ours, optimizer, ["blocks/0/w", "blocks/0/c", "head"])
    with pytest.raises(ValueError, match="Adam with amsgrad=True is no optimizer here"):
        optim.to_torch_state(ours, adam_state(amsgrad=True)[0])
    state = optim.rmsprop(0.1).init(of_tree(grads_of(0)))
    with pytest.raises(ValueError, match="RMSprop counts its steps, and our state does not; pass step="):
        optim.to_torch_state(state, torch.optim.RMSprop(optimizer.param_groups[0]["params"]), NAMES)
