"""One step on many ranks: a mesh, a plan of what is split over it, and collectives that differentiate, map and compile.

See docs/sharding.md.
"""

from functrain.sharding.collectives import exchange, gather, index, scatter, shift, sum
from functrain.sharding.mapping import shard_map
from functrain.sharding.mesh import Mesh
from functrain.sharding.placement import P, largest, parts
from functrain.sharding.plan import Plan
from functrain.sharding.using import use
from functrain.tree import elsewhere

__all__ = [
    "Mesh", "P", "Plan", "exchange", "gather", "index", "largest", "parts", "scatter", "shard_map", "shift", "sum",
    "use",
]  # fmt: skip

elsewhere.furnish(__name__)
