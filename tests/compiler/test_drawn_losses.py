"""A loss that Hypothesis draws out of operations, layers, maps and gradients, cut as a large step is, equals eager.

The graphs are cut, split and linked as ever, and run operation by operation in place of being compiled, which takes a
hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import functrain as ft
from functrain.compiler import compilation, linking

WIDTH = 4
Piece = Callable[[Any, Tensor, Tensor], Tensor]  # (params, x, key) -> x


def run(graph: fx.Graph | fx.GraphModule) -> Callable[[list[Any]], list[Any]]:
    module = fx.GraphModule({}, graph) if isinstance(graph, fx.Graph) else graph

    def kernel(values: list[Any]) -> list[Any]:
        given = list(values)
        values.clear()
        return list(module(*given))

    return kernel


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def lower(
        module: fx.GraphModule, mode: Any, which: str, visible: int | None = None, given: Sequence[int] = ()
    ) -> Any:
        module.recompile()
        kernel = run(module)

        def spoiling(values: list[Any]) -> Any:
            spoilt = [values[i] for i in given]
            found = kernel(values)
            for value in spoilt:
                value.fill_(1000)  # which a program may do with what it is given
            return found

        return spoiling, [None] * len(module.graph.output_node().args[0])

    from functrain.compiler.inductor import lowering  # here: torch's compiler takes 2 s to load

    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    monkeypatch.setattr(lowering, "lower", lower)
    monkeypatch.setattr(lowering, "compile_graph", lambda graph, mode: run(graph))
    yield


def layers(params: Any, count: int) -> list[Any]:
    return [params["w"][i % 3] for i in range(count)]


def stacked(count: int, policy: Any, outside: bool) -> Piece:
    def piece(params: Any, x: Tensor, key: Tensor) -> Tensor:
        shift = torch.cos(x) * params["v"]  # what the block takes from around it has a gradient of its own

        def block(layer: Any, x: Tensor) -> Tensor:
            h = ft.checkpoint_name(torch.tanh(x @ layer), "h")
            return x + (h * shift if outside else h)

        block = block if policy is None else ft.recompute(block, policy)
        return ft.nn.stack(block, layers(params, count), x)

    return piece


def stacked_trees(count: int) -> Piece:
    def block(layer: Any, x: Any, scale: Tensor) -> Any:
        return {"h": torch.sin(x["h"] @ layer) * scale, "kept": x["kept"]}

    def piece(params: Any, x: Tensor, key: Tensor) -> Tensor:
        found = ft.nn.stack(block, layers(params, count), {"h": x, "kept": x * 2}, params["v"])
        return found["h"] + found["kept"]

    return piece


def mapped(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.vmap(lambda row, w: torch.tanh(row @ w), (0, None))(x, params["w"][1])


def stacked_in_a_map(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.vmap(lambda row: ft.nn.stack(lambda w, y: torch.sin(y @ w), layers(params, 2), row))(x)


def differentiated(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.grad(lambda y: torch.sum(torch.sin(y * params["v"]) ** 2))(x)


def examples(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.per_example_grad(lambda w, row: torch.sum(torch.tanh(row @ w)))(params["w"][2], x).sum(-1)


def dropped(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.nn.dropout(x, 0.3, key)


def written(params: Any, x: Tensor, key: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = x[:, ::2] * params["v"][::2]
    y.add_(x).mul_(0.5)
    return y


def of_a_view(params: Any, x: Tensor, key: Tensor) -> Tensor:
    y = x.clone()
    y.T[0].mul_(2.0)  # a write through views, which only functionalization sees
    return y * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)


def recomputed(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return ft.recompute(lambda w, x: torch.exp(torch.sin(x @ w)))(params["w"][0], x)


def without_gradient(params: Any, x: Tensor, key: Tensor) -> Tensor:
    return x * torch.sum(params["v"].detach()) + (x > 0).to(x.dtype)


PIECES = st.one_of(
    st.builds(
        stacked,
        st.integers(1, 4),
        st.sampled_from([None, "nothing", "dots", ("h",)]),
        st.just(False),  # what is recomputed must get all that it uses
    ),
    st.builds(stacked, st.integers(1, 4), st.none(), st.just(True)),
    st.builds(stacked_trees, st.integers(1, 3)),
    st.sampled_from(
        [mapped, stacked_in_a_map, differentiated, examples, dropped, written, of_a_view, recomputed, without_gradient]
    ),
)


def loss_of(pieces: list[Piece]) -> Callable[..., Any]:
    def loss(params: Any, batch: Tensor, key: Tensor) -> ft.Loss:
        x = batch
        for i, piece in enumerate(pieces):
            x = piece(params, x, ft.random.fold_in(key, i))
        x = x + params["b"]
        return ft.Loss(torch.sum(x**2), torch.tensor(float(len(batch))), {"mean": torch.mean(x)})

    return loss


def start() -> Any:
    w = torch.linspace(-1, 1, 3 * WIDTH * WIDTH, dtype=torch.float64).view(3, WIDTH, WIDTH)
    v = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
    return {"w": list(w.unbind()), "v": v, "b": torch.zeros(WIDTH, dtype=torch.float64), "unused": torch.ones(2)}


BATCH = torch.linspace(-2, 2, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
OPTIMIZER = ft.optim.chain(ft.optim.clip_by_global_norm(1e3), ft.optim.sgd(0.1, momentum=0.9))


class Module(nn.Module):
    """A loss as a module of torch, whose parameters are those of `start`."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss
        self.w = nn.ParameterList([nn.Parameter(w) for w in start()["w"]])
        self.v, self.b = nn.Parameter(start()["v"]), nn.Parameter(start()["b"])

    def forward(self, batch: Tensor, key: Tensor) -> ft.Loss:
        return self.loss({"w": list(self.w), "v": self.v, "b": self.b}, batch, key)


