"""Params that are split over ranks, and gathered when they are used: the step is the same, and the memory is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optimizers
import pytest
import steps
import torch
from ranks import Ranks
from test_data_parallel import assert_equal

import functrain as ft
from functrain.models import gpt2
from functrain.sharding import pieces


def without_bytes(found: list[Any]) -> list[Any]:
    return [(state, seen) for state, seen, _ in found]


@pytest.mark.parametrize(
    ("model", "accumulate", "options"),
    [
        ("mlp", 1, {}),
        ("mlp", 2, {"scaled": True}),
        ("gpt", 1, {}),
        ("gpt", 2, {}),
        ("gpt", 1, {"recompute": True}),
        ("gpt", 1, {"scaled": True}),
    ],
)
def test_split_params_take_the_same_step(two: Ranks, model: str, accumulate: int, options: dict[str, Any]) -> None:
    found = two.run(split, {"fsdp": 2}, model, accumulate, options)
    assert_equal(without_bytes(found), split({"fsdp": 1}, model, 2 * accumulate, options)[:2])


def split(mesh: dict[str, int], model: str, accumulate: int, options: dict[str, Any]) -> Any:
    return steps.split(mesh, model, accumulate, **options)


@pytest.mark.parametrize(("model", "accumulate"), [("mlp", 2), ("gpt", 1), ("gpt, whole", 1)])
def test_a_compiled_step_is_the_same(two: Ranks, model: str, accumulate: int, tmp_path: Path) -> None:
    found = two.run(split, {"fsdp": 2}, model, accumulate, {"programs": str(tmp_path)})
    assert_equal(without_bytes(found), split({"fsdp": 1}, model, 2 * accumulate, {})[:2])


def donated() -> str:
    plan = ft.sharding.Plan({"fsdp": 2}, [("**", ft.sharding.largest("fsdp"))], device="cpu")
    old = plan.shard({"w": torch.arange(4.0)})
    new, _ = ft.compile(lambda params: (ft.tree.map(lambda w: 2 * w, params), ft.tree.norm(params)), donate=True)(old)
    assert plan.whole(new)["w"].tolist() == [0.0, 2.0, 4.0, 6.0]
    try:
        old["w"] + 1
    except ft.transforms.ConsumedError as error:
        return str(error)
    return ""


def test_a_donated_leaf_that_is_split_is_consumed(two: Ranks) -> None:
    assert all(text.startswith("this tensor was donated") for text in two.run(donated))


def test_split_in_one_and_whole_in_the_other_axis(four: Ranks) -> None:
    found = four.run(split, {"data": 2, "fsdp": 2}, "gpt", 1, {})
    assert_equal(without_bytes(found), split({"fsdp": 1}, "gpt", 4, {})[:2])


def test_a_rank_has_its_part_of_params_and_moments(two: Ranks) -> None:
    whole = split({"fsdp": 1}, "gpt", 2, {})[2]
    for _, _, here in two.run(split, {"fsdp": 2}, "gpt", 1, {}):
        assert here <= whole / 2 * 1.01 + 100  # counters, a key


def misused() -> list[str]:
    """Do with split params what cannot be done."""
    plan = ft.sharding.Plan({"fsdp": 2}, [("**", ft.sharding.largest("fsdp"))], device="cpu", layers="blocks/**")
    state = ft.init_state(
        plan.shard({"blocks": [{"w": torch.ones(4)}], "head": torch.ones(2)}), ft.optim.sgd(0.1), key=ft.random.key(0)
    )
    batch, found = torch.ones(1, 4), []

    def multiplied(params: Any, batch: Any, key: Any) -> ft.Loss:
        return ft.Loss((batch * params["blocks"][0]["w"]).sum(), torch.tensor(1.0), {})

    def asked(params: Any, batch: Any, key: Any) -> ft.Loss:
        return ft.Loss(params["blocks"][0]["w"].sum(), torch.tensor(1.0), {})

    for loss in (multiplied, asked):
        try:
            ft.train_step(loss, ft.optim.sgd(0.1), plan=plan)(state, batch)
        except (RuntimeError, AttributeError) as error:
            found.append(str(error))
    try:
        ft.train_step(asked, ft.optim.sgd(0.1))(state, batch)
    except TypeError as error:
        found.append(str(error))
    return found


def test_a_split_leaf_that_is_used_before_it_is_gathered_is_named(two: Ranks) -> None:
    for mul, name, no_plan in two.run(misused):
        assert mul.startswith("mul: sharding: blocks/0/w is split over ranks") and "ft.nn.stack" in mul
        assert name.startswith("sum: sharding: blocks/0/w is split over ranks")
        assert "plan=" in no_plan


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("a", ft.sharding.P())], "b: expected one rule that fits, came none"),
        ([("a", ft.sharding.P()), ("*", ft.sharding.P())], "a: expected one rule that fits, came 'a', '\\*'"),
        ([("**", ft.sharding.P("fsdp", None, None))], "a: expected at most 2 dimensions"),
        ([("**", ft.sharding.P("fsdp", "fsdp"))], "a: expected each axis at one dimension, came 'fsdp' twice"),
        ([("**", ft.sharding.P("rows"))], "an axis of the mesh fsdp=1, came 'rows'"),
    ],
)
def test_rules_that_cannot_be_are_told(rules: Any, words: str) -> None:
    plan = ft.sharding.Plan({"fsdp": 1}, rules, device="cpu")
    with pytest.raises(ValueError, match=words):
        plan.shard({"a": torch.ones(2, 3), "b": torch.ones(3)})


def test_a_dimension_that_does_not_divide_is_told_with_one_that_does() -> None:
    from types import SimpleNamespace

    from functrain.sharding import placement

    grid: Any = SimpleNamespace(size=lambda axes: 4 if axes else 1, ordered=lambda axes: ("fsdp",) if axes else ())
    with pytest.raises(
        ValueError, match=r"w: expected dimension 1 of \(8, 6\) to divide by 4.*split dimension 0, of 8"
    ):
        placement.resolved({"w": torch.ones(8, 6)}, [("**", ft.sharding.P(None, "fsdp"))], grid)
    params = {"w": torch.ones(8, 12), "b": torch.ones(3)}
    assert placement.resolved(params, [("**", placement.largest("fsdp"))], grid) == {
        "w": ((), ("fsdp",)), "b": ((),),
    }  # fmt: skip


def test_optimizers_see_whole_matrices_where_leaves_are_split(two: Ranks) -> None:
    for found in two.run(optimizers.differences):
        assert found.keys() == set(optimizers.NAMES)
        assert [name for name, difference in found.items() if not difference < 1e-14] == []


def counted(mesh: dict[str, int], recompute: bool, again: bool = True) -> Any:
    """Return how many collectives of each kind a step of two layers takes, which are gathered `again` or kept for the
    backward pass."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "functrain_ranks" and "place" not in func.name() and "finish" not in func.name():
                found[func.name().partition("::")[2]] += 1
            return func(*args, **(kwargs or {}))

    plan = ft.sharding.Plan(mesh, gpt2.sharding(fsdp="fsdp"), device="cpu", reshard_after_forward=again)
    config = gpt2.Config(vocab=32, context=8, layers=2, heads=2, width=8, attention="math")

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        return ft.losses.next_token(gpt2.apply(params, batch["tokens"], config), batch["targets"])

    step = ft.train_step(ft.recompute_layers(loss_fn) if recompute else loss_fn, ft.optim.sgd(0.1), plan=plan)
    state = ft.init_state(plan.shard(gpt2.init(config, ft.random.key(0))), ft.optim.sgd(0.1), key=ft.random.key(0))
    batch = {"tokens": torch.zeros(2, 8).long(), "targets": torch.zeros(2, 8).long()}
    with Counting():
        step(state, batch)
    return dict(found)


