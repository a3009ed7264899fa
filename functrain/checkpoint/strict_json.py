"""JSON with one meaning: UTF-8, every key once, no NaN or inf, no depth that overflows a stack."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from functrain.checkpoint.errors import CheckpointError

Refuse = Callable[[str, str, str | None], CheckpointError]  # (expected, came, key) -> the error to raise


def loads(text: bytes, refuse: Refuse) -> dict[str, Any]:
    """Parse a JSON object; raise what `refuse` returns for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise refuse("every JSON key once", "a key twice", Counter(name for name, _ in pairs).most_common(1)[0][0])
        return table

    def constant(name: str) -> NoReturn:
        raise refuse("JSON numbers", name, None)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise refuse("JSON numbers", digits[:40], None)  # Python would make it inf
        return value

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_float=number)
    except CheckpointError:
        raise
    except RecursionError:
        raise refuse("a JSON object", "JSON nested too deeply", None) from None
    except MemoryError:
        raise refuse("a JSON object", "more JSON than memory holds", None) from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise refuse("a JSON object in UTF-8", str(error), None) from None
    if not isinstance(table, dict):
        raise refuse("a JSON object", type(table).__name__, None)
    return table


def is_text(value: str) -> bool:
    """Tell whether a string can be written as UTF-8; JSON escapes can spell lone surrogates, which cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def dumps(table: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Return the JSON text that `loads` reads back as the same values, floats to the last bit."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(table, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    return text.encode("utf-8")
