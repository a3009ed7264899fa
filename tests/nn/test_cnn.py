"""Layers of a convolutional network equal torch's, forward and backward, and go through every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import functrain as ft
from functrain import nn, tree

# the same float64 operations in another order
CLOSE: Any = {"rtol": 1e-11, "atol": 1e-11}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_with_gradients(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *args: Tensor) -> None:
    found, expected = ours(*args), theirs(*args)
    torch.testing.assert_close(found, expected, **CLOSE)
    along = draw(99, *found.shape)
    every = tuple(range(len(args)))
    grads = [torch.func.grad(lambda *a, fn=fn: torch.sum(fn(*a) * along), every)(*args) for fn in (ours, theirs)]
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_equal_torchs(dims: int) -> None:
    x, bias = draw(0, 2, 4, *(6, 7, 5)[:dims]), draw(2, 6)
    weight, back = draw(1, 6, 2, *(3, 2, 3)[:dims]), draw(3, 4, 3, *(3, 2, 3)[:dims])
    theirs, transposed = getattr(F, f"conv{dims}d"), getattr(F, f"conv_transpose{dims}d")
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    same_with_gradients(lambda *a: nn.conv(*a, **options), lambda *a: theirs(*a, **options), x, weight, bias)
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    same_with_gradients(
        lambda *a: nn.conv_transpose(*a, **options), lambda *a: transposed(*a, **options), x, back, bias
    )
    assert nn.conv(x, draw(1, 6, 4, *[3] * dims), padding="same").shape == (2, 6, *x.shape[2:])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_equal_torchs(dims: int) -> None:
    x = draw(0, 2, 3, *(9, 8, 7)[:dims])
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("max_pool", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}),
        ("max_pool", (2,), {"dilation": 2}),
        ("avg_pool", (3,), {"stride": 2, "padding": 1, "count_include_pad": False}),
        ("avg_pool", (2,), {"ceil_mode": True}),
        ("adaptive_avg_pool", (4,), {}),
        ("adaptive_max_pool", (4,), {}),
    ]
    for name, args, options in cases:
        theirs = getattr(F, f"{name}{dims}d")
        same_with_gradients(
            lambda x, n=name, a=args, o=options: getattr(nn, n)(x, *a, **o),
            lambda x, f=theirs, a=args, o=options: f(x, *a, **o),
            x,
        )
    same_with_gradients(nn.global_avg_pool, lambda x: getattr(F, f"adaptive_avg_pool{dims}d")(x, 1).flatten(1), x)


@pytest.mark.parametrize("space", [(), (5,), (4, 3), (2, 3, 2)])
def test_batch_norm_equals_torchs_and_so_do_its_statistics(space: tuple[int, ...]) -> None:
    x, weight, bias = draw(0, 6, 4, *space) * 3 + 1, draw(1, 4), draw(2, 4)
    start = nn.BatchStats(draw(3, 4), draw(4, 4).abs())
    same_with_gradients(
        lambda *a: nn.batch_norm(a[0], start, *a[1:], eps=1e-3)[0],
        lambda *a: F.batch_norm(a[0], None, None, *a[1:], True, 0.0, 1e-3),
        x, weight, bias,
    )  # fmt: skip
    stats, mean, var = start, start.running_mean.clone(), start.running_var.clone()
    for _ in range(3):
        _, stats = nn.batch_norm(x, stats, weight, bias, momentum=0.3)
        F.batch_norm(x, mean, var, weight, bias, True, 0.3)
    torch.testing.assert_close(stats, nn.BatchStats(mean, var), **CLOSE)
    same_with_gradients(
        lambda *a: nn.batch_norm_inference(a[0], stats, *a[1:]),
        lambda *a: F.batch_norm(a[0], mean, var, *a[1:], False),
        x, weight, bias,
    )  # fmt: skip


@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 2)])
def test_group_and_instance_norm_equal_torchs(space: tuple[int, ...]) -> None:
    x, weight, bias = draw(0, 3, 6, *space) * 3 + 1, draw(1, 6), draw(2, 6)
    same_with_gradients(
        lambda *a: nn.group_norm(*a, groups=3, eps=1e-3),
        lambda *a: F.group_norm(a[0], 3, *a[1:], 1e-3),
        x,
        weight,
        bias,
    )
    same_with_gradients(
        lambda *a: nn.instance_norm(*a, eps=1e-3),
        lambda *a: F.instance_norm(a[0], weight=a[1], bias=a[2], eps=1e-3),
        x, weight, bias,
    )  # fmt: skip


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda x: nn.batch_norm(x, nn.batch_stats(x.shape[1]))[0],
    "inference": lambda x: nn.batch_norm_inference(x, nn.batch_stats(x.shape[1])),
    "group": lambda x: nn.group_norm(x, groups=2),
    "instance": nn.instance_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_half_precision_are_computed_in_float32(name: str) -> None:
    x = (draw(0, 4, 4, 50) * 0.01 + 3).to(torch.bfloat16)
    assert torch.equal(NORMS[name](x), NORMS[name](x.float()).to(torch.bfloat16))
    _, stats = nn.batch_norm(x, nn.batch_stats(4), torch.ones(4, dtype=torch.bfloat16))
    assert stats.running_mean.dtype == stats.running_var.dtype == torch.float32


@pytest.mark.parametrize("name", NORMS)
def test_norms_can_be_differentiated_twice(name: str) -> None:
    x, along = draw(0, 3, 2, 3), draw(1, 3, 2, 3)

    def of(x: Tensor) -> Tensor:
        return torch.sum(NORMS[name](x) ** 3 * along)

    slope = ft.grad(of)
    v, step = draw(2, 3, 2, 3), 1e-5
    product = ft.grad(lambda x: torch.sum(slope(x) * v))(x)
    quotient = (slope(x + step * v) - slope(x - step * v)) / (2 * step)
    torch.testing.assert_close(product, quotient, rtol=1e-5, atol=1e-6)
    for hessian in (torch.func.hessian(of)(x), torch.func.jacrev(torch.func.jacfwd(of))(x)):
        torch.testing.assert_close(torch.einsum("bcsxyz,xyz->bcs", hessian, v), quotient, rtol=1e-5, atol=1e-6)


def init(key: Tensor) -> tuple[Any, Any]:
    keys = ft.random.split(key, 3)
    he = ft.nn.init.he_normal(in_dim=1, out_dim=0)
    params = {
        "first": {"weight": he(keys[0], (4, 1, 3, 3))},  # a bias would be taken out by the norm
        "norm": {"weight": torch.ones(4), "bias": torch.zeros(4)},
        "second": {"weight": he(keys[1], (6, 4, 3, 3))},
        "head": {"weight": ft.nn.init.lecun_normal()(keys[2], (6, 3)), "bias": torch.zeros(3)},
    }
    return params, {"norm": nn.batch_stats(4)}


def apply(params: Any, buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A small convolutional network: images (B, 1, H, W) to logits (B, 3)."""
    h = nn.conv(x, **params["first"], padding=1)  # (B, 4, H, W)
    h, stats = nn.batch_norm(h, buffers["norm"], **params["norm"])
    h = nn.max_pool(torch.relu(h), 2)  # (B, 4, H / 2, W / 2)
    h = torch.relu(nn.conv(h, **params["second"], padding=1))  # (B, 6, H / 2, W / 2)
    return nn.linear(nn.global_avg_pool(h), **params["head"]), {"norm": stats}  # (B, 3)


