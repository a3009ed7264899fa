"""Every public name of optax has a place here, with optax's arguments and fields; the page that says so is current."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import functrain as ft

ROOT = Path(__file__).parents[2]


def load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load(ROOT / "docs" / "optax_table.py")
ROWS = table.all_rows()

RENAMED = {
    # a tensor's dimension is a dim
    "axis": "dim", "axes": "dims", "per_elt_axis": "per_elt_dim",
    # trees are given by position
    "tree_x": "a", "tree_y": "b", "other_trees": "others",
}  # fmt: skip

# transformations that keep optax's word
KEPT = {"optax.adaptive_grad_clip": "axis", "optax.transforms.unitwise_norm": "axis"}

PRINTS = "prints from inside a compiled program; what it prints is in the state, or follows from the updates"

# arguments of optax's that are not here
LEFT_OUT = {
    "optax.safe_norm": {"ord": "only the Euclidean norm", "axis": "of the whole leaf", "keepdims": "of the whole leaf"},
    "optax.tree.sum": {"associative_reduction": "XLA's time of compiling"},
    "optax.nnls": {"unroll": "XLA's loops"},
    "optax.power_iteration": {"precision": "XLA's; torch.set_float32_matmul_precision is torch's"},
    "optax.contrib.sophia": {"verbose": PRINTS, "print_win_rate_every_n_steps": PRINTS},
    "optax.scale_by_backtracking_linesearch": {"verbose": PRINTS},
    "optax.scale_by_zoom_linesearch": {"verbose": PRINTS},
    "optax.matrix_inverse_pth_root": {"precision": "XLA's; torch.set_float32_matmul_precision is torch's"},
}

# defaults that are not optax's
OTHER_DEFAULTS = {
    ("optax.tree.allclose", "equal_nan"): "trees are compared to see whether they are the same, NaN or not",
}


def shared() -> dict[str, tuple[Any, Any]]:
    """Return (optax's, ours) of every name that both have, once for each object of ours."""
    pairs: dict[int, tuple[str, Any, Any]] = {}
    for module_name, rows in ROWS.items():
        parent, _, last = module_name.rpartition(".")
        module = getattr(importlib.import_module(parent), last) if parent else importlib.import_module(module_name)
        for row in rows:
            if row.home is None:
                continue
            node: Any = ft
            for name in row.home.split("."):
                node = getattr(node, name)
            pairs.setdefault(id(node), (row.name, getattr(module, row.name.rpartition(".")[2]), node))
    return {name: (theirs, mine) for name, theirs, mine in pairs.values()}


SHARED = shared()


def test_no_name_of_optax_is_missing() -> None:
    assert table.missing() == []
    assert sum(map(len, ROWS.values())) > 450  # optax 0.2.8 has 480: the table does not lose its modules


def test_the_page_has_the_table_of_today() -> None:
    old = table.PAGE.read_text().splitlines()
    new = table.page_with_table(table.PAGE.read_text()).splitlines()
    stale = [line for line, now in zip(old, new, strict=True) if line != now]
    assert stale == [], "run `python docs/optax_table.py --write`"


def test_a_missing_name_is_found_and_fails_the_command(monkeypatch, capsys) -> None:
    monkeypatch.delattr(ft.optim, "adamw")
    assert "optax.adamw" in table.missing() and table.main([]) == 1
    printed = capsys.readouterr().out
    assert re.match(r"names covered / names in optax: \d+ / \d+ ", printed) and "\nmissing: optax.adamw\n" in printed
    assert "| `adamw` | **missing** |" in table.table()
    assert table.main(["--wrong"]) == 2


def arguments(fn: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(fn).parameters)


def test_arguments_are_those_of_optax_in_name_order_kind_and_default() -> None:
    checked, wrong = 0, []
    for name, (theirs, mine) in SHARED.items():
        if inspect.isclass(theirs) or not inspect.isfunction(inspect.unwrap(getattr(theirs, "func", theirs))):
            continue
        checked += 1
        given = [p for p in arguments(theirs).values() if p.name not in LEFT_OUT.get(name, {})]
        want = [(p.name if p.name == KEPT.get(name) else RENAMED.get(p.name, p.name), p.kind) for p in given]
        have = [(p.name, p.kind) for p in arguments(mine).values()]
        if have != want:
            wrong.append(f"{name}: optax has {[n for n, _ in want]}, came {[n for n, _ in have]}, or other kinds")
        for p, q in zip(arguments(theirs).values(), arguments(mine).values(), strict=False):
            if RENAMED.get(p.name, p.name) == q.name and not same_default(p.default, q.default):
                if (name, p.name) not in OTHER_DEFAULTS:
                    wrong.append(f"{name}: {p.name} is {p.default!r} in optax, came {q.default!r}")
    assert not wrong, "\n".join(wrong)
    assert checked > 200


def same_default(theirs: Any, mine: Any) -> bool:
    """Tell whether two defaults are one number, or stand for one thing: jnp.float32 for torch.float32, a function."""
    if callable(theirs) or type(theirs).__module__.startswith(("optax", "jax")):
        names = [getattr(x, "__name__", type(x).__name__) for x in (theirs, mine)]
        return names[0] == names[1] or str(mine) == f"torch.{names[0]}"
    return type(theirs) is type(mine) and theirs == mine


def test_fields_of_states_are_those_of_optax_one_for_one() -> None:
    states = {name: pair for name, pair in SHARED.items() if hasattr(pair[0], "_fields")}
    wrong = [f"{n}: {a._fields}, came {b._fields}" for n, (a, b) in states.items() if a._fields != b._fields]
    assert not wrong, "\n".join(wrong)
    assert len(states) > 50 and all(b.__name__ == a.__name__ for a, b in states.values())


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_optaxs_and_not_ours(name: str) -> None:
    theirs, mine = SHARED[name]
    assert set(LEFT_OUT[name]) <= set(arguments(theirs)) and not set(LEFT_OUT[name]) & set(arguments(mine))
