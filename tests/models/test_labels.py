"""Labels of a model's parameters say to an optimizer what a user would say by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from functrain import optim, random, tree
from functrain.models import gpt2

CONFIG = gpt2.Config(vocab=17, context=12, layers=2, heads=2, width=8)
PARAMS = tree.map(lambda leaf: leaf + 1.0, gpt2.init(CONFIG, random.key(0)))
LABELS = gpt2.labels(CONFIG)


def updates_of(optimizer: optim.GradientTransformation, gradient: float) -> dict[str, Tensor]:
    grads = tree.map(lambda leaf: torch.full_like(leaf, gradient), PARAMS)
    return dict(tree.items(optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]))


def test_weights_alone_decay_and_no_embedding_norm_or_bias_does() -> None:
    moved = updates_of(optim.adamw(1e-3, weight_decay=0.1, mask=LABELS.decayed), 0.0)
    for path, update in moved.items():
        assert bool((update != 0).all()) == path.endswith(("qkv/weight", "out/weight", "up/weight", "down/weight")), (
            path
        )
        assert (update != 0).any() == (update != 0).all()


def test_each_layer_learns_at_its_rate_of_the_next() -> None:
    moved = updates_of(optim.chain(optim.sgd(1.0), optim.layerwise_decay(0.5, LABELS.depth)), 1.0)
    below = {"wte": 3, "wpe": 3, "blocks/0": 2, "blocks/1": 1, "ln_f": 0}
    for path, update in moved.items():
        [steps] = [steps for start, steps in below.items() if path.startswith(start)]
        assert torch.equal(update, torch.full_like(update, -(0.5**steps))), path


def test_muon_takes_the_matrices_of_hidden_layers_and_adamw_the_rest() -> None:
    optimizer = optim.muon(1.0, muon_weight_dimension_numbers=LABELS.matrices)
    grads = tree.map(lambda leaf: random.normal(random.key(leaf.numel()), leaf.shape), PARAMS)
    moved = dict(tree.items(optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]))
    adam = optim.adamw(1.0, weight_decay=0.0, nesterov=True)
    by_adam = dict(tree.items(adam.update(grads, adam.init(PARAMS), PARAMS)[0]))
    for path, update in moved.items():
        hidden = path.startswith("blocks/") and update.ndim == 2
        assert torch.allclose(update, by_adam[path]) != hidden, path
    assert sum(path.startswith("blocks/") and update.ndim == 2 for path, update in moved.items()) == 8


def test_a_stack_of_experts_is_a_batch_of_matrices() -> None:
    numbers = LABELS.matrices({"blocks": [{"experts": torch.zeros(3, 4, 5)}]})["blocks"][0]["experts"]
    assert numbers == optim.MuonDimensionNumbers(-2, -1)
    params = {"blocks": [{"experts": random.normal(random.key(0), (3, 4, 5))}]}
    optimizer = optim.muon(1.0, muon_weight_dimension_numbers=LABELS.matrices)
    whole = optimizer.update(params, optimizer.init(params), params)[0]["blocks"][0]["experts"]
    one = {"blocks": [{"experts": params["blocks"][0]["experts"][1]}]}
    alone = optimizer.update(one, optimizer.init(one), one)[0]["blocks"][0]["experts"]
    # float32 rounding of matrices of order 1, in a batch and alone
    torch.testing.assert_close(whole[1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["wte", "blocks/1/ln_1/bias", "ln_f/weight"])
def test_depth_counts_from_the_embeddings(path: str) -> None:
    assert LABELS.depth(path) == {"wte": 0, "blocks/1/ln_1/bias": 2, "ln_f/weight": 3}[path]
