"""What is saved is loaded: every bit, every container, ties; and what cannot be is told with its path."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from checkpoint_trees import Layer, Moments, assert_same, bits, keys, small, tensors, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import checkpoint, tree
from functrain.checkpoint import manifest, stream
from functrain.checkpoint.tensors import NAMES


@settings(deadline=None, derandomize=True, max_examples=150)
@given(trees, st.booleans())
def test_loaded_equals_saved(before: Any, with_like: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = [bits(leaf) for leaf in tree.leaves(before)]
        checkpoint.save(f"{folder}/c", before)
        assert [bits(leaf) for leaf in tree.leaves(before)] == kept
        after = checkpoint.load(f"{folder}/c", like=before if with_like else None)
        if with_like:
            assert tree.structure(after) == tree.structure(before)
            assert [bits(a) for a in tree.leaves(after)] == kept
        else:
            assert_same(before, after)
        assert checkpoint.contents(f"{folder}/c").leaves.keys() == set(tree.paths(before))


def test_every_nan_payload_of_two_bytes_survives(tmp_path: Path) -> None:
    raw = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    before = {str(dtype): raw.view(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int16, torch.uint16)}
    checkpoint.save(tmp_path / "c", before)
    assert_same(before, checkpoint.load(tmp_path / "c"))


def test_every_kind_of_nan_and_zero_of_python_survives(tmp_path: Path) -> None:
    words = [0x7FF8 << 48, 0xFFF8 << 48, 0x7FF0 << 48 | 1, 0xFFF8DEADBEEF0001, 0x7FF0 << 48, 0xFFF0 << 48, 1 << 63, 1]
    floats = [struct.unpack(">d", word.to_bytes(8, "big"))[0] for word in words]
    before = {"floats": floats, "complex": [complex(a, b) for a in floats[:4] for b in floats[3:]]}
    checkpoint.save(tmp_path / "c", before)
    for like in (None, before):
        assert_same(before, checkpoint.load(tmp_path / "c", like=like))


def test_plain_safetensors_reads_the_tensors(tmp_path: Path) -> None:
    state = small(3)
    del state["params"]["b"]  # numpy has no bfloat16
    checkpoint.save(tmp_path / "c", state)
    found = safetensors.numpy.load_file(tmp_path / "c" / "tensors.safetensors")
    # tied leaves stand once, under the path that sorts first; scalars are in tree.json
    assert set(found) == {"params/tied", "moments/mu", "moments/nu", "step"}
    assert found["params/tied"].tobytes() == state["params"]["w"].numpy().tobytes()
    assert int(found["step"]) == 3


NUMPY = {"F64", "F32", "F16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "C64"}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.dictionaries(keys, tensors(), max_size=6))
def test_the_safetensors_library_reads_every_bit_of_every_dtype(before: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint.save(f"{folder}/c", before) / "tensors.safetensors"
        raw = dict(safetensors.deserialize(file.read_bytes()))
        table = checkpoint.contents(f"{folder}/c").leaves
        for name, tensor in before.items():
            kept = raw[table[name]["tensor"]]
            plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            assert (kept["dtype"], kept["shape"]) == (NAMES[tensor.dtype], list(tensor.shape))
            assert kept["data"] == bytes(plain.reshape(-1).view(torch.uint8).tolist())
            if kept["dtype"] in NUMPY:
                with safetensors.safe_open(file, framework="np") as opened:
                    assert opened.get_tensor(table[name]["tensor"]).tobytes() == kept["data"]


def test_tied_leaves_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    w = torch.randn(100, 100)
    other = {"a": w, "b": [w.view(100, 100), w.clone()], "c": w.t(), "empty": torch.empty(0), "also": torch.empty(0)}
    checkpoint.save(tmp_path / "c", other)
    assert (tmp_path / "c" / "tensors.safetensors").stat().st_size < 3.1 * w.nbytes
    for like in (None, other):
        after = checkpoint.load(tmp_path / "c", like=like)
        assert after["a"] is after["b"][0] and after["a"] is not after["b"][1] and after["a"] is not after["c"]
        assert after["empty"] is not after["also"]
        assert_same(other, after)


def test_conjugated_and_negated_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    z = torch.complex(torch.arange(3.0), torch.ones(3))
    before = {"conj": z.conj(), "neg": z.conj().imag, "one": z[:1].conj().imag, "same": z}
    checkpoint.save(tmp_path / "c", before)
    after = checkpoint.load(tmp_path / "c")
    assert after["conj"].tolist() == [0 - 1j, 1 - 1j, 2 - 1j] and after["neg"].tolist() == [-1, -1, -1]
    assert after["one"].tolist() == [-1]
    assert torch.equal(after["same"], z)


def test_a_leaf_called_as_the_header_calls_its_own_strings(tmp_path: Path) -> None:
    before = {"__metadata__": torch.ones(3)}
    checkpoint.save(tmp_path / "c", before)
    assert_same(before, checkpoint.load(tmp_path / "c"))
    found = safetensors.numpy.load_file(tmp_path / "c" / "tensors.safetensors")
    assert found["__metadata__/"].tolist() == [1, 1, 1]


def test_the_order_in_memory_comes_back(tmp_path: Path) -> None:
    w = torch.randn(3, 4, 5)
    before = {"t": w.permute(2, 0, 1), "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    checkpoint.save(tmp_path / "c", before)
    after = checkpoint.load(tmp_path / "c")
    assert_same(before, after)
    assert {k: v.stride() for k, v in after.items()} == {k: v.stride() for k, v in before.items()}


def test_parameters_come_back_as_plain_tensors(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.nn.Parameter(torch.ones(2))})
    after = checkpoint.load(tmp_path / "c", like={"w": torch.nn.Parameter(torch.zeros(2))})
    assert type(after["w"]) is torch.Tensor and not after["w"].requires_grad and torch.equal(after["w"], torch.ones(2))


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    before = small(1)
    checkpoint.save(tmp_path / "c", before)
    after = checkpoint.load(tmp_path / "c", like=before)
    os.truncate(tmp_path / "c" / "tensors.safetensors", 0)  # under a memory map, the next line would be a SIGBUS
    assert_same(before, after)


def test_an_empty_tree_and_a_tree_of_one_leaf(tmp_path: Path) -> None:
    for i, before in enumerate(({}, None, (), torch.ones(2), 5)):
        checkpoint.save(tmp_path / str(i), before)
        assert_same(before, checkpoint.load(tmp_path / str(i)))


def test_a_subtree_loads_alone(tmp_path: Path) -> None:
    state = small(2)
    checkpoint.save(tmp_path / "c", state)
    assert_same(state["params"], checkpoint.load(tmp_path / "c", at="params"))
    assert_same(state["moments"].nu, checkpoint.load(tmp_path / "c", at="moments/nu", like=torch.zeros(())))
    with pytest.raises(checkpoint.MissingError, match="'parms', came only params, moments, step, note"):
        checkpoint.load(tmp_path / "c", at="parms")
    with pytest.raises(checkpoint.MissingError, match="a leaf"):
        checkpoint.load(tmp_path / "c", at="step/x")
    with pytest.raises(checkpoint.MismatchError, match=r"params/w: like= has \(2,\), the checkpoint \(5, 7\)"):
        checkpoint.load(tmp_path / "c", at="params", like={**state["params"], "w": torch.zeros(2)})


def test_like_on_the_meta_device_gives_tensors_on_the_cpu(tmp_path: Path) -> None:
    state = small(2)
    checkpoint.save(tmp_path / "c", state)
    like = tree.map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, state)
    assert_same(state, checkpoint.load(tmp_path / "c", like=like))


def test_like_gives_the_containers(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"mu": torch.ones(1), "nu": (torch.zeros(1),)})
    like = Moments(torch.empty(1), [torch.empty(1)])
    assert_same(checkpoint.load(tmp_path / "c", like=like), Moments(torch.ones(1), [torch.zeros(1)]))


def test_all_differences_to_like_are_told_at_once(tmp_path: Path) -> None:
    layer, other = Layer(torch.ones(1), None, 0.1), Layer(torch.ones(1).half(), None, 0.2)
    saved = {"w": torch.ones(2, 3), "bias": torch.ones(3), "n": 1, "layer": layer, "x": [1, 2]}
    like = {"w": torch.ones(3, 2), "biass": torch.ones(3), "n": True, "layer": other}
    checkpoint.save(tmp_path / "c", saved)
    with pytest.raises(checkpoint.MismatchError) as caught:
        checkpoint.load(tmp_path / "c", like=like)
    assert str(caught.value) == (
        f"{tmp_path / 'c'}: expected the tree of like=, came 8 differences; pass like= a tree as it was saved, "
        "or use only=, rename= or cast=\n"
        "  only in like= (1):\n    biass (did you mean bias?)\n"
        "  only in the checkpoint (3):\n    bias (did you mean biass?)\n    x/0\n    x/1\n"
        "  kind (1):\n    n: like= has bool, the checkpoint int\n"
        "  shape (1):\n    w: like= has (3, 2), the checkpoint (2, 3)\n"
        "  dtype (1):\n    layer/weight: like= has float16, the checkpoint float32\n"
        "  type (1):\n    layer.rate: like= has 0.2, the checkpoint 0.1"
    )


def test_another_named_type_with_the_same_paths_is_a_difference(tmp_path: Path) -> None:
    class Averages(NamedTuple):
        mu: Any
        nu: Any

    checkpoint.save(tmp_path / "c", [Moments(torch.ones(1), torch.ones(1))])
    with pytest.raises(checkpoint.MismatchError, match="0: like= has Averages, the checkpoint Moments"):
        checkpoint.load(tmp_path / "c", like=[Averages(torch.ones(1), torch.ones(1))])


def test_an_unregistered_type_needs_like(tmp_path: Path) -> None:
    class Unknown(NamedTuple):
        a: Any

    state = {"s": Unknown(torch.ones(1))}
    checkpoint.save(tmp_path / "c", state)
    with pytest.raises(checkpoint.UnknownTypeError, match="'s': .*Unknown with fields .'a'.*; pass like="):
        checkpoint.load(tmp_path / "c")
    assert_same(state, checkpoint.load(tmp_path / "c", like=state))
    checkpoint.register(Unknown)
    assert_same(state, checkpoint.load(tmp_path / "c"))
    with pytest.raises(TypeError, match="NamedTuple or dataclass"):
        checkpoint.register(int)
    checkpoint.save(tmp_path / "d", defaultdict(lambda: 1, a=1))
    with pytest.raises(checkpoint.UnknownTypeError, match="default_factory"):
        checkpoint.load(tmp_path / "d")
    checkpoint.save(tmp_path / "e", Layer(1, 2, rate=print))  # type: ignore[arg-type]
    with pytest.raises(checkpoint.UnknownTypeError, match="static fields"):
        checkpoint.load(tmp_path / "e")
    assert checkpoint.load(tmp_path / "e", like=Layer(0, 0, rate=print)).rate is print  # type: ignore[arg-type]


def test_a_type_named_in_a_file_is_never_imported_or_called(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", Moments(1, 2))
    ours = "functrain.checkpoint.errors.CheckpointError", "functrain.nosuch.Thing", "functrain.tree.map"
    for name in (*ours, "os.system"):
        text = (tmp_path / "c" / "tree.json").read_text()
        forged = tmp_path / name
        _forge(tmp_path / "c", forged, text.replace("checkpoint_trees.Moments", name))
        with pytest.raises(checkpoint.UnknownTypeError, match=name):
            checkpoint.load(forged)


def _forge(folder: Path, target: Path, text: str) -> None:
    """A checkpoint with another tree.json and a manifest that agrees: what somebody hostile would make."""
    target.mkdir()
    (target / "tensors.safetensors").write_bytes((folder / "tensors.safetensors").read_bytes())
    (target / manifest.TREE).write_text(text)
    record = stream.Record(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    records = {**manifest.read(folder), manifest.TREE: record}
    (target / "manifest.json").write_bytes(manifest.write(records))


BAD_NODES = (
    r"""
