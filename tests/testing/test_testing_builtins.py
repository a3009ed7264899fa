"""Every transformation that is no whole optimizer keeps every law; those are in test_testing_optimizers.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_optim_laws import examples
from test_optim_parity import CASES, Case

import functrain.optim as ours
from functrain import tree
from functrain.testing import laws, strategies

# what draws by the number of a leaf, or counts how deep leaves are: their docstrings say so
COUNTED = {
    "add_noise", "differentially_private_aggregate", "dpsgd", "kron", "layerwise_decay", "noisy_sgd",
    "round_state_stochastically", "scale_by_kron",
}  # fmt: skip
MATRIX = {"w": torch.arange(6.0).reshape(2, 3) - 2, "b": torch.ones(3)}


@pytest.mark.parametrize("case", [c for c in CASES if not c.is_optimizer], ids=lambda case: case.name)
def test_a_part_keeps_every_law(case: Case) -> None:
    check_case(case)


def check_case(case: Case) -> None:
    what = examples(case, 4)[-1]  # the first one is the simplest
    extra_args = (lambda step: {"value": case.loss(step)}) if case.loss else (lambda step: {})
    # the compiler takes seconds: what the tracer sees is compiled in test_testing_declared.py
    without = ["uncounted"] if case.name in COUNTED else []
    laws.check(what.build("ours"), extra_args=extra_args, compiled=False, examples=4, without=without)


def of_examples(params: Any, seed: int) -> Any:
    """Gradients of two examples, (2, ...) for each leaf of params."""
    rows = [strategies.fill(params, 10 * seed + i) for i in range(2)]
    return tree.map(lambda *leaves: torch.stack(leaves), *rows)


def quartic(params: Any) -> Any:
    return sum(torch.sum(leaf**4) for leaf in tree.leaves(params))


# a second one in a chain would be given the mean instead of the examples
OF_EXAMPLES = {"gradients": of_examples, "without": ["associative"]}
# inner products of updates in bfloat16 have two digits, and are added in another order when mapped
LONG_FLOATS = {"params": strategies.params(dtypes=[torch.float32, torch.float64]), "rtol": 1e-4}
# updates of half-precision params are float32, which is what they are for: see test_half_params.py
WIDE = {"params": strategies.params(dtypes=[torch.float32, torch.float64])}
SKIP_LARGE = partial(ours.skip_large_updates, max_squared_norm=9.0)

# what test_optim_parity.py does not make: it has arguments that are functions, or gradients of its own kind
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "differentially_private_aggregate": (ours.differentially_private_aggregate(1.0, 0.1, 3), OF_EXAMPLES),
    "dpsgd": (ours.dpsgd(0.1, 1.0, 0.1, 3, momentum=0.9), OF_EXAMPLES),
    "inject_hyperparams": (
        ours.inject_hyperparams(ours.adamw)(learning_rate=lambda count: 0.1 / (count + 1), weight_decay=0.1), {}
    ),
    "keep_ema": (ours.keep_ema(ours.adam(0.1), 0.9), {}),
    "keep_master_copies": (ours.keep_master_copies(ours.adam(0.1)), WIDE),
    "keep_swa": (ours.keep_swa(ours.adam(0.1), 2, 2), {}),
    "lbfgs": (ours.lbfgs(0.1, memory_size=2, linesearch=None), LONG_FLOATS),
    "measure_with_ema": (ours.monitor({"norm": ours.measure_with_ema(tree.norm, 0.9)}), {}),
    "monitor": (ours.monitor({"norm": tree.norm}), {}),
    "noisy_sgd": (ours.noisy_sgd(0.1, key=3), {}),
    "round_params_stochastically": (ours.round_params_stochastically(ours.adam(0.1)), WIDE),
    "scale_by_dog": (ours.scale_by_dog(("distance", 0.1)), {}),
    "scale_by_dowg": (ours.scale_by_dowg(), {}),
    "scale_by_galore": (ours.scale_by_galore(2, 2), {}),
    "scale_by_lbfgs": (ours.scale_by_lbfgs(2), LONG_FLOATS),
    "scale_by_muon": (ours.scale_by_muon(), {"params": {"w": MATRIX["w"]}}),
    "scale_by_shape": (ours.scale_by_shape(), {"params": {"w": MATRIX["w"]}}),
    "selective_transform": (
        ours.selective_transform(ours.adam(0.1), freeze_mask={"w": True, "b": False}), {"params": MATRIX}
    ),
    # its state tells the square of a norm, which may be infinite
    "skip_large_updates": (
        ours.MultiSteps(ours.adam(0.1), 2, should_skip_update_fn=SKIP_LARGE), {"without": ["finite_at_edges"]}
    ),
    "skip_not_finite": (ours.MultiSteps(ours.adam(0.1), 2, should_skip_update_fn=ours.skip_not_finite), {}),
    "snapshot": (ours.snapshot("norm", tree.norm), {}),
    # without a leaf its loss depends on nothing, which is an error
    "sophia": (
        ours.sophia(0.1, update_interval=2),
        {"extra_args": lambda step: {"obj_fn": quartic}, "params": MATRIX, "without": ["masked_nowhere"]},
    ),
    "stateless": (ours.stateless(lambda updates, params: tree.scale(2.0, updates)), {}),
    "stateless_with_tree_map": (ours.stateless_with_tree_map(lambda g, p: g * 2 if p is None else g + p), {}),
    "with_extra_args_support": (ours.with_extra_args_support(ours.trace(0.9)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_takes_functions_keeps_every_law(name: str) -> None:
    tx, options = OTHERS[name]
    without = [*options.get("without", []), *(["uncounted"] if name in COUNTED else [])]
    laws.check(tx, compiled=False, examples=5, **{**options, "without": without})