def in_module(loss: Callable[..., Any]) -> Callable[..., Any]:
    functional = ft.from_module(Module(loss))

    def loss_of(params: Any, batch: Tensor, key: Tensor) -> ft.Loss:
        named = {"w": {str(i): w for i, w in enumerate(params["w"])}, "v": params["v"], "b": params["b"]}
        return functional.apply(named, {}, key, batch, key)[0]

    return loss_of


def check(pieces: list[Piece], accumulate: int, around: Callable[..., Any] = lambda loss: loss) -> None:
    state = ft.init_state(start(), OPTIMIZER, key=ft.random.key(1))
    expected = ft.train_step(loss_of(pieces), OPTIMIZER, accumulate=accumulate)(state, BATCH)
    step = ft.train_step(around(loss_of(pieces)), OPTIMIZER, accumulate=accumulate)
    equal(ft.compile(step)(state, BATCH), expected)


def equal(found: Any, expected: Any) -> None:
    # float64 sums in another order, of losses up to 1e6
    for (path, a), b in zip(ft.tree.items(expected), ft.tree.leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda text, path=path: f"{path}: {text}")


SETTINGS = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(st.lists(PIECES, min_size=1, max_size=4), st.sampled_from([1, 1, 2]))
def test_a_drawn_loss_in_pieces_is_the_eager_one(pieces: list[Piece], accumulate: int) -> None:
    check(pieces, accumulate)


@SETTINGS
@given(st.lists(PIECES, min_size=1, max_size=3))
def test_a_drawn_loss_in_a_module_in_pieces_is_the_eager_one(pieces: list[Piece]) -> None:
    # who runs a module's forward takes its calls of torch to themselves, which must not reach our own
    check(pieces, 1, in_module)


@SETTINGS
@given(st.lists(PIECES, min_size=1, max_size=3))
def test_a_gradient_in_pieces_closes_over_what_is_around_it(pieces: list[Piece]) -> None:
    loss, key = loss_of(pieces), ft.random.key(1)

    def slopes(params: Any, batch: Tensor) -> Tensor:
        return ft.grad(lambda x: loss(params, x, key).total)(batch)

    equal(ft.compile(slopes)(start(), BATCH), slopes(start(), BATCH))


def test_mutants_of_the_linker_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the law above must see: a saved value of another layer, gradients in another order, a write dropped."""
    pieces = [stacked(3, None, True), stacked_trees(2)]
    check(pieces, 2)
    add = linking.Listing.add

    def of_another_layer(self: Any, name: str, program: Any, given: Any, made: Any, *rest: Any) -> None:
        if name == "layer backward":
            forward = next(line for line in self.lines if line.name == "layer forward")
            slots = {slot: key for key, slot in self._slots.items()}
            kept = [slot for slot in forward.made[1:] if slot >= 0]
            given = [slots[kept[0]], *given[1:]] if kept else given
        add(self, name, program, given, made, *rest)

    def reversed_gradients(self: Any, name: str, program: Any, given: Any, made: Any, *rest: Any) -> None:
        made = made[::-1] if name == "layer backward" else made
        add(self, name, program, given, made, *rest)

    for mutant in (of_another_layer, reversed_gradients):
        with monkeypatch.context() as patched:
            patched.setattr(linking.Listing, "add", mutant)
            with pytest.raises((AssertionError, RuntimeError)):
                check(pieces, 1)
    with monkeypatch.context() as patched:
        patched.setattr(linking.graph_passes, "write_early", lambda graph: [
            graph.erase_node(node) for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        ])  # fmt: skip
        with pytest.raises(AssertionError):
            check(pieces, 2)


def test_memory_is_given_away_where_nobody_reads_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward program may spoil what was kept for it alone: not its inputs, nor what the caller gets."""

    def fn(w: list[Tensor], x: Tensor) -> Any:
        h = ft.nn.stack(lambda w, x: torch.tanh(x @ w), w, x)  # is kept, and is a result
        return torch.sum(h), h

    weights = [w.clone() for w in start()["w"]]
    expected = ft.value_and_grad(fn, has_aux=True)(weights, BATCH)

    def right() -> bool:
        # float64, a few sums in another order
        return ft.tree.allclose(ft.compile(ft.value_and_grad(fn, has_aux=True))(weights, BATCH), expected, rtol=1e-9)

    assert right()
    monkeypatch.setattr(
        linking, "_its_own", lambda _, results, kept: [i for i, (of_input, _) in enumerate(kept) if not of_input]
    )
    assert not right()
