"""Where every public name of optax is here: the table in docs/coming-from-optax.md.

`python docs/optax_table.py` prints how many names are covered, and those that are not; `--write` puts the table in the
page again.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import NamedTuple

import functrain as ft

PAGE = Path(__file__).parent / "coming-from-optax.md"
BEGIN, END = "<!-- table: made by docs/optax_table.py -->", "<!-- end of the table -->"

# where the names of each module of optax are looked for, in this order
HOMES = {
    "optax": ["optim", "schedules", "losses"],
    "optax.contrib": ["optim"],
    "optax.transforms": ["optim"],
    "optax.losses": ["losses"],
    "optax.schedules": ["schedules", "optim"],
    "optax.projections": ["optim.projections"],
    "optax.second_order": ["optim.second_order"],
    "optax.perturbations": ["optim.perturbations"],
    "optax.assignment": ["optim.assignment"],
    "optax.tree": ["tree", "optim"],
    "optax.tree_utils": ["tree", "optim"],
    "optax.microbatching": ["optim.microbatching"],
    "optax.experimental.aggregating": ["optim.aggregating"],
}

# what has another name here, and why
RENAMED = {
    "optax.Params": ("tree.Params", ""),
    "optax.safe_int32_increment": ("optim.safe_increment", "optax's older name"),
    "optax.tree.map_params": ("optim.tree_map_params", ""),
    "optax.tree_utils.tree_map_params": ("optim.tree_map_params", ""),
}

# what is not here, and what one writes instead
INSTEAD = {
    "optax.tree.unwrap_random_key_data": "not needed: a key is a tensor of its two words",
    "optax.tree_utils.tree_unwrap_random_key_data": "not needed: a key is a tensor of its two words",
    "optax.tree_utils.NamedTupleKey": "paths are strings; `get_all_with_path(state, 'ScaleByAdamState')` finds a state",
}


class Row(NamedTuple):
    name: str  # optax.contrib.muon
    home: str | None  # optim.muon
    note: str

    @property
    def covered(self) -> bool:
        return self.home is not None or bool(self.note)


def public(module: types.ModuleType) -> list[str]:
    """Return the names that a module of optax gives to its users."""
    aggregating = module.__name__.endswith("_aggregating")

    def of_its_own(value: object) -> bool:
        # the one module without a front desk: what it imports is not its own
        return not aggregating or getattr(value, "__module__", "") == module.__name__

    found = [name for name in dir(module) if not name.startswith("_") and name not in ("annotations", "functools")]
    return [n for n in found if not isinstance(v := getattr(module, n), types.ModuleType) and of_its_own(v)]


def rows(module_name: str) -> list[Row]:
    """Return a row for each public name of a module."""
    parent, _, last = module_name.rpartition(".")
    module = getattr(importlib.import_module(parent), last) if parent else importlib.import_module(module_name)
    made = []
    for name in public(module):
        full = f"{module_name}.{name}"
        if full in INSTEAD:
            made.append(Row(full, None, INSTEAD[full]))
            continue
        short = name.removeprefix("tree_") if module_name == "optax.tree_utils" else name
        target, note = RENAMED.get(full, (None, ""))
        places = [target] if target else [f"{home}.{short}" for home in HOMES[module_name]]
        made.append(Row(full, next((place for place in places if there(place)), None), note))
    return made


def there(place: str) -> bool:
    """Tell whether `ft.place` exists."""
    node: object = ft
    for name in place.split("."):
        node = getattr(node, name, None)
    return node is not None


def all_rows() -> dict[str, list[Row]]:
    """Return the rows of every public module of optax."""
    return {module: rows(module) for module in HOMES}


def table() -> str:
    """Return the table as Markdown, a section for each module."""
    lines = []
    for module, found in all_rows().items():
        lines += [f"### {module}", "", f"| {module} | functrain |", "|---|---|"]
        for row in found:
            here = f"`ft.{row.home}`" if row.home else ""
            note = f"{here}; {row.note}" if here and row.note else here or row.note or "**missing**"
            lines.append(f"| `{row.name.removeprefix(module + '.')}` | {note} |")
        lines.append("")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """Return the page with a new table between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def missing() -> list[str]:
    """Return the names that have no place here and no reason."""
    return [row.name for found in all_rows().values() for row in found if not row.covered]


def main(arguments: list[str]) -> int:
    """Print the coverage; with --write, write the table into the page. Return 1 when a name is missing."""
    if arguments not in ([], ["--write"]):
        print("usage: python docs/optax_table.py [--write]", file=sys.stderr)
        return 2
    if arguments == ["--write"]:
        PAGE.write_text(page_with_table(PAGE.read_text()))
    counted = [row for found in all_rows().values() for row in found]
    lacking = missing()
    placed = sum(row.home is not None for row in counted)
    print(
        f"names covered / names in optax: {len(counted) - len(lacking)} / {len(counted)}"
        f" ({placed} in functrain, {len(counted) - len(lacking) - placed} with what to write instead)"
    )
    for name in lacking:
        print(f"missing: {name}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
