"""The loss of a classifier: torch's, its mask and its accuracy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import functrain as ft


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy_of_the_rows_that_count(dtype: torch.dtype, smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=dtype).requires_grad_()
    labels, mask = torch.randint(5, (7,)), torch.tensor([True, True, False, True, False, True, True])
    labels[~mask] = -100
    loss = ft.losses.classification(logits, labels, mask, label_smoothing=smoothing)
    wide = logits.detach().to(loss.total.dtype).requires_grad_()
    theirs = F.cross_entropy(wide[mask], labels[mask], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss.total, theirs)
    (ours,), (wanted,) = torch.autograd.grad(loss.total, logits), torch.autograd.grad(theirs, wide)
    torch.testing.assert_close(ours, wanted.to(dtype))
    assert loss.weight == 5 and loss.metrics["accuracy"] == (logits.argmax(-1) == labels)[mask].sum()


def test_parts_of_a_batch_add_up_and_pixels_are_examples() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, 4, 3), torch.randint(3, (6, 4, 4))
    whole = ft.losses.classification(logits, labels)
    parts = [ft.losses.classification(logits[i : i + 2], labels[i : i + 2]) for i in range(0, 6, 2)]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts))
    assert whole.weight == 96 == sum(part.weight for part in parts)


def test_what_is_no_batch_of_labels_is_told() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"classification: expected logits"):
        ft.losses.classification(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="integer targets"):
        ft.losses.classification(logits, torch.zeros(2))
    with pytest.raises(IndexError, match=r"labels in \[0, 3\), came 3.*by mask="):
        ft.losses.classification(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\)"):
        ft.losses.classification(logits, torch.tensor([0, 1]), label_smoothing=1.0)
