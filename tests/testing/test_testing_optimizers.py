"""Every optimizer keeps every law; what some declare besides is in test_testing_declared.py."""

from __future__ import annotations

import pytest
from test_optim_parity import CASES, Case
from test_testing_builtins import check_case


@pytest.mark.parametrize("case", [c for c in CASES if c.is_optimizer], ids=lambda case: case.name)
def test_an_optimizer_keeps_every_law(case: Case) -> None:
    check_case(case)
