"""Laws of from_module and to_module: a module's numbers, with its state outside."""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functrain as ft
from functrain import tree
from functrain.compiler import compilation

KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor in the buffer's place, not a write into it
        return self.out(self.embed(tokens) * self.frozen)


def loss_of(functional: ft.nn.Functional) -> Any:
    def loss_fn(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
        logits, new = functional.apply(params, buffers, key, batch["x"])
        total = F.cross_entropy(logits, batch["y"], reduction="sum")
        return ft.Loss(total, torch.full((), float(len(logits))), {}), new

    return loss_fn


@pytest.mark.parametrize(("way", "accumulate"), [("eager", 1), ("eager", 2), ("whole", 1), ("piecewise", 1)])
def test_a_batch_norm_cnn_trains_as_the_stateful_loop(
    way: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0 if way == "piecewise" else 2**62)
    module = cnn()
    functional, tx = ft.from_module(module), ft.optim.sgd(0.1)
    step: Any = ft.train_step(loss_of(functional), tx, buffers=True, accumulate=accumulate)
    step = step if way == "eager" else ft.compile(step)
    state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    theirs = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = {"x": draw(1, 8, 1, 6, 6), "y": torch.arange(8) % 3}
    for _ in range(5):
        state, metrics = step(state, batch)
        theirs.zero_grad()
        loss = torch.zeros(())
        for x, y in zip(batch["x"].chunk(accumulate), batch["y"].chunk(accumulate), strict=True):
            part = F.cross_entropy(module(x), y, reduction="sum") / 8
            part.backward()
            loss += part.detach()
        theirs.step()
        # float32 sums in another order, over five steps
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-5, atol=1e-5)
    after = ft.to_module(cnn(), state.params, state.buffers)
    torch.testing.assert_close(dict(after.named_buffers()), dict(module.named_buffers()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.eval()(batch["x"]), module.eval()(batch["x"]), rtol=1e-4, atol=1e-4)


def test_it_changes_no_argument_and_no_module() -> None:
    module = cnn()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    functional = ft.from_module(module)
    kept = tree.map(torch.clone, functional.buffers)
    first, new = functional.apply(functional.params, functional.buffers, None, draw(1, 8, 1, 6, 6))
    again, _ = functional.apply(functional.params, functional.buffers, None, draw(1, 8, 1, 6, 6))
    assert torch.equal(first, again)
    assert all(tree.leaves(tree.map(torch.equal, kept, functional.buffers)))
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert int(new["1"]["num_batches_tracked"]) == 1 and not torch.equal(new["1"]["running_mean"], torch.zeros(4))
    assert torch.equal(first, module(draw(1, 8, 1, 6, 6))), "the mode is the module's"
    assert torch.equal(module.eval()(draw(2, 2, 1, 6, 6)), module(draw(2, 2, 1, 6, 6)))


def test_the_mode_is_that_of_the_moment() -> None:
    module = cnn()
    evaluate = ft.from_module(module.eval())
    module.train()
    x = draw(2, 2, 1, 6, 6)
    result, new = evaluate.apply(evaluate.params, evaluate.buffers, None, x)
    assert torch.equal(result, module.eval()(x))
    assert all(tree.leaves(tree.map(torch.equal, new, evaluate.buffers)))


@pytest.mark.parametrize("shared_buffers", [True, False])
@pytest.mark.parametrize("map_", [ft.vmap, torch.func.vmap])
def test_a_mapped_lane_equals_the_lane_alone(shared_buffers: bool, map_: Any) -> None:
    functional = ft.from_module(cnn())
    grad = ft.grad(loss_of(functional), has_aux=True)
    x, y = draw(1, 3, 8, 1, 6, 6), torch.arange(8) % 3
    lanes = tree.map(lambda leaf: torch.stack([leaf, leaf * 0.5, leaf * 2]), functional.params)
    buffers = functional.buffers if shared_buffers else tree.map(lambda b: torch.stack([b] * 3), functional.buffers)
    flat, structure = tree.flatten((lanes, x))

    def lane(leaves: list[Tensor], *held: Tensor) -> Any:
        params, x = tree.unflatten(structure, leaves)
        held_tree = tree.unflatten(tree.structure(functional.buffers), held)
        return tree.leaves(grad(params, held_tree, {"x": x, "y": y}, KEY))

    dims = (0, *([None if shared_buffers else 0] * len(tree.leaves(functional.buffers))))
    mapped = map_(lane, dims)(flat, *tree.leaves(buffers))
    for i in range(3):
        params = tree.map(lambda leaf, i=i: leaf[i], lanes)
        alone = tree.leaves(grad(params, functional.buffers, {"x": x[i], "y": y}, KEY))
        for a, b in zip(mapped, alone, strict=True):
            # float32 convolutions of grouped and single lanes add in another order
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)


def test_tied_parameters_are_one_leaf_and_frozen_ones_are_not_trained() -> None:
    module = Tied()
    functional = ft.from_module(module)
    assert tree.paths(functional.params) == ["embed/weight"]
    assert tree.paths(functional.buffers) == ["calls", "frozen"]
    tokens = torch.tensor([1, 2])
    result, new = functional.apply(functional.params, functional.buffers, None, tokens)
    assert torch.equal(result, module(tokens)) and int(new["calls"]) == 1

    def total(params: Any) -> Tensor:
        return torch.sum(torch.sin(functional.apply(params, functional.buffers, None, tokens)[0]))

    grads = ft.grad(total)(functional.params)
    torch.sum(torch.sin(module(tokens))).backward()
    assert torch.equal(grads["embed"]["weight"], module.embed.weight.grad)
    back = ft.to_module(module, tree.scale(2.0, functional.params), new)
    assert back.out.weight is back.embed.weight and torch.equal(back.embed.weight, 2 * module.embed.weight)
    assert int(back.calls) == 1 and back.calls is not new["calls"] and not back.frozen.requires_grad


