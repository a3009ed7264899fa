"""Meshes and plans: where ranks stand, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import steps
import torch
from ranks import Ranks

import functrain as ft
from functrain.sharding import plan as plans


def places() -> Any:
    mesh = ft.sharding.Mesh({"data": 2, "tensor": 2}, device="cpu")
    with ft.sharding.Plan({"data": 2, "tensor": 2}, device="cpu").entered():
        x = torch.tensor(float(10**mesh.rank))
        sums = [ft.sharding.sum(x, axes).item() for axes in ("data", "tensor", ("tensor", "data"))]
        place = [ft.sharding.index(axes, x).item() for axes in ("data", "tensor", ("data", "tensor"))]
    return place, sums, [mesh.index(axes) for axes in ("data", "tensor")]


def test_ranks_stand_in_rows_whose_last_axis_is_of_neighbours(four: Ranks) -> None:
    assert four.run(places) == [
        ([0, 0, 0], [101.0, 11.0, 1111.0], [0, 0]),
        ([0, 1, 1], [1010.0, 11.0, 1111.0], [0, 1]),
        ([1, 0, 2], [101.0, 1100.0, 1111.0], [1, 0]),
        ([1, 1, 3], [1010.0, 1100.0, 1111.0], [1, 1]),
    ]


@pytest.mark.parametrize(
    ("mesh", "options", "words"),
    [
        ({}, {}, "a mesh with an axis"),
        ({"data": 0}, {}, "at least 1 rank, came data=0"),
        ({"a b": 1}, {}, "names of axes.*came 'a b'"),
        ({"data": 2}, {}, "the mesh data=2 has places, 2, came 1; start it by torchrun --nproc-per-node 2"),
        ({"data": 1}, {"reduce_dtype": torch.int32}, "floating-point reduce_dtype, came torch.int32"),
    ],
)
def test_a_plan_that_cannot_be_is_told(mesh: dict[str, int], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ft.sharding.Plan(mesh, device="cpu", **options)


def test_buckets_hold_all_leaves_in_order_and_a_large_one_alone() -> None:
    leaves = [torch.zeros(n) for n in (3, 4, 100, 1, 2, 8)]
    found = plans.buckets(leaves, bytes=40)
    assert [[leaf.numel() for leaf in some] for some in found] == [[3, 4], [100], [1, 2], [8]]
    assert plans.buckets([]) == []


def test_a_plan_of_one_rank_changes_no_step() -> None:
    import steps

    plan = ft.sharding.Plan({"data": 1}, device="cpu")
    made = [ft.train_step(steps.loss_fn, steps.optimizer(), plan=p) for p in (None, plan)]
    state = ft.init_state(steps.params(), steps.optimizer(), key=ft.random.key(3))
    (_, without), (_, with_plan) = [step(state, steps.batches()[0]) for step in made]
    assert without["loss"] == pytest.approx(with_plan["loss"].item(), rel=1e-14)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "expected a plan, or a rank and a world"),
        ({"rank": 0}, "expected a plan, or a rank and a world"),
        ({"rank": 0, "world": 1, "accumulate": 0}, "accumulate of at least 1 slice, came 0"),
    ],
)
def test_a_shard_needs_one_way_to_know_its_rank(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ft.data.shard([torch.zeros(3)], **given)


def test_options_that_have_no_meaning_under_a_plan_are_refused() -> None:
    import steps

    plan = ft.sharding.Plan({"data": 1}, device="cpu")
    with pytest.raises(ValueError, match="accumulate beside a plan, came accumulate_rows"):
        ft.train_step(steps.loss_fn, steps.optimizer(), accumulate_rows=2, plan=plan)
    with pytest.raises(TypeError, match="return a Loss"):
        state = ft.init_state(steps.params(), steps.optimizer(), key=ft.random.key(3))
        ft.train_step(lambda params, batch, key: params["out"].sum(), steps.optimizer(), plan=plan)(
            state, steps.batches()[0]
        )


def test_a_sweep_over_ranks_is_refused(two: Ranks) -> None:
    import steps

    assert all("came one with a plan of 2 ranks" in text for text in two.run(steps.swept))


@pytest.mark.parametrize("split", [False, True])
def test_gradients_are_added_in_the_dtype_that_is_asked_for(two: Ranks, split: bool) -> None:
    import steps

    exact, rounded = (
        [state.params["in"] for state, _ in two.run(steps.train_plain, 2, dtype, split)] for dtype in (None, "bf16")
    )
    assert torch.equal(rounded[0], rounded[1])
    # AdamW makes of a relative error of 2 ** -8 one of the same size of a step of 0.01
    difference = (exact[0] - rounded[0]).abs().max()
    assert 1e-7 < difference < 1e-3


def disagreeing(what: str) -> str:
    """Return what a rank says of ranks that are not alike."""
    import os

    P = ft.sharding.P
    last = os.environ["RANK"] == "1"
    try:
        if what == "mesh":
            ft.sharding.Plan({"fsdp" if last else "data": 2}, device="cpu")
        elif what == "rules":
            ft.sharding.Plan({"data": 2}, [("**", P("data") if last else P())], device="cpu")
        elif what == "whole":
            plan = ft.sharding.Plan({"data": 2}, [("**", P("data"))], device="cpu")
            step = ft.train_step(
                lambda params, x, key: ft.Loss(params["w"].sum(), x.sum(), {}), ft.optim.sgd(0.1), plan=plan
            )
            step(ft.init_state({"w": torch.ones(4)}, ft.optim.sgd(0.1), key=ft.random.key(0)), torch.ones(1))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("mesh", "rank 1: expected the mesh of rank 0, data=2, came fsdp=2; start all ranks alike"),
        ("rules", "rank 1: expected the plan's params of rank 0, (('**', P()),), came (('**', P('data')),)"),
        (
            "whole",
            "w: expected a leaf that is split by P(('data',)), as the rules say, came one by P(None); begin with",
        ),
    ],
)
def test_ranks_that_are_not_alike_are_told_on_all(two: Ranks, what: str, told: str) -> None:
    assert all(told in said for said in two.run(disagreeing, what))


def unrolled() -> tuple[Any, str]:
    """Return the last state of an unrolled step with a plan, whole, and what is said of its gradient."""
    plan = ft.sharding.Plan({"data": 2}, device="cpu")
    step = ft.train_step(steps.loss_fn, steps.optimizer(), plan=plan)
    state = ft.init_state(steps.params(), steps.optimizer(), key=ft.random.key(3))
    parts = ft.data.shard(steps.batches(), plan=plan)

    def last(params: Any) -> Any:
        return ft.train.unroll(step, state._replace(params=params), [parts[t] for t in range(3)])[0]

    try:
        ft.grad(lambda params: ft.tree.norm(last(params).params))(state.params)
        said = ""
    except NotImplementedError as error:
        said = str(error)
    return last(state.params), said


def test_an_unrolled_step_is_the_loop_and_its_gradient_over_ranks_is_refused(two: Ranks) -> None:
    alone, _ = steps.train(1, 2)
    for found, said in two.run(unrolled):
        ft.testing.assert_trees_close(found, alone, rtol=1e-11, atol=1e-13)
        assert "expected tensors that nobody differentiates to add over ranks" in said
