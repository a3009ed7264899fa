"""What torch's functions draw from the global generator, drawn from a key: the same distributions, other numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain import random


class Source(Protocol):
    """Where keys come from, one for each draw."""

    def next_key(self) -> Tensor: ...

    def drop(self, x: Tensor, p: float) -> Tensor: ...

    def attention(self, *args: Any, **kwargs: Any) -> Tensor: ...


def draw(source: Source, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what `func` of this name does with numbers from the source; NotImplemented for what is not known."""
    known = _DRAWS.get(name)
    others = [kwargs.get(option) for option in _OTHER]
    if known is None or not all(x is None or x is False or x is torch.strided for x in others):
        return NotImplemented
    return known(source, func, *args, **{k: v for k, v in kwargs.items() if k not in _OTHER and k not in _NO_NUMBERS})


_OTHER = {"generator", "out", "layout", "names", "requires_grad"}
_NO_NUMBERS = {"pin_memory", "memory_format"}


def into(input: Tensor, result: Tensor, inplace: bool) -> Tensor:
    """Return the result, where the caller wants so in the memory of the input, which it may read by another name."""
    return input.copy_(result) if inplace else result


def _check(right: bool, message: str) -> None:
    if not right:
        raise ValueError(f"from_module: {message}, as torch does")


def _made(values: Tensor, dtype: torch.dtype | None, device: Any) -> Tensor:
    return values.to(device=device or values.device, dtype=dtype or values.dtype)


def _floats(
    of: Callable[..., Tensor], source: Source, shape: Sequence[int], dtype: torch.dtype | None, device: Any
) -> Tensor:
    return _made(of(source.next_key(), tuple(shape), dtype or torch.get_default_dtype()), dtype, device)


