"""What `ft.compile` hands to torch's compiler, for tests of how often and of what."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest

from functrain.compiler import compilation


class Program(NamedTuple):
    which: str  # "forward", "backward" or "inference"
    operations: Counter[str]  # as "mm" for aten.mm.default
    results: list[Any]  # tensors without data


def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Return a list that every program is added to which is compiled from here on."""
    from functrain.compiler.inductor import lowering  # here: torch's compiler takes 2 s to load

    programs: list[Program] = []
    lower = lowering.lower

    def seen(module: Any, mode: Any, which: str, **options: Any) -> Any:
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        counts = Counter(str(node.target).removeprefix("aten.").split(".")[0] for node in calls)
        results = [node.meta["val"] for node in module.graph.output_node().args[0] if node is not None]
        programs.append(Program(which, counts, results))
        return lower(module, mode, which, **options)

    monkeypatch.setattr(lowering, "lower", seen)
    return programs


def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ft.compile` cut every function at layers and gradients, as it cuts those of 1 MiB."""
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
