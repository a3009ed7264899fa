"""The composition matrix as a page: what was compiled to the end, cell by cell, and the table in docs/transforms.md."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from composition import TRANSFORMS, WAYS, Chain, chains, close, expected

PAGE = Path(__file__).parents[2] / "docs" / "transforms.md"
BEGIN, END = "<!-- table: made by tests/transforms/composition.py -->\n", "<!-- end of the table -->\n"
OUTCOMES = Path(__file__).parent / "composition_compiled.txt"
BY_STEP = {"in pieces": "p", "donated": "d"}


def cells() -> list[tuple[str, Chain]]:
    """Every (way, stack) that is compiled: whole, and the single transforms in a step, in pieces and donated."""
    return [*[(way, (name,)) for way in BY_STEP for name in TRANSFORMS], *[("compiled", chain) for chain in chains()]]


def outcomes() -> dict[tuple[str, Chain], str]:
    """What was found, of the lines `way: stack: outcome`."""
    found = {}
    for line in OUTCOMES.read_text(encoding="utf-8").splitlines():
        way, stack, outcome = line.split(": ", 2)
        found[way, tuple(stack.split(" in "))] = outcome
    return found


def try_all(seconds: float) -> None:
    """Compile what has no outcome yet, and add it to the file."""
    start, done = time.monotonic(), outcomes() if OUTCOMES.exists() else {}
    left = [cell for cell in cells() if cell not in done]
    for n, (way, chain) in enumerate(left):
        if time.monotonic() - start > seconds:
            print(f"{len(left) - n} of {len(cells())} are left")
            return
        outcome = try_one(way, chain)
        with OUTCOMES.open("a", encoding="utf-8") as file:
            file.write(f"{way}: {' in '.join(chain)}: {outcome}\n")
        if outcome != "equal":
            print(way, chain, outcome, flush=True)


def try_one(way: str, chain: Chain) -> str:
    torch.compiler.reset()
    try:
        return "equal" if close(WAYS[way](chain), expected(chain)) else "WRONG"
    except Exception as error:
        says = " ".join(str(error).partition(";")[0].split())[:200]  # what was expected and what came
        return f"{type(error).__name__}: {says}"


def table() -> str:
    found, names = outcomes(), list(TRANSFORMS)
    columns = ["by itself", *names]
    lines = ["| inside \\ around | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for a in names:
        alone = _cell(found, (a,)) + "".join(f" {c}" for way, c in BY_STEP.items() if found.get((way, (a,))) == "equal")
        lines.append(f"| {a} | " + " | ".join([alone, *[_cell(found, (a, b)) for b in names]]) + " |")
    lines.append("| ft.compile | e |" + " -: outermost |" * len(names))
    more = [f"- {' in '.join(chain)}: {_cell(found, chain)}" for chain in chains() if len(chain) > 2]
    lines += ["", "Stacks of more:", "", *more]
    odd = [(way, chain, what) for (way, chain), what in found.items() if what != "equal"]
    if odd:
        lines += ["", "Without the letter:", ""]
        lines += [f"- {way}, {' in '.join(chain)}: {what}" for way, chain, what in odd]
    return "\n".join(lines) + "\n"


def _cell(found: dict[tuple[str, Chain], str], chain: Chain) -> str:
    return "e t c" if found.get(("compiled", chain)) == "equal" else "e t"


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        try_all(float(sys.argv[2]))
    elif sys.argv[1:] == ["--write"]:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(table(), end="")
