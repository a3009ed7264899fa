"""What an update writes over is its own: the same bits, and arguments, maps and gradients as if it did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain.optim as ours
from functrain import tree
from functrain.testing import laws
from functrain.tree import reusing

OPTIMIZERS: dict[str, Any] = {
    "adamw": ours.adamw(0.1, weight_decay=0.1),
    "adam with eps_root": ours.adam(0.1, eps_root=1e-3, eps=0.0),
    "nadam": ours.nadam(0.1),
    "amsgrad": ours.amsgrad(0.1),
    "rmsprop": ours.rmsprop(0.1),
    "radam": ours.radam(0.1),
    "ademamix": ours.ademamix(0.1),
    "adopt": ours.adopt(0.1),
    "clipped": ours.chain(ours.clip_by_global_norm(1.0), ours.adam(0.1)),
}
PARAMS = {
    "wide": torch.linspace(-2, 3, reusing._LARGE + 37),
    "half": torch.linspace(-2, 3, reusing._LARGE).to(torch.bfloat16),
    "complex": torch.complex(torch.linspace(-1, 2, 2 * reusing._LARGE), torch.linspace(2, -1, 2 * reusing._LARGE)),
    "small": torch.ones(3),
}


def run(tx: Any) -> Any:
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(3):
        grads = tree.map(lambda p, i=i: (p * p * (i + 1)).to(p.dtype), params)
        given = tree.map(torch.clone, (grads, state, params))
        updates, new = tx.update(grads, state, params)
        assert all(map(torch.equal, tree.leaves((grads, state, params)), tree.leaves(given)))  # nothing was written
        params, state = ours.apply_updates(params, updates), new
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_are_those_without_reuse_and_arguments_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(OPTIMIZERS[name])
    monkeypatch.setattr(reusing, "_LARGE", 2**62)
    assert all(map(torch.equal, tree.leaves(found), tree.leaves(run(OPTIMIZERS[name]))))


def test_adam_keeps_every_law_where_all_leaves_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reusing, "_LARGE", 0)
    laws.check(ours.adam, differentiable=False, compiled=False, examples=2)


def test_memory_is_reused_and_not_where_it_would_be_seen() -> None:
    x = torch.ones(reusing._LARGE)
    fresh = x + 1
    assert reusing.over(fresh, torch.sqrt, fresh).data_ptr() == fresh.data_ptr()
    fresh = x + 1
    with torch.autograd.forward_ad.dual_level():
        assert reusing.over(fresh, torch.sqrt, fresh).data_ptr() != fresh.data_ptr()
    slope = x.clone().requires_grad_()
    reusing.over(fresh, torch.mul, fresh, slope).sum().backward()
    assert torch.equal(slope.grad, fresh)
    seen = torch.vmap(lambda row: reusing.over(row, torch.mul, row, row))(torch.stack([x, x]))
    assert torch.equal(seen, torch.stack([x, x]))
    small = torch.ones(3)
    assert reusing.over(small, torch.sqrt, small).data_ptr() != small.data_ptr()


def test_a_norm_leaves_its_tree() -> None:
    x = torch.linspace(-1, 1, reusing._LARGE)
    before = x.clone()
    tree.norm({"a": x, "b": torch.complex(x, x)})
    assert torch.equal(x, before)
