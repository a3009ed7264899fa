"""The page of guarantees names tests that are there, and no promise stands without one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
TESTS = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", PAGE)


def test_every_test_that_is_named_exists() -> None:
    absent = [
        f"{file}::{name}"
        for file, name in TESTS
        if not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert absent == [] and len(TESTS) > 30


def test_every_promise_has_its_tests_and_limits() -> None:
    promises = re.findall(r"^## \d\. .*?(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert len(promises) == 6
    for promise in promises:
        rows = [line for line in promise.splitlines() if line.startswith("| ") and not line.startswith("| case")]
        assert len(rows) >= 4 and all("`tests/" in row for row in rows), promise.splitlines()[0]
        assert "Limits:" in promise or promise.startswith("## 5"), promise.splitlines()[0]
