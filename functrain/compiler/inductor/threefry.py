"""The hash of a draw as one loop, to torch's compiler."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._inductor.ir import Pointwise
from torch._inductor.lowering import broadcast_tensors, make_pointwise, register_lowering
from torch._inductor.virtualized import ops

from functrain.random.hashing import PAIRS, WORD
from functrain.random.threefry import ROTATIONS


def _word(k0: Any, k1: Any, high: Any, low: Any, word: int) -> Any:
    return make_pointwise(lambda *values: _rounds(*values)[word])(k0, k1, high, low)


def _pairs(*values: Any) -> Any:
    values = broadcast_tensors(*values)
    loaders = [x.make_loader() for x in values]

    def element(index: Any) -> Any:
        x0, x1, _ = _rounds(*(load(index[:-1]) for load in loaders))
        return ops.where(ops.eq(ops.index_expr(index[-1], torch.int32), ops.constant(0, torch.int32)), x0, x1)

    low = values[-1]
    return Pointwise.create(device=low.get_device(), dtype=torch.int32, inner_fn=element, ranges=[*low.get_size(), 2])


register_lowering(WORD, broadcast=True, type_promotion_kind=None)(_word)
register_lowering(PAIRS, type_promotion_kind=None)(_pairs)


def _rounds(k0: Any, k1: Any, high: Any, low: Any) -> tuple[Any, Any, Any]:
    """Return both words and their exclusive or, as `functrain.random.threefry.rounds`."""

    @cache  # what is made twice is generated twice
    def number(value: int) -> Any:
        return ops.constant(value, torch.int32)

    k2 = ops.bitwise_xor(ops.bitwise_xor(k0, k1), number(0x1BD11BDA))
    x0, x1 = ops.add(high, k0), ops.add(low, k1)
    for i, (add0, add1) in enumerate(((k1, k2), (k2, k0), (k0, k1), (k1, k2), (k2, k0))):
        for r in ROTATIONS[i % 2]:
            x0 = ops.add(x0, x1)
            down = ops.bitwise_and(ops.bitwise_right_shift(x1, number(32 - r)), number((1 << r) - 1))
            x1 = ops.bitwise_xor(ops.bitwise_or(down, ops.bitwise_left_shift(x1, number(r))), x0)
        x0 = ops.add(x0, add0)
        x1 = ops.add(x1, ops.add(add1, number(i + 1)))
    return x0, x1, ops.bitwise_xor(x0, x1)
