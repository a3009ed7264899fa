"""What nobody means to save or to load: told by path and type, or kept, and never a raw error of Python or torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from checkpoint_trees import assert_same

from functrain import checkpoint, tree
from functrain.checkpoint import header, manifest, staging, stream, tensors


def forge(folder: Path, node: str, **more: str) -> Path:
    """A checkpoint that somebody hostile wrote: its manifest vouches for any text."""
    folder.mkdir()
    tensors.write_file(folder / "tensors.safetensors", {"a": torch.ones(2, 3)})
    table = {"metadata": "{}", "environment": "{}", "run": "null", "tree": node, **more}
    (folder / "tree.json").write_text("{" + ",".join(f'"{key}":{text}' for key, text in table.items()) + "}")
    return vouch(folder)


def vouch(folder: Path) -> Path:
    texts = {path.name: path.read_bytes() for path in folder.iterdir()}
    records = {name: stream.Record(len(text), hashlib.sha256(text).hexdigest()) for name, text in texts.items()}
    (folder / manifest.NAME).write_bytes(manifest.write(records))
    return folder


# ---- too large ----------------------------------------------------------------------------------------------------


def test_names_too_long_for_one_header_make_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 10_000)
    before = {f"{'é' * 100}\n{i}": torch.full((2,), float(i)) for i in range(60)}
    folder = checkpoint.save(tmp_path / "c", before)
    assert_same(before, checkpoint.load(folder))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and sum(len(safetensors.torch.load_file(file)) for file in files) == 60
    found = checkpoint.load_folder(checkpoint.save_folder(tmp_path / "h", before, {}, max_file_bytes=9**9))
    assert_same(before, {name: found[name] for name in before})
    with pytest.raises(checkpoint.UnsupportedError, match="give them shorter names"):
        checkpoint.save(tmp_path / "d", {"a" * 10_000: torch.ones(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "h"]


def test_json_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    bomb = b'{"a":[' + b"[]," * 400_000 + b"[]]}"
    (tmp_path / "bomb").write_bytes(len(bomb).to_bytes(8, "little") + bomb)
    with open(tmp_path / "long", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(10**12)  # a hole: no block on the disk
    with pytest.raises(checkpoint.HeaderError, match="header length of 100000001 in a file of 1000000000000"):
        checkpoint.load_file(tmp_path / "long")
    begun = time.monotonic()
    with pytest.raises(checkpoint.HeaderError, match="400003 brackets in"):
        checkpoint.load_file(tmp_path / "bomb")
    assert time.monotonic() - begun < 5
    for name in ("tree.json", manifest.INDEX):
        folder = forge(tmp_path / name, '{"kind":"none"}')
        with open(folder / name, "wb") as file:
            file.truncate(10**13)  # a hole: no block on the disk
        records = {**manifest.read(folder), name: stream.Record(10**13, "0" * 64)}
        (folder / manifest.NAME).write_bytes(manifest.write(records))
        with pytest.raises(checkpoint.IntegrityError, match="at most 1000000000 bytes, came 10000000000000"):
            checkpoint.load(folder)


def test_a_tensor_that_memory_does_not_hold_is_told(tmp_path: Path) -> None:
    text = header.write([("w", "F32", (10**13 // 4,))], {})
    (tmp_path / "hole").write_bytes(text)
    os.truncate(tmp_path / "hole", len(text) + 10**13)
    with pytest.raises(checkpoint.StorageError, match="'w': expected memory for 10000000000000 bytes"):
        checkpoint.load_file(tmp_path / "hole")


@pytest.mark.parametrize("where", ["tree", "metadata"])
def test_a_number_that_python_would_make_infinite_is_refused(where: str, tmp_path: Path) -> None:
    texts = {"tree": '{"kind":"float","value":1e999}', "metadata": '{"loss":-1e999}'}
    folder = forge(tmp_path / "c", **{"node": '{"kind":"none"}', **({} if where == "tree" else {where: texts[where]})})
    if where == "tree":
        folder = forge(tmp_path / "d", texts["tree"])
    with pytest.raises(checkpoint.IntegrityError, match="expected JSON numbers, came -?1e999"):
        checkpoint.load(folder)


# ---- types --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    x: Any


@checkpoint.register
@tree.dataclass
class Checked:
    w: Any

    def __post_init__(self) -> None:
        raise RuntimeError("code of the type was run")


def test_a_dataclass_comes_back_without_its_init_and_only_if_it_is_a_node(tmp_path: Path) -> None:
    made: Any = object.__new__(Checked)
    object.__setattr__(made, "w", torch.ones(1))
    after = checkpoint.load(checkpoint.save(tmp_path / "c", made))
    assert type(after) is Checked and torch.equal(after.w, made.w)
    with pytest.raises(TypeError, match="dataclass that is a tree node"):
        checkpoint.register(Plain)
    config = {"vocab": 0, "context": 1, "layers": 1, "heads": 1, "width": 1}
    static = json.dumps([[name, {"kind": "int", "value": value}] for name, value in config.items()])
    node = f'{{"kind":"dataclass","type":"functrain.models.gpt2.Config","items":[],"static":{static}}}'
    with pytest.raises(checkpoint.UnknownTypeError, match=r"gpt2\.Config"):
        checkpoint.load(forge(tmp_path / "config", node))


def test_no_module_is_imported_because_a_file_says_so(tmp_path: Path) -> None:
    node = '{"kind":"namedtuple","type":"functrain.testing","items":[]}'
    code = (
        "import sys\nfrom functrain import checkpoint\ntry:\n    checkpoint.load(sys.argv[1])\n"
        "except checkpoint.UnknownTypeError:\n    print('functrain.testing' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(forge(tmp_path / "c", node))]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "False\n"


def test_fields_that_changed_since_the_save_are_told_with_the_way_out(tmp_path: Path) -> None:
    def state(fields: list[str]) -> Any:
        made: Any = NamedTuple("State", [(name, Any) for name in fields])  # type: ignore[misc]
        made.__qualname__ = "State"
        return checkpoint.register(made)

    folder = checkpoint.save(tmp_path / "c", state(["mu", "nu"])(torch.ones(1), torch.zeros(1)))
    wider = state(["mu", "nu", "count"])
    with pytest.raises(
        checkpoint.UnknownTypeError, match=r"fields \['mu', 'nu', 'count'\], as it is here, came \['mu'"
    ):
        checkpoint.load(folder)
    like = wider(torch.zeros(1), torch.ones(1), torch.tensor(7))
    with pytest.raises(checkpoint.MismatchError, match=r"only in like= \(1\):\n    count"):
        checkpoint.load(folder, like=like)
    assert_same(wider(torch.ones(1), torch.zeros(1), torch.tensor(7)), checkpoint.load(folder, like=like, only="?u"))
    renamed = state(["mean", "nu"])(torch.zeros(1), torch.ones(1))
    after = checkpoint.load(folder, like=renamed, rename={"mu": "mean"})
    assert_same(type(renamed)(torch.ones(1), torch.zeros(1)), after)


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


UNSUPPORTED = {
    "a deque": (lambda: deque([1]), "a container that a file can name, came collections.deque"),
    "a struct": (lambda: time.gmtime(0), "a container that a file can name, came time.struct_time"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "came a nested tensor"),
    "freed": (freed, "came one whose memory was freed"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_leaf_or_container_that_no_file_keeps_is_told(name: str, tmp_path: Path) -> None:
    make, says = UNSUPPORTED[name]
    with pytest.raises(checkpoint.UnsupportedError, match=f"'x': .*{says}"):
        checkpoint.save(tmp_path / "c", {"x": make()})
    assert list(tmp_path.iterdir()) == []


def test_keys_that_files_or_shells_would_trip_over_come_back(tmp_path: Path) -> None:
    names = ["😀", "é", "e\u0301", "W", "w", "a.b", "..", ".", "\0", "\n", "con", " ", "a\\b", "__metadata__", "{}"]
    before = {name: torch.full((1,), float(i)) for i, name in enumerate(names)} | {-1: torch.zeros(1)}
    folder = checkpoint.save(tmp_path / "c", before, max_file_bytes=8)
    assert_same(before, checkpoint.load(folder))
    assert_same(before, checkpoint.load(folder, like=before))


def test_metadata_too_deep_or_too_long_to_come_back_is_refused(tmp_path: Path) -> None:
    inside: list[Any] = []
    inside.append(inside)
    for value, says in ((inside, "at most 100 levels"), (10**4000, "an int of 10000 bits")):
        with pytest.raises(checkpoint.UnsupportedError, match=f"'metadata/x.*{says}"):
            checkpoint.save(tmp_path / "c", 1, metadata={"x": value})


# ---- asked of a load ----------------------------------------------------------------------------------------------


class Sub(torch.Tensor):
    pass


def test_what_load_cannot_give_is_not_silently_something_else(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", {"w": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="a device that holds values, came device='meta'"):
        checkpoint.load(folder, device="meta")
    for like in (torch.ones(2, 2).as_subclass(Sub), torch.eye(2).to_sparse()):
        with pytest.raises(checkpoint.UnsupportedError, match="like=: 'w': expected a plain tensor"):
            checkpoint.load(folder, like={"w": like})


READS = [checkpoint.load, checkpoint.verify, checkpoint.load_file, checkpoint.load_folder, checkpoint.latest]


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
def test_a_name_that_cannot_be_is_told(read: Any, tmp_path: Path) -> None:
    for name in ("a" * 300, "a\0b"):
        with pytest.raises((checkpoint.StorageError, checkpoint.MissingError)):
            read(tmp_path / name)
    for save in (checkpoint.save, lambda folder, _: checkpoint.every(1, folder)):
        for name in ("a" * 300, "a\0b"):
            with pytest.raises(checkpoint.StorageError):
                save(tmp_path / name, 1)


def test_a_folder_that_may_not_be_searched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for call, reads in (("stat", READS[:2] + READS[3:4]), ("open", READS[2:3]), ("listdir", READS[4:])):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refused)
            for read in reads:
                with pytest.raises(checkpoint.StorageError, match="Permission denied.*check the name and the rights"):
                    read(tmp_path / "c")


# ---- hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_folder_holds_only_what_a_reader_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tensor in {"__metadata__": torch.ones(1), "\ud800": torch.ones(1), "s": torch.eye(2).to_sparse()}.items():
        with pytest.raises(checkpoint.UnsupportedError):
            checkpoint.save_folder(tmp_path / "m", {name: tensor}, {}, max_file_bytes=9**9)
    for file in ("../evil", "a/b", "", "model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(checkpoint.UnsupportedError, match="a file beside the tensors"):
            checkpoint.save_folder(tmp_path / "m", {"w": torch.ones(1)}, {file: b"x"}, max_file_bytes=9**9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(checkpoint.StorageError, match="need 4.00 kB, free 1.00 kB"):
        checkpoint.save_folder(tmp_path / "m", {"w": torch.ones(1000)}, {}, max_file_bytes=9**9)
    assert list(tmp_path.iterdir()) == []


def test_a_save_of_another_process_in_the_run_folder_is_left_alone(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path)
    host, parent = staging.socket.gethostname(), os.getppid()
    theirs = tmp_path / "checkpoints" / f".best.staging-{host}-{parent}-01234567"
    theirs.mkdir()
    ours = tmp_path / "checkpoints" / f".step-00000009.staging-{host}-{parent}-01234567"
    ours.mkdir()  # a number that another process got again: nobody else writes steps while we hold the lock
    hook.save(1, 1)
    assert theirs.exists() and not ours.exists()
