"""Laws of differentially private training: the step, the sampling, the accountant."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import optim, tree
from functrain.train import privacy

KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    errors = batch["x"] @ params["w"] + params["b"] - batch["y"]  # (B,)
    return ft.Loss(torch.sum(batch["mask"] * errors**2), torch.sum(batch["mask"]), {})


def problem(rows: int) -> tuple[Any, Any]:
    params = {"w": draw(0, 3), "b": draw(1)}
    return params, {"x": draw(2, rows, 3), "y": draw(3, rows), "mask": torch.ones(rows, dtype=torch.float64)}


def stepped(params: Any, batch: Any, optimizer: Any) -> tuple[Any, Any]:
    state = ft.init_state(params, optimizer, key=KEY)
    new, metrics = ft.train.private_step(loss_fn, optimizer)(state, batch)
    return new.params, metrics


def test_without_noise_and_clip_a_private_step_is_a_step() -> None:
    params, batch = problem(6)
    got, metrics = stepped(params, batch, optim.dpsgd(0.1, l2_norm_clip=1e9, noise_multiplier=0.0, seed=0))
    sgd = optim.sgd(0.1)
    want, plain = ft.train_step(loss_fn, sgd)(ft.init_state(params, sgd, key=KEY), batch)
    # some dozen float64 roundings of numbers of size 10
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), got, want.params)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-12, atol=1e-12)


def test_no_example_moves_the_mean_by_more_than_the_clip() -> None:
    params, batch = problem(6)
    optimizer = optim.dpsgd(1.0, l2_norm_clip=0.5, noise_multiplier=0.0, seed=0)
    with_it, _ = stepped(params, batch, optimizer)
    absent = batch | {"mask": torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)}
    without, _ = stepped(params, absent, optimizer)
    # its gradient has norm 0.5 when clipped, a sixth of which is in the mean; every gradient here is longer than 0.5
    torch.testing.assert_close(tree.norm(tree.sub(with_it, without)).item(), 0.5 / 6, rtol=1e-9, atol=0)


def test_a_weight_scales_no_examples_own_mean() -> None:
    params, batch = problem(4)
    optimizer = optim.dpsgd(1.0, l2_norm_clip=1e9, noise_multiplier=0.0, seed=0)
    heavy, _ = stepped(params, batch | {"mask": 3 * batch["mask"]}, optimizer)
    light, _ = stepped(params, batch, optimizer)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), heavy, light)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_steps_without_noise_equal_opacus(momentum: float | None) -> None:
    """Opacus' optimizer with noise 0 leaves the sum of clipped gradients, divided by the expected batch size."""
    params, batch = problem(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus' own, about its hooks
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        module = torch.nn.Linear(3, 1).double()
        with torch.no_grad():
            module.weight.copy_(params["w"][None])
            module.bias.copy_(params["b"][None])
        hooked = GradSampleModule(module, loss_reduction="sum")
        inner = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum or 0.0)
        theirs = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=6)
        for _ in range(5):
            theirs.zero_grad()
            torch.sum((hooked(batch["x"])[:, 0] - batch["y"]) ** 2).backward()
            theirs.step()
    optimizer = optim.dpsgd(0.1, l2_norm_clip=0.7, noise_multiplier=0.0, seed=0, momentum=momentum)
    step, state = ft.train.private_step(loss_fn, optimizer), ft.init_state(params, optimizer, key=KEY)
    for _ in range(5):
        state, metrics = step(state, batch)
        assert metrics["gradient_norm_mean"] > 0.7
    # opacus divides by norm + 1e-6: a clipped gradient is shorter by 0.7 * 1e-6 / norm < 1e-6, a step by 0.1 of that
    # over 1 - momentum
    bound = 5 * 0.1 * 1e-6 / (1 - (momentum or 0.0))
    torch.testing.assert_close(state.params["w"], module.weight.detach()[0], rtol=0, atol=bound)
    torch.testing.assert_close(state.params["b"], module.bias.detach()[0], rtol=0, atol=bound)


def test_a_batch_of_nothing_moves_by_noise_alone() -> None:
    params, batch = problem(4)
    absent = batch | {"mask": torch.zeros_like(batch["mask"])}
    optimizer = optim.dpsgd(1.0, l2_norm_clip=2.0, noise_multiplier=0.5, seed=3)
    got, metrics = stepped(params, absent, optimizer)
    aggregate = optim.differentially_private_aggregate(2.0, 0.5, seed=3)
    zeros = tree.map(lambda p: torch.zeros((4, *p.shape), dtype=p.dtype), params)
    noise, drawn = aggregate.update(zeros, aggregate.init(params), params)
    assert not torch.equal(noise["w"], aggregate.update(zeros, drawn, params)[0]["w"])
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-15), got, tree.sub(params, noise))
    assert metrics["loss"] == metrics["weight"] == metrics["gradient_norm_mean"] == 0 and tree.norm(noise) > 0


