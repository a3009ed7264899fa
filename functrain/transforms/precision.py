"""Mixed precision by casting the tree, and torch's autocast as a sibling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler.half_products import warn_if_slow
from functrain.tree import Params
from functrain.tree.selection import Pattern

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Which floating-point dtype parameters are kept in, a function computes in, and returns.

    `param` is what `cast_params` casts to, and what `mixed_precision` then expects; None keeps parameters as they are.
    `exceptions` are dtypes by path, of any argument's tree, in the patterns of `ft.tree.select`: of several that fit a
    path the last counts. They are for compute and for `param` alike: `{"**ln_*/**": torch.float32}` keeps norms in
    float32, and the layers of `ft.nn` compute a norm in the wider dtype of input and weight. Each must fit a path of
    some argument, which `mixed_precision` sees.

    Source: the three dtypes of DeepMind's jmp.
    Raises: TypeError for what is no floating-point dtype, and for exceptions that are no patterns with dtypes.
    """

    compute: torch.dtype
    output: torch.dtype = torch.float32
    param: torch.dtype | None = None
    exceptions: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.exceptions, Mapping) or not all(isinstance(path, str) for path in self.exceptions):
            raise TypeError(f"Policy: exceptions: expected a dict from patterns to dtypes, came {self.exceptions!r}")
        named = {"compute": self.compute, "output": self.output}
        named |= {} if self.param is None else {"param": self.param}
        for name, dtype in (named | {f"exceptions: {path}": d for path, d in self.exceptions.items()}).items():
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"Policy: {name}: expected a floating-point torch.dtype, came {dtype!r}")
        patterns = tuple((Pattern(text), dtype) for text, dtype in self.exceptions.items())
        object.__setattr__(self, "_patterns", patterns)  # made once: torch.compile cannot trace the making
        object.__setattr__(self, "exceptions", dict(self.exceptions))  # a caller who changes theirs would see no change

    def cast_params(self, params: Params) -> Params:
        """Return the tree in `param`, its exceptions in theirs: what to give to `ft.init_state`.

        Raises: ValueError for a policy without `param`.
        """
        if self.param is None:
            raise ValueError("Policy.cast_params: this policy keeps parameters as they are; give it a `param` dtype")
        return self._cast((params,), self.param, some=True)[0]

    def _cast(self, trees: tuple[Any, ...], dtype: torch.dtype, *, some: bool = False) -> tuple[Any, ...]:
        patterns: tuple[tuple[Pattern, torch.dtype], ...] = self._patterns  # type: ignore[attr-defined]
        if not patterns:
            return tuple([tree.cast(t, dtype) for t in trees])
        met: set[str] = set()

        def cast(path: str, leaf: Any) -> Any:
            chosen = dtype
            for pattern, other in patterns:
                if pattern.fits(path):
                    met.add(pattern.text)
                    chosen = other
            return _to(leaf, chosen)

        made = tuple([tree.map_with_path(cast, t) for t in trees])
        for pattern, _ in patterns:
            if pattern.text not in met and not some:  # of some arguments, an exception may fit another one
                raise pattern.error([path for t in trees for path in tree.paths(t)])
        return made


_PRESETS = {
    "bf16": Policy(compute=torch.bfloat16),
    "fp16": Policy(compute=torch.float16),
    "full": Policy(compute=torch.float32),
}


def mixed_precision(fn: Callable[P, R], policy: Policy | str) -> Callable[P, R]:
    """Make a function that casts floating-point arguments to the compute dtype and results to the output dtype.

    Gradients reach the arguments in the arguments' own dtypes, because a cast is differentiable: parameters kept in
    float32 are float32 master copies. "bf16", "fp16" and "full" are policies that compute in bfloat16, float16 and
    float32, and return float32; "full" around a part of a function keeps that part in float32 inside of another policy
    or of an autocast, which is off inside.
    float16 wants a loss scale: see `ft.loss_scale`. A mask is an argument too, and bfloat16 counts to 256 only: give a
    Loss the weight `torch.sum(mask, dtype=torch.float32)`, as those of `ft.losses` have. So are buffers: a running mean
    that is rounded in each step stops moving, unless it is an exception, `{"**running_*": torch.float32}`.

    Raises: TypeError when `policy` is no Policy, and naming a leaf of the first argument in another dtype than
    `policy.param`; ValueError for another string; PathError for an exception that fits no path of any argument.

    >>> def fn(params, x):
    ...     return x * params["w"]
    >>> half = ft.mixed_precision(fn, ft.Policy(compute=torch.bfloat16))
    >>> half({"w": torch.tensor(1.001)}, torch.tensor(2.0))
    tensor(2.)
    """
    chosen = _policy("mixed_precision", policy)

    @wraps(fn)
    def in_precision(*args: Any, **kwargs: Any) -> Any:
        if chosen.param is not None and args:
            _check_params(args[0], chosen)
        names = list(kwargs)
        cast = chosen._cast((*args, *[kwargs[name] for name in names]), chosen.compute)
        kwargs = dict(zip(names, cast[len(args) :], strict=True))
        called = fn
        tensors = [leaf for leaf in tree.leaves(cast) if isinstance(leaf, Tensor)]
        warn_if_slow("mixed_precision", chosen.compute, tensors)
        for kind in _kinds(tensors):
            if torch.is_autocast_enabled(kind):  # it would compute in its own dtype whatever the arguments have
                called = _without_autocast(called, kind)
        result = called(*cast[: len(args)], **kwargs)
        return tree.map(lambda x: _to(x, chosen.output), result)

    return in_precision


