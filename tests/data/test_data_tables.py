"""Files of tables as columns: what pandas reads is what comes, and what is wrong in a file is named by its line."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain import data

pyarrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the package pyarrow")
LAW = settings(deadline=None, derandomize=True, max_examples=60)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda s: s.strip("\ufeff \u2028"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.txt"


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def test_columns_have_the_dtypes_of_what_stands_in_them(path: Path) -> None:
    written(path, 'n,x,name,yes,day\r\n1, 2.5,"a, b",true,2020-01-02\r\n\r\n-3,4,"c\nd",false,2020-01-03\r\n')
    table = data.read_csv(path)
    assert {name: column.dtype.str for name, column in table.items()} == {
        "n": "<i8", "x": "<f8", "name": "|O", "yes": "|b1", "day": "<M8[D]",
    }  # fmt: skip
    assert table["n"].tolist() == [1, -3] and table["x"].tolist() == [2.5, 4.0]
    assert table["name"].tolist() == ["a, b", "c\nd"] and table["yes"].tolist() == [True, False]
    table["n"][0] = 7  # its own memory


@settings(LAW, max_examples=25)
@given(
    rows=st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT),
        min_size=1,
        max_size=8,
    )
)
def test_what_was_written_is_read(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("n", "x", "name"), *((n, repr(x), name) for n, x, name in rows)])
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"n": n, "x": x, "name": name}) + "\n" for n, x, name in rows), encoding="utf-8"
    )
    columns = dict(zip(("n", "x", "name"), map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    for table in (
        data.read_csv(folder / "a.csv", text=["name"]),
        data.read_jsonl(folder / "a.jsonl"),
        data.read_parquet(folder / "a.parquet"),
    ):
        assert {name: column.tolist() for name, column in table.items()} == columns
        assert [column.dtype.kind for column in table.values()] == ["i", "f", "O"]


def test_it_reads_what_pandas_reads(path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="needs the package pandas")
    rows = "\n".join(f"{i},{i / 7},w{i % 3},{i % 2 == 0}" for i in range(500))
    table = data.read_csv(written(path, f"n,x,name,yes\n{rows}\n"))
    frame = pandas.read_csv(path)
    for name in frame.columns:
        expected = frame[name].to_numpy()
        # pandas' fast parser is off by the last bit at times
        close = np.allclose(table[name], expected, rtol=1e-15) if name == "x" else (table[name] == expected).all()
        assert close and table[name].dtype.kind == expected.dtype.kind


def test_columns_names_text_missing_and_delimiter(path: Path) -> None:
    written(path, "1;x;\n2;y;3\n")
    table = data.read_csv(path, names=["n", "name", "z"], delimiter=";", missing=-1.0)
    assert table["n"].dtype == np.int64 and table["z"].tolist() == [-1.0, 3.0] and table["z"].dtype == np.float64
    assert list(data.read_csv(path, names=["n", "name", "z"], delimiter=";", columns=["name", "n"])) == ["name", "n"]
    table = data.read_csv(path, names=["n", "name", "z"], delimiter=";", text=["n", "z"])
    assert table["n"].tolist() == ["1", "2"] and table["z"].tolist() == ["", "3"]
    assert data.read_csv(written(path, "\ufeffn\n1\n"))["n"].tolist() == [1]
    # a column is told by all of its rows, however many blocks they are
    rows = "".join(f'{n},"a\nb"\n' for n in range(200_000))
    many = data.read_csv(written(path, f"x,name\n{rows}2.5,c\n"))
    assert many["x"][-1] == 2.5 and many["x"].dtype == np.float64 and set(many["name"]) == {"a\nb", "c"}


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("a,b\n1,2\n\n3,4,5\n", {}, r"line 4: expected 2 cells, as in the first line, came 3: \['3', '4', '5'\]"),
        ("a,b\n1,2\n3\n", {}, "line 3: expected 2 cells.*came 1"),
        ("1,2\n3\n", {"names": ["a", "b"]}, "line 2: expected 2 cells, as in the names given, came 1"),
        ("1,2\n3,4\n", {"names": ["a"]}, "line 1: expected 1 cells, as in the names given, came 2"),
        ('a,b\n1,"x\ny"\n3,z\nsix,z\n', {}, "line 5: column 'a': expected a number, as in the rows before, came 'six'"),
        ("a,b\n1,2\n\n3,\n", {}, "line 4: column 'b': expected a number, came ''; .*missing=value.*columns="),
        ("a,b\n1,2\n3,NaN\n", {}, "line 3: column 'b': expected a number, came 'NaN'"),
        ("1,2\n3,\n", {"names": ["a", "b"]}, "line 2: column 'b': expected a number, came ''"),
        ("a,b\n1,\n2,\n", {}, "line 2: column 'b': expected a number, came ''"),
        ("a,b\n1,true\n2,\n", {"missing": 0.0}, "line 3: column 'b': expected bool, came ''"),
        ("a,b\n1,2\n", {"columns": ["c"]}, "expected columns among a, b, came 'c'"),
        ("a,b\n1,2\n", {"text": ["c"]}, "expected columns among a, b, came 'c'"),
        ("a,a\n1,2\n", {}, "expected a name for each column, came 'a' twice"),
        ("a,b\n", {}, "expected rows below the names, came none"),
        ("", {}, "expected rows, came an empty file"),
    ],
)
def test_a_fault_of_a_csv_file_is_named_by_its_line(
    path: Path, content: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=rf"table.txt(,|:) ?{says}"):
        data.read_csv(written(path, content), **options)


def test_text_that_is_not_utf8_and_files_that_are_not_there_are_told(path: Path) -> None:
    path.write_bytes("a,b\n1,x\n2,\xe9t\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3: column 'b': expected text in UTF-8, came .*; convert the file"):
        data.read_csv(path)
    for read in (data.read_csv, data.read_jsonl, data.read_parquet):
        with pytest.raises(FileNotFoundError, match=f"{read.__name__}: expected a file, found none at"):
            read(path.with_name("none"))


def test_json_lines_hold_arrays_and_objects(path: Path) -> None:
    lines = [
        '{"x": [[1, 2], [3, 4.5]], "y": 1, "in": {"a": true}}',
        "",
        '{"in": {"a": false}, "y": 2.5, "x": [[0, 0], [0, 0]]}',
    ]
    table = data.read_jsonl(written(path, "\n".join(lines)))
    assert (
        table["x"].shape == (2, 2, 2)
        and table["y"].tolist() == [1.0, 2.5]
        and table["in"]["a"].tolist() == [True, False]
    )
    made = data.batches(table, batch=2, shuffle=False)[0]
    assert made["x"].shape == (2, 2, 2) and made["in"]["a"].dtype == torch.bool


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ('{"a": 1}\n\n{"a": "x"}', {}, 'line 3: a: expected a number, as in the first row, came "x"'),
        ('{"a": 1}\n{"a": null}', {}, "line 2: a: expected a number, as in the first row, came null"),
        ('{"a": null}', {}, "line 1: a: expected true or false, a number, text or a list of them, came null"),
        ('{"a": 1}\n{"a": true}', {}, "line 2: a: expected a number, as in the first row, came true"),
        ('{"a": 1}\n\n{"b": 1}', {}, "line 3: expected the fields a, as in the first row, came b; .*columns="),
        ('{"i": {"a": 1}}\n{"i": {"b": 1}}', {}, "line 2: i: expected the fields a, as in the first row, came b"),
        ('{"i": {"a": 1}}\n{"i": 3}', {}, "line 2: i: expected the fields a, as in the first row, came 3"),
        ('{"a": [1, 2]}\n{"a": [1]}', {}, r"line 2: a: expected lists of shape \(2,\) of a number.*came \[1\]"),
        ('{"a": [1, "x"]}', {}, "line 1: a: expected true or false, a number, text or a list of them"),
        ('{"a": [[1, 2], [3]]}', {}, "line 1: a: expected true or false, a number, text or a list of them"),
        ('{"a": []}', {}, "line 1: a: expected true or false, a number, text or a list of them"),
        ('{"a": 1}\n{"a":', {}, "line 2: expected a JSON object, came .*; mend the line"),
        ("[1]", {}, "line 1: expected a JSON object with a field for each column"),
        ('{"a": 1}\n{"b": 1}', {"columns": ["a"]}, "line 2: expected columns among b, came 'a'"),
        ('{"a": 99999999999999999999}', {}, "line 1: a: expected whole numbers that int64 holds"),
        ("\n\n", {}, "expected an object on each line, came only empty lines"),
    ],
)
def test_a_fault_of_a_json_lines_file_is_named_by_its_line(
    path: Path, content: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=rf"table.txt(,|:) ?{says}"):
        data.read_jsonl(written(path, content), **options)


def test_parquet_keeps_dtypes_and_gives_lists_structs_and_categories(path: Path) -> None:
    columns = {
        "f": pyarrow.array([1, 2], pyarrow.float32()),
        "u": pyarrow.array([1, 2], pyarrow.uint8()),
        "list": pyarrow.array([[1, 2, 3], [4, 5, 6]], pyarrow.list_(pyarrow.int16())),
        "struct": pyarrow.array([{"a": 1}, {"a": 2}]),
        "category": pyarrow.array(["x", "y"]).dictionary_encode(),
        "fixed": pyarrow.array([[1.0, 2.0], [3.0, 4.0]], pyarrow.list_(pyarrow.float32(), 2)),
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=1)
    table = data.read_parquet(path)
    assert table["f"].dtype == np.float32 and table["u"].dtype == np.uint8
    assert table["list"].tolist() == [[1, 2, 3], [4, 5, 6]] and table["list"].dtype == np.int16
    assert table["struct"]["a"].tolist() == [1, 2] and table["category"].tolist() == ["x", "y"]
    assert table["fixed"].shape == (2, 2)
    assert list(data.read_parquet(path, columns=["u", "f"])) == ["u", "f"]
    with pytest.raises(ValueError, match="expected columns among f, u, .*, came 'g'"):
        data.read_parquet(path, columns=["g"])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, None, 3], "column 'a': expected int64 in every row, row 1 has none"),
        ([[1], [2, 3]], "column 'a': expected lists of one length, 1 as in row 0, came 2 in row 1"),
        ([{"b": 1}, {"b": None}], "column 'a': expected int64 in every row, row 1 has none"),
    ],
)
def test_a_fault_of_a_parquet_file_is_named_by_its_row(path: Path, values: list[Any], says: str) -> None:
    parquet.write_table(pyarrow.table({"a": values}), path)
    with pytest.raises(ValueError, match=f"table.txt: {says}"):
        data.read_parquet(path)


def test_packed_files_are_read(path: Path) -> None:
    for name, content in (("a.csv.gz", "a,b\n1,x\n2,y\n"), ("a.jsonl.gz", '{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n')):
        file = path.with_name(name)
        file.write_bytes(gzip.compress(content.encode()))
        table = data.read_csv(file, text=["b"]) if "csv" in name else data.read_jsonl(file)
        assert table["a"].tolist() == [1, 2] and table["b"].tolist() == ["x", "y"]
    file = path.with_name("b.csv.gz")
    file.write_bytes(gzip.compress(b"a,b\n1,x\n2\n"))
    with pytest.raises(ValueError, match=r"b.csv.gz, line 3: expected 2 cells"):
        data.read_csv(file)


def test_what_is_no_parquet_file_is_told(path: Path) -> None:
    with pytest.raises(ValueError, match="table.txt: expected a Parquet file, came something else"):
        data.read_parquet(written(path, "a,b\n1,2\n"))


def test_without_arrow_the_way_to_install_it_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.csv", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for read in (data.read_csv, data.read_parquet):
        with pytest.raises(ModuleNotFoundError, match=rf"{read.__name__} needs .*pip install 'functrain\[tables\]'"):
            read(written(path, "a\n1\n"))
    assert data.read_jsonl(written(path, '{"a": 1}'))["a"].tolist() == [1]


# ---- labels and splits ---------------------------------------------------------------------------------------------


@LAW
@given(values=st.lists(st.sampled_from(["b", "a", "c", "é"]), min_size=1))
def test_labels_name_the_values_of_a_column(values: list[str]) -> None:
    for column in (values, np.array(values), np.array(values, object)):
        labels, names = data.categories(column)
        assert [names[label] for label in labels] == values and names == sorted(set(values))
        assert labels.dtype == np.int64
        again, same_names = data.categories(column[:1], names=names)
        assert again[0] == labels[0] and same_names == names


def test_numbers_are_classes_too_and_an_unknown_one_is_named() -> None:
    labels, names = data.categories(torch.tensor([7, 3, 7]))
    assert labels.tolist() == [1, 0, 1] and names == [3, 7]
    with pytest.raises(ValueError, match="categories: row 1: expected one of 2 names, 'a', 'b', came 'c'"):
        data.categories(["a", "c"], names=["a", "b"])
    with pytest.raises(ValueError, match="names that differ"):
        data.categories(["a"], names=["a", "a"])
    with pytest.raises(ValueError, match=r"one column \(N,\), came shape \(2, 2\)"):
        data.categories(np.zeros((2, 2)))


@LAW
@given(rows=st.integers(2, 50), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**64 - 1))
def test_a_split_has_each_row_on_one_side_in_its_order(rows: int, share: float, seed: int) -> None:
    held_out = round(share * rows)
    source: Any = {
        "row": np.arange(rows),
        "name": np.array([f"n{i}" for i in range(rows)], object),
        "t": torch.arange(rows),
    }
    if not 0 < held_out < rows:
        with pytest.raises(ValueError, match="leaves rows on both sides"):
            data.split(source, validation=share, seed=seed)
        return
    sides = data.split(source, validation=share, seed=seed)
    assert len(sides[1]["row"]) == held_out
    assert sorted([*sides[0]["row"], *sides[1]["row"]]) == list(range(rows))
    for side in sides:
        assert side["row"].tolist() == side["t"].tolist() == sorted(side["row"])
        assert side["name"].tolist() == [f"n{i}" for i in side["row"]]
    again = data.split(source, validation=share, seed=seed)
    assert np.array_equal(again[1]["row"], sides[1]["row"])
    listed = data.split(list(range(rows)), validation=share, seed=seed)
    assert listed[1] == sides[1]["row"].tolist()


def test_a_split_of_a_dataset_and_of_tables_is_one_like_it() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(10))
    train, validation = data.split(dataset, validation=0.2, seed=0)
    assert len(train) == 8 and len(validation) == 2 and isinstance(train, torch.utils.data.Subset)
    assert sorted(x.item() for side in (train, validation) for (x,) in side) == list(range(10))
    table = pyarrow.table({"a": range(10)})
    assert data.split(table, validation=0.2, seed=0)[1]["a"].to_pylist() == [int(x[0]) for x in validation]
    pandas = pytest.importorskip("pandas", reason="needs the package pandas")
    frame = pandas.DataFrame({"a": range(10)})
    assert data.split(frame, validation=0.2, seed=0)[1]["a"].tolist() == [int(x[0]) for x in validation]


def test_what_cannot_be_split_is_told() -> None:
    for wrong in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="split: expected a fraction for validation"):
            data.split(np.arange(10), validation=wrong, seed=0)
    with pytest.raises(ValueError, match=r"same number of rows in every column, came {'a': 2, 'b': 3}"):
        data.split({"a": np.arange(2), "b": np.arange(3)}, validation=0.5, seed=0)
    with pytest.raises(TypeError, match="split: a: expected rows that can be asked for by number"):
        data.split({"a": 3}, validation=0.5, seed=0)
    with pytest.raises(ValueError, match="expected a seed"):
        data.split(np.arange(10), seed=-1)


def test_from_a_csv_file_to_a_trained_classifier(path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(200, 2))
    lines = [f"{x:.4f},{y:.4f},{'above' if y > x else 'below'}" for x, y in points]
    written(path, "x,y,side\n" + "\n".join(lines))

    table = data.read_csv(path)
    labels, names = data.categories(table["side"])
    rows = {"x": np.stack([table["x"], table["y"]], 1).astype(np.float32), "label": labels}
    train, validation = data.split(rows, validation=0.25, seed=0)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        logits = batch["x"] @ params["w"]
        return ft.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    optimizer = ft.optim.adam(0.1)
    state = ft.init_state({"w": torch.zeros(2, len(names))}, optimizer, key=ft.random.key(0))
    batches = data.batches(train, batch=32, seed=0)
    state = ft.fit(ft.train_step(loss_fn, optimizer), state, batches, steps=60)

    right = sum(
        int(((b["x"] @ state.params["w"]).argmax(1) == b["label"]).sum())
        for b in data.batches(validation, batch=16, shuffle=False)
    )
    assert right >= 45 and len(validation["label"]) == 50