def test_dropout_is_a_function_of_the_key() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.25), nn.Dropout2d(0.5))
    functional = ft.from_module(module)
    x = torch.ones(4, 50, 6, 6)
    state = torch.get_rng_state()
    first, again, other = (functional.apply({}, {}, key, x)[0] for key in (KEY, KEY, ft.random.key(1)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    want = ft.nn.dropout(ft.nn.dropout(x, 0.5, ft.random.fold_in(KEY, 0)), 0.25, ft.random.fold_in(KEY, 1))
    channels = ft.nn.dropout(torch.ones(4, 50, 1, 1), 0.5, ft.random.fold_in(KEY, 2))
    assert torch.equal(first, want * channels)
    assert torch.equal(ft.from_module(module.eval()).apply({}, {}, None, x)[0], x)
    with pytest.raises(RuntimeError, match="as dropout in training mode does; pass a key"):
        functional.apply({}, {}, None, x)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_dropout_is_the_formula(causal: bool) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal, enable_gqa=True)

    apply = ft.from_module(Attention()).apply
    q, k, v = draw(0, 2, 4, 5, 8), draw(1, 2, 2, 5, 8), draw(2, 2, 2, 5, 8)
    plain = apply({}, {}, None, q, k, v, 0.0)[0]
    # a rate so small that no element is dropped: what is left is the formula
    torch.testing.assert_close(apply({}, {}, KEY, q, k, v, 1e-9)[0], plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(apply({}, {}, KEY, q, k, v, 0.5)[0], plain)


class Calls(nn.Module):
    """A module that calls a function, on what a linear layer makes of its input if it has one."""

    def __init__(self, function: Any, width: int = 0) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(width, width) if width else nn.Identity()

    def forward(self, *args: Tensor) -> Any:
        return self.function(*[self.linear(x) for x in args])


N = 20_000
# each way to call them, with the mean and the deviation of what is drawn
DRAWN: dict[str, tuple[Any, float, float]] = {
    "rand": (lambda x: torch.rand(N // 2, 2), 0.5, 12**-0.5),
    "rand_like": (lambda x: torch.rand_like(x, dtype=torch.float64), 0.5, 12**-0.5),
    "randn": (lambda x: torch.randn(size=(N,)), 0.0, 1.0),
    "randn_like": (lambda x: torch.randn_like(x), 0.0, 1.0),
    "randint": (lambda x: torch.randint(7, (N,)), 3.0, 2.0),
    "randint from": (lambda x: torch.randint(3, 10, (N,), dtype=torch.int32), 6.0, 2.0),
    "randint named": (lambda x: torch.randint(low=3, high=10, size=(N,)), 6.0, 2.0),
    "randint mixed": (lambda x: torch.randint(3, high=10, size=(N,)), 6.0, 2.0),
    "randint_like": (lambda x: torch.randint_like(x, 7), 3.0, 2.0),
    "randint_like from": (lambda x: torch.randint_like(x, 3, 10), 6.0, 2.0),
    "randperm": (lambda x: torch.randperm(N), (N - 1) / 2, N * 12**-0.5),
    "normal of tensors": (lambda x: torch.normal(x + 1, x + 2), 1.0, 2.0),
    "normal of a mean": (lambda x: torch.normal(x + 1, 2.0), 1.0, 2.0),
    "normal of a deviation": (lambda x: torch.normal(1.0, x + 2), 1.0, 2.0),
    "normal of numbers": (lambda x: torch.normal(1.0, 2.0, (N,)), 1.0, 2.0),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.5), 0.5, 0.5),
    "bernoulli of p": (lambda x: torch.bernoulli(x, 0.2), 0.2, 0.4),
    "method": (lambda x: (x + 0.2).bernoulli(), 0.2, 0.4),
    "bernoulli_": (lambda x: torch.empty(N, dtype=torch.bool).bernoulli_(0.2), 0.2, 0.4),
    "bernoulli_ of a tensor": (lambda x: torch.empty(N).bernoulli_(x + 0.2), 0.2, 0.4),
    "uniform_": (lambda x: torch.empty(N).uniform_(2.0, 5.0), 3.5, 3 * 12**-0.5),
    "uniform_ to": (lambda x: torch.empty_like(x).uniform_(to=5.0), 2.5, 5 * 12**-0.5),
    "normal_": (lambda x: torch.empty(N).normal_(1.0, 2.0), 1.0, 2.0),
    "exponential_": (lambda x: torch.empty(N).exponential_(2.0), 0.5, 0.5),
    "a distribution": (lambda x: torch.distributions.Normal(x + 1, 2.0).rsample(), 1.0, 2.0),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x.view(-1, 2), hard=True)[:, 0], 0.5, 0.5),
    "rrelu": (lambda x: F.rrelu(x - 1, 0.1, 0.4, training=True), -0.25, 0.3 * 12**-0.5),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, training=True), 0.0, 0.69364),
    "feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x.view(2, -1, 1), 0.3, True), 0.0, 0.69364),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_module_draws_is_drawn_from_the_key_with_the_same_distribution(name: str) -> None:
    draws, mean, deviation = DRAWN[name]
    apply, x = ft.from_module(Calls(draws)).apply, torch.zeros(N)
    found, state = apply({}, {}, KEY, x)[0], torch.get_rng_state()
    torchs = draws(x)
    assert found.shape == torchs.shape and found.dtype == torchs.dtype
    for values in (found, torchs):
        # five deviations of a mean of as many numbers as are independent, which a shuffle has none of
        close = 5 * deviation * values.numel() ** -0.5
        assert abs(values.double().mean() - mean) < close
        assert abs(values.double().std() - deviation) < 3 * close
    assert not torch.equal(found, torchs) and not torch.equal(found, apply({}, {}, ft.random.key(1), x)[0])
    torch.set_rng_state(state)
    assert torch.equal(found, apply({}, {}, KEY, x)[0]) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="the module draws random numbers.*; pass a key"):
        apply({}, {}, None, x)


