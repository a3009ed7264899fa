"""Laws that a pure function over trees keeps, as assertions and checks for tests of your own.

`laws` and `strategies` need Hypothesis: `pip install 'functrain[testing]'`.
"""

from importlib import import_module
from types import ModuleType

from functrain.testing.assertions import assert_trees_close, assert_trees_equal, assert_trees_finite
from functrain.testing.counting import assert_max_traces
from functrain.testing.leaks import assert_no_leak
from functrain.testing.under_plan import assert_same_under_plan
from functrain.testing.variation import Variant, variants

__all__ = [
    "Variant", "assert_max_traces", "assert_no_leak", "assert_same_under_plan", "assert_trees_close",
    "assert_trees_equal", "assert_trees_finite", "laws", "strategies", "variants",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> ModuleType:
    # not with the package: the assertions need no Hypothesis
    if name not in ("laws", "strategies"):
        raise AttributeError(f"module 'functrain.testing' has no attribute {name!r}")
    return import_module(f"functrain.testing.{name}")