def loss_fn(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
    logits, buffers = apply(params, buffers, batch["image"])
    losses = ft.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])  # (B,)
    return ft.Loss(losses.sum(), losses.new_full((), len(losses)), {}), buffers


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(1, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4)
        self.second, self.head = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        return self.head(F.adaptive_avg_pool2d(torch.relu(self.second(h)), 1).flatten(1))


def batch(number: int) -> Any:
    key = ft.random.key(number)
    return {"image": ft.random.normal(key, (6, 1, 8, 8)), "label": ft.random.randint(key, (6,), 0, 3)}


@pytest.mark.parametrize("way", ["eager", "compiled", "recomputed"])
def test_training_a_small_network_equals_torchs_loop(way: str) -> None:
    params, buffers = init(ft.random.key(0))
    module = Module()
    names = {path.replace("/", "."): leaf for path, leaf in tree.items(params)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(names[name].T if name == "head.weight" else names[name])
    tx = ft.optim.adamw(1e-2)
    step = ft.train_step(ft.recompute(loss_fn) if way == "recomputed" else loss_fn, tx, buffers=True)
    step = ft.compile(step, donate=True) if way == "compiled" else step
    state = ft.init_state(params, tx, key=ft.random.key(0), buffers=buffers)
    theirs = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=1e-4)
    for number in range(3):
        state, metrics = step(state, batch(number))
        loss = F.cross_entropy(module(batch(number)["image"]), batch(number)["label"])
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    # Adam divides small gradients by their size: float32 roundings of 1e-7 of them become 1e-5 of a step of 1e-2
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(state.buffers["norm"].running_var, module.norm.running_var, **close)
    torch.testing.assert_close(state.buffers["norm"].running_mean, module.norm.running_mean, **close)
    torch.testing.assert_close(state.params["second"]["weight"], module.second.weight, **close)


def test_networks_can_be_mapped_over() -> None:
    keys = ft.random.split(ft.random.key(0), 3)
    alone = [init(key) for key in keys]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *alone)
    found, new = ft.vmap(lambda p, b, x: tuple(apply(p, b, x)), (0, 0, None))(*stacked, batch(0)["image"])
    for i, (params, buffers) in enumerate(alone):
        expected, stats = apply(params, buffers, batch(0)["image"])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new["norm"].running_var[i], stats["norm"].running_var, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_told() -> None:
    x = torch.ones(3, 4, 4)
    with pytest.raises(ValueError, match=r"conv: expected x \(B, I, \*S\).*write x\[None\] for a single example"):
        nn.conv(x, torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="global_avg_pool: expected x"):
        nn.global_avg_pool(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"with C = 2, as the statistics have.*make them by ft.nn.batch_stats\(4\)"):
        nn.batch_norm(x, nn.batch_stats(2))
    half = nn.BatchStats(*[s.to(torch.bfloat16) for s in nn.batch_stats(4)])
    for norm in (nn.batch_norm, nn.batch_norm_inference):
        with pytest.raises(ValueError, match="expected running statistics in float32 or float64.*running_"):
            norm(x, half)