IN_PLACE: list[Any] = [
    nn.Dropout(0.4, inplace=True), nn.Dropout1d(0.4, inplace=True), nn.RReLU(inplace=True),
    Calls(lambda x: F.alpha_dropout(x, 0.4, True, True)),
    Calls(lambda x: F.feature_alpha_dropout(x, 0.4, True, True)),
]  # fmt: skip


@pytest.mark.parametrize("layer", IN_PLACE)
def test_a_layer_that_works_in_place_does(layer: nn.Module) -> None:
    def forgetful(x: Tensor) -> Tensor:
        x = 2 * x
        layer(x)
        return x

    def kept(x: Tensor) -> Tensor:
        return layer(2 * x)

    x = draw(0, 2, 3, 5)
    found, expected = (ft.from_module(Calls(f)).apply({}, {}, KEY, x)[0] for f in (forgetful, kept))
    assert torch.equal(found, expected) and not torch.equal(found, 2 * x)
    slopes = [ft.grad(lambda x, f=f: torch.sum(ft.from_module(Calls(f)).apply({}, {}, KEY, x)[0] ** 2))(x)
              for f in (forgetful, kept)]  # fmt: skip
    assert torch.equal(*slopes)
    alone = ft.per_example_grad(
        lambda x, batch: torch.sum(ft.from_module(Calls(kept)).apply({}, {}, KEY, batch)[0] * x)
    )
    assert alone(torch.ones(()), x).shape == (2,)


@pytest.mark.parametrize(
    "draws",
    [
        lambda x: x.uniform_(2.0, 1.0), lambda x: x.normal_(0.0, -1.0), lambda x: torch.normal(x, -1.0),
        lambda x: x.exponential_(0.0), lambda x: F.rrelu(x, 0.5, 0.1, True), lambda x: x.bernoulli_(2.0),
    ],
)  # fmt: skip
def test_what_torch_does_not_draw_is_an_error(draws: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError):
        draws(x)
    with pytest.raises(ValueError, match="expected .*, came"):
        ft.from_module(Calls(draws)).apply({}, {}, KEY, x)


def test_a_relaxed_choice_has_the_gradient_of_its_softmax() -> None:
    x, weights = draw(0, 4, 3), draw(1, 4, 3)
    found = {hard: Calls(lambda x, hard=hard: F.gumbel_softmax(x, 0.5, hard)) for hard in (False, True)}
    soft, hard = (ft.from_module(module).apply for module in (found[False], found[True]))
    assert torch.equal(hard({}, {}, KEY, x)[0].argmax(-1), soft({}, {}, KEY, x)[0].argmax(-1))
    slopes = [ft.grad(lambda x, f=f: torch.sum(weights * f({}, {}, KEY, x)[0]))(x) for f in (soft, hard)]
    torch.testing.assert_close(*slopes)


RECURRENT: list[Any] = [
    lambda p: nn.LSTM(6, 4, 3, dropout=p, batch_first=True, bidirectional=True, proj_size=2),
    lambda p: nn.LSTM(6, 4, 2, dropout=p, bias=False),
    lambda p: nn.GRU(6, 4, 3, dropout=p, batch_first=True),
    lambda p: nn.RNN(6, 4, 2, dropout=p, bidirectional=True),
    lambda p: Packed(p),
    lambda p: nn.TransformerEncoderLayer(6, 2, 8, dropout=p, batch_first=True),
    lambda p: Attends(6, 2, dropout=p),
]


