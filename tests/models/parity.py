"""A model of a folder of transformers, beside transformers itself: results, gradients, and the folder written back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import random, tree
from functrain.models import names

RESULTS, GRADIENTS = 2e-5, 2e-4  # of the largest: what sums in another order do in float32


class Case(NamedTuple):
    """A model of theirs, and what it and ours are called with."""

    about: dict[str, Any]
    model: Any
    theirs: Callable[[Any], list[Tensor]]  # model -> its results
    from_hf: Callable[[Path], tuple[Any, Any]]
    to_hf: Callable[[Path, Any, Any], Any]
    ours: Callable[[Any, Any], list[Tensor]]  # params, config -> the same results
    layout: Any
    # tensors of their model by the names that its files have, where these are others
    in_files: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, named: named
    loaded_by: Any = None  # the class of theirs that loads a folder of ours, where it may be another

    def __repr__(self) -> str:
        return f"Case({self.about})"


def shaken(model: Any, seed: int) -> Any:
    """Make every parameter random, so that a bias of 0 or a norm of 1 hides nothing."""
    with torch.no_grad():
        for number, leaf in enumerate(model.parameters()):
            leaf.add_(0.3 * random.normal(random.fold_in(random.key(seed), number), leaf.shape))
    return model.eval()


def check(case: Case, folder: Path, *, shards: bool) -> dict[str, float]:
    """Assert that both compute the same and that the folder comes back; return the largest differences."""
    size = sum(leaf.nbytes for leaf in case.model.parameters())
    case.model.save_pretrained(folder / "theirs", max_shard_size=max(size // 3, 2000) if shards else size)
    params, config = case.from_hf(folder / "theirs")

    theirs, ours = case.theirs(case.model), case.ours(params, config)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    found = {"results": max(apart(a, b) for a, b in zip(ours, theirs, strict=True))}
    assert found["results"] <= RESULTS, found

    weights = [random.normal(random.fold_in(random.key(7), i), x.shape) for i, x in enumerate(theirs)]
    wanted = dict(case.model.named_parameters())
    total = sum(torch.sum(x * w) for x, w in zip(theirs, weights, strict=True))
    their_grads = dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))
    their_grads = case.in_files(case.model, their_grads)

    def loss(params: Any) -> Tensor:
        return sum(torch.sum(x * w) for x, w in zip(case.ours(params, config), weights, strict=True))

    our_grads = names.to_state_dict(torch.func.grad(loss)(params), case.layout.names_of(config))
    prefix = case.layout.prefix if not any(name.startswith(case.layout.prefix) for name in wanted) else ""
    largest = max(float(g.abs().max()) for g in their_grads.values())
    compared = 0
    for name, grad in their_grads.items():
        ours_grad = our_grads[prefix + name]
        # a gradient that is zero by symmetry, as of the bias of keys, is rounding alone
        bound = max(float(grad.abs().max()), 1e-2 * largest)
        found["gradients"] = max(found.get("gradients", 0.0), float((ours_grad - grad).abs().max()) / bound)
        assert found["gradients"] <= GRADIENTS, (name, found)
        compared += 1
    assert compared == len(our_grads)

    case.to_hf(folder / "ours", params, config)
    again, report = (case.loaded_by or type(case.model)).from_pretrained(
        folder / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    for name, leaf in case.model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], leaf), name
    # of the same parameters; where they lie in memory decides which kernels run, and so the last bits
    assert all(apart(a, b) <= 1e-6 for a, b in zip(case.theirs(again.eval()), theirs, strict=True))
    back, same = case.from_hf(folder / "ours")
    assert same == config and tree.allclose(back, params, rtol=0, atol=0)
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a part of the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