def test_collectives_are_as_many_as_layers_and_one(two: Ranks, four: Ranks) -> None:
    """One gather for each layer and one for the rest, and as many sums back; layers that are not kept for the backward
    pass, or are recomputed in it, are gathered twice."""
    for recompute, again, gathers in ((False, False, 3), (False, True, 5), (True, False, 5), (True, True, 5)):
        for found in two.run(counted, {"fsdp": 2}, recompute, again):
            # one sum for loss, weight and metrics
            assert found == {"gather": gathers, "scatter": 3, "begin_sum": 1}
    for found in four.run(counted, {"data": 2, "fsdp": 2}, False):
        # and one of gradients over the axis that splits nothing
        assert found == {"gather": 5, "scatter": 3, "begin_sum": 2}


def differentiated(again: bool) -> Any:
    """Return the gradient by split layers, that of its square, and what is said of a write into what is saved."""
    plan = ft.sharding.Plan(
        {"fsdp": 2}, [("**", ft.sharding.P("fsdp"))], device="cpu", layers="blocks/**", reshard_after_forward=again
    )
    whole = {"blocks": [{"w": torch.linspace(0.1, 1.0, 8).view(4, 2)}, {"w": torch.linspace(-1.0, 1.0, 8).view(4, 2)}]}
    params = plan.shard(whole)
    x = torch.linspace(-1, 1, 4).view(1, 4)

    spread = plan.spread(params)
    parts = ft.tree.map(lambda leaf: leaf.detach().requires_grad_(), pieces.local(params))

    def of(parts: Any, block: Any) -> torch.Tensor:
        return ft.nn.stack(block, plan.bind(parts, spread)["blocks"], x).square().sum()

    def block(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ layer["w"]) @ layer["w"].T

    def writing(layer: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x @ layer["w"])
        return y.mul_(2.0) @ layer["w"].T

    with plan.entered():
        leaves = ft.tree.leaves(parts)
        first = torch.autograd.grad(of(parts, block), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        found = [*(x.detach() for x in first), *second]
        try:
            ft.grad(of)(parts, writing)
            said = ""
        except RuntimeError as error:
            said = str(error)
    return found, said


def test_layers_that_are_gathered_again_have_the_derivatives_of_those_that_are_kept(two: Ranks) -> None:
    for (again, said), (kept, also) in zip(two.run(differentiated, True), two.run(differentiated, False), strict=True):
        ft.testing.assert_trees_equal(again, kept)
        assert "modified by an inplace operation" in said and "modified by an inplace operation" in also
