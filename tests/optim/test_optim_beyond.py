"""What users of optax ask for and it does not have: decay by depth, loss spikes, moments in half the memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_optim_laws import close, draw_like, equal

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

# ---- learning rates by depth ----------------------------------------------------------------------------------------

PARAMS = {"embed": torch.ones(3), "blocks": [{"w": torch.ones(2, 2)}, {"w": -torch.ones(2, 2)}], "head": torch.ones(2)}


def depth(path: str) -> int:
    return int(path.split("/")[1]) + 1 if path.startswith("blocks") else 3 * path.startswith("head")


def test_decay_by_depth_is_torch_with_a_learning_rate_for_each_group() -> None:
    mine = ours.chain(ours.adamw(0.1, weight_decay=0.1), ours.layerwise_decay(0.8, depth))
    groups = [
        {"params": [leaf.clone().requires_grad_()], "lr": 0.1 * 0.8 ** (3 - depth(path))}
        for path, leaf in tree.items(PARAMS)
    ]
    theirs = torch.optim.AdamW(groups, weight_decay=0.1)
    params, state = PARAMS, mine.init(PARAMS)
    for step in range(5):
        grads = draw_like(params, step)
        for group, g in zip(groups, tree.leaves(grads), strict=True):
            group["params"][0].grad = g.clone()
        theirs.step()
        updates, state = mine.update(grads, state, params)
        params = ours.apply_updates(params, updates)
    for got, group in zip(tree.leaves(params), groups, strict=True):
        # five steps of a few roundings of 6e-8
        torch.testing.assert_close(got, group["params"][0].detach(), rtol=1e-5, atol=1e-6)


def test_the_rate_by_depth_may_be_a_schedule_or_a_tensor_and_the_deepest_layer_given() -> None:
    make = [lambda _: torch.tensor(0.5), torch.tensor(0.5), 0.5]
    first, *others = [tx.update(PARAMS, tx.init(PARAMS))[0] for tx in (ours.layerwise_decay(m, depth, 4) for m in make)]
    assert all(equal(first, other) for other in others)
    assert torch.equal(first["head"], 0.5 * PARAMS["head"]) and torch.equal(first["embed"], 0.5**4 * PARAMS["embed"])


def test_a_depth_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="head: expected a depth, an integer from 0 to deepest=2, came 3"):
        ours.layerwise_decay(0.8, depth, 2).init(PARAMS)
    with pytest.raises(ValueError, match="blocks/0/w: expected a depth, an integer from 0, came -1"):
        ours.layerwise_decay(0.8, lambda _: -1).init(PARAMS)


# ---- loss spikes ----------------------------------------------------------------------------------------------------

LOSSES = [3.0, 2.9, 3.1, 3.0, 9.0, 3.0, math.nan, 2.9, math.inf, -9.0, 3.0, 8.0, 3.1, 3.0, 2.8, 3.0, 3.4, 3.0]


def is_taken(losses: list[float], window: int, sigmas: float) -> list[bool]:
    """Return which steps are taken, by `torch.std_mean` of the finite losses before each."""
    taken = []
    for i, loss in enumerate(losses):
        before = [x for x in losses[:i] if math.isfinite(x)][-window:]
        enough = len(before) >= max(2, window // 2)
        std, mean = torch.std_mean(torch.tensor(before)) if enough else (torch.tensor(math.inf), torch.tensor(0.0))
        taken.append(math.isfinite(loss) and loss - float(mean) <= sigmas * float(std))
    return taken


@pytest.mark.parametrize(("window", "sigmas"), [(8, 6.0), (4, 3.0), (2, 1.0), (128, 1.0)])
def test_a_spike_leaves_params_and_moments_as_they_are(window: int, sigmas: float) -> None:
    tx, plain = ours.skip_loss_spikes(ours.adam(0.1), window, sigmas), ours.adam(0.1)
    params = reference = {"w": torch.ones(2, 3), "b": torch.tensor(1.0)}
    state, kept = tx.init(params), plain.init(params)
    taken = is_taken(LOSSES, window, sigmas)
    for step, loss in enumerate(LOSSES):
        grads = tree.map(lambda p, loss=loss: p * loss, draw_like(params, step))
        updates, state = tx.update(grads, state, params, value=torch.tensor(loss))
        params = ours.apply_updates(params, updates)
        if taken[step]:
            updates, kept = plain.update(grads, kept, reference)
            reference = ours.apply_updates(reference, updates)
    assert equal((params, state.inner_state), (reference, kept))
    assert int(state.skipped) == taken.count(False)
    assert window == 128 or taken.count(False) > 2  # what is not finite, and spikes


def test_a_loss_that_stays_high_is_no_spike() -> None:
    tx = ours.skip_loss_spikes(ours.identity(), 4, 2.0)
    state, skips = tx.init({}), []
    for loss in [1.0, 1.1, 1.0, 1.1] + [5.0] * 5:
        _, state = tx.update({}, state, value=loss)
        skips.append(int(state.skipped))
    assert skips == [0] * 4 + [1] * 5


def test_spikes_need_a_loss_and_a_window() -> None:
    tx = ours.skip_loss_spikes(ours.identity())
    with pytest.raises(ValueError, match="skip_loss_spikes needs the loss: call update"):
        tx.update({}, tx.init({}))
    with pytest.raises(ValueError, match="a window of at least 2 losses, came 1"):
        ours.skip_loss_spikes(ours.identity(), 1)


# ---- moments in half the memory -------------------------------------------------------------------------------------


def test_rounding_is_one_of_two_neighbours_and_right_on_average() -> None:
    x = torch.tensor([1 + 2.0**-10, -3.3, 1e-30, 7e-41, 0.0, 5.0])
    many = ours.round_stochastically(x[:, None].expand(-1, 40000).contiguous(), ft.random.key(1)).double()
    bits = x.view(torch.int32) & ~0xFFFF
    below, above = bits.view(torch.float32).double(), (bits + 0x10000).view(torch.float32).double()
    assert ((many == below[:, None]) | (many == above[:, None])).all()
    assert (many[-2:] == x[-2:, None]).all(), "a bfloat16 number is itself"
    part = ((x.double() - below) / (above - below)).clamp(0, 1)
    # four standard deviations of the mean of 40000 draws, each above with probability `part`
    off = ((many.mean(1) - x.double()) / (above - below)).abs()
    assert (off <= 4 * torch.sqrt(part * (1 - part) / 40000) + 1e-12).all()


def test_rounding_leaves_what_is_not_finite_and_the_largest() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(torch.bfloat16).max])
    x = torch.cat([x, torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)])
    for seed in range(20):
        got = ours.round_stochastically(x, ft.random.key(seed))
        assert torch.equal(got.isnan(), x.isnan()) and torch.equal(got[:2].float(), x[:2]) and got[3] == x[3]


def test_moments_of_bfloat16_follow_those_of_float32_on_average_and_the_nearest_do_not() -> None:
    params = {"w": torch.zeros(4000)}
    rounded, exact = ours.round_state_stochastically(ours.scale_by_adam()), ours.scale_by_adam()
    s, r = rounded.init(params), exact.init(params)
    nearest, moving = exact.init(params), None
    for step in range(800):
        g = {"w": torch.full((4000,), 1.0 + 0.5 * math.sin(step))}
        _, s = rounded.update(g, s)
        _, r = exact.update(g, r)
        wide = nearest._replace(mu=tree.cast(nearest.mu, torch.float32), nu=tree.cast(nearest.nu, torch.float32))
        _, moving = exact.update(g, wide)
        nearest = moving._replace(mu=tree.cast(moving.mu, torch.bfloat16), nu=tree.cast(moving.nu, torch.bfloat16))
    assert s.inner_state.nu["w"].dtype == s.inner_state.mu["w"].dtype == torch.bfloat16
    for field in ("mu", "nu"):
        want = getattr(r, field)["w"].double().mean()
        # a random walk of 800 steps of at most 2**-8, the mean of 4000 of them: 0.11 / 63 of the value
        assert abs(getattr(s.inner_state, field)["w"].double().mean() - want) < 4e-3 * want
    assert abs(nearest.nu["w"].double().mean() - r.nu["w"].double().mean()) > 0.1 * r.nu["w"].double().mean()


def test_a_bfloat16_state_halves_the_memory_and_trains_as_well() -> None:
    target = {"w": torch.linspace(-1, 1, 64).reshape(8, 8), "b": torch.ones(8)}
    params = {"w": torch.zeros(8, 8), "b": torch.zeros(8)}
    ends = []
    for tx in (ours.adamw(0.02), ours.round_state_stochastically(ours.adamw(0.02), ft.random.key(3))):
        p, state = params, tx.init(params)
        for _ in range(150):
            updates, state = tx.update(tree.sub(p, target), state, p)
            p = ours.apply_updates(p, updates)
        ends.append((float(tree.norm(tree.sub(p, target))), tree.bytes(state)))
    (loss, size), (rounded_loss, rounded_size) = ends
    assert loss < 0.05 and rounded_loss < 0.05
    assert rounded_size == size / 2 + 4 + 8  # half of the moments and of the count, which stays whole, and a key


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_compiled_rounding_has_the_bits_of_the_eager_one() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 100)
    compiled = torch.compile(ours.round_stochastically, fullgraph=True)
    for seed in range(3):
        assert equal(compiled(x, ft.random.key(seed)), ours.round_stochastically(x, ft.random.key(seed)))


def test_the_derivative_of_rounding_is_that_of_the_mean() -> None:
    x = torch.tensor([1.3, math.inf, -2.1])
    gradient = torch.func.grad(lambda x: ours.round_stochastically(x, ft.random.key(0)).float()[::2].sum())(x)
    assert torch.equal(gradient, torch.tensor([1.0, 0.0, 1.0]))


def test_keys_make_the_rounding() -> None:
    params, ends = {"w": torch.full((50,), 0.3)}, []
    for seed in (1, 1, 2):
        tx: Any = ours.round_state_stochastically(ours.trace(0.9), ft.random.key(seed))
        ends.append(tx.update(params, tx.update(params, tx.init(params))[1])[1].inner_state)
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2]) and close(ends[0], ends[2], 0.02)
