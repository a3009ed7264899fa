"""Text from a language model, token by token, through a cache of keys and values: at once, or as it comes."""

from functrain.generation.decoding import decode_stream
from functrain.generation.generating import Model, generate, stream
from functrain.tree import elsewhere

__all__ = ["Model", "decode_stream", "generate", "stream"]

elsewhere.furnish(__name__)