def _new(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(source: Source, func: Any, *size: Any, dtype: Any = None, device: Any = None, **given: Any) -> Tensor:
        size = given.get("size", size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        return _floats(of, source, size, dtype, device)

    return drawn


def _like(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(source: Source, func: Any, input: Tensor, *, dtype: Any = None, device: Any = None) -> Tensor:
        return _floats(of, source, input.shape, dtype or input.dtype, device or input.device)

    return drawn


def _bounds(bounds: Sequence[int], given: dict[str, Any]) -> tuple[int, int]:
    """Return the low and the high one, as given by position, as (high,) or (low, high), or by name."""
    both = len(bounds) == 2 or (len(bounds) == 1 and "high" in given)
    return bounds[0] if both else given.get("low", 0), given["high"] if "high" in given else bounds[-1]


def _randint(source: Source, func: Any, *args: Any, dtype: Any = None, device: Any = None, **given: Any) -> Tensor:
    bounds, size = (args, given["size"]) if "size" in given else (args[:-1], args[-1])
    return _made(random.randint(source.next_key(), tuple(size), *_bounds(bounds, given)), dtype, device)


def _randint_like(
    source: Source, func: Any, input: Tensor, *bounds: int, dtype: Any = None, device: Any = None, **given: Any
) -> Tensor:
    found = random.randint(source.next_key(), tuple(input.shape), *_bounds(bounds, given))
    return _made(found, dtype or input.dtype, device or input.device)


def _randperm(source: Source, func: Any, n: int, *, dtype: Any = None, device: Any = None) -> Tensor:
    return _made(random.permutation(source.next_key(), n), dtype, device)


def _normal(
    source: Source, func: Any, mean: Any, std: Any = 1.0, size: Any = None, *, dtype: Any = None, device: Any = None
) -> Tensor:
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    _check(isinstance(std, Tensor) or std >= 0.0, f"normal: expected std >= 0, came {std}")
    if tensors:
        size, dtype = torch.broadcast_shapes(*[x.shape for x in tensors]), dtype or tensors[0].dtype
        device = tensors[0].device
    return mean + std * _floats(random.normal, source, size, dtype, device)


def _bernoulli(source: Source, func: Any, input: Tensor, p: Any = None) -> Tensor:
    return random.bernoulli(source.next_key(), input if p is None else p, tuple(input.shape)).to(input)


def _in_place(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(source: Source, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = input.dtype if input.is_floating_point() else torch.float32
        return input.copy_(of(lambda f: f(source.next_key(), tuple(input.shape), dtype), *args, **kwargs))

    return drawn


def _uniform_(unit: Callable[..., Tensor], start: float = 0.0, to: float = 1.0, **given: float) -> Tensor:
    start = given.get("from", start)
    _check(start <= to, f"uniform_: expected from <= to, came {start} and {to}")
    return start + (to - start) * unit(random.uniform)


def _normal_(unit: Callable[..., Tensor], mean: float = 0.0, std: float = 1.0) -> Tensor:
    _check(std >= 0.0, f"normal_: expected std >= 0, came {std}")
    return mean + std * unit(random.normal)


def _exponential_(unit: Callable[..., Tensor], lambd: float = 1.0) -> Tensor:
    _check(lambd > 0.0, f"exponential_: expected lambd > 0, came {lambd}")
    return -torch.log1p(-unit(random.uniform)) / lambd


def _bernoulli_(unit: Callable[..., Tensor], p: float | Tensor = 0.5) -> Tensor:
    return unit(lambda key, shape, dtype: random.bernoulli(key, p, shape).to(dtype))


def _gumbel_softmax(
    source: Source, func: Any, logits: Tensor, tau: float = 1.0, hard: bool = False, eps: float = 0.0, dim: int = -1
) -> Tensor:
    u = random.uniform(source.next_key(), tuple(logits.shape), logits.dtype)
    # of the exponential, which is at least the least normal number, as torch's is positive
    noise = -torch.log((-torch.log1p(-u)).clamp(min=torch.finfo(logits.dtype).tiny))
    soft = torch.softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    index = torch.argmax(soft, dim, keepdim=True)
    return torch.zeros_like(logits).scatter(dim, index, 1.0) - soft.detach() + soft


def _rrelu(
    source: Source, func: Any, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    _check(lower <= upper, f"rrelu: expected lower <= upper, came {lower} and {upper}")
    slope = lower + (upper - lower) * random.uniform(source.next_key(), tuple(input.shape), input.dtype)
    return into(input, torch.where(input >= 0, input, input * slope), inplace)


def _alpha_dropout(channels: bool) -> Callable[..., Tensor]:
    def drawn(
        source: Source, func: Any, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if channels else tuple(input.shape)
        kept = random.bernoulli(source.next_key(), 1.0 - p, shape)
        # what is dropped has the value that a SELU goes to; scale and shift keep mean 0 and variance 1
        scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * _SATURATED**2)) if p < 1.0 else 0.0
        return into(input, torch.where(kept, input, _SATURATED) * scale - scale * p * _SATURATED, inplace)

    return drawn


_SATURATED = -1.7580993408473766  # -alpha * scale of a SELU


def _recurrent(source: Source, func: Any, *args: Any) -> tuple[Tensor, ...]:
    """Run a recurrent net of several layers layer by layer, with dropout between them."""
    packed = isinstance(args[1], Tensor) and not isinstance(args[2], bool) and isinstance(args[3], (list, tuple))
    input, *sizes, state, weights, biases, layers, p, training, both = args[: 9 if packed else 8]
    state = tuple(state) if isinstance(state, (list, tuple)) else (state,)
    states, count, directions = [], len(weights) // layers, 2 if both else 1
    for i in range(layers):
        first = tuple([h[i * directions : (i + 1) * directions] for h in state])
        own = weights[i * count : (i + 1) * count]
        options = (own, biases, 1, 0.0, training, both, *args[9 if packed else 8 :])
        input, *last = func(input, *sizes, first if len(first) == 2 else first[0], *options)
        states.append(last)
        if i < layers - 1:
            input = source.drop(input, p)
    return input, *[torch.cat(parts) for parts in zip(*states, strict=True)]


class _Inside(threading.local):
    source: Any = None


_inside = _Inside()


def _heads(source: Source, func: Any, *args: Any, **kwargs: Any) -> Any:
    before, _inside.source = _inside.source, source
    try:
        return _HEADS(*args, **kwargs)
    finally:
        _inside.source = before


def _copy(func: Any, **others: Any) -> Any:
    """Make the same Python function with other globals: torch's own begins by handing itself to whom has called it."""
    names = {**func.__globals__, **others}
    del names["__name__"]  # by which a tracer would find torch's globals
    return FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


_HEADS = _copy(
    F.multi_head_attention_forward,
    has_torch_function=lambda tensors: False,
    dropout=lambda x, p, training=True: _inside.source.drop(x, p),
    scaled_dot_product_attention=lambda *args: _inside.source.attention(*args),
)

_DRAWS: dict[str, Callable[..., Any]] = {
    "rand": _new(lambda key, shape, dtype: random.uniform(key, shape, dtype)),
    "randn": _new(random.normal),
    "rand_like": _like(lambda key, shape, dtype: random.uniform(key, shape, dtype)),
    "randn_like": _like(random.normal),
    "randint": _randint,
    "randint_like": _randint_like,
    "randperm": _randperm,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "uniform_": _in_place(_uniform_),
    "normal_": _in_place(_normal_),
    "exponential_": _in_place(_exponential_),
    "bernoulli_": _in_place(_bernoulli_),
    "gumbel_softmax": _gumbel_softmax,
    "rrelu": _rrelu,
    "alpha_dropout": _alpha_dropout(channels=False),
    "feature_alpha_dropout": _alpha_dropout(channels=True),
    "multi_head_attention_forward": _heads,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
