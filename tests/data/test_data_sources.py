"""What rows may come from: trees, lists, tables, memory-mapped files, datasets of torch and of Hugging Face."""

from __future__ import annotations

import datetime
import warnings
from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import functrain as ft
from functrain import data

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.array([0, 1, 0, 1, 1, 0])
Pair = namedtuple("Pair", ["x", "y"])


class Rows(Dataset[Any]):
    """A map-style dataset of (image, label), as those of torchvision."""

    def __init__(self, row: Any = lambda i: (torch.from_numpy(X[i]), int(Y[i]))) -> None:
        self.row, self.asked = row, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        self.asked.append(i)
        return self.row(i)


class Several(Rows):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked.append(indices)
        return [self.row(i) for i in indices]


def leaves(source: Any, **options: Any) -> list[Any]:
    options = {"batch": 4, "seed": 0} | options
    return ft.tree.leaves(data.batches(source, **options)[1])


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapped") / "x.npy"
    np.save(path, X)
    return path


def sources(mapped: Path) -> dict[str, Any]:
    return {
        "tuple of arrays": (X, Y),
        "tuple of tensors": (torch.from_numpy(X), torch.from_numpy(Y)),
        "NamedTuple": Pair(X, Y),
        "dict": {"a": X, "b": Y},
        "nested": {"a": {"x": X}, "b": (Y,)},
        "lists of numbers": {"a": X.tolist(), "b": Y.tolist()},
        "rows that are dicts": [{"a": x, "b": int(y)} for x, y in zip(X, Y, strict=True)],
        "rows that are tuples": [(x.tolist(), y) for x, y in zip(X, Y, strict=True)],
        "memory-mapped": (np.load(mapped, mmap_mode="r"), Y),
        "read-only": tuple(np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for a in (X, Y)),
        "columns side by side": (np.asfortranarray(X), np.stack([Y, Y], 1)[:, 0]),
        "TensorDataset": TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        "Dataset": Rows(),
        "Dataset of dicts": Rows(lambda i: {"a": X[i], "b": Y[i]}),
        "Dataset with __getitems__": Several(),
        "Subset": Subset(Rows(), range(6)),
        "Subset of a TensorDataset": Subset(
            TensorDataset(torch.from_numpy(X[::-1].copy()), torch.from_numpy(Y[::-1].copy())), range(5, -1, -1)
        ),
    }


NAMES = [
    "tuple of arrays", "tuple of tensors", "NamedTuple", "dict", "nested", "lists of numbers", "rows that are dicts",
    "rows that are tuples", "memory-mapped", "read-only", "columns side by side", "TensorDataset", "Dataset",
    "Dataset of dicts", "Dataset with __getitems__", "Subset", "Subset of a TensorDataset",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"seed": None, "shuffle": False}])
def test_sources_of_every_kind_give_the_same_rows(name: str, options: dict[str, Any], mapped: Path) -> None:
    expected = leaves((X, Y), **options)
    made = leaves(sources(mapped)[name], **options)
    for x, y in zip(made, expected, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.is_contiguous()
        x.zero_()
    assert X[1, 1] == 3.0 and Y[1] == 1 and np.load(mapped)[1, 1] == 3.0
    assert torch.equal(leaves(sources(mapped)[name], **options)[0], expected[0])


def test_a_batch_is_a_tree_like_the_source_or_like_a_row(mapped: Path) -> None:
    given = sources(mapped)
    assert type(data.batches(given["NamedTuple"], batch=2, seed=0)[0]) is Pair
    assert data.batches(given["nested"], batch=2, seed=0)[0]["a"]["x"].shape == (2, 2)
    assert type(data.batches(given["Dataset"], batch=2, seed=0)[0]) is tuple
    assert data.batches(given["Dataset of dicts"], batch=2, seed=0)[0].keys() == {"a", "b"}
    assert data.batches(X, batch=2, seed=0)[0].shape == (2, 2)


DTYPES = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16,
          np.float32, np.float64, np.complex64, np.complex128]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype: Any) -> None:
    column = np.array([0, 1, 1, 0, 1], dtype)
    for source in (column, torch.from_numpy(column), [{"x": x} for x in column], Rows(lambda i: (column[i % 5],))):
        (made,) = leaves(source, batch=5)
        assert made.dtype == torch.from_numpy(column).dtype


