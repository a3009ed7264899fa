"""Matrix products in half precision on a CPU that has none: found out by trying, told, and computed in float32."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from functrain.compiler.graph_passes import is_product

aten = torch.ops.aten

HALF = (torch.bfloat16, torch.float16)
_SLOW = 2.0  # times as long as in float32: a CPU with such products takes 0.5, one that imitates them 6, others 200
_told: set[torch.dtype] = set()


@functools.cache
def factor(dtype: torch.dtype) -> float:
    """Return how many times as long a matrix product on this CPU takes in `dtype` as in float32.

    It is measured once in a process, in a few milliseconds: the least of three, of sizes up to 512.
    """
    found: list[float] = []
    # a thread of its own is in no trace, no map and no autocast
    thread = threading.Thread(target=lambda: found.append(_measured(dtype)))
    thread.start()
    thread.join()
    return found[0]


def _measured(dtype: torch.dtype) -> float:
    ratio = 0.0
    for size in (128, 512):
        ratio = _seconds(size, dtype) / _seconds(size, torch.float32)
        if ratio > 2 * _SLOW:  # a larger one would take seconds
            break
    return ratio


def _seconds(size: int, dtype: torch.dtype) -> float:
    x = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def are_slow(dtype: torch.dtype) -> bool:
    """Tell whether products in a half-precision dtype take this CPU longer by far than those in float32."""
    return dtype in HALF and factor(dtype) > _SLOW


def warn_if_slow(what: str, dtype: torch.dtype, tensors: Iterable[Any]) -> None:
    """Warn once in a process if products in `dtype` are slow, and a tensor is on the CPU."""
    if dtype in HALF and dtype not in _told and any(isinstance(x, Tensor) and x.device.type == "cpu" for x in tensors):
        if (words := once_if_slow(dtype)) is not None:
            warnings.warn(f"{what}: {words}", stacklevel=3)


def once_if_slow(dtype: torch.dtype) -> str | None:
    """Return what to tell of slow products in `dtype`, once in a process; None where they are fast."""
    if dtype in _told:
        return None
    _told.add(dtype)
    name = str(dtype).removeprefix("torch.")
    return (
        f"on this CPU a matrix product in {name} takes {factor(dtype):.0f} times as long as in float32. ft.compile "
        "computes it in float32 and rounds; in eager, use float32"
        if are_slow(dtype)
        else None
    )


def widen(graph: fx.Graph) -> None:
    """Compute products in float32, of inputs and for results in half precision, where a CPU has none.

    What lies in memory, and all that is no product, stays in half precision.
    """
    wide: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target is aten.addmm_.default or _multiplies(node)):
            continue
        inputs = [arg for arg in node.all_input_nodes if _is_half(arg)]
        if not inputs or not are_slow(inputs[0].meta["val"].dtype):
            continue
        with graph.inserting_before(node):
            for arg in inputs:
                if arg not in wide:
                    wide[arg] = _cast(graph, arg, torch.float32)
        if node.target is aten.addmm_.default:
            _add_wide(graph, node, wide)
        else:
            _compute_wide(graph, node, wide)


def _add_wide(graph: fx.Graph, node: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    """Add a product to an input in its memory, as `graph_passes.write_early` has written it."""
    into, a, b = node.args
    value = node.meta["val"]
    with graph.inserting_before(node):
        total = graph.call_function(aten.addmm.default, (wide[into], wide[a], wide[b]))  # type: ignore[index]
        total.meta = {**node.meta, "val": _like(value, torch.float32)}
        graph.call_function(aten.copy_.default, (into, _cast(graph, total, value.dtype))).meta.update(node.meta)
    graph.erase_node(node)


def _compute_wide(graph: fx.Graph, node: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: wide.get(arg, arg))
    values = node.meta["val"]
    with graph.inserting_before(node):
        computed = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        if isinstance(values, Tensor):
            computed.meta = {**node.meta, "val": _like(values, torch.float32)}
            node.replace_all_uses_with(_cast(graph, computed, values.dtype))
        else:
            made = [_like(v, torch.float32) if _half(v) else v for v in values]
            computed.meta = {**node.meta, "val": type(values)(made)}
    if not isinstance(values, Tensor):
        for item in list(node.users):
            value = item.meta["val"]
            item.args = (computed, item.args[1])
            if _half(value):
                item.meta = {**item.meta, "val": _like(value, torch.float32)}
                with graph.inserting_after(item):
                    back = _cast(graph, item, value.dtype)
                item.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)  # type: ignore[misc]
    graph.erase_node(node)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (node, dtype))
    cast.meta["val"] = _like(node.meta["val"], dtype)
    return cast


def _like(value: Tensor, dtype: torch.dtype) -> Tensor:
    with _disable_current_modes(), value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)


def _half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF and value.device.type == "cpu"


def _is_half(node: fx.Node) -> bool:
    return _half(node.meta.get("val"))


def _multiplies(node: fx.Node) -> bool:
    return is_product(node) or "scaled_dot_product" in str(node.target)