class Packed(nn.LSTM):
    def __init__(self, p: float) -> None:
        super().__init__(6, 4, 2, dropout=p, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        rows = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(super().forward(rows)[0])


class Attends(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x.sin(), x)


@pytest.mark.parametrize("make", RECURRENT)
def test_dropout_inside_of_torchs_layers_is_drawn_from_the_key(make: Any) -> None:
    torch.manual_seed(0)
    x, layer, dropping = torch.randn(3, 5, 6, dtype=torch.float64), make(1e-9).double(), make(0.5).double()
    dropping.load_state_dict(layer.state_dict())
    keyed, plain, half = ft.from_module(layer), ft.from_module(layer.eval()), ft.from_module(dropping)
    found, expected = keyed.apply(keyed.params, {}, KEY, x)[0], plain.apply(plain.params, {}, None, x)[0]
    # a rate so small that nothing is dropped, of which what is kept is divided by one less it
    assert tree.structure(found) == tree.structure(expected) and tree.allclose(found, expected, rtol=0, atol=1e-8)

    # all dropped, and torch draws nothing that matters: where it drops, and where not
    whole = make(1.0).double()
    whole.load_state_dict(layer.state_dict())
    everything = ft.from_module(whole)
    assert tree.allclose(everything.apply(everything.params, {}, KEY, x)[0], whole(x), rtol=0, atol=1e-12)

    def loss(params: Any, batch: Any, key: Tensor) -> Tensor:
        return torch.sum(tree.leaves(half.apply(params, {}, key, batch)[0])[0] ** 2)

    # a mask is of shape (T, B, ...), of each example alone another one than of all, and the packed lengths are of all
    if not isinstance(layer, Packed):
        grads = ft.per_example_grad(loss)(half.params, x, KEY)
        one = ft.grad(loss)(half.params, x[1:2], ft.random.fold_in(KEY, 1))
        assert tree.allclose(tree.map(lambda leaf: leaf[1], grads), one, rtol=1e-9, atol=1e-12)
    others = [loss(half.params, x, key) for key in (KEY, ft.random.key(1))]
    assert others[0] != others[1] != loss(plain.params, x, KEY) and others[0] == loss(half.params, x, KEY)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_layers_that_draw_compile(in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_pieces:
        monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(self.recurrent(x)[0])
            return x + torch.randn(4) + torch.empty_like(x).uniform_()

    functional, tx = ft.from_module(Net()), ft.optim.sgd(0.1)

    def loss(params: Any, batch: Any, key: Tensor) -> Tensor:
        return torch.sum(functional.apply(params, functional.buffers, key, batch)[0] ** 2)

    state, step = ft.init_state(functional.params, tx, key=KEY), ft.train_step(loss, tx)
    found, expected = (f(state, draw(0, 2, 3, 4)) for f in (ft.compile(step), step))
    assert tree.allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32, fused in another order


def test_a_module_that_calls_randn_like_draws_from_its_key_in_a_large_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    functional, tx = ft.from_module(Calls(lambda x: x + torch.randn_like(x), 3)), ft.optim.sgd(0.1)
    step = ft.train_step(lambda p, batch, key: torch.sum(functional.apply(p, {}, key, batch)[0] ** 2), tx)
    state, x = ft.init_state(functional.params, tx, key=KEY), draw(0, 2, 3)
    found, expected = (f(state, x) for f in (ft.compile(step), step))
    assert tree.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "draws",
    [
        lambda x: torch.poisson(x),
        lambda x: torch.multinomial(x, 1),
        lambda x: torch.rand(3, generator=torch.Generator()),
        lambda x: torch.rand(3, out=torch.empty(3)),
    ],
)
def test_other_randomness_is_an_error(draws: Any) -> None:
    with pytest.raises(RuntimeError, match="which draws from the global generator"):
        ft.from_module(Calls(draws)).apply({}, {}, KEY, torch.ones(3))


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.AlphaDropout(0.5), nn.LSTM(3, 3, 2, dropout=0.5)])
def test_what_draws_nothing_needs_no_key(layer: nn.Module) -> None:
    functional = ft.from_module(layer.eval())
    functional.apply(functional.params, functional.buffers, None, draw(0, 2, 2, 3))


def test_a_query_that_sees_no_key_attends_to_nothing() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.5 if self.training else 0.0)

    x, mask = draw(0, 2, 3, 4), torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    apply = ft.from_module(Attention()).apply
    assert torch.equal(apply({}, {}, KEY, x, mask)[0][:, 1], torch.zeros(2, 4))
    assert torch.all(torch.isfinite(ft.grad(lambda x: torch.sum(apply({}, {}, KEY, x, mask)[0] ** 2))(x)))


def norm_of_weights() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("make", [norm_of_weights, encoder])
def test_second_derivatives_of_what_torch_fuses_are_those_of_differences(make: Any) -> None:
    torch.manual_seed(0)
    functional = ft.from_module(make().double())
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def loss_fn(params: Any, batch: Tensor, key: Any = None) -> Tensor:
        return torch.sum(functional.apply(params, functional.buffers, None, batch)[0] ** 4)

    params = functional.params
    v = tree.map(torch.randn_like, params)
    gradient_at = lambda step: ft.grad(loss_fn)(tree.add_scale(params, step, v), x)  # noqa: E731
    wanted = tree.scale(0.5e5, tree.sub(gradient_at(1e-5), gradient_at(-1e-5)))
    _, forward = torch.func.jvp(lambda p: ft.grad(loss_fn)(p, x), (params,), (v,))
    for found in (ft.hvp(loss_fn, params, x, v), forward):  # the error of a difference is that of its third order
        assert tree.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def normalized(layer: str) -> Any:
    """Make a function of params, (P,), and one example in which a layer normalizes what depends on both."""
    if layer == "layer_norm":
        return lambda p, x: ft.nn.layer_norm(p[:8].view(2, 4) * x, p[8:12], p[12:])
    makes = {
        "LayerNorm": lambda: nn.LayerNorm(4),
        "BatchNorm1d": lambda: nn.BatchNorm1d(4),
        "InstanceNorm1d": lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    }
    functional = ft.from_module(makes[layer]().double())
    count = functional.params["weight"].numel()

    def apply(p: Tensor, x: Tensor) -> Tensor:
        params = {"weight": p[8 : 8 + count], "bias": p[12 : 12 + count]}
        y = p[:8].view(2, 4) * x
        y = y[None] if layer == "InstanceNorm1d" else y
        return functional.apply(params, functional.buffers, None, y)[0]

    return apply


