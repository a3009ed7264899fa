"""Layers as pure functions of tensors, and the one way to run layers after another."""

from functrain.nn import init
from functrain.nn.attention import attention, causal_mask, fused_causal_attention
from functrain.nn.dropout import dropout
from functrain.nn.functional import Functional, from_module, to_module
from functrain.nn.layers import embedding, gelu, layer_norm, linear, rms_norm
from functrain.nn.stack import stack

__all__ = [
    "Functional", "attention", "causal_mask", "dropout", "embedding", "from_module", "fused_causal_attention", "gelu",
    "init", "layer_norm", "linear", "rms_norm", "stack", "to_module",
]  # fmt: skip
