"""Every transform of the library as a function from a loss to a loss, so that any of them stands inside any other.

A transform that gives a gradient becomes the loss `<gradient, DIRECTION>`, a step becomes what it moves the params
along DIRECTION, and so on. What comes out is differentiated once more and compared with `expected`, by torch.autograd
alone. All numbers are small integers, with which float32 and the products of bfloat16 are exact: the precisions are
real ones here, and the results still those of float64.

python tests/transforms/composition.py --compile 500  # compile every cell to the end, for so many seconds; then goes on
python tests/transforms/composition.py --write        # the table in docs/transforms.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import functrain as ft
from functrain import optim, tree
from functrain.compiler import compilation

LossFn = Callable[[Any, Any, Any], ft.Loss]
Around = Callable[[LossFn], LossFn]
Chain = tuple[str, ...]  # transforms from the inside out


def draw(seed: int, *shape: int) -> Tensor:
    # of the first of 4000 seeds for which bfloat16 products are exact in second derivatives too
    return ft.random.randint(ft.random.key(8000 + seed), shape, -1, 2).to(torch.float64)


PARAMS = [{"w": draw(i, 3, 3), "b": draw(10 + i, 3)} for i in range(2)]
DIRECTION = [{"w": draw(20 + i, 3, 3), "b": draw(30 + i, 3)} for i in range(2)]
BATCH = {"x": draw(40, 4, 3), "mask": torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)}
KEY = ft.random.key(0)


def block(layer: Any, x: Tensor) -> Tensor:
    return x + 0.5 * x * (x @ layer["w"] + layer["b"])


def loss(params: Any, batch: Any, key: Any) -> ft.Loss:
    rows = torch.sum(ft.nn.stack(block, params, batch["x"]) ** 2, -1)  # (B,)
    return weighed(torch.sum(batch["mask"] * rows), batch)


def weighed(total: Tensor, batch: Any) -> ft.Loss:
    # a power of two for the whole batch, its halves and its rows, so that a division by it is exact
    return ft.Loss(total, torch.full((), len(batch["x"]), dtype=total.dtype), {})


# ---- the same loss -----------------------------------------------------------------------------------------------


def in_float32(loss: LossFn) -> LossFn:
    def checked(params: Any, batch: Any, key: Any) -> ft.Loss:
        assert {leaf.dtype for leaf in tree.leaves((params, batch))} == {torch.float32}
        return loss(params, batch, key)

    return ft.mixed_precision(checked, ft.Policy(compute=torch.float32, output=torch.float64))


def in_bfloat16(loss: LossFn) -> LossFn:
    # autocast leaves float64 as it is
    return in_float32(ft.autocast(loss, ft.Policy(compute=torch.bfloat16)))


def mapped(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        rows = {name: leaf.unsqueeze(1) for name, leaf in batch.items()}
        return weighed(torch.sum(ft.vmap(lambda row: loss(params, row, key).total)(rows)), batch)

    return loss_of


def as_module(loss: LossFn) -> LossFn:
    class Layer(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(layer["w"].clone()), nn.Parameter(layer["b"].clone())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(layer) for layer in PARAMS])
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, batch: Any, key: Any) -> ft.Loss:
            self.calls += 1
            return loss([{"w": layer.w, "b": layer.b} for layer in self.layers], batch, key)

    functional = ft.from_module(Model())

    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        named = {"layers": {str(i): layer for i, layer in enumerate(params)}}
        return functional.apply(named, functional.buffers, key, batch, key)[0]

    return loss_of


# ---- the gradient along a direction ------------------------------------------------------------------------------


def along(gradient: Callable[[LossFn, Any, Any, Any], Any]) -> Around:
    """Of a gradient `(loss, params, batch, key) -> grads`, the loss that is the derivative along DIRECTION."""

    def around(loss: LossFn) -> LossFn:
        return lambda params, batch, key: weighed(tree.vdot(gradient(loss, params, batch, key), DIRECTION), batch)

    return around


def of_leaves(loss: LossFn, params: Any, batch: Any, key: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Of a loss, the function of the leaves that torch.func takes."""
    leaves, structure = tree.flatten(params)
    return (lambda *leaves: loss(tree.unflatten(structure, leaves), batch, key).total), leaves