def test_numbers_of_python_become_what_torch_makes_of_them() -> None:
    assert [x.dtype for x in leaves([{"a": 1, "b": 2.0, "c": True, "d": [1, 2]}] * 6)] == [
        torch.int64, torch.float32, torch.bool, torch.int64,
    ]  # fmt: skip
    for dtype in (torch.bfloat16, torch.float8_e5m2):  # numpy has none such
        column = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
        assert torch.equal(leaves(column, batch=3, last="short")[0].float().sort()[0], column.float())
        other = (-column.float()).to(dtype)
        assert data.batches(column, batch=1, seed=0).fingerprint != data.batches(other, batch=1, seed=0).fingerprint


def test_a_dataset_is_asked_for_its_rows_only_and_several_at_once() -> None:
    dataset = Rows()
    batches = data.batches(dataset, batch=2, shuffle=False)
    dataset.asked.clear()
    batches[1]
    assert dataset.asked == [2, 3]
    several = Several()
    batches = data.batches(several, batch=2, shuffle=False)
    several.asked.clear()
    batches[1]
    assert several.asked == [[2, 3]]


def test_a_dataset_is_known_by_its_fingerprint_or_its_type_and_length() -> None:
    plain, named = Rows(), Rows()
    named.fingerprint = "v1"  # type: ignore[attr-defined]
    assert data.batches(plain, batch=2, seed=0).description["source"] == "Rows of 6 rows"
    assert data.batches(named, batch=2, seed=0).description["source"] == "v1"
    halves = [data.batches(Subset(plain, indices), batch=1, seed=0).fingerprint for indices in ([0, 1], [0, 2], [0, 1])]
    assert halves[0] == halves[2] != halves[1]
    assert data.batches(TensorDataset(torch.from_numpy(X)), batch=2, seed=0).fingerprint == (
        data.batches((X,), batch=2, seed=0).fingerprint
    )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(X)


RAGGED = Rows(lambda i: {"words": torch.zeros(3 if i == 4 else 2)})


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ({"x": X, "y": Y[:5]}, ValueError, r"same number of rows in every leaf, came {'x': 6, 'y': 5}"),
        ({"a": {"x": np.float32(1)}}, TypeError, "a/x: expected an array or a tensor"),
        ({"a": torch.tensor(1.0)}, ValueError, r"a: expected a tensor \(N, ...\)"),
        ({"a": np.array(1.0)}, ValueError, r"a: expected an array \(N, ...\)"),
        ({"a": {"name": np.array(["x", "y"])}}, TypeError, r"a/name: .*an array of <U1.*ft.data.categories\(column\)"),
        ({"name": np.array(["x", "y"], object)}, TypeError, r"name: .*object.*ft.data.categories\(column\)"),
        ({"name": ["x", "y"]}, TypeError, r"name: .*a list of str 'x'.*ft.data.categories"),
        ({"day": np.array(["2020-01-01"], "M8[D]")}, TypeError, r"day: .*datetime64\[D\].*astype\('int64'\)"),
        ({"x": X.astype(">f4")}, TypeError, "x: .*>f4.*write .astype"),
        ({"x": np.ma.masked_array(X, X > 3)}, TypeError, r"x: .*a masked array; write array.filled\(value\)"),
        ({"x": X.astype(np.longdouble)}, TypeError, "x: .*write .astype"),
        ({"x": torch.zeros(3, requires_grad=True)}, ValueError, "x: .*requires grad; write .detach"),
        ([torch.zeros(2)] * 3, TypeError, r"a list of Tensor \(2,\) of torch.float32; write torch.stack"),
        ({"x": [[1, 2], [3]]}, ValueError, "x: expected a number, or as many numbers, in every row"),
        ([{"x": 1}, {"y": 1}], ValueError, "like the first, a dict of 'x', came a dict of 'y' at number 1"),
        ([{"x": None}], TypeError, "x: expected rows of tensors, arrays and numbers, came NoneType"),
        ([{"x": "word"}], TypeError, "x: .*came str 'word'; .*ft.data.categories.* ft.data.loader"),
        (Rows(lambda i: (X[i], datetime.date.min)), TypeError, "1: .*came date"),
        ({}, ValueError, "a leaf at least"),
        (UserDict(x=X), TypeError, r"came UserDict; write dict\(source\)"),
        ("file.csv", TypeError, "came str"),
        (iter([1]), TypeError, "came list_iterator"),
        (Stream(), TypeError, "came Stream, which is only iterated; give it to ft.data.loader"),
        (DataLoader(TensorDataset(torch.zeros(3))), TypeError, "came DataLoader, .*ft.data.loader"),
    ],
)
def test_what_is_no_source_is_named_with_a_way_out(source: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"batches: .*{says}"):
        data.batches(source, batch=2, seed=0)


