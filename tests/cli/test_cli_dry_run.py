"""`functrain dry-run`: what is shown, and what is refused."""

from __future__ import annotations

import re

import pytest

from functrain import cli


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["dry-run", *words]) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_a_step_is_rehearsed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "gpt2-124m", "--mesh", "data=2,fsdp=8,tensor=4", "--model.layers", "2")
    assert "parameters on 64 ranks: data=2,fsdp=8,tensor=4" in text
    for words in (
        "state",
        "gathered params",
        "backward",
        "gather   along fsdp",
        "scatter  along tensor",
        "MFU of at most",
    ):
        assert words in text, text
    shares = [float(found) for found in re.findall(r"(\d+\.\d)%  #", text)]
    assert sum(shares) > 95.0
    assert re.search(r"fits into a H200 of 131\.3 GiB: \d+% of it", text)


def test_a_mesh_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "tiny", "--gpus", "2", "--batch", "8")
    found = re.findall(r"^  ((?:\w+=\d,?)+) +(\S+ \S+) +(yes|no) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert {row[0] for row in found} == {"data=2", "fsdp=2", "tensor=2"}
    times = [float(best) + float(worst) for *_, best, worst in found]
    assert times == sorted(times) and {row[2] for row in found} == {"yes"}
    assert f"parameters on 2 ranks: {found[0][0]}" in text  # the first is rehearsed whole
    assert "came 4 and a mesh" in said(capsys, "tiny", "--gpus", "4", "--mesh", "data=4", code=2)
    assert "came none; batch: expected at least" in said(capsys, "tiny", "--gpus", "64", "--node", "1", code=2)


def test_what_does_not_fit_is_told_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.layers", "2", "--model.width", "16384", "--model.heads", "128", "--gpu", "a100")
    text = said(capsys, "gpt2-124m", "--mesh", "data=2", *words)
    assert "does not fit into a A100 of 74.51 GiB: the largest are " in text and "; try " in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tinny"], "no preset 'tinny'; did you mean tiny?"),
        (["tiny", "--mesh", "x=2"], "mesh: expected auto, or some of data=N"),
        (["tiny", "--mesh", "tensor=3"], "to divide by 3"),
        (["tiny", "--mesh", "data=64"], "batch: expected at least 64 rows"),
        (["tiny", "--node", "0"], "dry-run: expected --node of at least 1"),
        (["--mesh", "data=2"], "dry-run: expected a preset"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in said(capsys, *words, code=2)
