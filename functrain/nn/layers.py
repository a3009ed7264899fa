"""Layers as functions of tensors. A layer's tree has the argument names as keys: `linear(x, **params["mlp"]["up"])`.

I inputs, O outputs, D width, V vocabulary; ... any leading dimensions. B batch, C channels, *S dims of space.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine
from functrain.nn import normalization
from functrain.sharding import split


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight + bias. Shapes: x (..., I), weight (I, O), bias (O,), result (..., O).

    Equals `torch.nn.functional.linear(x, weight.T, bias)`.

    >>> weight, bias = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), torch.tensor([0.0, 0.0, 10.0])
    >>> ft.nn.linear(torch.tensor([1.0, 2.0]), weight, bias)
    tensor([ 1.,  2., 13.])
    """
    if isinstance(weight, split.Split):  # of a plan with a tensor axis
        return split.linear(x, weight, bias)
    y = x @ weight  # (..., O)
    return y if bias is None else y + bias


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of weight (V, D) that the tokens (...) name, (..., D).

    Raises: TypeError for tokens that are no integers; IndexError for a token outside [0, V) on the CPU, a device
    assertion elsewhere.

    >>> ft.nn.embedding(torch.tensor([2, 0]), torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    tensor([[4., 5.],
            [0., 1.]])
    """
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"embedding: expected integer tokens, came {tokens.dtype}; pass tokens.long()")
    if isinstance(weight, split.Split):
        return split.embedding(tokens, weight)
    with tokens_inside("embedding", tokens, weight):
        return F.embedding(tokens, weight)


@contextmanager
def tokens_inside(caller: str, tokens: Tensor, weight: Tensor) -> Iterator[None]:
    """Say of the CPU's error about a token outside of a vocabulary which one came."""
    try:
        yield
    except IndexError as error:
        if "index out of range in self" not in str(error):
            raise
        outside = "one outside"
        if not torch._C._functorch.is_functorch_wrapped_tensor(tokens):
            outside = f"{int(tokens[(tokens < 0) | (tokens >= len(weight))].flatten()[0])}"
        raise IndexError(
            f"{caller}: expected tokens in [0, {len(weight)}), the rows of the table, came {outside}; look for another "
            "tokenizer, or for padding by -100"
        ) from error


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Return x (..., D) with mean 0 and variance 1 along its last dim, times weight (D,), plus bias (D,).

    Computed in the wider dtype of x and weight, and returned in x's.
    Equals `torch.nn.functional.layer_norm`. Source: Ba et al. 2016 (arXiv:1607.06450).

    >>> ft.nn.layer_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), torch.ones(2))
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """
    norm = normalization.layer_norm if engine.twice() else F.layer_norm
    if weight.dtype == x.dtype:
        return norm(x, weight.shape, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return norm(x.to(dtype), weight.shape, weight.to(dtype), bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return x (..., D) divided by the root of its mean square along its last dim, times weight (D,).

    Computed in float32 up to the product, which is in the wider dtype of x and weight, and returned in x's.
    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), as Llama has it.

    >>> ft.nn.rms_norm(torch.tensor([[3.0, 4.0], [30.0, 40.0]]), torch.ones(2))
    tensor([[0.8485, 1.1314],
            [0.8485, 1.1314]])
    """
    # float32: a bfloat16 sum of a thousand squares keeps 8 bits
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(torch.mean(wide * wide, -1, keepdim=True) + eps)
    return (scaled.to(torch.promote_types(x.dtype, weight.dtype)) * weight).to(x.dtype)


def group_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int, eps: float = 1e-5
) -> Tensor:
    """Return x (B, C, *S) with mean 0 and variance 1 in each of `groups` of neighbouring channels, times weight (C,),
    plus bias (C,).

    Computed in float32 at least, and returned in x's dtype. Equals `torch.nn.functional.group_norm`. Source: Wu and He
    2018 (arXiv:1803.08494).

    >>> ft.nn.group_norm(torch.tensor([[[1.0], [3.0], [10.0], [30.0]]]), groups=2).flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Return x (B, C, *S) with mean 0 and variance 1 in each channel of each example, times weight (C,), plus bias
    (C,).

    Computed in float32 at least, and returned in x's dtype. Equals `torch.nn.functional.instance_norm`. Source:
    Ulyanov et al. 2016 (arXiv:1607.08022).

    >>> ft.nn.instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    norm = normalization.instance_norm if engine.twice() else F.instance_norm
    return norm(x.to(wide), weight=weight, bias=bias, eps=eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """Return x times the normal distribution function at x, by GPT-2's tanh approximation.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415).

    >>> ft.nn.gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1588,  0.0000,  0.8412])
    """
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """Return silu(gate) * x, where silu(g) = g * sigmoid(g): the gated unit of the Llama family's MLP.

    Source: Shazeer 2020 (arXiv:2002.05202).

    >>> ft.nn.swiglu(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([2.0, 2.0, 2.0]))
    tensor([-0.5379,  0.0000,  1.4621])
    """
    return F.silu(gate) * x
