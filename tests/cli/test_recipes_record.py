"""What a recipe records and shows beside the public record: bits per byte, and steps that went wrong."""

from __future__ import annotations

import math
import os

import torch
from shown import Shown

from functrain.recipes.record import bits, record_of, rows


def record_in(run, *, every=2, show=None):
    return record_of(
        run, every=every, learning_rate=lambda count: count / 10, show=show or Shown(), counted={"tokens": "weight"}
    )


def metrics(loss, norm=1.0):
    return {"loss": torch.tensor(loss), "weight": torch.tensor(8.0), "grad_norm": torch.tensor(norm)}


def test_the_last_row_of_each_reading_is_shown(tmp_path):
    show = Shown()
    record, in_bits = record_in(tmp_path, show=show), bits(0.5)
    for t in range(1, 6):
        record(t, None, metrics(float(t)) | in_bits(t, None, metrics(float(t))))
    record.close()
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["bits_per_byte"] for row in found] == [0.5, 1, 1.5, 2, 2.5]
    assert [row["step"] for row in show.rows] == [1, 2, 4, 5]


def test_a_run_whose_name_is_no_utf_8_is_recorded(tmp_path):
    run, show = tmp_path / os.fsdecode(b"run\xff"), Shown()
    record = record_in(run, show=show)
    record(1, None, metrics(1.0))
    record.close()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1]
    assert show.notes == ["no TensorBoard events: it takes no folder whose name is not UTF-8"]


def test_what_is_not_a_number_or_was_skipped_is_shown(tmp_path):
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