def test_rows_of_other_shapes_are_told_when_they_come() -> None:
    batches = data.batches(RAGGED, batch=3, shuffle=False)
    batches[0]
    with pytest.raises(
        ValueError, match=r"words: .*like the first, Tensor \(2,\) .* came Tensor \(3,\) .* at number 1"
    ):
        batches[1]


def test_a_table_of_pandas_and_of_arrow_is_its_columns() -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
    for table in (arrow.table({"a": X[:, 0], "b": Y}),):
        made = data.batches(table, batch=4, seed=0)[1]
        assert torch.equal(made["a"], leaves({"a": X[:, 0], "b": Y})[0]) and made["b"].dtype == torch.int64
    pandas = pytest.importorskip("pandas", reason="needs the package pandas")
    made = data.batches(pandas.DataFrame({"a": X[:, 0], "b": Y}), batch=4, seed=0)[1]
    assert torch.equal(made["a"], leaves({"a": X[:, 0], "b": Y})[0]) and made["b"].dtype == torch.int64
    with pytest.raises(TypeError, match=r"name: .*ft.data.categories\(column\)"):
        data.batches(pandas.DataFrame({"name": ["x", "y"]}), batch=1, seed=0)


def test_a_dataset_of_hugging_face_gives_its_columns_in_its_format() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        hugging_face = pytest.importorskip("datasets", reason="needs the package datasets")
    dataset = hugging_face.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    for kind in (None, "torch", "numpy"):
        made = data.batches(dataset.with_format(kind), batch=4, seed=0)[1]
        assert torch.equal(made["x"], leaves((X, Y))[0]) and made["y"].dtype == torch.int64, kind
        made["x"].zero_()
        assert torch.equal(data.batches(dataset.with_format(kind), batch=4, seed=0)[1]["x"], leaves((X, Y))[0])
    batches = data.batches(dataset, batch=2, seed=0)
    assert batches.fingerprint == data.batches(dataset, batch=2, seed=0).fingerprint
    assert batches.fingerprint != data.batches(dataset.select(range(5)), batch=2, seed=0).fingerprint
    train, validation = data.split(dataset, validation=0.5, seed=0)
    assert sorted(train["y"][:] + validation["y"][:]) == sorted(Y.tolist()) and len(train) == 3
    with pytest.raises(TypeError, match=r"name: .*ft.data.categories.*; or try dataset.with_format\('torch'\)"):
        data.batches(dataset.add_column("name", ["x"] * 6), batch=2, seed=0)
    with pytest.raises(TypeError, match=r"came DatasetDict; take one of its datasets, as source\['train'\]"):
        data.batches(hugging_face.DatasetDict(train=dataset), batch=2, seed=0)
    with pytest.raises(TypeError, match="only iterated"):
        data.batches(dataset.to_iterable_dataset(), batch=2, seed=0)


def test_images_that_lie_channels_last_are_contiguous_in_a_batch() -> None:
    images = np.arange(96.0).reshape(6, 2, 2, 4).transpose(0, 3, 1, 2)  # (N, C, H, W), as they are often stored
    for options in ({"seed": 0}, {"shuffle": False}):
        made = data.batches((images, np.arange(6)), batch=3, **options)[0]  # type: ignore[arg-type]
        assert made[0].is_contiguous() and torch.equal(made[0], torch.from_numpy(images[made[1].numpy()]))