@pytest.mark.parametrize("layer", ["layer_norm", "LayerNorm", "BatchNorm1d", "InstanceNorm1d"])
def test_second_derivatives_through_a_normalization_are_those_of_differences(layer: str) -> None:
    apply = normalized(layer)
    p, v, x = draw(0, 16).double(), draw(1, 16).double(), draw(2, 3, 2, 4).double()

    def loss_fn(p: Tensor) -> Tensor:
        return torch.sum(torch.sin(ft.vmap(lambda x: apply(p, x))(x)))

    def summed(p: Tensor) -> Tensor:  # as MAML and penalties of single examples' gradients have it
        return torch.sum(ft.per_example_grad(lambda p, x: torch.sum(torch.sin(apply(p, x[0]))))(p, x) * v)

    def slope(p: Tensor) -> Tensor:
        return torch.func.jvp(loss_fn, (p,), (v,))[1]

    leaf, lane = p.clone().requires_grad_(), p.clone().requires_grad_()
    summed(leaf).backward()
    (ft.vmap(ft.grad(loss_fn))(lane[None])[0] @ v).backward()

    gradient_at = lambda step: ft.grad(loss_fn)(p + step * v)  # noqa: E731
    wanted = 0.5e5 * (gradient_at(1e-5) - gradient_at(-1e-5))
    hessian = torch.func.hessian(loss_fn)
    twice = torch.func.jacrev(torch.func.jacrev(loss_fn))
    found = [ft.grad(summed)(p), leaf.grad, lane.grad, hessian(p) @ v, twice(p) @ v, ft.grad(slope)(p)]
    if layer == "layer_norm":
        found.append(ft.compile(hessian)(p) @ v)
    for each in found:  # the error of a difference is that of its third order
        torch.testing.assert_close(each, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)])
def test_running_statistics_are_those_of_torch_where_it_is_differentiated_twice(layer: nn.Module) -> None:
    functional, x = ft.from_module(layer), 3 + draw(0, 5, 4, 6)
    plain, buffers = functional.apply(functional.params, functional.buffers, None, x)

    def tangent(p: Any) -> Any:
        return functional.apply(p, functional.buffers, None, x)

    (result, new), _ = torch.func.jvp(tangent, (functional.params,), (functional.params,))
    torch.testing.assert_close(result, plain)
    assert all(tree.leaves(tree.map(torch.equal, new, buffers)))


def test_hidden_randomness_is_found_and_undone() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ops.aten.rand.default([2])

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="has drawn from the global generator"):
        ft.from_module(Hidden()).apply({}, {}, KEY, torch.zeros(2))
    assert torch.equal(state, torch.get_rng_state())


def test_a_thread_that_draws_beside_is_none_of_it() -> None:
    asked: Queue[str] = Queue()
    drawn: Queue[Tensor] = Queue()
    loader = Thread(target=lambda: [drawn.put(torch.rand(2)) for _ in iter(asked.get, "end")])

    class Waits(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            asked.put("draw")
            drawn.get()
            return super().forward(x)

    x = draw(0, 5, 3)
    norm, waits = ft.from_module(nn.BatchNorm1d(3)), ft.from_module(Waits(3))
    loader.start()
    try:
        found = waits.apply(waits.params, waits.buffers, None, x)
    finally:
        asked.put("end")
        loader.join()
    assert tree.allclose(found, norm.apply(norm.params, norm.buffers, None, x), rtol=0, atol=0)


def test_trees_that_are_not_the_modules_are_named() -> None:
    functional = ft.from_module(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"params are not the module's(.|\n)*missing: 'bias'"):
        functional.apply({"weight": torch.zeros(3, 2)}, {}, None, torch.zeros(2))
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, 2\), came \(4, 3, 2\)"):
        ft.to_module(nn.Linear(2, 3), tree.map(lambda p: torch.stack([p] * 4), functional.params), {})
    with pytest.raises(ValueError, match="weight: expected a shape, came a lazy tensor"):
        ft.from_module(nn.LazyLinear(3))


def test_a_transformers_model_trains_as_the_stateful_loop() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    functional, tx = ft.from_module(model), ft.optim.sgd(0.1)
    assert "lm_head/weight" not in tree.paths(functional.params)
    tokens = torch.arange(24).reshape(2, 12) * 7 % 31

    def loss_fn(params: Any, buffers: Any, batch: Tensor, key: Tensor) -> Any:
        result, new = functional.apply(params, buffers, key, input_ids=batch, labels=batch)
        return result.loss, new

    step = ft.train_step(loss_fn, tx, buffers=True)
    state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        state, metrics = step(state, tokens)
        loss = model(input_ids=tokens, labels=tokens).loss
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        # float32, in another order of sums
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-5)


