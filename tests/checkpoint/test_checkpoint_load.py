"""What the caller asks of a load: a part, other names, another dtype, another device; and nothing of it silently."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoint_trees import Moments, assert_same, small

import functrain as ft
from functrain import checkpoint, tree
from functrain.checkpoint import registry


def model(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    blocks = [{"w": torch.randn(3, 2, generator=generator), "b": torch.randn(2, generator=generator)} for _ in range(2)]
    return {"blocks": blocks, "head": torch.randn(2, 5, generator=generator), "width": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "c", model(1))


def test_only_without_like_gives_the_leaves_that_fit_by_path(folder: Path) -> None:
    found = checkpoint.load(folder, only=["blocks/*/w", "width"])
    assert list(found) == ["blocks/0/w", "blocks/1/w", "width"]
    assert_same(list(found.values()), list(tree.select(model(1), "blocks/*/w", "width").values()))
    assert list(checkpoint.load(folder, at="blocks", only="1/**")) == ["1/w", "1/b"]
    with pytest.raises(checkpoint.MissingError, match=r"only='blocks/\*/ww', came only 'blocks"):
        checkpoint.load(folder, only="blocks/*/ww")


def test_only_with_like_takes_the_others_from_like(folder: Path) -> None:
    like = model(2) | {"head": torch.zeros(2, 9)}  # another head: its shape does not matter, it is not asked for
    found = checkpoint.load(folder, like=like, only="blocks/**")
    assert_same(found, like | {"blocks": model(1)["blocks"]})
    assert found["head"] is like["head"]
    with pytest.raises(checkpoint.MismatchError, match=r"shape \(1\):\n    head"):
        checkpoint.load(folder, like=like, only=["blocks/**", "head"])
    with pytest.raises(checkpoint.MismatchError, match="only in the checkpoint"):
        checkpoint.load(folder, like={"blocks": like["blocks"][:1]}, only="blocks/**")


def test_rename_brings_saved_prefixes_to_those_of_like(folder: Path) -> None:
    before = model(1)
    like = {"model": {"layers": model(2)["blocks"], "head": torch.zeros(2, 5), "width": 0}}
    found = checkpoint.load(folder, like=like, rename={"": "model", "blocks": "model/layers"})
    assert_same(found, {"model": {"layers": before["blocks"], "head": before["head"], "width": 2}})
    assert_same(checkpoint.load(folder, like=before["blocks"], rename={"blocks": ""}, only="*/*"), before["blocks"])
    with pytest.raises(checkpoint.MissingError, match="rename='block'"):
        checkpoint.load(folder, like=like, rename={"block": "layers"})
    with pytest.raises(checkpoint.MismatchError, match="one leaf by rename=, came both"):
        checkpoint.load(folder, like=like, rename={"blocks/0": "x", "blocks/1": "x"})
    with pytest.raises(ValueError, match="pass like= too"):
        checkpoint.load(folder, rename={"blocks": "layers"})


def test_a_dtype_changes_only_when_asked_and_only_among_floats(folder: Path) -> None:
    like = tree.map(lambda leaf: leaf.bfloat16() if isinstance(leaf, torch.Tensor) else leaf, model(2))
    with pytest.raises(checkpoint.MismatchError, match=r"dtype \(5\)"):
        checkpoint.load(folder, like=like)
    found = checkpoint.load(folder, like=like, cast=True)
    assert_same(found["head"], model(1)["head"].bfloat16())
    assert_same(found["blocks"][1]["w"], model(1)["blocks"][1]["w"].bfloat16())
    like["head"] = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(checkpoint.MismatchError, match="head: like= has int32, the checkpoint float32"):
        checkpoint.load(folder, like=like, cast=True)
    with pytest.raises(ValueError, match="pass like= too"):
        checkpoint.load(folder, cast=True)


def test_tensors_go_to_the_device_that_is_named(folder: Path) -> None:
    assert_same(checkpoint.load(folder, device="cpu"), model(1))
    meta = tree.map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, model(2))
    assert_same(checkpoint.load(folder, like=meta, device="cpu"), model(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_holds_what_was_saved(tmp_path: Path) -> None:
    on_device = tree.map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, small(3))
    folder = checkpoint.save(tmp_path / "c", on_device)
    assert_same(checkpoint.load(folder), small(3))
    for found in (checkpoint.load(folder, like=on_device), checkpoint.load(folder, device="cuda")):
        assert found["params"]["w"].is_cuda and found["params"]["w"] is found["params"]["tied"]
        assert_same(tree.map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, found), small(3))


def test_without_verify_sizes_names_and_shapes_are_still_checked(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    text = bytearray(path.read_bytes())
    text[-1] ^= 1
    path.write_bytes(text)
    with pytest.raises(checkpoint.IntegrityError, match="sha256"):
        checkpoint.load(folder)
    found = checkpoint.load(folder, verify=False)
    assert_same(tree.structure(found), tree.structure(model(1)))
    os.truncate(path, len(text) - 1)
    with pytest.raises(checkpoint.IntegrityError, match="bytes"):
        checkpoint.load(folder, verify=False)
    path.write_bytes(text.replace(b"head", b"heat"))
    with pytest.raises(checkpoint.IntegrityError, match="'head'"):
        checkpoint.load(folder, verify=False)


def test_tied_leaves_stay_tied_through_a_cast(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", small(1))
    like = tree.map(lambda leaf: leaf.double() if getattr(leaf, "is_floating_point", bool)() else leaf, small(1))
    found = checkpoint.load(folder, like=like, cast=True)
    assert found["params"]["w"] is found["params"]["tied"] and found["params"]["w"].dtype == torch.float64


def test_a_type_with_a_name_of_its_own_may_move(tmp_path: Path) -> None:
    @checkpoint.register(name="averages")
    class Old(NamedTuple):
        mu: Any

    folder = checkpoint.save(tmp_path / "c", Old(torch.ones(2)))
    assert '"type":"averages"' in (folder / "tree.json").read_text()

    class Other(NamedTuple):
        mu: Any

    with pytest.raises(ValueError, match="'averages' stands for"):
        checkpoint.register(Other, name="averages")
    assert_same(checkpoint.load(folder), Old(torch.ones(2)))
    assert checkpoint.register(Moments) is Moments


def test_a_type_may_have_grown_by_fields_with_a_default(tmp_path: Path) -> None:
    class Old(NamedTuple):
        mu: Any

    class New(NamedTuple):
        mu: Any
        nu: Any = None

    class Other(NamedTuple):
        mu: Any
        nu: Any

    checkpoint.register(name="grown")(Old)
    folder = checkpoint.save(tmp_path / "c", Old(torch.ones(2)))
    # a later program, in which the name stands for the type as it is then
    registry._REGISTERED["grown"] = New
    assert_same(checkpoint.load(folder), New(torch.ones(2)))
    registry._REGISTERED["grown"] = Other
    with pytest.raises(checkpoint.UnknownTypeError, match="fields .'mu'."):
        checkpoint.load(folder)


def test_a_run_saved_before_states_had_guards_is_loaded_with_and_without_like() -> None:
    """The folder was written by the functrain before that commit: its TrainState has six fields."""
    folder = Path(__file__).parent / "saved" / "before-guards"
    optimizer = ft.optim.adamw(1e-2)
    like = ft.init_state({"w": torch.zeros(3)}, optimizer, key=ft.random.key(1))
    for state in (checkpoint.load(folder), checkpoint.load(folder, like=like)):
        assert type(state) is ft.TrainState and state.guard is None and int(state.step) == 3
        assert type(state.opt_state[0]) is ft.optim.ScaleByAdamState, "whose file has moved since"
        step = ft.train_step(lambda params, batch, key: torch.mean((batch @ params["w"]) ** 2), optimizer)
        assert float(step(state, torch.ones(2, 3))[1]["loss"]) == pytest.approx((3 * 0.9850) ** 2, abs=1e-3)


def test_a_type_of_ours_that_has_moved_is_found_where_one_alone_can_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry._find("functrain.before.TrainState") is ft.TrainState
    assert registry._find("functrain.before.Absent") is registry._find("elsewhere.before.TrainState") is None
    another = type("TrainState", (ft.TrainState,), {"__module__": "functrain.optim"})
    monkeypatch.setattr(ft.optim, "TrainState", another, raising=False)
    assert registry._find("functrain.before.TrainState") is None


def test_what_like_cannot_be_is_told(folder: Path) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match=re.escape("like=: 'head'")):
        checkpoint.load(folder, like=model(1) | {"head": object()})


def test_a_process_that_has_named_no_room_builds_the_types_of_the_house(tmp_path: Path) -> None:
    optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.keep_ema(ft.optim.adamw(0.1)))
    guard = ft.train.skip_nonfinite()
    state = ft.init_state({"w": torch.ones(2)}, optimizer, key=ft.random.key(0), guard=guard)
    checkpoint.save(tmp_path / "c", state)
    program = f"import functrain as ft\nprint(ft.checkpoint.load({str(tmp_path / 'c')!r}))"
    environment = os.environ | {"PYTHONPATH": str(Path(ft.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{state}\n", done.stderr