1
null
[]
{}
{"kind":"what"}
{"kind":["list"]}
{"kind":"other"}
{"kind":"none","more":1}
{"kind":"int","value":true}
{"kind":"int","value":1.0}
{"kind":"bool","value":0}
{"kind":"str","value":1}
{"kind":"str","value":"\ud800"}
{"kind":"float","value":1}
{"kind":"float","bits":"7ff8"}
{"kind":"complex","bits":"FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"}
{"kind":"list","items":{}}
{"kind":"list","items":[1]}
{"kind":"dict","items":[["a"]]}
{"kind":"dict","items":[["a/b",{"kind":"none"}]]}
{"kind":"dict","items":[["",{"kind":"none"}]]}
{"kind":"dict","items":[["1",{"kind":"none"}],[1,{"kind":"none"}]]}
{"kind":"dict","items":[[1.5,{"kind":"none"}]]}
{"kind":"dict","items":[[true,{"kind":"none"}]]}
{"kind":"namedtuple","type":1,"items":[]}
{"kind":"namedtuple","type":"a.B","items":[[1,{"kind":"none"}]]}
{"kind":"defaultdict","factory":"eval","items":[]}
{"kind":"dataclass","type":"a.B","items":[],"static":[["x",{"kind":"list","items":[]}]]}
{"kind":"tensor","tensor":"no such","dtype":"float32","shape":[]}
{"kind":"tensor","tensor":"a","dtype":"float64","shape":[2,3]}
{"kind":"tensor","tensor":"a","dtype":"float32","shape":[3,2]}
{"kind":"tensor","tensor":"a","dtype":"float32","shape":[6],"stride":[1]}
{"kind":"tensor","tensor":"a","dtype":"quint8","shape":[2,3]}
{"kind":"tensor","tensor":"a","dtype":"float32","shape":[2,-3]}
{"kind":"tensor","tensor":"a","dtype":"float32","shape":[2,3],"stride":[1,1000000000000]}
{"kind":"tensor","tensor":"a","dtype":"float32","shape":[2,3],"stride":[1]}
{"kind":"tensor","tensor":["a"],"dtype":["float32"],"shape":[2,3]}
""".strip().splitlines()
    + ['{"kind":"list","items":[' * levels + "]}" * levels for levels in (102, 3000)]
)


@pytest.mark.parametrize("node", BAD_NODES, ids=range(len(BAD_NODES)))
def test_a_description_that_means_nothing_is_refused(node: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"a": torch.ones(2, 3)})
    text = json.loads((tmp_path / "c" / "tree.json").read_text())
    _forge(tmp_path / "c", tmp_path / "d", json.dumps(text).replace(json.dumps(text["tree"]), node))
    for read in (checkpoint.load, checkpoint.verify):
        with pytest.raises(checkpoint.IntegrityError):
            read(tmp_path / "d")


class Subclass(torch.Tensor):
    pass


UNSUPPORTED = {
    "meta": (torch.empty(2, device="meta"), "meta device"),
    "sparse": (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    "complex128": (torch.ones(2, dtype=torch.complex128), "torch.complex128"),
    "half a byte": (torch.empty(2, dtype=torch.int4), "torch.int4"),
    "subclass": (torch.ones(2).as_subclass(Subclass), "Subclass"),
    "deep": (torch.ones([1] * 65), "65"),
    "numpy": (np.ones(2), "numpy.ndarray"),
    "numpy scalar": (np.float64(1.0), "numpy.float64"),
    "object": (object(), "builtins.object"),
    "function": (print, "builtin_function"),
    "bytes": (b"x", "builtins.bytes"),
    "set": ({1}, "builtins.set"),
    "surrogate": ("\ud800", "surrogate"),
    "endless int": (1 << 20_000, "a longer one"),
    "a key of bytes": ({b"k": 1}, "str or int"),
    "a slash": ({"a/b": 1}, "without '/'"),
    "one path twice": ({1: torch.ones(1), "1": torch.ones(1)}, ""),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_saved_is_told_by_path_before_anything_is_written(name: str, tmp_path: Path) -> None:
    leaf, came = UNSUPPORTED[name]
    with pytest.raises(checkpoint.UnsupportedError, match="'params/0'") as caught:
        checkpoint.save(tmp_path / "new" / "c", {"params": [leaf], "fine": torch.ones(3)})
    assert came in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_inside_a_transform_and_a_key_of_surrogates_are_told(tmp_path: Path) -> None:
    def save(x: torch.Tensor) -> torch.Tensor:
        checkpoint.save(tmp_path / "c", {"w": x})
        return x

    with pytest.raises(checkpoint.UnsupportedError, match="'w': expected a tensor with values"):
        torch.func.vmap(save)(torch.ones(2))
    with pytest.raises(checkpoint.UnsupportedError, match="surrogate"):
        checkpoint.save(tmp_path / "c", {"\ud800": torch.ones(1)})
    inside: list[Any] = []
    inside.append(inside)
    with pytest.raises(checkpoint.UnsupportedError, match="a tree inside itself"):
        checkpoint.save(tmp_path / "c", inside)


def test_a_tree_of_a_hundred_levels_comes_back(tmp_path: Path) -> None:
    before: Any = torch.ones(1)
    for _ in range(100):
        before = (before,)
    assert_same(before, checkpoint.load(checkpoint.save(tmp_path / "c", before)))


def test_metadata_comes_back_or_is_refused_by_key(tmp_path: Path) -> None:
    metadata = {"config": {"width": 8, "lr": 0.1, "names": ["é", None, True]}, "": -0.0}
    checkpoint.save(tmp_path / "c", {}, metadata=metadata | {"layers": (1, (2, "x"))})
    contents = checkpoint.contents(tmp_path / "c")
    assert contents.metadata == metadata | {"layers": [1, [2, "x"]]}
    assert contents.environment == checkpoint.environment()
    assert contents.environment["threads"] == torch.get_num_threads()
    refused = {"a set": {1, 2}, "a tensor": torch.ones(1), "a key": {1: 2}, "nan": float("nan"), "text": "\ud800"}
    for value in refused.values():
        with pytest.raises(checkpoint.UnsupportedError, match="'metadata/config"):
            checkpoint.save(tmp_path / "d", {}, metadata={"config": value})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_saving_the_same_again_changes_nothing_and_other_things_are_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", small(1))
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    assert checkpoint.save(folder, small(1)) == folder
    with pytest.raises(checkpoint.ExistsError, match="another tree, metadata or environment"):
        checkpoint.save(folder, small(2))
    with pytest.raises(checkpoint.ExistsError):
        checkpoint.save(folder, small(1), metadata={"a": 1})
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()} == before
    (folder / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.IntegrityError):
        checkpoint.save(folder, small(1))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        with pytest.raises(checkpoint.ExistsError, match="choose another name"):
            checkpoint.save(tmp_path / name, small(1))
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", small(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "empty", "file", "full", "link"]


def test_files_and_folders_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = checkpoint.save(tmp_path / "new" / "c", small(1))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o750


def test_a_long_tree_is_divided_into_files(tmp_path: Path) -> None:
    before = {f"w{i}": torch.full((100,), float(i)) for i in range(7)} | {"long": torch.arange(1000)}
    folder = checkpoint.save(tmp_path / "c", before, max_file_bytes=1000)
    assert len(sorted(folder.glob("tensors-0000?-of-00005.safetensors"))) == 5
    assert_same(before, checkpoint.load(folder))
    assert_same(before, checkpoint.load(folder, like=before))
    text = json.loads((folder / "tensors.safetensors.index.json").read_text())
    assert text["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    read = {name: safetensors.numpy.load_file(folder / file)[name] for name, file in text["weight_map"].items()}
    assert read.keys() == before.keys() and all(read[name].tobytes() == before[name].numpy().tobytes() for name in read)
    with pytest.raises(ValueError, match="max_file_bytes: expected at least 1 byte, came 0"):
        checkpoint.save(tmp_path / "d", before, max_file_bytes=0)


def test_an_index_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", {"a": torch.ones(2), "b": torch.ones(2)}, max_file_bytes=8)
    text = (folder / manifest.INDEX).read_text()
    other, moved = text.replace('"a"', '"c"'), text.replace("00001-of", "00002-of")
    for i, forged in enumerate((moved, other, "{}", '{"weight_map":1}')):
        shutil.copytree(folder, tmp_path / str(i))
        (tmp_path / str(i) / manifest.INDEX).write_text(forged)
        record = stream.Record(len(forged.encode()), hashlib.sha256(forged.encode()).hexdigest())
        records = {**manifest.read(folder), manifest.INDEX: record}
        (tmp_path / str(i) / manifest.NAME).write_bytes(manifest.write(records))
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(checkpoint.IntegrityError, match="index.json"):
                read(tmp_path / str(i))


def test_pieces_longer_than_a_chunk_keep_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 7, 64, 4096):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
        folder = checkpoint.save(tmp_path / str(chunk), small(chunk))
        assert_same(small(chunk), checkpoint.load(folder))
    monkeypatch.undo()
    assert_same(small(7), checkpoint.load(tmp_path / "7"))


def test_twenty_thousand_tensors(tmp_path: Path) -> None:
    before = OrderedDict((f"t{i}", torch.tensor(i)) for i in range(20_000))
    after = checkpoint.load(checkpoint.save(tmp_path / "c", before), like=before)
    assert tree.structure(after) == tree.structure(before) and all(int(t) == i for i, t in enumerate(after.values()))