def test_padded_rows_do_not_count_in_the_mean_norm() -> None:
    params, batch = problem(4)
    optimizer = optim.dpsgd(1.0, l2_norm_clip=1.0, noise_multiplier=0.0, seed=0)
    _, alone = stepped(params, tree.map(lambda leaf: leaf[:2], batch), optimizer)
    _, padded = stepped(params, batch | {"mask": torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)}, optimizer)
    assert torch.equal(alone["gradient_norm_mean"], padded["gradient_norm_mean"])
    _, one = stepped(params, tree.map(lambda leaf: leaf[:1], batch), optimizer)
    assert one["gradient_norm_mean"] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_padded_row_holds_reaches_neither_params_nor_metrics(bad: float) -> None:
    params, batch = problem(4)
    batch = batch | {"mask": torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)}
    dirty = batch | {"x": batch["x"].index_fill(0, torch.tensor([1]), bad)}
    for optimizer in (optim.dpsgd(0.1, 0.5, 1.0, 3), optim.dpsgd(0.1, 1e9, 0.0, 3)):
        clean, came = stepped(params, batch, optimizer), stepped(params, dirty, optimizer)
        for one, other in zip(tree.leaves(clean), tree.leaves(came), strict=True):
            assert torch.equal(one, other) and torch.isfinite(other).all()


def test_bfloat16_gradients_are_clipped_and_added_in_float32() -> None:
    grads = draw(5, 64, 1000).bfloat16()
    aggregate = optim.differentially_private_aggregate(0.5, 0.25, seed=0)
    params = torch.zeros(1000, dtype=torch.bfloat16)
    got, _ = aggregate.update(grads, aggregate.init(params), params)
    want, _ = aggregate.update(grads.float(), aggregate.init(params), params)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    summed, _ = optim.per_example_global_norm_clip(grads, 0.5)
    wide, _ = optim.per_example_global_norm_clip(grads.float(), 0.5)
    assert torch.equal(summed, wide.bfloat16())


@pytest.mark.parametrize("last", [optim.reduce_on_plateau(), optim.polyak_sgd(), optim.momo()])
def test_an_optimizer_that_takes_the_loss_is_refused(last: Any) -> None:
    params, batch = problem(3)
    optimizer = optim.chain(optim.differentially_private_aggregate(1.0, 1.0, seed=0), last)
    with pytest.raises(TypeError, match="takes the loss of the batch as value=, which is not private"):
        stepped(params, batch, optimizer)


def test_a_loaded_run_draws_the_noise_that_was_to_come(tmp_path: Any) -> None:
    params, batch = problem(4)
    optimizer = optim.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=1.0, seed=0, momentum=0.9)
    step, state = ft.train.private_step(loss_fn, optimizer), ft.init_state(params, optimizer, key=KEY)
    state, _ = step(state, batch)
    ft.checkpoint.save(tmp_path / "one", state)
    loaded = ft.checkpoint.load(tmp_path / "one", like=state)
    ends = [step(step(begin, batch)[0], batch)[0] for begin in (state, loaded)]
    assert all(tree.leaves(tree.map(torch.equal, *ends)))
    assert tree.norm(tree.sub(ends[0].params, step(state, batch)[0].params)) > 0


# ---- the accountant ---------------------------------------------------------------------------------------------


def test_epsilon_of_one_full_gaussian_step_is_the_closed_form() -> None:
    # Balle and Wang 2018 (arXiv:1805.06530), theorem 8, for sensitivity 1 and deviation 2
    from scipy.stats import norm

    sigma, eps = 2.0, privacy.epsilon(noise_multiplier=2.0, sampling_rate=1.0, steps=1, delta=1e-5)
    delta = norm.cdf(0.5 / sigma - eps * sigma) - 2.718281828459045**eps * norm.cdf(-0.5 / sigma - eps * sigma)
    assert delta == pytest.approx(1e-5, rel=2e-2)  # the distribution is a grid of 1e-4 in epsilon, pessimistic


