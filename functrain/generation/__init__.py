"""Text from a language model, token by token, through a cache of keys and values: at once, or as it comes."""

from functrain.generation.decoding import decode_stream
from functrain.generation.generating import Model, generate, stream

__all__ = ["Model", "decode_stream", "generate", "stream"]
