"""Other world sizes: one order of samples, and one step after which all ranks stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks

import functrain as ft
from functrain import checkpoint


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_rows_one_after_another_are_the_batch(world: int) -> None:
    batches = ft.data.windows(two_ranks.IDS, batch=5, context=8, seed=3)
    shards = [ft.data.shard(batches, rank=rank, world=world) for rank in range(world)]
    for t in range(25):  # more than two epochs
        whole, parts = batches[t], [shard[t] for shard in shards]
        assert max(len(part["tokens"]) for part in parts) <= -(-5 // world)
        for name, leaf in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), leaf)


def test_of_a_finite_row_of_batches_each_is_cut() -> None:
    shard: Any = ft.data.shard(ft.data.evaluation_windows(two_ranks.IDS, batch=4, context=8), rank=1, world=2)
    assert len(shard) == 13 and shard[12]["mask"].shape == (2, 8)
    assert not hasattr(
        ft.data.shard(ft.data.windows(two_ranks.IDS, batch=4, context=8, seed=0), rank=0, world=2), "__len__"
    )


def test_what_cannot_be_is_told() -> None:
    batches = ft.data.windows(two_ranks.IDS, batch=2, context=8, seed=0)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected a rank in"):
            ft.data.shard(batches, rank=rank, world=world)
    with pytest.raises(ValueError, match="batch 7: expected as many rows.*one for each of 3 ranks.*'tokens': 2"):
        ft.data.shard(batches, rank=0, world=3)[7]
    with pytest.raises(ValueError, match="'b': 3"):
        ft.data.shard([{"a": torch.zeros(2), "b": torch.zeros(3)}], rank=0, world=2)[0]


def test_a_signal_in_one_rank_stops_both_after_one_step_and_one_process_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, two_ranks.__file__]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), "2", str(run), "1000000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ranks[1].stdout is not None
    for line in ranks[1].stdout:
        if int(line) == 7:
            ranks[1].send_signal(signal.SIGTERM)
            break
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], said
    last = [int(out.split()[-1]) if out.split() else 7 for out, _ in said]
    assert last[0] == last[1] >= 7
    newest = checkpoint.latest(run)
    assert newest is not None and newest.name == f"step-{last[0]:08d}"
    # the order of samples is that of one process, which goes on from the checkpoint of two
    assert torch.equal(checkpoint.load(newest).params, two_ranks.train(0, 1, tmp_path / "one", last[0]).params)
    more = two_ranks.train(0, 1, run, last[0] + 9)
    assert torch.equal(more.params, two_ranks.train(0, 1, tmp_path / "whole", last[0] + 9).params)


LEAVING = """
import sys, time, torch
from torch import distributed
import functrain as ft

rank, meeting, code = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
state = ft.TrainState(torch.tensor(0), torch.tensor(0), (), torch.zeros(2, dtype=torch.int32))
ft.fit(lambda state, batch: (state._replace(step=state.step + 1), {}), state, [0, 0], steps=2)
distributed.barrier()
if rank:
    time.sleep(0.3)
else:
    sys.setswitchinterval(1000)  # nobody takes the interpreter's lock from us until we end
work = distributed.all_reduce(torch.ones(1000), async_op=True)
del work  # a thread of gloo's holds the tensor, lets it go, and waits for the lock
end = time.monotonic() + 0.6
while time.monotonic() < end:
    pass
if code == 1:
    raise RuntimeError("an error of the program")
sys.exit(code)
"""


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_process_ends_with_its_own_code_when_a_thread_of_the_group_holds_a_tensor(tmp_path: Path, code: int) -> None:
    words = [sys.executable, "-c", LEAVING]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "meeting"), str(code)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], said
