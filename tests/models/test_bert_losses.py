"""Laws of what a BERT is trained on: means over real targets, the same in parts, the same training as elsewhere."""

from __future__ import annotations

import bert_witness
import pytest
import torch
import transformers

import functrain as ft
from functrain import random, tree
from functrain.models import bert

transformers.utils.logging.disable_progress_bar()
CONFIG = bert.Config(vocab=32, context=12, layers=1, heads=2, width=8, inner=8)
PARAMS = tree.map(lambda x: 3 * x + 0.1, bert.init(CONFIG, random.key(0)))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_is_that_of_transformers_with_torch_adamw(accumulate: int) -> None:
    ours, theirs = bert_witness.trained(8, accumulate)
    assert ours[-1] < ours[0] - 0.03
    # float32 rounding, which Adam makes larger where gradients are small
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0.0)


def test_parts_with_unequal_numbers_of_masked_tokens_add_up_to_the_whole_batch() -> None:
    batch = bert_witness.draw_batch(CONFIG, 0)
    counts = (batch["weights"] > 0).sum(1)
    assert len(set(counts.tolist())) > 2
    grad_fn = ft.value_and_grad(bert_witness.loss_fn(CONFIG))
    whole, grads = grad_fn(PARAMS, batch, None)
    for parts in (1, 2, 8):
        loss, summed = ft.accumulate(grad_fn, parts)(PARAMS, batch, None)
        assert loss.weight == whole.weight == 8.0
        torch.testing.assert_close(loss.total, whole.total, rtol=1e-6, atol=0.0)
        for (path, a), (_, b) in zip(tree.items(summed), tree.items(grads), strict=True):
            assert (a - b).abs().max() <= 2e-6 * b.abs().max() + 1e-6 * 8, path  # sums of 8 rows in another order


def test_the_loss_is_the_mean_over_masked_tokens_plus_the_mean_over_rows() -> None:
    batch = bert_witness.draw_batch(CONFIG, 0)
    tokens, rows = bert.apply(PARAMS, batch["tokens"], CONFIG, types=batch["types"], mask=batch["mask"])
    loss = bert.pretraining_loss((tokens, rows), batch["targets"], batch["weights"], batch["next_sentence"])
    masked = batch["weights"] > 0
    mean = torch.nn.functional.cross_entropy(tokens[masked], batch["targets"][masked])
    other = torch.nn.functional.cross_entropy(rows, batch["next_sentence"])
    torch.testing.assert_close(loss.total / loss.weight, mean + other)
    metrics = {name: value / loss.weight for name, value in loss.metrics.items()}
    torch.testing.assert_close(metrics["masked_lm_loss"], mean)
    torch.testing.assert_close(metrics["next_sentence_loss"], other)
    right = (tokens.argmax(-1) == batch["targets"])[masked].float().mean()
    torch.testing.assert_close(metrics["masked_lm_accuracy"], right)
    right = (rows.argmax(-1) == batch["next_sentence"]).float().mean()
    torch.testing.assert_close(metrics["next_sentence_accuracy"], right)


def test_the_loss_of_masked_places_is_the_loss_of_all() -> None:
    batch = bert_witness.draw_batch(CONFIG, 0)
    given = {"types": batch["types"], "mask": batch["mask"]}
    places = (
        (batch["weights"] == 0).long().argsort(dim=1, stable=True)[:, :7]
    )  # masked ones first, and some that are not
    assert ((batch["weights"] > 0).sum(1) <= 7).all()
    some = {name: batch[name].take_along_dim(places, 1) for name in ("targets", "weights")}
    whole = bert.pretraining_loss(
        bert.apply(PARAMS, batch["tokens"], CONFIG, **given), batch["targets"], batch["weights"], batch["next_sentence"]
    )
    found = bert.pretraining_loss(
        bert.apply(PARAMS, batch["tokens"], CONFIG, **given, places=places), **some,
        next_sentence=batch["next_sentence"],
    )  # fmt: skip
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


def test_a_batch_in_which_nothing_is_masked_has_weights_of_zero() -> None:
    assert torch.equal(bert.token_weights(torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


def test_a_classifier_of_one_label_is_a_regression_and_padding_does_not_count() -> None:
    mask = torch.tensor([True, False])
    loss = bert.classifier_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([4.0, torch.nan]), mask)
    assert (loss.total, loss.weight) == (9.0, 1.0)
    logits = torch.tensor([[[0.0, 3.0], [1.0, 0.0]]])
    loss = bert.classifier_loss(logits, torch.tensor([[1, -100]]), mask[None])
    torch.testing.assert_close(loss.total, torch.nn.functional.cross_entropy(logits[0, :1], torch.tensor([1])))
    assert (loss.weight, loss.metrics["accuracy"]) == (1.0, 1.0)


def test_labels_and_weights_of_another_kind_are_told() -> None:
    rows, targets = torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        TypeError, match="expected weights that add up to the rows, came torch.bool; pass token_weights"
    ):
        bert.pretraining_loss((torch.zeros(2, 3, 4), rows), targets, targets.bool(), targets[:, 0])
    with pytest.raises(TypeError, match="token_weights: expected a boolean mask, .*came torch.float32"):
        bert.token_weights(torch.ones(2, 3))
    with pytest.raises(TypeError, match="floating-point labels for the one label of a regression, came torch.int64"):
        bert.classifier_loss(torch.zeros(2, 1), targets[:, 0])
    with pytest.raises(ValueError, match=r"expected labels \(2,\) as the logits, came \(3,\)"):
        bert.classifier_loss(torch.zeros(2, 1), torch.zeros(3))
    with pytest.raises(TypeError, match="expected integer targets, came torch.float32"):
        bert.classifier_loss(torch.zeros(2, 3), torch.zeros(2))
