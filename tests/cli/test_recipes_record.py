"""The record of a run: every step once, whatever was killed; what is not a number, or skipped, is seen."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from shown import Shown

from functrain.recipes.record import Record, keep, rows


def record_in(run, done=0, *, every=2, show=None):
    return Record(
        run,
        done,
        every=every,
        learning_rate=lambda count: count / 10,
        bits_per_byte=0.5,
        show=show or Shown(),
    )


def metrics(loss, norm=1.0):
    return {"loss": torch.tensor(loss), "weight": torch.tensor(8.0), "grad_norm": torch.tensor(norm)}


def test_every_step_has_one_line_with_the_learning_rate_that_made_it(tmp_path):
    show = Shown()
    record = record_in(tmp_path, show=show)
    for t in range(1, 6):
        record(t, None, metrics(float(t)) | ({"validation_loss": 9.0} if t == 4 else {}))
    record.flush()
    record.close()
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["bits_per_byte"] for row in found] == [0.5, 1, 1.5, 2, 2.5]
    assert [row["learning_rate"] for row in found] == [0, 0.1, 0.2, 0.3, 0.4]
    assert [row.get("validation_loss") for row in found] == [None, None, None, 9.0, None]
    assert [row["step"] for row in show.rows] == [1, 2, 4, 5]


def test_lines_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path):
    record = record_in(tmp_path)
    for t in range(1, 7):
        record(t, None, metrics(1.0))
    record.close()
    record = record_in(tmp_path, done=3)
    for t in range(4, 7):
        record(t, None, metrics(2.0))
    record.close()
    found = rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in found] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in rows(path)] == [1]
    keep(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    "damaged",
    [b"}{", b"\0" * 9, b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": 2, "loss": null}', b"", b'{"step": "x"}'],
)
def test_a_damaged_line_costs_itself_and_is_told(damaged, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    first, third = b'{"step": 1, "loss": "nan"}\n', b'{"step": 3, "loss": 2.0}\n'
    path.write_bytes(first + damaged + b"\n" + third + b'{"step": 4, "loss": 2.0}\n')
    assert [row["step"] for row in rows(path)] == [1, 3, 4]
    assert caplog.messages == [f"{path}: line 2 is damaged and left out"]
    keep(path, 3)
    assert path.read_bytes() == first + third


def test_a_run_whose_name_is_no_utf_8_is_recorded(tmp_path):
    run, show = tmp_path / os.fsdecode(b"run\xff"), Shown()
    run.mkdir()
    record = record_in(run, show=show)
    record(1, None, metrics(1.0))
    record.close()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1]
    assert show.notes == ["no TensorBoard events: it takes no folder whose name is not UTF-8"]


def test_what_is_not_a_number_or_was_skipped_is_shown_and_recorded(tmp_path):
    show = Shown()
    record = record_in(tmp_path, every=1, show=show)
    losses = [(math.nan, 1.0, 1.0), (1.0, 1.0, 0.0), (math.nan, 1.0, 1.0), (9.0, math.inf, 0.0), (7.0, 2.0, 1.0)]
    for t, (loss, norm, skipped) in enumerate(losses, 1):
        record(t, None, metrics(loss, norm) | {"skipped": torch.tensor(skipped)})
    record.close()
    assert show.notes == [
        "step 1: loss nan, gradient norm 1: skipped (1 in a row)",
        "step 3: loss nan, gradient norm 1: skipped (1 in a row)",
        "step 4: loss 9, gradient norm inf: not finite (2 in a row)",
        "step 5: loss 7, gradient norm 2: skipped (3 in a row)",
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["loss"] for row in written] == ["nan", 1.0, "nan", 9.0, 7.0]
    assert [math.isfinite(row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [False, True, False, True, True]


@pytest.mark.parametrize("rewound", [True, False])
def test_each_step_is_there_once_after_a_resume_or_going_back(rewound, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = record_in(tmp_path)
    for done, stop, loss in [(0, 6, 1.0), (3, 6, 2.0)]:
        if done and rewound:
            record.begin(done, 6, None)
        elif done:
            record.close()
            record = record_in(tmp_path, done=done)
        for t in range(done + 1, stop + 1):
            record(t, None, metrics(loss))
    record.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
