"""A run goes on where it was, and with other data or another config only when it is told to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain import checkpoint
from functrain.models import llama


def about(**changes: Any) -> dict[str, Any]:
    data = ft.data.windows(torch.arange(100), batch=2, context=8, seed=changes.pop("seed", 0)).description
    return {"data": data, "config": {"width": 8, "layers": [1, 2]} | changes}


def test_a_run_without_a_checkpoint_begins_and_then_goes_on(tmp_path: Path) -> None:
    like = {"w": torch.zeros(2)}
    assert checkpoint.resume(tmp_path, like, metadata=about()) is like
    checkpoint.every(1, tmp_path, metadata=about(), keep_best=checkpoint.Best("loss"))(
        3, {"w": torch.ones(2)}, {"loss": 1}
    )
    assert torch.equal(checkpoint.resume(tmp_path, like, metadata=about())["w"], torch.ones(2))
    assert torch.equal(checkpoint.resume(tmp_path, like)["w"], torch.ones(2))


def test_what_differs_is_listed_until_it_is_accepted(tmp_path: Path) -> None:
    like = {"w": torch.zeros(2)}
    checkpoint.every(100, tmp_path, metadata=about(gone=1)).save(3, {"w": torch.ones(2)})
    now = about(seed=1, width=16, new=None)
    with pytest.raises(checkpoint.ChangedError) as error:
        checkpoint.resume(tmp_path, like, metadata=now)
    first, *lines = str(error.value).splitlines()
    assert "came 4 differences; choose another run folder, or pass accept_changes=True" in first
    wanted = ["data.seed: 0 -> 1", "config.width: 8 -> 16", "config.new: nothing -> null", "config.gone: 1 -> nothing"]
    assert [line.strip() for line in lines] == wanted
    assert torch.equal(checkpoint.resume(tmp_path, like, metadata=now, accept_changes=True)["w"], torch.ones(2))


@pytest.mark.parametrize("changed", [torch.arange(99), torch.arange(100).flip(0)], ids=["shrank", "other order"])
def test_other_data_is_a_difference(changed: torch.Tensor, tmp_path: Path) -> None:
    checkpoint.every(1, tmp_path, metadata=about())(1, {"w": torch.ones(2)})
    data = ft.data.windows(changed, batch=2, context=8, seed=0).description
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    found = checkpoint.differences(newest, about() | {"data": data})
    assert found and all(line.startswith(("data.source: ", "data.tokens: 100 -> 99")) for line in found)
    with pytest.raises(checkpoint.ChangedError, match="data.source"):
        checkpoint.resume(tmp_path, {"w": torch.zeros(2)}, metadata=about() | {"data": data})


def test_metadata_that_json_does_not_keep_is_told_before_it_is_compared(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match="metadata/config/layers"):
        checkpoint.resume(tmp_path, {}, metadata=about(layers={1, 2}))


def test_a_tuple_in_the_metadata_is_its_list(tmp_path: Path) -> None:
    config = dataclasses.asdict(llama.Config(vocab=8, context=4, layers=1, heads=1, width=4, inner=4))
    state = {"w": torch.zeros(2)}
    checkpoint.every(1, tmp_path, metadata={"config": config})(1, state)
    assert config["dense_layers"] == ()
    assert torch.equal(checkpoint.resume(tmp_path, state, metadata={"config": config})["w"], state["w"])
    with pytest.raises(checkpoint.ChangedError, match=r"config.dense_layers: \[\] -> \[0\]"):
        checkpoint.resume(tmp_path, state, metadata={"config": config | {"dense_layers": (0,)}})
