"""Trees of tensors: nested dict, list, tuple, NamedTuple and registered dataclasses, every leaf with a stable path.

A path joins keys, indices and field names with "/": `blocks/0/attn/qkv`. Dictionaries are traversed by sorted key,
OrderedDict in its own order, and None is an empty node, as in JAX. Every function here is pure and, unless it reads a
value to the host, traces under `torch.compile(fullgraph=True)`.
"""

from functrain.tree import elsewhere
from functrain.tree.algebra import add, add_scale, allclose, mul, scale, sub, vdot, where
from functrain.tree.casting import cast, cast_like, dtype, full_like, ones_like, to, zeros_like
from functrain.tree.elementwise import batch_shape, clip, conj, div, real
from functrain.tree.fields import get, get_all_with_path, set
from functrain.tree.flattening import flatten, items, leaves, paths, structure, unflatten
from functrain.tree.mapping import check_same_structure, map, map_with_path
from functrain.tree.nodes import Batch, Params, Tree, children
from functrain.tree.reductions import max, min, norm, sum
from functrain.tree.registering import dataclass, register_dataclass
from functrain.tree.selection import Where, combine, mask, partition, select
from functrain.tree.summary import summary
from functrain.tree.surgery import PathError, at, set_at
from functrain.tree.table import bytes, format, size

__all__ = [
    "Batch", "Params", "PathError", "Tree", "Where", "add", "add_scale", "allclose", "at", "batch_shape", "bytes",
    "cast", "cast_like", "check_same_structure", "children", "clip", "combine", "conj", "dataclass", "div", "dtype",
    "flatten", "format", "full_like", "get", "get_all_with_path", "items", "leaves", "map", "map_with_path", "mask",
    "max", "min", "mul", "norm", "ones_like", "partition", "paths", "real", "register_dataclass", "scale", "select",
    "set", "set_at", "size", "structure", "sub", "sum", "summary", "to", "unflatten", "vdot", "where", "zeros_like",
]  # fmt: skip

elsewhere.furnish(__name__)