def test_epsilon_is_near_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus' own, about its hooks
        from opacus.accountants import PRVAccountant, RDPAccountant

    ours = privacy.epsilon(noise_multiplier=1.1, sampling_rate=256 / 60000, steps=1000, delta=1e-5)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(1.1, 256 / 60000, 1000)]
    # opacus' estimate is an upper bound with an error of 0.01; Renyi's is looser
    assert ours <= prv.get_epsilon(1e-5) <= ours + 0.02 and ours < rdp.get_epsilon(1e-5)
    # the event that we account for is opacus': Renyi's divergences of the same orders are the same closed form
    accounting, orders = privacy._accounting(), list(range(2, 64))
    renyi = accounting.rdp.RdpAccountant(orders)
    renyi.compose(privacy._event(accounting, 1.1, 256 / 60000, 1000))
    assert renyi.get_epsilon(1e-5) == pytest.approx(rdp.get_epsilon(1e-5, alphas=orders), rel=1e-6)


@pytest.mark.parametrize(("sampling_rate", "orders"), [(1.0, None), (0.5, None), (1.0, [256])])
def test_the_noise_multiplier_is_the_inverse_of_epsilon(
    sampling_rate: float, orders: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if orders:  # a bound so loose that the search must begin lower
        monkeypatch.setattr(privacy, "_ORDERS", orders)
    budget = {"sampling_rate": sampling_rate, "steps": 1, "delta": 1e-5}
    found = privacy.noise_multiplier(epsilon=3.0, **budget)
    assert privacy.epsilon(noise_multiplier=found, **budget) <= 3.0 + 1e-6
    assert privacy.epsilon(noise_multiplier=found - 1e-2, **budget) > 3.0
    assert not caplog.records  # of a series that does not converge


@pytest.mark.parametrize(
    ("wished", "sampling_rate", "steps"), [(50.0, 0.001, 100), (8.0, 0.01, 10000), (0.002, 1.0, 101476)]
)
def test_the_noise_multiplier_spends_the_epsilon_but_a_thousandth(
    wished: float, sampling_rate: float, steps: int
) -> None:
    budget = {"sampling_rate": sampling_rate, "steps": steps, "delta": 1e-8}
    found = privacy.noise_multiplier(epsilon=wished, **budget)
    assert 0.999 * wished <= privacy.epsilon(noise_multiplier=found, **budget) <= wished


def test_a_large_epsilon_needs_no_fine_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, loss = [], privacy._loss
    monkeypatch.setattr(privacy, "_loss", lambda *args: (grids.append(args[-1]), loss(*args))[1])
    budget = {"sampling_rate": 0.001, "steps": 100, "delta": 1e-5}
    found = privacy.noise_multiplier(epsilon=50.0, **budget)
    # a grid of 1e-4 takes 3.5 s each time
    assert min(grids) >= 1e-3 and len(grids) < 20
    fine = loss(privacy._accounting(), privacy._event(privacy._accounting(), found, 0.001, 100), 1e-5, 3e-4)
    assert fine <= privacy.epsilon(noise_multiplier=found, **budget) <= (1 + 5e-4) * fine


def test_where_the_loss_jumps_the_noise_is_enough() -> None:
    found, _ = privacy._inverse(lambda sigma: 3.0 if sigma < 1 else 1.0, 2.0, 5.0, -1.5)
    assert 1.0 <= found <= 1.0 + 1e-4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sampling_rate": 0.0}, r"sampling_rate in \(0, 1\], came 0.0"),
    ({"sampling_rate": 2.0}, r"sampling_rate in \(0, 1\], came 2.0"),
    ({"steps": 0}, "steps >= 1, came 0"),
    ({"delta": 1.0}, r"delta in \(0, 1\), came 1.0"),
    ({"noise_multiplier": 0.0}, "noise_multiplier > 0, came 0.0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_numbers_that_make_no_mechanism_are_refused(wrong: Any, message: str) -> None:
    right = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=message):
        privacy.epsilon(**(right | wrong))


def test_without_the_accountant_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'functrain\[privacy\]'"):
        privacy.epsilon(noise_multiplier=1.0, sampling_rate=0.1, steps=10, delta=1e-5)


def test_poisson_rows_are_independent_draws() -> None:
    counts = []
    for i in range(200):
        rows, mask = privacy.poisson_rows(ft.random.fold_in(KEY, i), 100, 0.2, 50)
        chosen = rows[mask]
        assert rows.shape == mask.shape == (50,) and torch.equal(chosen, torch.unique(chosen))
        assert torch.equal(rows[~mask], torch.zeros_like(rows[~mask]))
        counts.append(len(chosen))
    # binomial of 20000 trials: mean 4000, deviation sqrt(20000 * 0.16) = 57
    assert abs(sum(counts) - 4000) < 5 * 57
    # the number in a batch varies as a binomial's: variance 16, whose estimate deviates by 16 * sqrt(2 / 199) = 1.6
    assert abs(torch.tensor(counts, dtype=torch.float64).var().item() - 16) < 5 * 1.6


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="more than capacity=3"):
        privacy.poisson_rows(KEY, 100, 0.5, 3)
