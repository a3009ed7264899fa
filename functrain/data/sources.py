"""Where rows come from: a tree of columns, a map-style Dataset of torch, a dataset of Hugging Face."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from functrain import tree
from functrain.data.order import Indices
from functrain.data.stacking import columns, stacked
from functrain.data.tables import table_columns
from functrain.tree import Tree


class Source(Protocol):
    rows: int

    def take(self, indices: Indices, in_order: bool) -> Tree:
        """Copy these rows into a tree of tensors (B, ...); `in_order` says that they lie side by side."""

    @property
    def fingerprint(self) -> str: ...


def source_of(given: Any) -> Source:
    """Tell what the rows of a source are.

    Raises: TypeError for what has no rows that can be asked for by number; ValueError for columns of other lengths.
    """
    if isinstance(given, (DataLoader, IterableDataset)) or isinstance(given, _of("datasets", "IterableDataset")):
        raise TypeError(
            f"batches: expected rows that can be asked for by number, came {type(given).__name__}, which is only "
            "iterated; give it to ft.data.loader, in a torch DataLoader if it is a dataset"
        )
    if isinstance(given, _of("pandas", "DataFrame")):
        given = {str(name): given[name].to_numpy() for name in given.columns}
    if isinstance(given, _of("pyarrow", "Table")):
        given = table_columns(given, "batches")
    if isinstance(given, _of("datasets", "Dataset")):
        return _HuggingFace(given)
    if type(given) is TensorDataset:
        return Columns(given.tensors)
    if type(given) is Subset:
        return _Selected(source_of(given.dataset), given.indices)
    if isinstance(given, list) and given and isinstance(given[0], (dict, tuple)):
        return Columns(stacked(given))
    if tree.children(given) is not None or isinstance(given, (Tensor, np.ndarray)):
        return Columns(given)
    if isinstance(given, (Mapping, str, bytes)) or not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        way_out = "write dict(source)" if isinstance(given, Mapping) else "give a dict of arrays, one for each column"
        if isinstance(given, _of("datasets", "DatasetDict")):
            way_out = f"take one of its datasets, as source[{next(iter(given), 'train')!r}]"
        raise TypeError(
            "batches: expected a tree of arrays, a list of dicts, or a dataset with a length and rows by number, came "
            f"{type(given).__name__}; {way_out}"
        )
    return _Samples(given)


class Columns:
    """A tree of arrays and tensors, in memory or mapped, with as many rows each."""

    def __init__(self, given: Tree) -> None:
        self.tree = columns(given)
        lengths = {path: len(leaf) for path, leaf in tree.items(self.tree)}
        if len(set(lengths.values())) != 1:
            expected = "the same number of rows in every leaf" if lengths else "a leaf at least"
            raise ValueError(
                f"batches: expected {expected}, came {lengths}; leave out what has another first dimension"
            )
        self.rows = next(iter(lengths.values()))

    def take(self, indices: Indices, in_order: bool) -> Tree:
        where = slice(int(indices[0]), int(indices[-1]) + 1) if in_order else indices
        return tree.map(lambda leaf: _gathered(leaf, where), self.tree)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of paths, dtypes, shapes and bytes: every one is read, once."""
        digest = hashlib.sha256()
        for path, leaf in tree.items(self.tree):
            dtype = leaf.dtype if isinstance(leaf, Tensor) else torch.from_numpy(np.empty(0, leaf.dtype)).dtype
            digest.update(f"{path} {dtype} {tuple(leaf.shape)} ".encode())
            for piece in _pieces(leaf):
                digest.update(piece.data)
        return digest.hexdigest()


class _Samples:
    """A map-style dataset: row i is `dataset[i]`, or `dataset.__getitems__(indices)` gives several."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.rows = len(dataset)  # type: ignore[arg-type]  # a Dataset need not have one: TypeError

    def take(self, indices: Indices, in_order: bool) -> Tree:
        wanted = indices.tolist()
        several = getattr(self.dataset, "__getitems__", None)
        return stacked([self.dataset[i] for i in wanted] if several is None else several(wanted))

    @property
    def fingerprint(self) -> str:
        """That which the dataset has; else its type and length: nobody knows what reading every row would cost."""
        own = getattr(self.dataset, "fingerprint", None)
        return own if isinstance(own, str) else f"{type(self.dataset).__qualname__} of {self.rows} rows"


class _Selected:
    """Rows of another source: a `Subset`, as `split` and `random_split` give, gathered as fast as the whole is."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.rows = len(self.indices)

    def take(self, indices: Indices, in_order: bool) -> Tree:
        return self.source.take(self.indices[indices], False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes()).hexdigest()


class _HuggingFace:
    """A `datasets.Dataset`, in the format that it has."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.rows = len(dataset)

    def take(self, indices: Indices, in_order: bool) -> Tree:
        found: dict[str, Any] = self.dataset[indices.tolist()]
        try:
            made = columns(found)
        except TypeError as error:
            if self.dataset.format["type"] is None:  # in which an image is an object of PIL
                raise TypeError(f"{error}; or try dataset.with_format('torch')") from None
            raise
        return tree.map(lambda leaf: leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.array(leaf)), made)

    @property
    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)  # theirs has no public name


def _of(package: str, name: str) -> Any:
    """Give a class of a package that nobody has to install: who has an object of it has imported it."""
    return getattr(sys.modules.get(package), name, ())


def _gathered(leaf: Any, where: Indices | slice) -> Tensor:
    if isinstance(where, slice):
        return leaf[where].clone() if isinstance(leaf, Tensor) else torch.from_numpy(leaf[where].copy())
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, torch.from_numpy(where).to(leaf.device))
    # take is faster, but copies the whole of an array that does not lie row by row
    return torch.from_numpy(leaf.take(where, 0) if leaf.flags.c_contiguous else np.ascontiguousarray(leaf[where]))


def _pieces(leaf: Any) -> Iterator[NDArray[np.uint8]]:
    rows = max(1, (1 << 24) * len(leaf) // max(1, leaf.nbytes))
    for start in range(0, len(leaf), rows):
        piece = leaf[start : start + rows]
        if isinstance(piece, Tensor):
            yield piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
