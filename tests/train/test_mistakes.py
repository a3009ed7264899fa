"""Mistakes in a loss, a batch, a hook or a call of `fit` are told in one sentence with the way out, compiled too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import functrain as ft

KEY, TX = ft.random.key(0), ft.optim.sgd(0.1)
ONES = torch.ones


def loss(p: Any, b: Any, k: Any = None) -> Tensor:
    return torch.mean((b["x"] @ p["w"] - b["y"]) ** 2)


def batch() -> dict[str, Tensor]:
    return {"x": ONES(4, 3), "y": ONES(4)}


def start(tx: Any = TX, **options: Any) -> ft.TrainState:
    return ft.init_state({"w": torch.zeros(3)}, tx, key=KEY, **options)


def take(loss_fn: Any, way: str = "eager", b: Any = None, **options: Any) -> dict[str, Tensor]:
    step = ft.train_step(loss_fn, TX, **options)
    chosen = {name: options[name] for name in ("guard", "loss_scale") if name in options}
    return (ft.compile(step) if way == "compiled" else step)(start(**chosen), batch() if b is None else b)[1]


WAYS = pytest.mark.parametrize("way", ["eager", "compiled"])


# ---- the loss ------------------------------------------------------------------------------------------------------


def as_mixed(fn: Any) -> Any:
    return ft.mixed_precision(fn, "full")


@WAYS
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b: loss(p, b),
        lambda p: p["w"].sum(),
        lambda p, b, k, more: loss(p, b),
        as_mixed(lambda p, b: loss(p, b)),
    ],
)
def test_a_loss_of_other_arguments_names_those_that_it_gets(loss_fn: Any, way: str) -> None:
    with pytest.raises(
        TypeError, match=r"train_step: expected loss_fn\(params, batch, key\), came <lambda>\(p.*give it"
    ):
        take(loss_fn, way)
    with pytest.raises(TypeError, match=r"private_step: expected loss_fn\(params, example, key\), came <lambda>"):
        ft.train.private_step(loss_fn, ft.optim.dpsgd(0.1, 1.0, 1.0, KEY))(start(), batch())


def test_a_loss_with_buffers_and_without_the_option_is_told_of_it() -> None:
    with pytest.raises(TypeError, match="buffers=True is for"):
        take(lambda p, buffers, b, k: (loss(p, b), buffers))
    with pytest.raises(TypeError, match=r"expected loss_fn\(params, buffers, batch, key\), came <lambda>\(p, b, k\)"):
        ft.train_step(lambda p, b, k: loss(p, b), TX, buffers=True)(start(), batch())


def test_an_error_within_a_loss_stays_what_it_is() -> None:
    def failing(p: Any, b: Any, k: Any) -> Tensor:
        return {}["no"] + len(None)  # type: ignore[index, arg-type]

    with pytest.raises(KeyError, match="no"):
        take(failing)
    with pytest.raises(KeyError, match="'v'"):
        take(lambda p, b, k: p["v"])
    with pytest.raises(ValueError, match="not enough values to unpack"):
        take(lambda p, b, k: [x for x, y, z in [p["w"].shape]])


def doubled(p: Any, b: Any, k: Any) -> Tensor:
    p["w"] += 1
    return loss(p, b)


def backward(p: Any, b: Any, k: Any, **options: Any) -> Tensor:
    value = loss(p, b)
    value.backward(**options)
    return value


@WAYS
def test_what_a_gradient_cannot_be_taken_of_is_told(way: str) -> None:
    with pytest.raises(
        ValueError, match=r"test_mistakes.py:\d+: fn writes into an argument that it is differentiated by"
    ):
        take(doubled, way)
    for fn in (
        backward,
        functools.partial(backward, retain_graph=True),  # which torch passes over in silence
        lambda p, b, k: torch.autograd.grad(v := loss(p, b), p["w"])[0].sum() * 0 + v,
    ):
        with pytest.raises(TypeError, match=r"fn differentiates for itself.*leave out .backward\(\)"):
            take(fn, way)
    inner = ft.grad(lambda p: ft.grad(backward)(p, batch(), KEY)["w"].sum())
    with pytest.raises(TypeError, match=r"fn differentiates for itself.*leave out .backward\(\)"):
        (ft.compile(inner) if way == "compiled" else inner)({"w": ONES(3)})


def scaled(p: Any, b: Any, k: Any) -> Tensor:
    b["x"].mul_(2)
    return loss(p, b)


def emptied(p: Any, b: Any, k: Any) -> Tensor:
    b["x"] = b["x"] * 2
    return loss(p, {"x": b["x"], "y": b.pop("y")})


@WAYS
def test_a_batch_is_neither_written_into_nor_taken_apart(way: str) -> None:
    with pytest.raises(ValueError, match="train_step: batch: x: the loss has written into this tensor"):
        take(scaled, way)
    b = batch()
    first, second = take(emptied, way, b), take(emptied, way, b)
    assert list(b) == ["x", "y"] and torch.equal(b["x"], ONES(4, 3))
    assert torch.equal(first["grad_norm"], second["grad_norm"])


def test_a_batch_written_into_in_a_slice_is_told() -> None:
    with pytest.raises(ValueError, match="batch: x: the loss has written"):
        take(lambda p, b, k: ft.Loss(scaled(p, b, k), ONES(()), {}), accumulate=2)


DRAWS: dict[str, Callable[[Any], Any]] = {
    "F.dropout": lambda w: F.dropout(w),
    "nn.Dropout": lambda w: torch.nn.Dropout()(w),
    "randn": lambda w: torch.randn(3) * w,
    "rand_like": lambda w: torch.rand_like(w) * w,
    "bernoulli": lambda w: torch.bernoulli(torch.full((3,), 0.5)) * w,
    "randperm": lambda w: w[torch.randperm(3)],
    "normal_": lambda w: torch.empty(3).normal_() * w,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_loss_that_draws_from_the_global_generator_is_told_in_eager_too(name: str) -> None:
    def drawing(p: Any, b: Any, k: Any) -> Tensor:
        return torch.sum(DRAWS[name](p["w"]) + p["w"])

    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="draws from torch's global generator.*draw from its key, as by ft.nn.dropout"):
        take(drawing)
    with pytest.raises(TypeError, match="draws from torch's global generator"):
        take(lambda p, b, k: ft.Loss(drawing(p, b, k), ONES(()), {}), accumulate=2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="test_mistakes.py.*expected random numbers from a key"):
        ft.train.private_step(drawing, ft.optim.dpsgd(0.1, 1.0, 1.0, KEY))(start(), batch())


def test_what_a_loader_draws_beside_a_step_is_no_draw_of_the_loss() -> None:
    class Noisy(Dataset[Any]):
        def __getitem__(self, t: int) -> Any:
            return {"x": torch.randn(4, 3), "y": torch.randn(4)}

    ft.fit(ft.train_step(loss, TX), start(), Noisy(), steps=5)
    take(lambda p, b, k: torch.sum(ft.nn.dropout(p["w"], 0.5, k) + p["w"]))


# ---- the batch -----------------------------------------------------------------------------------------------------


@WAYS
def test_a_batch_of_another_kind_than_the_loss_takes_is_described(way: str) -> None:
    x, y = ONES(4, 3), ONES(4)

    def unpacking(p: Any, b: Any, k: Any) -> Tensor:
        x, y = b
        return loss(p, {"x": x, "y": y})

    for fn, b, says in (
        (loss, (x, y), r"the batch is a tuple of 2, without names; write x, y = batch"),
        (loss, [x, y], "the batch is a list of 2, without names"),
        (loss, x, r"the batch is a tensor of shape \(4, 3\)"),
        (loss, {"x": x}, r"the batch has no 'y'; there is \['x'\]"),
        (unpacking, {"x": x, "y": y, "z": y}, "which unpacks to its keys; take its entries by name"),
    ):
        with pytest.raises(TypeError, match=rf"train_step: .*{says}"):
            take(fn, way, b)
    take(unpacking, way, (x, y))


def test_arrays_of_numpy_in_a_batch_are_told_by_path() -> None:
    array = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match="batch: x: expected a tensor, came an array of numpy; .*torch.from_numpy"):
        take(loss, b={"x": array, "y": ONES(4)})
    with pytest.raises(TypeError, match="the batch: expected a tensor, came an array of numpy"):
        ft.fit(ft.train_step(loss, TX), start(), np.ones((2, 4, 3), np.float32), steps=1)


# ---- metrics -------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"a": ONES(4)}, r"metric 'a': expected a \(\) tensor, came shape \(4,\); take its sum"),
        ({"a": {"b": ONES(())}}, "metric 'a': expected .*came dict; flatten it"),
        ({"a": None}, "metric 'a': expected .*came NoneType"),
        ({"a": "text"}, "metric 'a': expected .*came str"),
        (None, "expected metrics in a dict, came NoneType"),
        ([ONES(())], "expected metrics in a dict, came list"),
    ],
)
def test_metrics_that_are_no_dict_of_numbers_are_named(metrics: Any, says: str, way: str) -> None:
    with pytest.raises(TypeError, match=says):
        take(lambda p, b, k: (loss(p, b), metrics), way)
    with pytest.raises(TypeError, match=says):
        take(lambda p, b, k: ft.Loss(loss(p, b), ONES(()), metrics), way)


def test_a_metric_with_the_name_of_one_of_the_steps_is_refused() -> None:
    everything = {"guard": ft.train.skip_nonfinite(), "loss_scale": ft.loss_scale.static(2.0)}
    for name in take(loss, **everything):
        with pytest.raises(ValueError, match=f"came '{name}'; rename it"):
            take(lambda p, b, k, name=name: (loss(p, b), {name: ONES(())}), **everything)
    assert take(lambda p, b, k: (loss(p, b), {"skipped": 2 * ONES(())}))["skipped"] == 2.0
    with pytest.raises(ValueError, match="came 'gradient_noise_scale'; rename it"):
        named = lambda p, b, k: ft.Loss(loss(p, b), ONES(()), {"gradient_noise_scale": ONES(())})  # noqa: E731
        ft.train.noise_scale_step(named, TX)(start(), batch())


@WAYS
def test_a_number_of_python_is_a_metric_also_in_slices(way: str) -> None:
    counted = lambda p, b, k: ft.Loss(loss(p, b), ONES(()), {"a": 1.5})  # noqa: E731
    assert take(counted, way)["a"] == 1.5 and take(counted, way, accumulate=2)["a"] == 1.5


# ---- the state -----------------------------------------------------------------------------------------------------


def test_a_donated_step_never_takes_the_callers_params() -> None:
    module = torch.nn.Linear(3, 1)
    functional = ft.from_module(module)
    shared = ONES(3)
    params = {"w": shared, "again": shared, "module": functional.params}
    step = ft.compile(ft.train_step(lambda p, b, k: sum(torch.sum(x) for x in ft.tree.leaves(p)), TX), donate=True)
    state, _ = step(ft.init_state(params, TX, key=KEY), batch())
    assert torch.equal(shared, ONES(3)) and torch.equal(functional.params["weight"], module.weight)
    assert torch.allclose(state.params["w"], 0.9 * ONES(3))  # 1 - 0.1


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (torch.nn.Linear(3, 1), "came the module Linear; take ft.from_module"),
        ({"net": torch.nn.Linear(3, 1)}, "net: .*came the module Linear; take ft.from_module"),
        (torch.nn.Linear(3, 1).parameters(), "came a generator, .*take ft.from_module"),
        (ft.from_module(torch.nn.Linear(3, 1)), "came the function 'apply'; .*pass its field `params`"),
    ],
)
def test_a_module_in_the_place_of_params_names_the_way_to_them(params: Any, says: str) -> None:
    for call in (
        lambda: ft.init_state(params, TX, key=KEY),
        lambda: ft.optim.adam(0.1).init(params),
        lambda: ft.grad(lambda p: ONES(()))(params),
    ):
        with pytest.raises(TypeError, match=says):
            call()
    with pytest.raises(TypeError, match=r"w: .*came ndarray .*make it one by torch.as_tensor"):
        ft.init_state({"w": np.ones(3)}, TX, key=KEY)


@WAYS
def test_the_state_of_another_optimizer_or_of_other_params_is_told_by_the_step(way: str) -> None:
    params = {"w": ONES(3, 3)}
    for tx, opt_state in (
        (ft.optim.adam(0.1), ft.optim.sgd(0.1, 0.9).init(params)),
        (ft.optim.muon(0.1), ft.optim.adam(0.1).init(params)),
        (ft.optim.schedule_free_sgd(0.1), ft.optim.adam(0.1).init(params)),
        (ft.optim.sm3(0.1), ft.optim.sm3(0.1).init({"w": ONES(1, 3)})),
    ):
        step = ft.train_step(lambda p, b, k: torch.sum(p["w"] ** 2), tx)
        state = ft.TrainState(torch.tensor(0), params, opt_state, KEY)
        with pytest.raises(ValueError, match="pass the state that the same optimizer's init made of these params"):
            (ft.compile(step) if way == "compiled" else step)(state, batch())


# ---- fit -----------------------------------------------------------------------------------------------------------


def fitted(batches: Any, steps: Any = 2, t: int = 0, step: Any = None, **options: Any) -> ft.TrainState:
    step = ft.train_step(loss, TX) if step is None else step
    return ft.fit(step, start()._replace(step=torch.tensor(t)), batches, steps=steps, **options)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (batch(), r"came a dict of tensors, one batch; write itertools.repeat\(batch\)"),
        ((ONES(4, 3), ONES(4)), r"came a tuple of 2 arrays, one batch; write itertools.repeat\(batch\)"),
        (None, "expected batches, .* came NoneType"),
        (lambda t: batch(), r"came function; of a function of t, pass \(fn\(t\) for t"),
        ("corpus.txt", "came str"),
    ],
)
def test_what_is_no_row_of_batches_is_told_before_a_step(batches: Any, says: str) -> None:
    with pytest.raises(TypeError, match=f"fit: {says}" if says[0] == "e" else f"fit: .*{says}"):
        fitted(batches)


@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        (lambda t, s, m: None, r"a list of hooks, came function; write every=\[hook\]"),
        (10, "a list of hooks, came int"),
        (None, "a list of hooks, came NoneType"),
        ((h for h in [print]), "a list of hooks, came generator"),  # which would be empty after a step
        ([None], r"a hook\(t, state, metrics\), came NoneType None; pass the function, not what it returns"),
        ([lambda t: None], r"a hook\(t, state, metrics\), came <lambda>, which does not take three arguments"),
        ([lambda t, s, m, more: None], "which does not take three arguments"),
    ],
)
def test_hooks_that_cannot_be_called_are_told_before_a_step(hooks: Any, says: str) -> None:
    taken = []
    with pytest.raises(TypeError, match=f"fit: .*expected .*{says}"):
        fitted([batch()] * 2, step=lambda state, b: taken.append(b), every=hooks)
    assert not taken
    fitted([batch()] * 2, every=(lambda *all: None, lambda t, s, m, more=0: None))


def test_every_wants_a_count_and_a_hook() -> None:
    hook = lambda t, s, m: None  # noqa: E731
    for n, fn, says in (
        ("2", hook, "n to be an int, a number of steps, came str '2'"),
        (1.5, hook, "came float 1.5"),
        (hook, 2, "came int 2; pass the function"),
        (2, lambda t: None, "which does not take three arguments"),
    ):
        with pytest.raises(TypeError, match=f"every: expected .*{says}"):
            ft.train.every(n, fn)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [None, 2.0, "2", True, [2]])
def test_a_number_of_steps_is_an_int(steps: Any) -> None:
    with pytest.raises(TypeError, match="fit: expected steps to be an int, a number of steps, came"):
        fitted([batch()] * 2, steps)


def test_arguments_of_fit_in_another_order_are_told_apart() -> None:
    step: Any = ft.train_step(loss, TX)
    for args in ((start(), step, [batch()]), (step, [batch()], start()), (step, (1, 2), [batch()])):
        with pytest.raises(TypeError, match=r"fit: expected \(step, state, batches\), .* came \("):
            ft.fit(*args, steps=1)
    with pytest.raises(TypeError, match=r"expected step\(state, batch\), .*make it by ft.train_step"):
        ft.fit(lambda p, b, k: loss(p, b), start(), [batch()], steps=1)


# ---- where a run goes on -------------------------------------------------------------------------------------------


def rows(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(5.0)), batch_size=1, **options)


def read(batches: Any, steps: int, t: int) -> list[float]:
    seen: list[float] = []

    def step(state: Any, b: Any) -> Any:
        seen.append(float(b[0]))
        return state._replace(step=state.step + 1), {}

    fitted(batches, steps, t, step)
    return seen


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(5.0)[:, None])


class SizedStream(Stream):
    def __len__(self) -> int:  # torch takes it for an estimate
        return 2


def test_a_resumed_run_goes_on_in_a_loader_where_it_was() -> None:
    assert read(rows(), 5, 2) == [2.0, 3.0, 4.0]
    assert read(rows(), 10, 5) == [0.0, 1.0, 2.0, 3.0, 4.0]  # the second epoch
    assert read(rows(), 10, 7) == [2.0, 3.0, 4.0]
    assert sorted(read(rows(shuffle=True), 10, 5)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert read(Stream(), 2, 0) == [0.0, 1.0]  # it has a __getitem__ that raises
    assert read(iter(rows()), 4, 2) == [0.0, 1.0]  # an iterator is where its owner left it
    assert read(itertools.islice(Stream(), 2, None), 4, 2) == [2.0, 3.0]


@pytest.mark.parametrize(
    "batches",
    [
        rows(shuffle=True),
        rows(sampler=torch.utils.data.RandomSampler(range(5))),
        Stream(),
        DataLoader(Stream()),
        SizedStream(),
        DataLoader(SizedStream(), batch_size=None),
    ],
)
def test_where_nobody_knows_the_order_a_resumed_run_is_refused_with_a_way_out(batches: Any) -> None:
    says = r"the state has read 2 batches.*ft.data.loader\(dataloader, seed=0\).*itertools.islice\(batches, t, None\)"
    with pytest.raises(ValueError, match=says):
        read(batches, 4, 2)
