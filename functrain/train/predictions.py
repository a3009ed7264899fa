"""Quantities that are no sums over batches: objects that are updated, and functions of all predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from functrain import tree
from functrain.train.ranks import gathered


@runtime_checkable
class Metric(Protocol):
    """A quantity that is computed from all batches, as those of torchmetrics are."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute(self) -> Any: ...

    def reset(self) -> Any: ...


class Predictions:
    """What metrics are given, batch by batch, and the numbers that they are at the end."""

    def __init__(self, what: str, metrics: Mapping[str, Metric | Callable[..., Any]]) -> None:
        self._what, self._objects, self._functions = what, dict[str, Metric](), dict[str, Callable[..., Any]]()
        for name, metric in metrics.items():
            if isinstance(metric, Metric) and not isinstance(metric, type):
                metric.reset()
                self._objects[name] = metric
            elif callable(metric) and not isinstance(metric, type):
                self._functions[name] = metric
            else:
                raise TypeError(
                    f"{what}: metrics: {name}: expected an object with update, compute and reset, or a function, came "
                    f"{metric!r}; write {name}={getattr(metric, '__name__', 'Metric')}(...)"
                )
        self._kept: list[Any] = []

    def add(self, arguments: Any) -> None:
        for metric in self._objects.values():
            args, kwargs = _split(_moved(arguments, getattr(metric, "device", None)))
            metric.update(*args, **kwargs)
        if self._functions:
            self._kept.append(tree.map(lambda leaf: leaf.cpu(), arguments))

    def compute(self, taken: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers. Raises: ValueError for a name of the loss's own, TypeError for what is no number."""
        found: dict[str, Any] = {}
        for name, metric in self._objects.items():
            found |= _named(name, metric.compute())
            metric.reset()  # which holds the predictions, in some
        if self._functions:
            args, kwargs = _split(self._all())
            for name, function in self._functions.items():
                found |= _named(name, function(*args, **kwargs))
        return {name: self._number(name, value, taken) for name, value in found.items()}

    def _all(self) -> Any:
        parts = [part for of_rank in gathered(self._kept) for part in of_rank]
        return tree.map(lambda *leaves: torch.cat(leaves), *parts)

    def _number(self, name: str, value: Any, taken: Mapping[str, float]) -> float:
        if name in taken:
            raise ValueError(f"{self._what}: metrics: {name!r} is a metric of the loss already; rename it")
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
            raise TypeError(f"{self._what}: metrics: {name}: expected a number, came {came}; average it") from None


def _moved(arguments: Any, device: Any) -> Any:
    return arguments if device is None else tree.map(lambda leaf: leaf.to(device), arguments)


def _split(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(arguments, dict):
        return (), arguments
    return (tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)), {}


def _named(name: str, value: Any) -> dict[str, Any]:
    """Name the numbers of a collection, as torchmetrics has them."""
    return {f"{name}_{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