def test_outputs_of_transformers_are_trees_for_every_transform() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    params, tokens = (functional := ft.from_module(model.eval())).params, torch.arange(8)[None]

    def outputs(params: Any) -> Any:
        return functional.apply(params, functional.buffers, None, input_ids=tokens, labels=tokens)[0]

    (_, found), grads = ft.value_and_grad(lambda p: ((out := outputs(p)).loss, out), has_aux=True)(params)
    assert type(found) is type(outputs(params)) and not found.logits.requires_grad and found.loss is found["loss"]
    assert tree.paths(found) == ["loss", "logits"]
    assert ft.mixed_precision(outputs, "bf16")(params).logits.dtype == torch.float32
    again = ft.grad(lambda p: ft.recompute(outputs, "dots")(p).loss)(params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(grads), tree.leaves(again), strict=True))
    hidden = functional.apply(params, {}, None, input_ids=tokens, output_hidden_states=True)[0].hidden_states
    assert len(hidden) == 2 and torch.equal(hidden[0], model(tokens, output_hidden_states=True).hidden_states[0])
    model.train().transformer.gradient_checkpointing = True  # what its gradient_checkpointing_enable sets
    with pytest.raises(ValueError, match="transformer: recomputes by torch.utils.checkpoint"):
        ft.from_module(model)


def test_padded_rows_of_a_transformers_model_have_gradients_of_their_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    functional = ft.from_module(transformers.GPT2LMHeadModel(config).eval())
    tokens, padding = torch.arange(24).view(3, 8) % 11, torch.ones(3, 8, dtype=torch.bool).tril(6)

    def loss(params: Any, batch: Any) -> Tensor:
        inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"]}
        logits = functional.apply(params, functional.buffers, None, **inputs)[0].logits
        weights = torch.zeros(8).index_fill(0, torch.arange(6), 1.0)
        return F.cross_entropy(logits.mT, batch["tokens"], reduction="none") @ weights @ torch.ones(len(logits))

    with pytest.raises(TypeError, match=r"masking_utils.*: expected Python that is the same for all examples"):
        ft.per_example_grad(loss)(functional.params, {"tokens": tokens, "mask": padding})
    causal = padding[:, None, None] & torch.ones(8, 8, dtype=torch.bool).tril()
    found = ft.per_example_grad(loss)(functional.params, {"tokens": tokens, "mask": causal})
    for i in range(3):
        expected = ft.grad(loss)(functional.params, {"tokens": tokens[i : i + 1], "mask": padding[i : i + 1]})
        one = tree.map(lambda leaf, i=i: leaf[i], found)
        # float32, in another order of sums
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5), one, expected)


def test_an_embedding_that_writes_or_has_sparse_gradients_is_refused() -> None:
    for name, value in (("max_norm", 0.1), ("sparse", True)):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            functional = ft.from_module(kind(3, 2, **{name: value}))
            before = functional.params["weight"].clone()
            with pytest.raises(RuntimeError, match=f"an embedding with {name}"):
                functional.apply(functional.params, {}, None, torch.tensor([[0, 1]]))
            assert torch.equal(functional.params["weight"], before)


def test_a_transformers_model_with_dropout_compiles() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, embd_pdrop=0.0)
    torch.manual_seed(0)
    functional = ft.from_module(transformers.GPT2LMHeadModel(config).train())
    tokens = torch.arange(8)[None]

    def loss(params: Any, key: Tensor) -> Tensor:
        return functional.apply(params, functional.buffers, key, input_ids=tokens, labels=tokens)[0].loss

    a, b = loss(functional.params, KEY), ft.compile(loss)(functional.params, KEY)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32, fused in another order
    assert not torch.equal(a, loss(functional.params, ft.random.key(1)))


