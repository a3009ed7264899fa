"""Models as pure functions of their parameters: each module has `Config`, `init` and `apply`."""

from functrain.models import bert, gpt2, llama, modernbert, vit
from functrain.models.flops import training_flops, training_flops_of
from functrain.models.labels import Labels
from functrain.models.names import Names, from_state_dict, to_state_dict
from functrain.tree import elsewhere

__all__ = [
    "Labels",
    "Names",
    "bert",
    "from_state_dict",
    "gpt2",
    "llama",
    "modernbert",
    "to_state_dict",
    "training_flops",
    "training_flops_of",
    "vit",
]

elsewhere.furnish(__name__)