def autocast(fn: Callable[P, R], policy: Policy | str) -> Callable[P, R]:
    """Run `fn` under `torch.autocast`: torch chooses by operation what is computed in the compute dtype.

    Arguments are not cast, results are cast to the output dtype. Equals `fn` inside of `torch.autocast` on the device
    of its first tensor.

    Raises: as `mixed_precision`, and ValueError for a policy with `param` or `exceptions`, which autocast cannot keep,
    or with a compute dtype that is not bfloat16 or float16.

    >>> fn = ft.autocast(lambda x, y: torch.mm(x, y), ft.Policy(compute=torch.bfloat16))
    >>> fn(torch.full((1, 1), 1.001), torch.full((1, 1), 2.0))
    tensor([[2.]])
    """
    chosen = _policy("autocast", policy)
    if chosen.param is not None or chosen.exceptions:
        raise ValueError("autocast: expected a policy of compute and output alone; for others use ft.mixed_precision")
    if chosen.compute not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast: expected to compute in bfloat16 or float16, came {chosen.compute}")

    @wraps(fn)
    def autocasting(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        warn_if_slow("autocast", chosen.compute, tensors)
        # no cache: a cast that was kept from one transform's pass would be a foreign tensor in the next one's
        with torch.autocast(device, dtype=chosen.compute, cache_enabled=False):
            result = fn(*args, **kwargs)
        return tree.map(lambda x: _to(x, chosen.output), result)

    return autocasting


def with_autocast(fn: Callable[P, R], tensors: Sequence[Tensor]) -> Callable[P, R]:
    """Make a function that runs `fn` under the autocast in force now, or none, wherever a backward pass runs it."""
    wanted = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds(tensors)}

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if all((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) == w for kind, w in wanted.items()):
            return fn(*args, **kwargs)
        with ExitStack() as stack:
            for kind, (on, dtype) in wanted.items():
                # no cache: what a forward pass has cast is no part of the second run's graph
                stack.enter_context(torch.autocast(kind, dtype, on, cache_enabled=False))
            return fn(*args, **kwargs)

    return run


def _without_autocast(fn: Callable[P, R], kind: str) -> Callable[P, R]:
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(kind, enabled=False):  # no ExitStack: Dynamo does not trace one
            return fn(*args, **kwargs)

    return run


def _kinds(tensors: Sequence[Tensor]) -> set[str]:
    return {"cpu", *[x.device.type for x in tensors if x.device.type != "meta"]}


def _policy(what: str, policy: Policy | str) -> Policy:
    if isinstance(policy, str):
        if policy not in _PRESETS:
            names = ", ".join([repr(name) for name in _PRESETS])
            raise ValueError(f"{what}: expected a Policy or one of {names}, came {policy!r}")
        return _PRESETS[policy]
    if not isinstance(policy, Policy):
        raise TypeError(f"{what}: expected a Policy, came {policy!r}; for one dtype, Policy(compute=dtype)")
    return policy


def _check_params(params: Any, policy: Policy) -> None:
    wanted = policy.cast_params(params)
    for (path, leaf), like in zip(tree.items(params), tree.leaves(wanted), strict=True):
        if isinstance(leaf, Tensor) and leaf.dtype != like.dtype:
            raise TypeError(
                f"mixed_precision: {path}: expected {like.dtype} as the policy's param says, came {leaf.dtype}; "
                "give policy.cast_params(params) to init_state"
            )


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
