"""A function of whole tensors, by a function of each rank's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrain.sharding.collectives import applied
from functrain.sharding.placement import P
from functrain.sharding.plan import Plan


def shard_map(
    fn: Callable[..., Any], plan: Plan, in_specs: Sequence[P], out_specs: P | Sequence[P]
) -> Callable[..., Any]:
    """Return a function of whole tensors, alike on all ranks, that calls `fn` with each rank's parts of them, and puts
    the parts that it returns together. As `jax.shard_map`.

    `in_specs` are a P for each argument, `out_specs` one for each result, or the one. Of what a P does not split along
    an axis, every rank gets the whole, and must return the same: add it over ranks by `ft.sharding.sum`. In `fn` all
    collectives of `ft.sharding` may be called. Derivatives are those of the whole function, alike on all ranks; it goes
    under `grad`, `vmap`, `jvp` and `compile` as collectives do.

    Raises: ValueError for as many arguments or results as there are no specs, an axis that the mesh lacks, and a
    dimension that does not divide.

    >>> plan = ft.sharding.Plan({"data": 1})
    >>> P = ft.sharding.P
    >>> mean = ft.sharding.shard_map(lambda x: ft.sharding.sum(x.sum(), "data"), plan, [P("data")], P())
    >>> mean(torch.tensor([1.0, 2.0]))
    tensor(3.)
    """
    single = isinstance(out_specs, P)
    results: Sequence[P] = (out_specs,) if isinstance(out_specs, P) else tuple(out_specs)
    arguments = tuple(in_specs)

    def run(*args: Tensor) -> Any:
        _check("arguments", len(args), len(arguments))
        with plan.entered():
            found = fn(*[_parted(x, spec, plan, i) for i, (x, spec) in enumerate(zip(args, arguments, strict=True))])
            values = (found,) if single else tuple(found)
            _check("results", len(values), len(results))
            whole = [_joined(x, spec, plan) for x, spec in zip(values, results, strict=True)]
        return whole[0] if single else tuple(whole)

    return run


def _parted(x: Tensor, spec: P, plan: Plan, number: int) -> Tensor:
    for dim, axes in _split(spec, plan):
        count = plan.mesh.size(axes)
        if dim >= x.dim() or x.shape[dim] % count:
            raise ValueError(
                f"shard_map: argument {number}: expected dimension {dim} of {tuple(x.shape)} to divide by {count}, the "
                f"ranks along {', '.join(axes)}, for {spec!r}"
            )
        x = applied("own", x, axes, dim)
    rest = _others(spec, plan)
    return applied("spread", x, rest) if rest else x


def _joined(x: Tensor, spec: P, plan: Plan) -> Tensor:
    rest = _others(spec, plan)
    x = applied("agreed", x, rest) if rest else x
    for dim, axes in _split(spec, plan):
        x = applied("join", x, axes, dim)
    return x


def _split(spec: P, plan: Plan) -> list[tuple[int, tuple[str, ...]]]:
    return [(dim, plan.mesh.ordered(axes)) for dim, axes in enumerate(spec) if axes is not None]


def _others(spec: P, plan: Plan) -> tuple[str, ...]:
    """Return the axes that split nothing of it."""
    split = {str(axis) for _, axes in _split(spec, plan) for axis in axes}
    return tuple(axis for axis in plan.mesh.axes if axis not in split)


def _check(what: str, came: int, expected: int) -> None:
    if came != expected:
        raise ValueError(f"shard_map: expected {expected} {what}, a spec for each, came {came}")