def jacobian(make: Any) -> Callable[[LossFn, Any, Any, Any], Any]:
    def gradient(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
        fn, leaves = of_leaves(loss, params, batch, key)
        return tree.unflatten(tree.structure(params), make(fn, argnums=tuple(range(len(leaves))))(*leaves))

    return gradient


def by_vjp(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
    fn, leaves = of_leaves(loss, params, batch, key)
    total, pull = torch.func.vjp(fn, *leaves)
    return tree.unflatten(tree.structure(params), list(pull(torch.ones_like(total))))


def by_jvp(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        fn, leaves = of_leaves(loss, params, batch, key)
        moves = [move.to(leaf.dtype) for move, leaf in zip(tree.leaves(DIRECTION), leaves, strict=True)]
        return weighed(torch.func.jvp(fn, tuple(leaves), tuple(moves))[1], batch)

    return loss_of


def of_examples(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
    grads = ft.per_example_grad(loss, chunk_size=3)(params, batch, key)
    return tree.map(lambda leaf: torch.sum(leaf, 0), grads)


def of_parts(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
    # by rows, not by parts: a row alone, as vmap gives it, has no two parts
    return ft.accumulate(ft.value_and_grad(loss), rows=3)(params, batch, key)[1]


# ---- second derivatives ------------------------------------------------------------------------------------------


def by_hessian(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        fn, leaves = of_leaves(loss, params, batch, key)
        rows = torch.func.hessian(fn, argnums=tuple(range(len(leaves))))(*leaves)
        moves = [move.to(leaf.dtype) for move, leaf in zip(tree.leaves(DIRECTION), leaves, strict=True)]
        pairs = [
            torch.sum(torch.tensordot(u, h, u.dim()) * v)
            for u, row in zip(moves, rows, strict=True)
            for v, h in zip(moves, row, strict=True)
        ]
        return weighed(torch.stack(pairs).sum(), batch)

    return loss_of


def by_hvp(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
    moves = tree.map(lambda move, leaf: move.to(leaf.dtype), DIRECTION, params)
    return ft.hvp(lambda *args: loss(*args).total, params, batch, moves, key=key)


def by_ggnvp(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
    """The outputs are the rows' losses, and their loss half the sum of squares: J' J."""

    def outputs(params: Any, batch: Any, key: Any) -> Tensor:
        rows = {name: leaf.unsqueeze(1) for name, leaf in batch.items()}
        return ft.vmap(lambda row: loss(params, row, key).total)(rows)

    moves = tree.map(lambda move, leaf: move.to(leaf.dtype), DIRECTION, params)
    return ft.ggnvp(outputs, lambda z, batch: 0.5 * torch.sum(z**2), params, batch, moves, key=key)


# ---- steps -------------------------------------------------------------------------------------------------------


def moved(take: Callable[[LossFn, Any, Any, Any], ft.TrainState]) -> Around:
    """Of a step of SGD with learning rate 1, or what is made of one, what it moves the params by."""

    def gradient(loss: LossFn, params: Any, batch: Any, key: Any) -> Any:
        new = take(loss, params, batch, key).params
        return tree.scale(float(len(batch["x"])), tree.sub(params, new))

    return along(gradient)


def step_with(**options: Any) -> Callable[[LossFn, Any, Any, Any], ft.TrainState]:
    kept = {name: options[name] for name in ("loss_scale", "guard") if name in options}

    def take(loss: LossFn, params: Any, batch: Any, key: Any) -> ft.TrainState:
        state = ft.init_state(params, optim.sgd(1.0), key=key, **kept)
        return ft.train_step(loss, optim.sgd(1.0), **options)(state, batch)[0]

    return take


def private(loss: LossFn, params: Any, batch: Any, key: Any) -> ft.TrainState:
    tx = optim.dpsgd(1.0, l2_norm_clip=1e30, noise_multiplier=0.0, seed=0)
    return ft.train.private_step(loss, tx)(ft.init_state(params, tx, key=key), batch)[0]


def second_of_two_runs(loss: LossFn, params: Any, batch: Any, key: Any) -> ft.TrainState:
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.5)
    runs = ft.sweep(ft.train_step(loss, tx), {"params": [tree.scale(2.0, params), params], "learning_rate": [0.5, 1.0]})
    states, _ = runs(runs.init(ft.init_state(params, tx, key=key)), batch)
    return runs.lane(states, 1)


def unrolled(loss: LossFn, params: Any, batch: Any, key: Any) -> ft.TrainState:
    """Three steps, of which the last two do not move."""
    tx = optim.sgd(lambda count: torch.where(count == 0, 1.0, 0.0))
    state = ft.init_state(params, tx, key=key)
    return ft.unroll(ft.train_step(loss, tx), state, [batch] * 3, recompute=True)[0]


TRANSFORMS: dict[str, Around] = {
    "mixed_precision": in_float32,
    "autocast": in_bfloat16,
    "recompute": ft.recompute,
    "recompute_layers": ft.recompute_layers,
    "from_module": as_module,
    "vmap": mapped,
    "grad": along(lambda loss, *args: ft.grad(loss)(*args)),
    "vjp": along(by_vjp),
    "jvp": by_jvp,
    "jacrev": along(jacobian(torch.func.jacrev)),
    "jacfwd": along(jacobian(torch.func.jacfwd)),
    "hessian": by_hessian,
    "hvp": along(by_hvp),
    "ggnvp": along(by_ggnvp),
    "per_example_grad": along(of_examples),
    "accumulate": along(of_parts),
    "train_step": moved(step_with()),
    "loss_scale": moved(step_with(loss_scale=ft.loss_scale.static(1024.0))),
    "guard": moved(step_with(guard=ft.train.skip_nonfinite())),
    "private_step": moved(private),
    "sweep": moved(second_of_two_runs),
    "unroll": moved(unrolled),
}
SAME = ("mixed_precision", "autocast", "recompute", "recompute_layers", "from_module", "vmap")
TWICE = ("hessian", "hvp")


def build(chain: Chain) -> Callable[[Any, Any, Any], Any]:
    """Make `(params, batch, key) -> gradients` of the loss with every transform of the chain around it."""
    fn = loss
    for name in chain:
        fn = TRANSFORMS[name](fn)
    return ft.grad(fn)


def expected(chain: Chain) -> Any:
    """The same by torch.autograd alone."""
    leaves, structure = tree.flatten(PARAMS)
    moves = tree.leaves(DIRECTION)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    rows = [{name: leaf[i : i + 1] for name, leaf in BATCH.items()} for i in range(len(BATCH["x"]))]
    # every transform is one of rows, whose losses add up
    totals = [loss(tree.unflatten(structure, leaves), row, KEY).total for row in rows]

    def derived(total: Tensor) -> Tensor:
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.stack([torch.sum(g * v) for g, v in zip(grads, moves, strict=True)]).sum()

    for name in chain:
        times = 0 if name in SAME else 2 if name in TWICE else 1
        for _ in range(times):
            totals = [derived(total) for total in totals]
        if name == "ggnvp":
            totals = [total**2 for total in totals]
    return tree.unflatten(structure, torch.autograd.grad(torch.stack(totals).sum(), leaves))


def chains() -> list[Chain]:
    """The transforms, all pairs, and the stacks of more that users make."""
    return [*[(name,) for name in TRANSFORMS], *[(a, b) for a in TRANSFORMS for b in TRANSFORMS], *STACKS]


STACKS: list[Chain] = [
    ("mixed_precision", "recompute", "accumulate", "sweep"),
    ("recompute", "mixed_precision", "loss_scale", "accumulate"),
    ("recompute_layers", "mixed_precision", "guard", "sweep"),
    ("mixed_precision", "recompute", "per_example_grad", "sweep"),
    ("from_module", "autocast", "recompute", "accumulate"),
    ("recompute", "private_step", "sweep"),
    ("mixed_precision", "recompute", "unroll", "sweep"),
    ("recompute", "vmap", "grad", "recompute", "accumulate"),
    ("recompute", "jacfwd", "vmap", "grad"),
    ("recompute", "hessian", "vmap"),
]


def close(found: Any, wanted: Any) -> bool:
    """Tell whether each leaf is within 1e-10 of the wanted one's largest number; a NaN is not."""
    pairs = zip(tree.leaves(found), tree.leaves(wanted), strict=True)
    return all(bool(torch.amax(torch.abs(a - b)) <= 1e-10 * torch.amax(torch.abs(b))) for a, b in pairs)


def gradient_by_a_step(step: Any) -> Any:
    """The gradient, from what one step of SGD with learning rate 1 takes off the params."""
    state = ft.init_state(tree.map(torch.clone, PARAMS), optim.sgd(1.0), key=KEY)
    return tree.scale(float(len(BATCH["x"])), tree.sub(PARAMS, step(state, BATCH)[0].params))


def stepping(chain: Chain) -> Any:
    fn = loss
    for name in chain:
        fn = TRANSFORMS[name](fn)
    return ft.train_step(fn, optim.sgd(1.0))


def gradient_in_pieces(chain: Chain) -> Any:
    whole, compilation._PIECEWISE_BYTES = compilation._PIECEWISE_BYTES, 0
    try:
        return gradient_by_a_step(ft.compile(stepping(chain)))
    finally:
        compilation._PIECEWISE_BYTES = whole


def gradient_donated(chain: Chain) -> Any:
    return gradient_by_a_step(ft.compile(stepping(chain), donate=True))


WAYS: dict[str, Callable[[Chain], Any]] = {
    "eager": lambda chain: build(chain)(PARAMS, BATCH, KEY),
    "traced": lambda chain: compilation.interpret(build(chain))(PARAMS, BATCH, KEY),
    "compiled": lambda chain: ft.compile(build(chain))(PARAMS, BATCH, KEY),
    "in pieces": gradient_in_pieces,
    "donated": gradient_donated,
}


if __name__ == "__main__":
    import composition_table

    composition_table.main()