def test_a_masked_language_model_trains_as_the_stateful_loop_in_parts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).train()
    functional, tx = ft.from_module(model), ft.optim.adam(1e-2)
    assert "cls/predictions/decoder/weight" not in tree.paths(functional.params), "tied to the embeddings"
    assert "bert/embeddings/position_ids" in tree.paths(functional.buffers), "not persistent, and still a buffer"
    batch = {"x": torch.arange(48).reshape(4, 12) * 7 % 31, "y": torch.arange(48).reshape(4, 12) * 5 % 31}

    def loss_fn(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
        result, new = functional.apply(params, buffers, key, input_ids=batch["x"])
        total = F.cross_entropy(result.logits.flatten(0, 1), batch["y"].flatten(), reduction="sum")
        return ft.Loss(total, total.new_full((), batch["y"].numel()), {}), new

    step = ft.train_step(loss_fn, tx, buffers=True, accumulate=2)
    state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    theirs = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        state, metrics = step(state, batch)
        loss = F.cross_entropy(model(input_ids=batch["x"]).logits.flatten(0, 1), batch["y"].flatten())
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        # float32, in another order of sums, and Adam divides by small roots
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """A submodule at two places, tied buffers, parametrizations, a hook, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.again = self.first
        self.other = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.other.register_forward_hook(lambda module, inputs, output: 2 * output)
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.register_buffer("same", self.shift)
        self.constant = torch.full((3,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.shift += 1
        return self.other(self.again(torch.tanh(self.first(x)))) + self.same * self.constant


def test_parametrizations_hooks_and_shared_parts_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    module, x = Odd(), draw(0, 4, 3)
    functional = ft.from_module(module)
    weight = "first/parametrizations/weight"
    assert [p for p in tree.paths(functional.params) if "again" in p] == []
    assert {f"{weight}/original0", f"{weight}/original1"} <= set(tree.paths(functional.params))
    assert "shift" in functional.buffers and "same" not in functional.buffers

    def total(params: Any, buffers: Any) -> Any:
        result, new = functional.apply(params, buffers, None, x)
        return torch.sum(torch.sin(result)), new

    buffers = functional.buffers
    for _ in range(3):  # power iterations of the spectral norm, in buffers
        grads, buffers = ft.grad(total, has_aux=True)(functional.params, buffers)
        module.zero_grad()
        torch.sum(torch.sin(module(x))).backward()
        theirs = {name.replace(".", "/"): p.grad for name, p in module.named_parameters()}
        torch.testing.assert_close(dict(tree.items(grads)), theirs, rtol=0, atol=0)
    after = ft.to_module(module, functional.params, buffers)
    assert torch.equal(after(x), module(x)) and after.same is after.shift and after.again is after.first


def test_a_parametrized_module_is_mapped_lane_by_lane() -> None:
    torch.manual_seed(0)
    functional, xs = ft.from_module(Odd()), draw(0, 2, 4, 3)
    flat, structure = tree.flatten(functional.buffers)

    def lane(x: Tensor) -> list[Tensor]:
        result, new = functional.apply(functional.params, tree.unflatten(structure, flat), None, x)
        return [result, *tree.leaves(new)]

    for got, want in zip(ft.vmap(lane)(xs), zip(*[lane(x) for x in xs], strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)  # float32 products of another size


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, [], torch.zeros(3)

    def forward(self, x: Tensor, what: str) -> Tensor:
        if what == "number":
            self.calls += 1
        elif what == "list":
            self.seen.append(x)
        elif what == "write":
            self.last.add_(1)
        elif what == "new":
            self.cache = x
        return x + self.calls


@pytest.mark.parametrize(
    ("what", "name"), [("number", "calls"), ("list", "seen"), ("write", "last"), ("new", "cache"), ("", "")]
)
def test_what_a_module_remembers_elsewhere_is_an_error(what: str, name: str) -> None:
    apply = ft.from_module(Remembers()).apply
    x = torch.zeros(3)
    if not what:
        assert torch.equal(apply({}, {}, None, x, what)[0], x)
        return
    for fn in (apply, ft.compile(lambda x: apply({}, {}, None, x, what)[0])):
        args = ({}, {}, None, x, what) if fn is apply else (x,)
        with pytest.raises(RuntimeError, match=f"Remembers changes its attribute '{name}'.*register_buffer"):
            fn(*args)
    assert torch.equal(apply({}, {}, None, x, "")[0], x), "what was remembered is forgotten"


@pytest.mark.parametrize("compiled", [False, True])
def test_torchs_checkpoint_is_refused_inside_and_right_around(compiled: bool) -> None:
    linear, x = nn.Linear(3, 3), torch.linspace(-1, 1, 6).view(2, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda y: torch.tanh(self.linear(y)), x, use_reentrant=False)

    def loss(params: Any, apply: Any) -> Any:
        return torch.sum(apply(params, {}, None, x)[0] ** 2)

    inside, plain = ft.from_module(Net()), ft.from_module(nn.Sequential(linear, nn.Tanh()))

    def around(*args: Any) -> Any:
        return checkpoint(plain.apply, *args, use_reentrant=False)

    grad = (
        ft.compile(ft.grad(lambda p: loss(p, inside.apply))) if compiled else ft.grad(lambda p: loss(p, inside.apply))
    )
    with pytest.raises(RuntimeError, match=r"recomputes by torch.utils.checkpoint.*put ft.recompute around apply"):
        grad(inside.params)
    found = ft.grad(loss)(plain.params, around)
    assert tree.allclose(found, ft.grad(loss)(plain.params, plain.apply))


def test_a_module_of_torchs_script_is_refused() -> None:
    with pytest.raises(ValueError, match="1: expected a module of Python, came one of torch.jit"):
        ft.from_module(nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(2, 2))))


def test_an_attribute_that_follows_from_shapes_may_be_set_before() -> None:
    class Remembers(nn.Module):
        rows = 0

        def forward(self, x: Tensor) -> Tensor:
            self.rows = len(x)
            return x * self.rows

    module, x = Remembers(), torch.ones(1000)
    with pytest.raises(RuntimeError, match="changes its attribute 'rows'.*call the module on one before from_module"):
        ft.from_module(module).apply({}, {}, None, x)
    module(x)
    assert torch.equal(ft.from_module(module).apply({}, {}, None, x)[0], x * 1000)


def test_a_call_that_is_broken_off_leaves_no_attribute() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depth = 0

        def forward(self, x: Tensor, broken: bool) -> Tensor:
            self.depth = 1
            if broken:
                raise ValueError("broken off")
            y = x.clone()
            y.T[0] = 1  # a trace of which begins anew
            self.depth = 0
            return y

    apply, x = ft.from_module(Counts()).apply, torch.zeros(2, 2)
    with pytest.raises(ValueError, match="broken off"):
        apply({}, {}, None, x, True)
    for fn in (apply, ft.compile(lambda *args: apply({}, {}, None, *args))):
        found = fn({}, {}, None, x, False) if fn is apply else fn(x, False)
        assert torch.equal(found[0], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_a_tensor_made_by_a_hook_of_the_old_kind_is_an_error() -> None:
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight: expected a parameter or a buffer.*parametrizations.weight_norm"):
        ft.from_module(module)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_mapped_over_inputs_and_params(layer: Any) -> None:
    # torch adds to the first state in place, which is an error where the input alone is mapped over
    functional = ft.from_module(layer(3, 4, batch_first=True, bidirectional=True, dtype=torch.float64))

    def loss(params: Any, x: Tensor) -> Tensor:
        return torch.sum(functional.apply(params, {}, None, x)[0][0] ** 2)

    xs = torch.linspace(-1, 1, 2 * 5 * 3, dtype=torch.float64).view(2, 1, 5, 3)
    lanes = ft.tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), functional.params)
    for params, rows, dims in ((functional.params, xs, (None, 0)), (lanes, xs[0], (0, None)), (lanes, xs, (0, 0))):
        found = ft.vmap(ft.grad(loss), dims)(params, rows)
        for i in range(2):
            lane = params if dims[0] is None else ft.tree.map(lambda leaf, i=i: leaf[i], params)
            wanted = ft.grad(loss)(lane, rows if dims[1] is None else rows[i])
            pairs = zip(ft.tree.leaves(found), ft.tree.leaves(wanted), strict=True)
            assert all(torch.allclose(a[i], b, rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_running_statistics_in_half_precision_are_refused_and_right_as_told() -> None:
    bn, norm = nn.BatchNorm1d(4, momentum=0.01), nn.InstanceNorm1d(4, track_running_stats=True)
    module = nn.Sequential(nn.Linear(3, 4), bn, nn.Unflatten(0, (4, 4)), norm, nn.Linear(4, 1))
    functional, tx = ft.from_module(module), ft.optim.sgd(0.0)
    batches = draw(0, 200, 16, 3) + 2

    def loss(params: Any, buffers: Any, batch: Tensor, key: Tensor) -> Any:
        found, new = functional.apply(params, buffers, key, batch)
        return torch.mean(found.float() ** 2), new

    def statistics(loss: Any, swept: bool = False) -> Any:
        state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
        step: Any = ft.train_step(loss, tx, buffers=True)
        if swept:
            step = ft.sweep(step, {"seed": [0]})
            state = step.init(state)
        for batch in batches:
            state, _ = step(state, batch)
        return step.lane(state.buffers, 0) if swept else state.buffers

    kept = ft.Policy(compute=torch.bfloat16, exceptions={"**running_*": torch.float32})
    wide = statistics(loss)
    for low in (ft.mixed_precision(loss, kept), ft.autocast(loss, "bf16")):
        for swept in (False, True):
            # a mean of inputs that are rounded by 2**-9; a running mean in bfloat16 ends a fifth below
            ft.tree.map(
                lambda a, b: torch.testing.assert_close(a, b, rtol=0.02, atol=0.01), statistics(low, swept), wide
            )
    with pytest.raises(ValueError, match=r"buffers: 1/running_mean: expected float32, .*\{'\*\*running_\*': torch.fl"):
        statistics(ft.mixed_precision(loss, "bf16"))
    half = ft.from_module(nn.BatchNorm1d(4).bfloat16())  # half precision is what this module has
    half.apply(half.params, half.buffers, None, draw(1, 5, 4).bfloat16())


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 4, 2, batch_first=True, bidirectional=True),
        nn.GRU(4, 4, 2, batch_first=True, bidirectional=True),
        nn.GRU(4, 4, dropout=0.0, bias=False),
        nn.RNN(4, 4, nonlinearity="relu"),
        nn.RNN(4, 4, 2),
    ],
)
def test_recurrent_layers_compiled_in_pieces_are_torchs(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    functional, x = ft.from_module(layer), torch.linspace(-2, 2, 60).view(3, 5, 4)  # 3 times where batch is second

    def loss(params: Any, x: Tensor) -> Tensor:
        (y, last), _ = functional.apply(params, functional.buffers, None, x)
        return torch.sum(y**3) + sum(torch.sum(h**2) for h in ft.tree.leaves(last))

    gradient = ft.compile(ft.value_and_grad(loss))
    (y, last) = layer(x)
    value = torch.sum(y**3) + sum(torch.sum(h**2) for h in ft.tree.leaves(last))
    expected = torch.autograd.grad(value, list(layer.parameters()))
    found, grads = gradient(functional.params, x)
    # float32 sums in another order
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-6)
    for name, grad in zip([n for n, _ in layer.named_parameters()], expected, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)
    if isinstance(layer, nn.RNN) and layer.num_layers == 1:  # the first begins with a state without a gradient
        assert "layer forward x 2  " in gradient.describe(functional.params, x)


def test_a_module_that_asks_for_the_gradient_of_its_input_loses_none() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, :3]
            x.requires_grad = True  # as transformers' wav2vec 2 does for its checkpointing
            return self.linear(x.requires_grad_())

    module, x = Asking(), torch.ones(2, 3)
    functional = ft.from_module(module)
    loss = lambda params: torch.sum(functional.apply(params, {}, None, x)[0] ** 2)  # noqa: E731
    expected = torch.autograd.grad(torch.sum(module(x.clone()) ** 2), list(module.parameters()))
    for gradient in (ft.grad(loss), ft.compile(ft.grad(loss))):
        for a, b in zip(ft.tree.leaves(gradient(functional.params)["linear"]), expected[::-1], strict=True):
            torch.testing.assert_close(a, b)
