"""Updates compiled leaf by leaf: torch's private names do what we think, and alike leaves share a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from functrain.transforms import inductor, leafwise
from functrain.transforms.compilation import _Compiled


def update(leaves: list[Tensor], grads: list[Tensor], count: Tensor) -> tuple[list[Tensor], Tensor]:
    norm = torch.sqrt(torch.stack([torch.sum(g * g) for g in grads]).sum())
    scale = 0.1 / (norm + count)
    new = [p - scale * g for p, g in zip(leaves, grads, strict=True)]
    new[-1] = new[-1] @ new[-1]  # a leaf that is no column
    return new, norm


def test_alike_leaves_share_a_kernel_and_the_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compile_for_any_length = inductor.compile_for_any_length
    monkeypatch.setattr(
        inductor, "compile_for_any_length", lambda *args: made.append(args) or compile_for_any_length(*args)
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (200, 100), (2, 3, 4), (150, 120), (4, 4)]
    leaves, grads = ([torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes] for _ in range(2))
    count = torch.tensor(2.0, dtype=torch.float32)
    new, norm = _Compiled(update, False, leafwise.compile_graph)(leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    # float32 sums of 4e4 squares in another order
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-5)
    assert len(made) == 2, "one kernel for the norms of five leaves, one for their updates"


def test_a_float64_update_is_compiled_as_an_ordinary_graph() -> None:
    leaves, grads = ([torch.full((3, 3), v, dtype=torch.float64) for _ in range(3)] for v in (1.0, 2.0))
    count = torch.tensor(2.0, dtype=torch.float64)
    new, norm = _Compiled(update, False, leafwise.compile_graph)(leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    torch.testing.assert_close((new, norm), (expected, expected_norm), rtol=1e-12, atol=1e-12)
