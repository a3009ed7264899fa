"""What a step and a loop take, as types that mypy and pyright check: a loss, batches. That of a hook is in `hooks.py`.

Annotate a loss's own batch, `def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor) -> ft.Loss`, and a
checker finds a batch of another type. Where nothing is annotated, nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

from functrain.losses import LossResult
from functrain.tree import Params, Tree

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)


class LossFn(Protocol[Batch_contra]):
    """A loss for `ft.train_step`: a pure function of params, a batch and a key of this step."""

    def __call__(self, params: Params, batch: Batch_contra, key: Tensor, /) -> LossResult: ...


class LossFnWithBuffers(Protocol[Batch_contra]):
    """A loss for `ft.train_step(..., buffers=True)`, which returns the new buffers beside its result."""

    def __call__(
        self, params: Params, buffers: Tree, batch: Batch_contra, key: Tensor, /
    ) -> tuple[LossResult, Tree]: ...


class IndexedBatches(Protocol[Batch_co]):
    """Batches by number, as `ft.data.windows` and lists are: batch t is that of step t, whatever was asked before."""

    def __getitem__(self, t: int, /) -> Batch_co: ...


# an iterable, such as a DataLoader, gives a batch for each step in its own order
Batches: TypeAlias = IndexedBatches[Batch] | Iterable[Batch]
