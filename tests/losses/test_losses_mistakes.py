"""Labels and tokens outside of the vocabulary, and -100 for rows that do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain as ft
from functrain import losses

CE = losses.softmax_cross_entropy_with_integer_labels
LOGITS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("label", [4, -1, -100])
def test_a_label_outside_of_the_vocabulary_is_named_with_the_way_to_leave_it_out(label: int) -> None:
    labels = torch.tensor([[0, 1, 2], [3, label, 0]])
    calls: dict[str, Any] = {
        "softmax_cross_entropy_with_integer_labels": lambda: CE(LOGITS, labels),
        "next_token": lambda: losses.next_token(LOGITS, labels),
        "next_token_from_hidden": lambda: losses.next_token_from_hidden(LOGITS, TABLE, labels),
        "multiclass_sparsemax_loss": lambda: losses.multiclass_sparsemax_loss(LOGITS, labels),
    }
    for name, call in calls.items():
        with pytest.raises(IndexError, match=rf"{name}: expected labels in \[0, 4\), came {label}; leave out rows"):
            call()
    with pytest.raises(IndexError, match=f"next_token_from_hidden: .* came {label}; .*by mask="):
        ft.grad(lambda table: losses.next_token_from_hidden(LOGITS, table, labels))(TABLE)
    with pytest.raises(IndexError, match=f"came {label}"):
        ft.vmap(CE)(LOGITS, labels)


def test_where_leaves_out_labels_that_are_no_classes() -> None:
    labels = torch.tensor([[0, 1, 2], [3, -100, 17]])
    where = labels.ge(0) & labels.lt(4)
    whole = CE(LOGITS, torch.where(where, labels, 0))
    wanted = torch.where(where, whole, 0.0)
    classes = where[..., None].expand(2, 3, 4)
    for mask in (where, classes):
        assert torch.equal(CE(LOGITS, labels, where=mask), wanted)
        grad = ft.grad(lambda x, mask=mask: CE(x, labels, where=mask).sum())(LOGITS)
        assert grad[1, 1:].abs().sum() == 0 and grad[0].abs().sum() > 0 and grad.isfinite().all()
    assert torch.equal(
        losses.next_token(LOGITS, labels, where).total, losses.next_token(LOGITS, labels, where.float()).total
    )


@pytest.mark.parametrize("labels", [torch.tensor([1]), torch.tensor([[1, 1, 1]]), torch.tensor(1)])
def test_labels_of_another_shape_are_not_taken_for_the_first_rows(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected labels \(2, 3\) for logits \(2, 3, 4\) and dim -1, came"):
        CE(LOGITS, labels)


def test_a_compiled_program_says_what_an_index_out_of_bounds_may_be() -> None:
    loss_fn = lambda p, b, k: losses.next_token(ft.nn.embedding(b["x"], p["w"]), b["y"])  # noqa: E731
    optimizer = ft.optim.sgd(0.1)
    step = ft.compile(ft.train_step(loss_fn, optimizer))
    state = ft.init_state({"w": TABLE}, optimizer, key=ft.random.key(0))
    good, bad = torch.tensor([[0, 3]]), torch.tensor([[0, 4]])
    step(state, {"x": good, "y": good})
    for batch in ({"x": bad, "y": good}, {"x": good, "y": bad}):
        with pytest.raises(IndexError, match="ft.compile: expected each index, such as a token or a label, inside"):
            step(state, batch)
