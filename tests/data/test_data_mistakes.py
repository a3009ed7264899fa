"""What a published tokenizer was made for, and tokens that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functrain import data

TEXT = "words of a text that is long enough " * 40
TRUNCATION = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 4096},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "\0",
}


@pytest.mark.parametrize(
    "published", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"truncation": TRUNCATION, "padding": PADDING}]
)
def test_a_published_tokenizer_neither_truncates_nor_pads(published: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    (tmp_path / "text.txt").write_text(TEXT)
    plain = data.train_bpe(data.corpus(tmp_path / "text.txt", validation=0.0), vocab_size=300)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(plain.definition) | published))
    loaded = data.load_tokenizer(path)
    assert np.array_equal(loaded.encode(TEXT), plain.encode(TEXT)) and loaded.decode(loaded.encode(TEXT)) == TEXT
    assert np.array_equal(loaded.encode("words"), plain.encode("words"))
    loaded.save(path)
    again = data.load_tokenizer(path)
    assert again.fingerprint == loaded.fingerprint  # tokens that were cut are found by another one
    assert np.array_equal(again.encode(TEXT), plain.encode(TEXT))


@pytest.mark.parametrize("make", [data.windows, data.crops])
def test_negative_tokens_are_told(make: Any) -> None:
    ids = torch.tensor([3, 1, -100, 2, 5, 6])
    with pytest.raises(ValueError, match="windows: expected tokens of 0 or more, came -100"):
        make(ids, batch=1, context=2, seed=0)
