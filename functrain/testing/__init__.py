"""Laws that a pure function over trees keeps, as assertions for tests of your own."""

from functrain.testing.assertions import assert_trees_close, assert_trees_equal, assert_trees_finite
from functrain.testing.counting import assert_max_traces
from functrain.testing.variation import Variant, variants

__all__ = [
    "Variant", "assert_max_traces", "assert_trees_close", "assert_trees_equal", "assert_trees_finite", "variants",
]  # fmt: skip
