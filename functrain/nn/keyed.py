"""Randomness of torch's own layers, drawn from a key in place of the global generator: the mode, and dropout."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functrain import random
from functrain.compiler import engine
from functrain.nn import draws, recurrent
from functrain.nn.dropout import dropout
from functrain.nn.fused import fused_attention
from functrain.nn.layers import tokens_inside
from functrain.transforms import captured


class Keyed(TorchFunctionMode):
    """Inside, draw n uses `fold_in(key, n)`; what would read the global generator and is not known is an error."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key, self.draws, self.level = key, 0, engine.level()
        self.outside = _saving()  # what recomputes the whole module may

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (saving := _saving()) is not self.outside:
            _check_checkpoint(saving)
        if func in _DROPOUTS:
            return _DROPOUTS[func](self, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is torch._weight_norm and engine.twice():
            return _weight_norm(*args, **kwargs)
        if func is F.normalize and kwargs.get("out") is not None:
            # spectral norm writes its vectors this way, for which torch.vmap has no rule
            return kwargs.pop("out").copy_(func(*args, **kwargs))
        if func in (F.batch_norm, F.instance_norm):
            return _normalized(func, *args, **kwargs)
        if func in _REQUIRES_GRAD and engine.level() == self.level:  # and no gradient inside of the module
            return args[0] if func is Tensor.requires_grad_ else None
        if func in (F.embedding, F.embedding_bag):
            _check_embedding(func, args, kwargs)
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            with tokens_inside("from_module", given["input"], given["weight"]):
                return func(*args, **kwargs)
        name, call = getattr(func, "__name__", ""), func
        if recurrent.cuts(name) and not isinstance(args[2], Tensor):  # no packed sequence
            call = recurrent.recurrent(name)
        elif name in _RECURRENT and engine.nested():
            call = lambda *args: func(*_mapped_state(*args))  # noqa: E731
        if name in _GLOBAL and not _quiet(name, args, kwargs):
            found = draws.draw(self, name, call, args, kwargs)
            if found is NotImplemented:
                raise RuntimeError(
                    f"from_module: the module calls torch's {name}, which draws from the global generator, so that its "
                    "result would not be a function of its arguments; draw outside from a key, and pass the numbers in"
                )
            return found
        if func is F.multi_head_attention_forward and engine.twice():
            return _with_weights(func, args, kwargs)
        return call(*args, **kwargs)

    def next_key(self) -> Tensor:
        if self.key is None:
            raise RuntimeError(
                "from_module: the module draws random numbers, as dropout in training mode does; pass a key, or make "
                "it from module.eval()"
            )
        self.draws += 1
        return random.fold_in(self.key, self.draws - 1)

    def drop(self, x: Tensor, p: float, like: Tensor | None = None) -> Tensor:
        """Drop elements of x, or of ones `like`, which broadcast to it, with probability p."""
        key = self.next_key()
        if p >= 1.0:
            return torch.zeros_like(x)
        return dropout(x, p, key) if like is None else x * dropout(like, p, key)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if dropout_p == 0.0 and not engine.twice():
            return fused_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        # torch's kernels draw their own masks and know first derivatives in reverse alone: attention as its formula
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)  # (..., T, S)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        # a query that sees no key, such as one of a padded row, attends to nothing, as in torch's kernels
        blind = torch.all(torch.isneginf(scores), -1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
        return (self.drop(weights, dropout_p) if dropout_p > 0.0 else weights) @ value


def _with_weights(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Call multi-head attention so that it makes its weights, by operations that can be differentiated twice."""
    given = inspect.signature(func).bind(*args, **kwargs)
    wanted = given.arguments.get("need_weights", True)
    given.arguments["need_weights"] = True
    result, weights = func(*given.args, **given.kwargs)
    return result, weights if wanted else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # torch 2.13 returns wrong second derivatives of its own, in silence, and has no forward mode
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _normalized(
    func: Any, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Normalize in the dtype of running statistics that are wider than the input, and return the input's."""
    means = running_mean
    if means is None or torch.promote_types(means.dtype, input.dtype) == input.dtype:
        return func(input, means, running_var, weight, bias, *args, **kwargs)
    narrow = weight is not None and weight.dtype != means.dtype
    if not (narrow or engine.here.tracing or torch.compiler.is_dynamo_compiling() or engine.mapped()):
        return func(input, means, running_var, weight, bias, *args, **kwargs)
    # torch's kernels for two dtypes cannot be mapped over, and want weights as wide as the statistics
    x, weight, bias = (None if t is None else t.to(means.dtype) for t in (input, weight, bias))
    return func(x, means, running_var, weight, bias, *args, **kwargs).to(input.dtype)


def _mapped_state(input: Tensor, state: Any, weights: Any, *options: Any) -> tuple[Any, ...]:
    """Let a recurrent layer's first state be mapped over where its input or weights are: torch adds to it in place."""
    if input.dim() < 3:  # a packed sequence, whose second argument are lengths
        return input, state, weights, *options

    def mapped(h: Tensor) -> Tensor:
        return h + input.new_zeros(h.shape) + weights[0].new_zeros(h.shape)

    state = mapped(state) if isinstance(state, Tensor) else type(state)([mapped(h) for h in state])
    return input, state, weights, *options


def _saving() -> Any:
    """Return what torch.autograd packs the tensors by that it saves, if anything."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks and hooks[0]


def _check_checkpoint(saving: Any) -> None:
    if saving is not None and saving.__qualname__.startswith("_checkpoint_hook"):
        raise RuntimeError(
            "from_module: the module recomputes by torch.utils.checkpoint, whose second run does not see the params it "
            "is given; leave it out, and put ft.recompute around apply"
        )


def _check_embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    if given.get("max_norm") is not None:
        raise RuntimeError(
            "from_module: an embedding with max_norm writes into its weight when it is called, which is the caller's; "
            "make it without, and scale the rows that are looked up"
        )
    if given.get("sparse"):
        raise RuntimeError(
            "from_module: an embedding with sparse=True has a sparse gradient, which gradient transformations do not "
            "take; set sparse=False"
        )


def _elementwise(mode: Keyed, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return draws.into(input, mode.drop(input, p), inplace) if training and p > 0 else input


def _channels(unbatched: int) -> Callable[..., Tensor]:
    """Make the dropout of whole channels, for inputs (N, C, ...), or (C, ...) where they have `unbatched` dims."""

    def drop(mode: Keyed, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        kept = 1 if input.dim() == unbatched else 2
        ones = input.new_ones(input.shape[:kept] + (1,) * (input.dim() - kept))
        return draws.into(input, mode.drop(input, p, ones), inplace)

    return drop


_DROPOUTS: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _elementwise,
    torch.dropout: _elementwise,
    F.dropout1d: _channels(2),
    F.dropout2d: _channels(0),  # torch takes three dims for (N, C, L) here
    F.dropout3d: _channels(4),
}
# a module that asks for the gradient of its own input, as for torch.utils.checkpoint, asks for nothing of params
_REQUIRES_GRAD = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_OTHER_DROPOUTS = {"alpha_dropout", "feature_alpha_dropout", "feature_dropout", "native_dropout"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_GLOBAL = {
    "alpha_dropout", "bernoulli", "bernoulli_", "cauchy_", "exponential_", "feature_alpha_dropout", "feature_dropout",
    "fractional_max_pool2d", "fractional_max_pool3d", "geometric_", "gru", "gumbel_softmax", "log_normal_", "lstm",
    "multi_head_attention_forward", "multinomial", "native_dropout", "normal", "normal_", "poisson", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "rnn_relu", "rnn_tanh",
    "rrelu", "uniform_",
}  # fmt: skip


def _quiet(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a function that may draw does not, with these arguments."""

    def given(option: str, at: int, default: Any) -> Any:
        return args[at] if len(args) > at else kwargs.get(option, default)

    if name in _RECURRENT:
        at = next(i for i, arg in enumerate(args) if type(arg) is float)  # dropout, then training
        return args[at] == 0.0 or not args[at + 1]
    if name == "multi_head_attention_forward":
        return given("dropout_p", 10, 0.0) == 0.0 or not given("training", 13, True)
    if name in _OTHER_DROPOUTS:
        return given("p", 1, 0.5) == 0.0 or not given("training", 2, kwargs.get("train", False))
    return name == "rrelu" and not given("training", 3, False)


@contextmanager
def check_generator(again: Callable[[], Any]) -> Iterator[None]:
    """Raise when the code inside, which `again` runs once more, has read the CPU's global generator all the same;
    nothing is checked in a trace."""
    if engine.here.tracing or torch.compiler.is_dynamo_compiling():
        yield
        return
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()) and captured.draws(again):
        torch.set_rng_state(before)
        raise RuntimeError(
            "from_module: the module has drawn from the global generator, so that its result is not a function of its "
            "arguments; draw outside from a key, and pass the numbers in"
        )
