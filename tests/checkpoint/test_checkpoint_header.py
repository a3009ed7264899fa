"""Whatever a file holds, reading it gives the exact tensors or a HeaderError that says what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import checkpoint
from functrain.checkpoint import header
from functrain.checkpoint.tensors import DTYPES, NAMES, write_file

FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(head: bytes | str, data: bytes = b"") -> bytes:
    head = head.encode() if isinstance(head, str) else head
    return len(head).to_bytes(8, "little") + head + data


def one(**changes: object) -> bytes:
    return file_of(json.dumps({"a": {**FLOAT, **changes}}), bytes(8))


BAD = {
    "empty": (b"", "an empty file"),
    "seven bytes": (b"\x00" * 7, "7 bytes in all"),
    "length past the end": (file_of("{}")[:9], "header length of 2 in a file of 9"),
    "length over the limit": ((100_000_001).to_bytes(8, "little") + b"{" + bytes(50), "header length of 100000001"),
    "length of all ones": (b"\xff" * 8 + b"{}", "header length of 18446744073709551615"),
    "no brace": (file_of("[1]"), "where the header's '{' should be"),
    "length zero": (bytes(16), "where the header's '{' should be"),
    "a zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(30), "a pickle .torch.save, .bin., which functrain never opens"),
    "a header length like a pickle": (b"\x80\x02" + bytes(6) + b'{"a"', "header length of 640 in a file of 12"),
    "an answer in words": (b"Entry not found", "text: 'Entry not found'"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(30), "GGUF"),
    "a web page": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "JSON": (b'{"a": 1, "b": [2, 3]}', "JSON text"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "gzip"),
    "not JSON": (file_of("{nope}"), "JSON object in UTF-8"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "JSON object in UTF-8"),
    "UTF-16": (file_of('{"a":1}'.encode("utf-16-le")), "JSON object in UTF-8"),
    "a lone surrogate": (file_of('{"\\ud800": ' + json.dumps(FLOAT) + "}", bytes(8)), "surrogate"),
    "nested too deeply": (file_of('{"a":' + "[" * 100_000), "nested too deeply"),
    "a number of 5000 digits": (file_of('{"a":' + "9" * 5000 + "}"), "JSON object in UTF-8"),
    "NaN": (file_of('{"a": NaN}'), "JSON numbers"),
    "a key twice": (file_of('{"a":' + json.dumps(FLOAT) + ',"a":' + json.dumps(FLOAT) + "}", bytes(8)), "twice"),
    "a key twice by escape": (
        file_of('{"a":' + json.dumps(FLOAT) + ',"\\u0061":' + json.dumps(FLOAT) + "}", bytes(8)),
        "twice",
    ),
    "a field twice": (file_of('{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "no dtype": (file_of('{"a":{"shape":[2],"data_offsets":[0,8]}}', bytes(8)), "dtype, shape and data_offsets"),
    "a field more": (one(more=1), "dtype, shape and data_offsets"),
    "unknown dtype": (one(dtype="F128"), "F128"),
    "dtype no string": (one(dtype=["F32"]), "a dtype of"),
    "negative size": (one(shape=[-2]), "sizes below"),
    "true as a size": (one(shape=[True, 2]), "sizes below"),
    "2.0 as a size": (one(shape=[2.0]), "sizes below"),
    "too many dimensions": (one(shape=[1] * 65 + [2]), "64 sizes"),
    "a size of 2**63": (one(shape=[0, 2**63], data_offsets=[0, 0]), "sizes below"),
    "strides that overflow": (one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "less than 2\\*\\*63 bytes"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "two rising"),
    "falling offsets": (one(data_offsets=[8, 0]), "two rising"),
    "bytes that do not fit the shape": (one(shape=[3]), "12 bytes for F32"),
    "a gap": (file_of(json.dumps({"a": {**FLOAT, "data_offsets": [8, 16]}}), bytes(16)), "a gap"),
    "an overlap": (file_of(json.dumps({"a": FLOAT, "b": FLOAT}), bytes(8)), "an overlap"),
    "bytes at the end": (file_of(json.dumps({"a": FLOAT}), bytes(9)), "as its header says"),
    "bytes missing": (file_of(json.dumps({"a": FLOAT}), bytes(7)), "as its header says"),
    "metadata no table": (file_of('{"__metadata__": [1]}'), "strings to strings"),
    "metadata no strings": (file_of('{"__metadata__": {"a": 1}}'), "strings to strings"),
    "metadata no text": (file_of('{"__metadata__": {"a": "\\ud800"}}'), "strings to strings"),
    "metadata of a key that is no text": (file_of('{"__metadata__": {"\\ud800": "a"}}'), "strings to strings"),
    "text after the header": (file_of("{} x"), "JSON object in UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(text)
    with pytest.raises(checkpoint.HeaderError, match=message) as caught:
        checkpoint.load_file(path)
    assert str(path) in str(caught.value) and caught.value.way_out


def test_a_folder_a_pipe_and_a_missing_file_are_told_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(checkpoint.StorageError, match="a folder, pipe or device"):
            checkpoint.load_file(tmp_path / name)
    with pytest.raises(checkpoint.IntegrityError, match="expected a file, came none"):
        checkpoint.load_file(tmp_path / "no")


names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6), st.randoms())
def test_what_write_says_read_says(rows: dict[str, tuple[str, tuple[int, ...]]], random: object) -> None:
    order = list(rows)
    random.shuffle(order)  # type: ignore[attr-defined]
    text = header.write([(name, *rows[name]) for name in order], {"format": "pt", "é": "\n"})
    sizes = [torch.empty(rows[name][1], dtype=DTYPES[rows[name][0]]).nbytes for name in order]
    file = text + bytes(sum(sizes))
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return file[at - count : at]

    found = header.read(take, len(file), "file")
    assert found.metadata == {"format": "pt", "é": "\n"} and found.size_bytes == at == len(text)
    assert {e.name: (e.dtype, e.shape) for e in found.entries} == rows
    assert {e.name: e.end - e.begin for e in found.entries} == dict(zip(order, sizes, strict=True))
    assert len(text) % 8 == 0


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 16), generator=generator, dtype=torch.uint8)
    return {name: (raw % 2 if name == "BOOL" else raw.clone()).view(dtype) for name, dtype in DTYPES.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    plain = a.dtype == b.dtype and a.shape == b.shape
    return plain and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_file(tmp_path / "ours.safetensors", tensors)
    # safetensors 0.8.0 writes F8_E8M0 and cannot read it
    theirs = {name: tensor for name, tensor in tensors.items() if name != "F8_E8M0"}
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in theirs.items())
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    read = checkpoint.load_file(tmp_path / "theirs.safetensors")
    assert read.keys() == tensors.keys() and all(same_bits(read[name], tensor) for name, tensor in tensors.items())


def test_every_dtype_of_the_format_has_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == header.ITEM_BYTES
    assert len(NAMES) == len(DTYPES)


@settings(deadline=None, derandomize=True, max_examples=2000)
@given(st.data())
def test_a_mutated_file_gives_tensors_or_a_header_error(data: st.DataObject) -> None:
    text = bytearray(MUTATED)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "drop", "double", "digit"])):
            case "flip":
                text[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del text[at + 1 :]
            case "drop":
                del text[at]
            case "double":
                text[at:at] = text[at : at + data.draw(st.integers(1, 40))]
            case "digit":
                text[at : at + 1] = str(data.draw(st.sampled_from([0, 7, 2**31, 2**63, 2**64]))).encode()
        if not text:
            break
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        assert at + count <= len(text), "reads past the end, or allocates more than the file"
        at += count
        return bytes(text[at - count : at])

    try:
        found = header.read(take, len(text), "file")
    except checkpoint.HeaderError:
        return
    ends = [found.size_bytes, *(entry.end for entry in found.entries)]
    assert [entry.begin for entry in found.entries] == ends[:-1] and ends[-1] == len(text)
    for entry in found.entries:
        assert torch.empty(entry.shape, dtype=DTYPES[entry.dtype]).nbytes == entry.end - entry.begin


MUTATED = header.write([("a/b", "F32", (2, 3)), ("c", "BF16", ()), ("é", "BOOL", (0, 4))], {"format": "pt"}) + bytes(26)
