"""A rehearsal on fake tensors says what real ranks hold, send and compute."""

from __future__ import annotations

from typing import Any

import layers
import pytest
import steps
import torch
from ranks import Ranks

import functrain as ft
from functrain.recipes import dry_run
from functrain.recipes.config import PRESETS
from functrain.sharding import rehearsal

MESH = {"fsdp": 2, "tensor": 2}


def made(plan: ft.sharding.Plan) -> Any:
    """Return a step of a model that is not small beside its batch, a state, and the rows of this rank."""
    from functrain.models import gpt2

    config = gpt2.Config(vocab=256, context=32, layers=3, heads=4, width=64, attention="math")

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        hidden = gpt2.hidden(params, batch["tokens"], config)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    step = ft.train_step(loss_fn, steps.optimizer(), plan=plan)
    state = ft.init_state(plan.shard(gpt2.init(config, ft.random.key(0))), steps.optimizer(), key=ft.random.key(0))
    return step, state, {name: torch.zeros(4, 32).long() for name in ("tokens", "targets")}


def plan_of(mesh: dict[str, int]) -> ft.sharding.Plan:
    rules = layers.gpt2.sharding(fsdp="fsdp", tensor="tensor")
    return ft.sharding.Plan(mesh, rules, tensor="tensor", stream=True, device="cpu")


def really(mesh: dict[str, int]) -> Any:
    """Return what a real rank counts, and the peak of torch's allocator beside what was held before."""
    from torch.profiler import ProfilerActivity, profile

    plan = plan_of(mesh)
    step, state, batch = made(plan)
    step(state, batch)  # what is made once
    found = rehearsal.measured(plan, step, state, batch)
    peaks = []
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step(state, batch)
        live = peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        peaks.append(peak)
    held = sum(leaf.nbytes for leaf in ft.tree.leaves(batch)) + found.state_bytes
    # the least: on a busy machine a thread of gloo's may let go of what was sent later than the step does
    return found, min(peaks) + held


def test_four_real_ranks_send_and_hold_what_was_rehearsed(four: Ranks) -> None:
    with rehearsal.pretended(4):
        plan = plan_of(MESH)
        said = rehearsal.rehearse(plan, lambda: made(plan))
    for found, allocated in four.run(really, MESH):
        assert found.collectives == said.collectives and len(said.collectives) >= 4
        assert found.flops == said.flops and found.state_bytes == said.state_bytes
        assert abs(found.peak_bytes / said.peak_bytes - 1) < 0.05
        assert abs(allocated / said.peak_bytes - 1) < 0.05
    assert sum(said.at_peak.values()) == said.peak_bytes
    # what DTensor adds along both axes it adds at once, which needs a private method of torch's DeviceMesh
    assert "fsdp,tensor" in {row.axes for row in said.collectives if row.kind == "sum"}


def test_more_ranks_hold_less_and_recomputing_gathers_twice() -> None:
    found = {}
    for ranks in (4, 64):
        with rehearsal.pretended(ranks):
            plan = plan_of({"fsdp": ranks // 2, "tensor": 2})
            found[ranks] = rehearsal.rehearse(plan, lambda plan=plan: made(plan))  # type: ignore[misc]
    assert found[64].state_bytes < 0.15 * found[4].state_bytes
    assert [row[:3] for row in found[4].collectives] == [row[:3] for row in found[64].collectives]


def test_layers_are_let_go_of_between_the_passes() -> None:
    """Of three layers that are gathered again, one is whole at the peak, beside what it is cut from, and each is sent
    once more."""
    found = {}
    for again in (True, False):
        with rehearsal.pretended(2):
            rules = layers.gpt2.sharding(fsdp="fsdp")
            plan = ft.sharding.Plan({"fsdp": 2}, rules, device="cpu", reshard_after_forward=again)
            found[again] = rehearsal.rehearse(plan, lambda plan=plan: made(plan))  # type: ignore[misc]
    layer = 4 * (12 * 64**2 + 13 * 64)
    saved = found[False].at_peak["gathered params"] - found[True].at_peak["gathered params"]
    assert saved > 1.2 * layer and found[False].peak_bytes - found[True].peak_bytes > 1.9 * layer
    (again, kept) = (next(row for row in found[which].collectives if row.kind == "gather") for which in (True, False))
    assert again.calls == kept.calls + 3 and again.size_bytes == kept.size_bytes + 3 * layer


def test_where_ranks_run_nothing_is_pretended(two: Ranks) -> None:
    assert all("came one where torch.distributed runs" in said for said in two.run(pretending))


def pretending() -> str:
    try:
        ft.sharding.Plan({"data": 2}, device="cpu")
        with rehearsal.pretended(4):
            return ""
    except RuntimeError as error:
        return str(error)


def test_sending_goes_by_the_slowest_link() -> None:
    gpu, mesh = dry_run.GPUS["h100"], {"data": 2, "fsdp": 4, "tensor": 2}
    how: dict[str, Any] = {"network_bytes": 50e9, "node": 8}

    def seconds(kind: str, axes: str) -> float:
        return dry_run.sending(rehearsal.Collective(kind, axes, 1, 10**9), mesh, gpu, **how)

    assert seconds("gather", "tensor") == pytest.approx(1e9 / 2 / 450e9)  # two neighbours in a machine
    assert seconds("gather", "fsdp") == pytest.approx(1e9 * 3 / 4 / 450e9)  # eight GPUs from the first to the last
    assert seconds("sum", "data") == pytest.approx(2 * 1e9 / 2 / 50e9)
    assert seconds("sum", "data,fsdp") == pytest.approx(2 * 1e9 * 7 / 8 / 50e9)


def test_a_preset_is_rehearsed_on_a_thousand_ranks() -> None:
    config = PRESETS["llama-1b"]
    import dataclasses

    small = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2), batch=2048)
    mesh = {"data": 16, "fsdp": 8, "tensor": 8}
    found = dry_run.estimate(small, mesh, dry_run.GPUS["h200"], network_bytes=50e9, node=8)
    assert found.ranks == 1024 and 0 < found.best_seconds < found.worst_seconds
    assert {row.axes for row in found.found.collectives} >= {"fsdp", "tensor"}
    assert found.found.state_bytes < 3 * 4 * found.parameters / 40


def test_few_layers_say_what_many_take() -> None:
    import dataclasses

    config = dataclasses.replace(PRESETS["tiny"], model=dataclasses.replace(PRESETS["tiny"].model, layers=7), batch=8)
    how: dict[str, Any] = {"network_bytes": 50e9, "node": 8}
    proposals = dry_run.propose(config, 2, dry_run.GPUS["h100"], **how)
    for mesh, peak, best, worst in proposals[:2]:
        whole = dry_run.estimate(config, mesh, dry_run.GPUS["h100"], **how)
        assert peak == pytest.approx(whole.found.peak_bytes, rel=0.02)
        assert (best, worst) == pytest.approx((whole.best_seconds, whole.worst_seconds), rel=0.02)
