"""Every pair of transforms that makes sense, as a chain around one loss; the table of them in docs/transforms.md.

python tests/composition.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import functrain as ft
from functrain import tree

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
BEGIN, END = "<!-- table: made by tests/composition.py -->\n", "<!-- end of the table -->\n"

LossFn = Callable[[Any, Any, Any], ft.Loss]
GradFn = Callable[[Any, Any, Any], tuple[ft.Loss, Any]]
SCALE = 1024.0


def draw(seed: int, *shape: int) -> Tensor:
    return ft.random.normal(ft.random.key(seed), shape, torch.float64)


PARAMS = [{"w": draw(i, 3, 3), "b": draw(10 + i, 3)} for i in range(2)]
DIRECTION = [{"w": draw(20 + i, 3, 3), "b": draw(30 + i, 3)} for i in range(2)]
BATCH = {"x": draw(40, 5, 3), "mask": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)}
KEY = ft.random.key(0)


def loss(params: Any, batch: Any, key: Any) -> ft.Loss:
    x = ft.nn.stack(lambda layer, x: torch.tanh(x @ layer["w"] + layer["b"]) + x, params, batch["x"])
    return ft.Loss(torch.sum(batch["mask"] * torch.sum(x**2, -1)), torch.sum(batch["mask"]), {})


# ---- loss to loss -----------------------------------------------------------------------------------------------


def in_float64(loss: LossFn) -> LossFn:
    return ft.mixed_precision(loss, ft.Policy(compute=torch.float64, output=torch.float64))


def scaled(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        found = loss(params, batch, key)
        return found._replace(total=found.total * SCALE)

    return loss_of


def mapped(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        rows = {name: leaf.unsqueeze(1) for name, leaf in batch.items()}
        # torch.func walks NamedTuples of torch's own registry only
        total, weight = ft.vmap(lambda row: tuple(loss(params, row, key)[:2]))(rows)
        return ft.Loss(torch.sum(total), torch.sum(weight), {})

    return loss_of


def along(loss: LossFn) -> LossFn:
    def loss_of(params: Any, batch: Any, key: Any) -> ft.Loss:
        found, grads = ft.value_and_grad(loss)(params, batch, key)
        return found._replace(total=tree.vdot(grads, DIRECTION))

    return loss_of


INSIDE: dict[str, Callable[[LossFn], LossFn]] = {
    "mixed_precision": in_float64,
    "recompute": ft.recompute,
    "recompute_layers": ft.recompute_layers,
    "loss scale": scaled,
    "vmap": mapped,
    "grad": along,
}

# ---- loss to gradient, and gradient to gradient -----------------------------------------------------------------


def of_examples(loss: LossFn) -> GradFn:
    both = ft.transforms.per_example_value_and_grad(loss, chunk_size=3)
    return lambda params, batch, key: tree.map(lambda leaf: torch.sum(leaf, 0), both(params, batch, None))


def of_runs(grad_fn: GradFn) -> GradFn:
    """The gradient in the second of two runs of a sweep."""

    def step(state: ft.TrainState, batch: Any) -> Any:
        return state, grad_fn(state.params, batch, state.key)

    def of_second(params: Any, batch: Any, key: Any) -> Any:
        runs = ft.sweep(step, {"params": [tree.scale(2.0, params), params]})
        states = runs.init(ft.init_state(params, ft.optim.sgd(0.1), key=key))
        return runs.lane(runs(states, batch)[1], 1)

    return of_second


DIFFERENTIATE: dict[str, Callable[[LossFn], GradFn]] = {
    "value_and_grad": ft.value_and_grad,
    "per_example_grad": of_examples,
}
AROUND: dict[str, Callable[[GradFn], GradFn]] = {
    "accumulate": lambda grad_fn: ft.accumulate(grad_fn, 2),
    "sweep": of_runs,
}
Chain = tuple[str, ...]  # transforms from the inside out; value_and_grad where no other one differentiates


def chains() -> list[Chain]:
    """Every pair, and the triples that users stack."""
    pairs = [(a, b) for a in INSIDE for b in [*INSIDE, "per_example_grad", *AROUND] if (a, b) != ("grad", "grad")]
    outside = [("per_example_grad", name) for name in AROUND] + [(a, b) for a in AROUND for b in AROUND if a != b]
    triples = [
        ("mixed_precision", "recompute", "accumulate"),
        ("recompute_layers", "mixed_precision", "accumulate", "sweep"),
        ("recompute", "mixed_precision", "loss scale", "accumulate", "sweep"),
        ("mixed_precision", "recompute", "per_example_grad", "sweep"),
        ("recompute", "vmap", "grad", "recompute", "accumulate"),
    ]
    return [*pairs, *outside, *triples]


def build(chain: Chain) -> GradFn:
    """Make `(params, batch, key) -> gradients` with every transform of the chain, and the scale divided out."""
    fn: Any = loss
    differentiated = False
    for name in chain:
        if name in INSIDE:
            fn = INSIDE[name](fn)
        elif name in DIFFERENTIATE:
            fn, differentiated = DIFFERENTIATE[name](fn), True
        else:
            fn, differentiated = AROUND[name](fn if differentiated else ft.value_and_grad(fn)), True
    if not differentiated:
        fn = ft.value_and_grad(fn)
    # a scale is also in what is made of it: a derivative of a scaled loss, a scaled scaled loss
    factor = SCALE ** chain.count("loss scale")
    return lambda params, batch, key: tree.scale(1 / factor, fn(params, batch, key)[1])


def table() -> str:
    """The pairs as a Markdown table."""
    columns = [*INSIDE, "per_example_grad", *AROUND]
    made = set(chains())
    lines = ["| inside \\ around | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in columns:
        cells = ["eager, traced" if (row, column) in made else "" for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    more = [" in ".join(chain) for chain in chains() if len(chain) > 2]
    return "\n".join([*lines, "", "Also:", "", *[f"- {stack}" for stack in more]]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    else:
        print(table(), end="")
